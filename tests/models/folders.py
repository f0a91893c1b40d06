"""Small folders of every kind, as transformers saves them, with weights large enough to move the answers."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from radix_mlp.models.tiny import tiny_tokenizer

CLASSES = {
    "trunk": AutoModel,
    "causal": AutoModelForCausalLM,
    "classifier": AutoModelForSequenceClassification,
}


def small_model(kind="trunk", model_type="qwen3", **options):
    sizes = {
        "vocab_size": 263,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        # a wrong mask or weight shows
        "initializer_range": 0.3,
        "pad_token_id": 256,
        "bos_token_id": 257,
        "eos_token_id": 258,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLASSES[kind].from_config(AutoConfig.for_model(model_type, **{**sizes, **options})).eval()


def tokenizer_that_writes(single):
    """The byte tokenizer with a post-processor such as `<|bos|> $A`."""
    tokenizer = tiny_tokenizer()
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|bos|>", "<|eos|>") if token in single]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    return tokenizer


def write(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def edit(path, **changes):
    """Change keys of a JSON file; None takes a key out."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def rewrite(source, target, change, **config):
    """A copy of a folder with `change(weights)`, which may return others, and keys of config.json."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    weights = change(weights) or weights
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    edit(target / "config.json", **config)
    return target
