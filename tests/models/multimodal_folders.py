"""Small folders of multimodal checkpoints, as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from tools.model_types.multimodal_zoo import tiny_multimodal
from tools.model_types.zoo import quiet, randomize
from transformers import (
    AutoModel,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from radix_mlp.hf.media import placeholders_of
from radix_mlp.models.tiny import tiny_tokenizer

CLASSES = {
    "causal": AutoModelForMultimodalLM,
    "trunk": AutoModel,
    "classifier": AutoModelForSequenceClassification,
}
MARKS = {"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
CHAT = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<boi>{% endif %}{% endfor %}{% endfor %}"
)
FIRST_PLACEHOLDER = 259


def model_of(model_type: str, kind: str = "causal", *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model for the tokens of `tokenizer_of`, its weights large."""
    config = tiny_multimodal(model_type).config
    names = [*dict.fromkeys(placeholders_of(config).values())]
    for place, name in enumerate(names):
        setattr(config, name, FIRST_PLACEHOLDER + place)
    config.get_text_config().vocab_size = 272
    with quiet():
        model = CLASSES[kind].from_config(config, dtype=dtype, experts_implementation="eager")
    randomize(model, 0)
    return model.to(dtype).eval()


def tokenizer_of() -> PreTrainedTokenizerBase:
    """A token a byte, and one for an image."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*MARKS.values()]})
    tokenizer._set_model_specific_special_tokens(MARKS)
    tokenizer.chat_template = CHAT
    return tokenizer


def multimodal_folder(path: Path, model_type: str, kind: str = "causal") -> str:
    """Save the model, its tokenizer, and for gemma3 a whole processor."""
    model = model_of(model_type, kind)
    model.save_pretrained(path)
    tokenizer = tokenizer_of()
    tokenizer.save_pretrained(path)
    if model_type == "gemma3":
        pixels = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
        Gemma3Processor(pixels, tokenizer, chat_template=CHAT, image_seq_length=4).save_pretrained(path)
    return str(path)
