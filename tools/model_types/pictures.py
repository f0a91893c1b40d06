"""Prompts about pictures for the tiny multimodal models, and what folding them changes: nothing, or it is an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf import disable, enable, last_call
from radix_mlp.hf.mixers.discovery import mixers_of
from radix_mlp.hf.pictures.picture_types import PICTURE_TYPES
from radix_mlp.hf.pictures.read import image_token_of
from radix_mlp.hf.spans import span_rule_of
from radix_mlp.hf.support import decoder_of
from tools.model_types.multimodal_zoo import tiny_multimodal
from tools.model_types.sweep import MAX_ERROR, Verdict
from tools.model_types.wide import wide
from tools.model_types.zoo import TOKEN_RANGE

__all__ = [
    "Picture",
    "Prompt",
    "batch_of",
    "examine_pictures",
    "picture_error",
    "picture_gradient_error",
    "sample_pictures",
    "sample_prompts",
    "tiny_with_pictures",
]


@dataclass(frozen=True)
class Picture:
    """A picture as a processor would hand it over."""

    pixels: Tensor
    """`[r, ...]` its rows of `pixel_values`."""
    size: tuple[Any, ...]
    """Its row of `image_grid_thw`, `image_sizes` or `image_position_ids`; empty if the class takes none of them."""
    tokens: tuple[int, ...]
    """Placeholders, and what the processor puts between them."""


Prompt = Sequence["Picture | Sequence[int]"]
"""Pictures and token ids, in order."""


def tiny_with_pictures(model_type: str) -> PreTrainedModel:
    """A tiny model of a type in `PICTURE_TYPES`, in which tokens of a picture see one another if they ever do."""
    model = tiny_multimodal(model_type)
    rule = span_rule_of(decoder_of(model))
    if rule is not None and rule.if_vision:
        model.config.get_text_config().use_bidirectional_attention = "vision"
    return model


def sample_pictures(model: PreTrainedModel, *, seed: int = 0) -> list[Picture]:
    """Three pictures, two of one size where a class takes several; the fourth differs from the first in one pixel."""
    trunk: Any = decoder_of(model)
    config = trunk.config
    draw = torch.Generator().manual_seed(seed)
    kind, token = PICTURE_TYPES[config.model_type], image_token_of(trunk)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(model.dtype)

    vision = config.vision_config
    if kind.sizes == "image_grid_thw":
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        grids = [(1, 4, 4), (1, 4, 6), (1, 4, 4)]
        merged = vision.spatial_merge_size**2
        # marks stand around it
        first, last = (TOKEN_RANGE[0],), (TOKEN_RANGE[0] + 1,)
        found = [
            Picture(noise(h * w, width), (t, h, w), first + (token,) * (h * w // merged) + last) for t, h, w in grids
        ]
    elif kind.sizes == "image_position_ids":
        kernel = getattr(vision, "pooling_kernel_size", 1)
        patches, width = (2 * kernel) ** 2, 3 * vision.patch_size**2
        found = []
        for high in (2 * kernel, kernel, 2 * kernel):
            places = [(x, y) for y in range(high) for x in range(2 * kernel)]
            padding = [(-1, -1)] * (patches - len(places))
            marked = (TOKEN_RANGE[0], *[token] * (len(places) // kernel**2), TOKEN_RANGE[0] + 1)
            found.append(Picture(noise(1, patches, width), (*places, *padding), marked))
    elif kind.sizes == "image_sizes":
        side = vision.patch_size * config.spatial_merge_size
        found = []
        for high, wide_ in [(2, 2), (2, 3), (2, 2)]:
            pixels = torch.zeros(1, 3, 2 * side, 3 * side, dtype=model.dtype)
            pixels[..., : wide_ * side] = noise(1, 3, 2 * side, wide_ * side)
            # a mark ends every line
            line = (token,) * wide_ + (TOKEN_RANGE[0],)
            found.append(Picture(pixels, (high * side, wide_ * side), line * high))
    else:
        side = vision.image_size
        high, wide_ = side if isinstance(side, (list, tuple)) else (side, side)
        drawn = [noise(1, 3, high, wide_) for _ in range(3)]
        with torch.no_grad():
            rows = trunk.get_image_features(drawn[0], return_dict=True).pooler_output
        count = rows.shape[-2] if isinstance(rows, Tensor) else len(rows[0])
        found = [Picture(pixels, (), (token,) * count) for pixels in drawn]
    changed = found[0].pixels.clone()
    changed.view(-1)[len(changed.view(-1)) // 3] += 0.5
    return [*found, Picture(changed, found[0].size, found[0].tokens)]


def sample_prompts(pictures: Sequence[Picture], *, seed: int = 0) -> list[Prompt]:
    """Prompts that share pictures, and such as must not: another one, another place, another word before it."""
    rng = np.random.default_rng(seed)

    def text(count: int) -> list[int]:
        return [int(token) for token in rng.integers(*TOKEN_RANGE, count)]

    head, other_head, question, other = text(5), text(5), text(4), text(6)
    a, b, c, changed = pictures
    return [
        [head, a, question],
        [head, a, question, other],
        [head, a, other],
        [head, a],
        # another picture of one size, of another size, one with one pixel changed
        [head, c, question],
        [head, b, question],
        [head, changed, question],
        # one token changed before it, and another place
        [other_head, a, question],
        [head[:3], a, question],
        [a, other],
        # two pictures, the second shared or not; twice the same
        [head, a, question, b, other],
        [head, a, question, b, question],
        [head, a, question, c, other],
        [head, a, a, question],
        # side by side
        [head, a, b, question],
        [head, question],
        [head, question, other],
    ]


def batch_of(model: PreTrainedModel, prompts: Sequence[Prompt], side: str = "left") -> dict[str, Any]:
    """The arguments of the class's forward for these prompts, padded at one side; one prompt is not padded."""
    trunk = decoder_of(model)
    kind, token = PICTURE_TYPES[trunk.config.model_type], image_token_of(trunk)
    shown = [part for prompt in prompts for part in prompt if isinstance(part, Picture)]
    rows = [[t for part in prompt for t in (part.tokens if isinstance(part, Picture) else part)] for prompt in prompts]
    length = max(map(len, rows))
    ids, mask = torch.ones(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for place, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[place, columns] = torch.tensor(row)
        mask[place, columns] = 1
    found: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    rule = span_rule_of(trunk)
    if rule is not None or kind.sizes == "image_grid_thw":
        found["mm_token_type_ids" if rule is None else rule.argument] = (ids == token).long()
    if shown:
        found["pixel_values"] = torch.cat([picture.pixels for picture in shown])
        if kind.sizes:
            found[kind.sizes] = torch.tensor([picture.size for picture in shown])
    return found


def picture_error(model: PreTrainedModel, prompts: Sequence[Prompt], side: str = "left") -> float:
    """Largest difference of logits, folded and one prompt at a time through the unmodified model, over the largest."""
    with torch.no_grad():
        expected = _alone(disable(model), prompts)
        found = _folded(model, prompts, side)
    return _relative(found, expected)


def picture_gradient_error(model: PreTrainedModel, prompts: Sequence[Prompt]) -> float:
    """Largest difference of any parameter's gradient, over the largest; the part that reads pictures is among them."""

    def gradients(logits: list[Tensor]) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        loss = sum(
            (torch.randn(len(x), 1, generator=draw, dtype=torch.float64).to(x.dtype) * x.sin()).sum() for x in logits
        )
        loss.backward()  # type: ignore[union-attr]
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    with wide(model) if mixers_of(model) else nullcontext():
        expected = gradients(_alone(disable(model), prompts))
        found = gradients(_folded(model, prompts, "right"))
    text = {id(p) for p in decoder_of(model).get_decoder().parameters()}
    assert any(id(p) not in text and name in found for name, p in model.named_parameters() if "head" not in name)
    assert found.keys() == expected.keys()
    scale = max(g.abs().max().item() for g in expected.values())
    return max((found[name] - expected[name]).abs().max().item() for name in expected) / scale


def examine_pictures(
    model_type: str, build: Callable[[str], PreTrainedModel] = tiny_with_pictures
) -> tuple[Verdict, PreTrainedModel]:
    """Fold prompts about pictures through a tiny model of a type in `PICTURE_TYPES` and compare.

    Raises:
        AssertionError: they differ, or were not folded.
        NotImplementedError: the type cannot be built here.
    """
    model = build(model_type)
    prompts = sample_prompts(sample_pictures(model))
    try:
        disable(enable(model))
    except UnsupportedModelError as refusal:
        return Verdict(model_type, "refused", str(refusal), model.config.model_type), model
    with wide(model) if mixers_of(model) else nullcontext():
        error = max(picture_error(model, prompts, side) for side in ("left", "right"))
    assert error < MAX_ERROR, f"{model_type} is not exact with images: relative error {error:.2e}"
    return Verdict(model_type, "exact", config_type=model.config.model_type, error=error), model


def _alone(model: PreTrainedModel, prompts: Sequence[Prompt]) -> list[Tensor]:
    return [model(**batch_of(model, [prompt]), use_cache=False).logits[0] for prompt in prompts]


def _folded(model: PreTrainedModel, prompts: Sequence[Prompt], side: str) -> list[Tensor]:
    batch = batch_of(model, prompts, side)
    enable(model, threshold=1.0)
    try:
        logits = model(**batch).logits
        report = last_call(model)
        assert report is not None
        assert report.folded, report.reason
    finally:
        disable(model)
    return [logits[row][batch["attention_mask"][row].bool()] for row in range(len(prompts))]


def _relative(found: list[Tensor], expected: list[Tensor]) -> float:
    difference = max((f - e).abs().max().item() for f, e in zip(found, expected, strict=True))
    return difference / max(e.abs().max().item() for e in expected)
