"""The output heads of models as functions of hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.engine.scheduler import Ids
from radix_mlp.engine.step import hidden_of_one
from radix_mlp.errors import UnsupportedModelError

__all__ = ["classification_head", "output_head", "pad_token_of", "require_output_head"]

PROBE_TOKENS = 8


def output_head(
    model: PreTrainedModel, probe: Ids, tokens: Sequence[int] | None = None, *, checked: set[Any] | None = None
) -> Callable[[Tensor], Tensor]:
    """Hidden states `[R, h]` -> logits `[R, V]`, as the model's own forward makes them.

    With `tokens`, the logits of these alone, `[R, len(tokens)]`, from as many rows of the head and in float32 or
    wider: the difference of two logits in bfloat16 has three digits at best.

    Architectures scale or cap their logits in different ways, so the function is held to the model's own logits
    on the first tokens of `probe` before it is used, unless it is in `checked`, where it is then entered.

    Raises:
        UnsupportedModelError: the model has no output head, or one that does something else besides.
    """
    require_output_head(model)
    linear = model.get_output_embeddings()
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    factor = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0

    project = linear if tokens is None else _rows(linear, tokens)

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = project(hidden) * factor / divisor
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    if _is_new(model, linear, checked, tokens):
        with torch.inference_mode():
            ours, own = head(hidden_of_one(model, probe[:PROBE_TOKENS])), _own_logits(model, probe)[0]
            _check(model, ours, own if tokens is None else own[:, list(tokens)], scale=own)
        _enter(model, linear, checked, tokens)
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
    linear = getattr(model, "score", None)
    if not isinstance(linear, torch.nn.Linear):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear layer `score`, so it makes its scores in a way that is not known "
            "here. Call it through radix_mlp.enable(model) and its own forward."
        )
    head = _rows(linear, range(linear.out_features))
    if _is_new(model, linear, checked, None):
        with torch.inference_mode():
            # the model reads its scores at the last token that is not padding
            begin = probe[:PROBE_TOKENS]
            ends = torch.arange(len(begin))[torch.from_numpy(begin != pad_token_of(model))]
            last = int(ends[-1]) if len(ends) else 0
            own = _own_logits(model, probe)
            _check(model, head(hidden_of_one(model, begin)[last : last + 1]), own, scale=own)
        _enter(model, linear, checked, None)
    return head


def pad_token_of(model: PreTrainedModel) -> int:
    """The id that a classifier takes for padding, wherever it stands; -1 if there is none."""
    pad = model.config.get_text_config().pad_token_id
    return -1 if pad is None else int(pad)


def _key(model: PreTrainedModel, linear: Any, tokens: Sequence[int] | None) -> tuple[Any, ...]:
    config = model.config.get_text_config()
    form = [getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")]
    weight: Tensor = linear.weight
    return type(model), id(linear), weight.data_ptr(), *form, None if tokens is None else tuple(tokens)


def _is_new(model: PreTrainedModel, linear: Any, checked: set[Any] | None, tokens: Sequence[int] | None) -> bool:
    # what an adapter or a hook adds changes with training, and its layer stays the same
    is_plain = type(linear) is torch.nn.Linear and not (linear._forward_hooks or linear._forward_pre_hooks)
    return checked is None or not is_plain or _key(model, linear, tokens) not in checked


def _enter(model: PreTrainedModel, linear: Any, checked: set[Any] | None, tokens: Sequence[int] | None) -> None:
    if checked is not None:
        checked.add(_key(model, linear, tokens))


def _rows(linear: torch.nn.Module, rows: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """The outputs `rows` of a linear layer, computed in float32 or wider."""
    whole: Tensor = linear.get_parameter("weight").detach()
    # slices, since sending an index to the device would wait for the forward pass that runs there
    is_whole = len(rows) == len(whole) and list(rows) == list(range(len(whole)))
    weight = whole if is_whole else torch.cat([whole[row : row + 1] for row in rows])
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight = weight.to(wide)
    bias: Any = getattr(linear, "bias", None)
    bias = None if bias is None else torch.stack([bias.detach()[row] for row in rows]).to(wide)
    return lambda hidden: torch.nn.functional.linear(hidden.to(wide), weight, bias)


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
