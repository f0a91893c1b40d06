"""The output heads of models as functions of hidden states, compared with the models' own logits before use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf.adapters import pretrained_of
from radix_mlp.hf.added_code import reason_of_called_module
from radix_mlp.hf.enabled import Enabled, enabled_of
from radix_mlp.hf.fingerprint import fingerprint, hooks_of
from radix_mlp.hf.media import placeholders_of
from radix_mlp.hf.names_in_forward import names_in_forward
from radix_mlp.hf.support import decoder_of
from radix_mlp.hf.text_tower import is_multimodal
from radix_mlp.ops.head.linear_head import LinearHead, is_plain_linear

__all__ = [
    "Head",
    "check_head",
    "classification_head",
    "hidden_of_probe",
    "language_head",
    "on_device",
    "pad_token_of",
    "require_language_head",
    "scale_and_softcap",
    "widened_head",
]

Head = Callable[[Tensor], Tensor]
"""Hidden states `[R, h]` -> logits `[R, V]`."""
OwnLogits = Callable[[PreTrainedModel, NDArray[np.int32]], Tensor]
NUM_PROBES = 3
"""Random runs of tokens on which a head may be tried until one can decide, before those of the caller."""
PROBE_TOKENS = 8
NUM_KEPT = 4
"""Heads of one model that are remembered as right."""


class _Checked(NamedTuple):
    """What a comparison of a head holds for: everything between the trunk's hidden states and the model's logits."""

    model_class: type
    class_forward: Any
    own_forward: Any
    hooks: list[Any]
    layer: Any
    form: tuple[float, float | None]


_CHECKED: WeakKeyDictionary[PreTrainedModel, list[_Checked]] = WeakKeyDictionary()


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


def pad_token_of(model: PreTrainedModel) -> int:
    """The id that a classifier takes for padding, wherever it stands; -1 if there is none."""
    pad = model.config.get_text_config().pad_token_id
    return -1 if pad is None else int(pad)


def scale_and_softcap(model: PreTrainedModel) -> tuple[float, float | None]:
    """What the model's configuration multiplies logits by, and where it caps them.

    A multimodal class has the settings of its text model and may leave them aside.
    """
    config: Any = model.config.get_text_config()
    if is_multimodal(model.config):
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


def check_head(
    model: PreTrainedModel,
    layer: torch.nn.Module,
    form: tuple[float, float | None],
    probe: NDArray[np.int32] | None,
    logits_of: Callable[[NDArray[np.int32]], Tensor],
    own: OwnLogits | None = None,
) -> None:
    """Compare a head with the model's own logits, unless this very head was found right before.

    Where no tokens can decide, nothing is remembered: then the answers themselves show it.

    Args:
        logits_of: the head's logits of some tokens.
        own: the model's own, `[1, n, V]`, or `[1, V]` for scores of a sequence; the model's `logits` unless given.
    """
    known = _CHECKED.setdefault(model, [])
    now = _Checked(
        type(model),
        type(model).forward,
        _own_forward(model),
        hooks_of(model),
        # a layer that is called is what the model calls, whatever its weights; of a linear one the weight is taken
        (id(layer), fingerprint(layer, addresses=is_plain_linear(layer))),
        form,
    )
    if now not in known and _agrees(model, probe, logits_of, own or _own_logits):
        known.append(now)
        del known[:-NUM_KEPT]


def _own_forward(model: PreTrainedModel) -> Any:
    """The forward that was put into this instance, if any: it may change the logits."""
    forward = vars(model).get("forward")
    while isinstance(forward, Enabled):
        forward = forward.previous
    return forward


@torch.no_grad()
def _agrees(
    model: PreTrainedModel,
    probe: NDArray[np.int32] | None,
    logits_of: Callable[[NDArray[np.int32]], Tensor],
    own_logits: OwnLogits,
) -> bool:
    """Whether a head gives the model's own logits; False if no tokens can decide.

    Raises:
        UnsupportedModelError: it gives others.
    """
    training = [module for module in model.modules() if module.training]
    enabled = enabled_of(model) or enabled_of(decoder_of(model))
    last_call = None if enabled is None else enabled.settings.last_call
    for module in training:
        module.training = False
    try:
        for begin in _probes(model, probe):
            own = own_logits(model, begin)[0]
            off = _difference(logits_of(begin), own if own.dim() == 2 else own[None])
            if off is None:
                continue
            if not off < (1e-4 if own.dtype.itemsize >= 4 and model.dtype.itemsize >= 4 else 3e-2):
                raise UnsupportedModelError(
                    f"{type(model).__name__} makes its logits in a way that is not known here (off by {off:.1g} of the "
                    "largest). Call radix_mlp.enable(model) and the model's own forward. Pass a function that makes "
                    "them in training: tree_logprobs(model, batch, head=function)."
                )
            return True
    finally:
        for module in training:
            module.training = True
        if enabled is not None:
            # the caller's last call, not one of these
            enabled.settings.last_call = last_call
    return False


def _probes(model: PreTrainedModel, probe: NDArray[np.int32] | None) -> Iterator[NDArray[np.int32]]:
    """Tokens to try a head on, the same for every job; last, the first ones of the caller's."""
    embeddings: Any = model.get_input_embeddings()
    draw = np.random.default_rng(0)
    for _ in range(NUM_PROBES):
        ids = draw.integers(0, embeddings.weight.shape[0], PROBE_TOKENS, dtype=np.int32)
        ids = ids[~np.isin(ids, [pad_token_of(model), *placeholders_of(model.config)])]
        if len(ids):
            yield ids
    if probe is not None:
        yield probe[:PROBE_TOKENS]


def _own_logits(model: PreTrainedModel, begin: NDArray[np.int32]) -> Tensor:
    """By the class's forward, past mixed precision and the like around it, unless other code wraps it.

    Raises:
        UnsupportedModelError: the other code fails on a call without labels.
    """
    ids = on_device(model, begin)
    given = {"attention_mask": torch.ones_like(ids), "use_cache": False, "return_dict": True}
    if reason_of_called_module(model) is None:
        own: Any = type(model).forward.__get__(model)
        logits: Tensor = own(ids, **given).logits
        return logits
    try:
        logits = model(ids, **given).logits
    except Exception as error:
        raise UnsupportedModelError(
            f"the code around {type(model).__name__}.forward fails on a call without labels "
            f"({type(error).__name__}: {error}), so its logits cannot be compared. Remove it, or train unfolded."
        ) from error
    return logits


def hidden_of_probe(model: PreTrainedModel, begin: NDArray[np.int32]) -> Tensor:
    trunk = decoder_of(model)
    hidden: Tensor = trunk(on_device(model, begin), use_cache=False, return_dict=True).last_hidden_state
    return hidden


def on_device(model: PreTrainedModel, begin: NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(begin.astype("int64"))[None].to(model.device)


def _difference(ours: Tensor, own: Tensor) -> float | None:
    """Largest difference relative to the largest logit; None if the model's own are NaN, or all of both are 0."""
    if own.isnan().any():
        return None
    if ours.shape != own.shape:
        return math.inf
    # what overflows in the model's dtype does so here
    same = ours.to(own.dtype) == own
    difference = float((ours - own).abs().masked_fill(same, 0).max())
    largest = float(own.masked_fill(own.isinf(), 0).abs().max())
    if largest == 0:
        return None if difference == 0 else math.inf
    return difference / largest
