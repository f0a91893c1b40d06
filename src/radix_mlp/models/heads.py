"""The output heads of models as functions of hidden states, compared with the models' own logits before use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf.adapters import pretrained_of
from radix_mlp.hf.names_in_forward import names_in_forward
from radix_mlp.models.head_check import check_head, hidden_of_probe, pad_token_of
from radix_mlp.ops.head.linear_head import LinearHead, is_plain_linear

__all__ = [
    "Head",
    "classification_head",
    "language_head",
    "require_language_head",
    "scale_and_softcap",
    "widened_head",
]

Head = Callable[[Tensor], Tensor]
"""Hidden states `[R, h]` -> logits `[R, V]`."""


def language_head(
    model: torch.nn.Module,
    tokens: Sequence[int] | None = None,
    *,
    probe: NDArray[np.int32] | None = None,
    check: bool = True,
) -> LinearHead | Head:
    """The function from last hidden states `[R, h]` to logits `[R, V]`, with the model's own scale and soft cap.

    It is a `LinearHead` if the head is a plain linear layer. Otherwise (adapters on the head, sharded or quantised
    heads) it calls the layer. Architectures scale and cap their logits in different ways, so the function is compared
    with the model's own logits of a few tokens before it is first used, and again after the head has changed.

    Args:
        model: with a language-model head; a PEFT model around one, too.
        tokens: compute the logits of these alone, `[R, len(tokens)]`, in float32 or wider: the difference of two
            logits in bfloat16 has three digits at best.
        probe: `[n]` token ids to compare on if random ones cannot decide (NaN logits, or all zero).
        check: False where the comparison cannot run: within a forward pass, on sharded weights.

    Raises:
        UnsupportedModelError: the model has no language-model head, or one that computes something else.
        InvalidDtypeError: `model` is not a transformers model.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_model
        >>> language_head(tiny_model()).weight.shape
        torch.Size([259, 64])
        >>> language_head(tiny_model(), [5, 7])(torch.zeros(1, 64))
        tensor([[0., 0.]], grad_fn=<MmBackward0>)
    """
    inner = pretrained_of(model)
    require_language_head(inner)
    layer: Any = inner.get_output_embeddings()
    form = scale_and_softcap(inner)
    head = LinearHead(layer.weight, layer.bias, *form) if is_plain_linear(layer) else _called(layer, *form)
    if check:
        check_head(inner, layer, form, probe, lambda begin: head(hidden_of_probe(inner, begin)[0]))
    return head if tokens is None else _narrowed(head, tokens)


def require_language_head(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` if the model has no logits over a vocabulary."""
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head, so it cannot score tokens. Load the checkpoint's "
            "ForCausalLM class."
        )


def classification_head(model: torch.nn.Module, *, probe: NDArray[np.int32] | None = None, check: bool = True) -> Head:
    """Hidden states `[R, h]` -> scores `[R, L]` of a `ForSequenceClassification` model, in float32 or wider.

    Arguments as in `language_head`.

    Raises:
        UnsupportedModelError: the model's scores are not its `score` layer on the last token.
    """
    inner = pretrained_of(model)
    layer = getattr(inner, "score", None)
    if not isinstance(layer, torch.nn.Module):
        raise UnsupportedModelError(
            f"{type(inner).__name__} has no layer `score`, so its way to compute scores is not known here. Load the "
            "checkpoint's ForSequenceClassification class, or call the model through radix_mlp.enable(model)."
        )
    head = widened_head(LinearHead(layer.weight, layer.bias) if is_plain_linear(layer) else layer)

    def scores_of(begin: NDArray[np.int32]) -> Tensor:
        # the model reads its scores at the last token that is not padding
        ends = np.flatnonzero(begin != pad_token_of(inner))
        last = int(ends[-1]) if len(ends) else 0
        return head(hidden_of_probe(inner, begin)[0, last : last + 1])

    if check:
        check_head(inner, layer, (1.0, None), probe, scores_of)
    return head


def scale_and_softcap(model: PreTrainedModel) -> tuple[float, float | None]:
    """What the model's configuration multiplies logits by, and where it caps them.

    A class may leave settings of its configuration aside: what its forward does not name does not count.
    """
    config: Any = model.config.get_text_config()
    model_class: Any = type(model)
    names = names_in_forward(model_class)
    config = SimpleNamespace(
        **{name: value for name, value in vars(config).items() if name in names}, model_type=config.model_type
    )
    scale = 1.0
    for name in ("logit_scale", "output_multiplier"):
        value = getattr(config, name, None)
        scale *= 1.0 if value is None else value
    scaling = getattr(config, "logits_scaling", None) or 1.0
    # granite divides by it, hyperclovax multiplies
    scale = scale * scaling if config.model_type == "hyperclovax" else scale / scaling
    caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
    return float(scale), next((cap for cap in caps if cap is not None), None)


def _called(layer: torch.nn.Module, scale: float, softcap: float | None) -> Head:
    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = layer(hidden) * scale
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    return head


def _narrowed(head: LinearHead | Head, tokens: Sequence[int]) -> Head:
    """The outputs `tokens` of a head, in float32 or wider."""
    if not isinstance(head, LinearHead):
        return lambda hidden: _widened(_chosen(head(hidden), tokens, dim=1))
    bias = None if head.bias is None else _chosen(head.bias, tokens, dim=0)
    return widened_head(LinearHead(_chosen(head.weight, tokens, dim=0), bias, head.scale, head.softcap))


def widened_head(head: LinearHead | Head) -> Head:
    """The outputs of a head in float32 or wider; a linear head is computed in that, too."""
    if not isinstance(head, LinearHead):
        return lambda hidden: _widened(head(hidden))
    bias = None if head.bias is None else _widened(head.bias)
    wide = LinearHead(_widened(head.weight), bias, head.scale, head.softcap)
    return lambda hidden: _widened(wide(hidden.to(wide.weight.dtype)))


def _chosen(whole: Tensor, places: Sequence[int], dim: int) -> Tensor:
    if list(places) == list(range(whole.shape[dim])):
        return whole
    # slices, since sending an index to the device would wait for the forward pass that runs there
    return torch.cat([whole.narrow(dim, int(place), 1) for place in places], dim)


def _widened(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
