"""A tiny Qwen3-VL with its own processor, and images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from tools.model_types.zoo import quiet, randomize
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from radix_mlp.models.tiny import _tokenizer

__all__ = ["TEMPLATE", "image_of", "tiny_qwen3_vl", "tiny_qwen3_vl_processor"]

MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class _Processor(Qwen3VLProcessor):
    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Nothing: without torchvision, transformers lacks the class to check videos by."""
        return type(argument)


def image_of(seed: int, size: tuple[int, int] = (80, 64)) -> Image.Image:
    """Noise in colour."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8))


def tiny_qwen3_vl_processor() -> Any:
    """One token a byte, squares of 32 pixels a token of an image."""
    tokenizer = _tokenizer(MARKS, ("yes", "no"))
    images = Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, temporal_patch_size=2, min_pixels=32 * 32, max_pixels=64 * 32 * 32
    )
    return _Processor(images, tokenizer, chat_template=TEMPLATE)


def tiny_qwen3_vl(processor: Any, *, seed: int = 0) -> Any:
    """Large weights, float64."""
    tokenizer = processor.tokenizer
    marks = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        }.items()
    }
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 96,
            "vocab_size": len(tokenizer) + 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 4,
            "intermediate_size": 96,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **marks,
    )
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config).to(torch.float64)
        with torch.no_grad():
            randomize(model, seed)
    return model.eval()
