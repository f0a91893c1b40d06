"""The output heads of models as functions of hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.engine.batching.scheduler import Ids
from radix_mlp.engine.execution.step import hidden_of_one
from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf.folding_forward import FoldingForward
from radix_mlp.ops.head.linear_head import is_plain_linear

__all__ = ["classification_head", "output_head", "pad_token_of", "require_output_head"]

PROBE_TOKENS = 8
Compared = tuple[Tensor, Tensor, Tensor]
"""A head's logits, the model's own, and all of the model's own, which tell how large they are."""
NUM_PROBES = 3
"""Runs of tokens, besides those of the first text, that a head may be tried on until one can decide."""


def output_head(
    model: PreTrainedModel, probe: Ids, tokens: Sequence[int] | None = None, *, checked: set[Any] | None = None
) -> Callable[[Tensor], Tensor]:
    """Hidden states `[R, h]` -> logits `[R, V]`, as the model's own forward makes them.

    With `tokens`, the logits of these alone, `[R, len(tokens)]`, from as many rows of the head and in float32 or
    wider: the difference of two logits in bfloat16 has three digits at best. A head that is more than a linear layer
    (an adapter, a quantized one) is called, and its logits of these tokens taken.

    Architectures scale or cap their logits in different ways, so the function is compared with the model's own logits
    of a few tokens before it is used, unless it is in `checked`, where it is then entered.

    Args:
        probe: tokens of a text, to compare on where no others can decide.

    Raises:
        UnsupportedModelError: the model has no output head, or one that does something else besides.
    """
    require_output_head(model)
    layer: Any = model.get_output_embeddings()
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    factor = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0

    project = layer if tokens is None else _rows(layer, tokens)

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = project(hidden) * factor / divisor
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    key = _key(model, layer, tokens)
    if checked is None or key not in checked:

        def logits_of(begin: Ids) -> Compared:
            own = _own_logits(model, begin)[0]
            return head(hidden_of_one(model, begin)), own if tokens is None else own[:, list(tokens)], own

        if _agrees(model, probe, logits_of) and checked is not None:
            checked.add(key)
    return head


def require_output_head(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` if the model has no logits over a vocabulary."""
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head, so it cannot score tokens. Load the checkpoint's "
            "ForCausalLM class."
        )


def classification_head(
    model: PreTrainedModel, probe: Ids, *, checked: set[Any] | None = None
) -> Callable[[Tensor], Tensor]:
    """Hidden states `[R, h]` -> scores `[R, L]` of a `ForSequenceClassification` model, in float32 or wider.

    Compared with the model's own scores of a few tokens before it is used, unless it is in `checked`; `probe` as in
    `output_head`.

    Raises:
        UnsupportedModelError: the model's scores are not its `score` layer on the last token.
    """
    layer = getattr(model, "score", None)
    if not isinstance(layer, torch.nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layer `score`, so it makes its scores in a way that is not known "
            "here. Call it through radix_mlp.enable(model) and its own forward."
        )
    head = _rows(layer, None)
    key = _key(model, layer, None)
    if checked is None or key not in checked:

        def scores_of(begin: Ids) -> Compared:
            # the model reads its scores at the last token that is not padding
            ends = np.flatnonzero(begin != pad_token_of(model))
            last = int(ends[-1]) if len(ends) else 0
            own = _own_logits(model, begin)
            return head(hidden_of_one(model, begin)[last : last + 1]), own, own

        if _agrees(model, probe, scores_of) and checked is not None:
            checked.add(key)
    return head


def pad_token_of(model: PreTrainedModel) -> int:
    """The id that a classifier takes for padding, wherever it stands; -1 if there is none."""
    pad = model.config.get_text_config().pad_token_id
    return -1 if pad is None else int(pad)


def _key(model: PreTrainedModel, layer: torch.nn.Module, tokens: Sequence[int] | None) -> tuple[Any, ...]:
    config = model.config.get_text_config()
    form = [getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")]
    # what is called is what the model calls, whatever becomes of it; of a linear layer the weight is taken out
    address = layer.weight.data_ptr() if is_plain_linear(layer) else None
    return type(model), _own_forward(model), id(layer), address, *form, None if tokens is None else tuple(tokens)


def _own_forward(model: PreTrainedModel) -> Callable[..., Any] | None:
    """The forward that somebody put into this instance, if any: it may do something to the logits."""
    forward: Callable[..., Any] | None = vars(model).get("forward")
    while isinstance(forward, FoldingForward):
        forward = forward.previous
    return forward


def _rows(layer: torch.nn.Module, rows: Sequence[int] | None) -> Callable[[Tensor], Tensor]:
    """The outputs `rows` of a head, all unless given, in float32 or wider."""
    if not is_plain_linear(layer):
        return lambda hidden: _widened(_chosen(layer(hidden), rows, dim=1))
    weight = _widened(_chosen(layer.weight.detach(), rows, dim=0))
    bias = None if layer.bias is None else _widened(_chosen(layer.bias.detach(), rows, dim=0))
    return lambda hidden: torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)


def _chosen(whole: Tensor, places: Sequence[int] | None, dim: int) -> Tensor:
    size = whole.shape[dim]
    if places is None or (len(places) == size and list(places) == list(range(size))):
        return whole
    # slices, since sending an index to the device would wait for the forward pass that runs there
    return torch.cat([whole.narrow(dim, place, 1) for place in places], dim)


def _widened(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _own_logits(model: PreTrainedModel, begin: Ids) -> Tensor:
    input_ids = torch.from_numpy(begin.astype("int64"))[None].to(model.device)
    logits: Tensor = model(input_ids, use_cache=False).logits
    return logits


def _agrees(model: PreTrainedModel, probe: Ids, compared: Callable[[Ids], Compared]) -> bool:
    """Whether a head gives the model's own logits; False where no tokens can decide: then every answer shows why.

    Raises:
        UnsupportedModelError: it gives others.
    """
    with torch.inference_mode():
        for begin in _probes(model, probe):
            off = _difference(*compared(begin))
            if off is None:
                continue
            if not off < (1e-4 if model.dtype.itemsize >= 4 else 3e-2):
                raise UnsupportedModelError(
                    f"{type(model).__name__} makes its logits in a way that is not known here (off by {off:.1g} of the "
                    "largest). Score it through radix_mlp.enable(model) and the model's own forward."
                )
            return True
    return False


def _difference(ours: Tensor, own: Tensor, all_own: Tensor) -> float | None:
    """Largest difference, relative to the largest logit; None where the model's own are NaN, or all of both are 0."""
    if all_own.isnan().any():
        return None
    # what overflows in the model's dtype does so here
    same = ours.to(own.dtype) == own
    difference = float((ours - own).abs().masked_fill(same, 0).max())
    largest = float(all_own.masked_fill(all_own.isinf(), 0).abs().max())
    if largest == 0:
        return None if difference == 0 else math.inf
    return difference / largest


def _probes(model: PreTrainedModel, probe: Ids) -> Iterator[Ids]:
    """Tokens to try a head on, the same for every job; last, the first ones of a text."""
    embeddings: Any = model.get_input_embeddings()
    draw = np.random.default_rng(0)
    for _ in range(NUM_PROBES):
        ids = draw.integers(0, embeddings.weight.shape[0], PROBE_TOKENS, dtype=np.int32)
        ids = ids[ids != pad_token_of(model)]
        if len(ids):
            yield ids
    yield probe[:PROBE_TOKENS]
