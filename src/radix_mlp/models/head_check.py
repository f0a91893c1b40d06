"""Whether a head function gives the model's own logits: compared on a few tokens before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf.added_code import reason_of_called_module
from radix_mlp.hf.enabled import Enabled, enabled_of
from radix_mlp.hf.fingerprint import fingerprint, hooks_of
from radix_mlp.hf.media import placeholders_of
from radix_mlp.hf.support import decoder_of
from radix_mlp.ops.head.linear_head import is_plain_linear

__all__ = ["check_head", "hidden_of_probe", "on_device", "pad_token_of"]

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


def pad_token_of(model: PreTrainedModel) -> int:
    """The id that a classifier takes for padding, wherever it stands; -1 if there is none."""
    pad = model.config.get_text_config().pad_token_id
    return -1 if pad is None else int(pad)
