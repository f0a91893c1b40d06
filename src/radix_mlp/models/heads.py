"""The output heads of models as functions of hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.engine.batching.scheduler import Ids
from radix_mlp.engine.execution.step import hidden_of_one
from radix_mlp.errors import UnsupportedModelError
from radix_mlp.ops.head.linear_head import is_plain_linear

__all__ = ["classification_head", "output_head", "pad_token_of", "require_output_head"]

PROBE_TOKENS = 8


def output_head(
    model: PreTrainedModel, probe: Ids, tokens: Sequence[int] | None = None, *, checked: set[Any] | None = None
) -> Callable[[Tensor], Tensor]:
    """Hidden states `[R, h]` -> logits `[R, V]`, as the model's own forward makes them.

    With `tokens`, the logits of these alone, `[R, len(tokens)]`, from as many rows of the head and in float32 or
    wider: the difference of two logits in bfloat16 has three digits at best. A head that is more than a linear layer
    (an adapter, a quantized one) is called, and its logits of these tokens taken.

    Architectures scale or cap their logits in different ways, so the function is held to the model's own logits
    on the first tokens of `probe` before it is used, unless it is in `checked`, where it is then entered.

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
        with torch.inference_mode():
            ours, own = head(hidden_of_one(model, probe[:PROBE_TOKENS])), _own_logits(model, probe)[0]
            _check(model, ours, own if tokens is None else own[:, list(tokens)], scale=own)
        if checked is not None:
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

    Held to the model's own scores of the first tokens of `probe` before it is used, unless it is in `checked`.

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
        with torch.inference_mode():
            # the model reads its scores at the last token that is not padding
            begin = probe[:PROBE_TOKENS]
            ends = torch.arange(len(begin))[torch.from_numpy(begin != pad_token_of(model))]
            last = int(ends[-1]) if len(ends) else 0
            own = _own_logits(model, probe)
            _check(model, head(hidden_of_one(model, begin)[last : last + 1]), own, scale=own)
        if checked is not None:
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
    return type(model), id(layer), address, *form, None if tokens is None else tuple(tokens)


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


def _own_logits(model: PreTrainedModel, probe: Ids) -> Tensor:
    input_ids = torch.from_numpy(probe[:PROBE_TOKENS].astype("int64"))[None].to(model.device)
    logits: Tensor = model(input_ids, use_cache=False).logits
    return logits


def _check(model: PreTrainedModel, ours: Tensor, own: Tensor, scale: Tensor) -> None:
    off = float((ours.float() - own.float()).abs().max() / scale.float().abs().max())
    if not off < (1e-4 if model.dtype.itemsize >= 4 else 3e-2):
        raise UnsupportedModelError(
            f"{type(model).__name__} makes its logits in a way that is not known here (off by {off:.1g} of the "
            "largest). Score it through radix_mlp.enable(model) and the model's own forward."
        )
