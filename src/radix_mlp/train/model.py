"""What training needs of a model: the transformers model itself, its output head, and that folding it is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from radix_mlp.errors import InvalidDtypeError, UnsupportedCallError, UnsupportedModelError
from radix_mlp.hf.adapters import opened
from radix_mlp.hf.added_code import reason_of_added_code, reason_of_called_module
from radix_mlp.hf.examination import reason_of_randomness
from radix_mlp.hf.support import decoder_of
from radix_mlp.hf.whole_calls import reason_of_whole_calls
from radix_mlp.ops.head.edge_logprobs import EdgeLogprobs, edge_logprobs
from radix_mlp.ops.head.edges import DeviceEdges, Edges
from radix_mlp.ops.head.linear_head import LinearHead, is_plain_linear

__all__ = ["check_not_wrapped", "check_trainable", "head_logprobs", "language_head", "pretrained_of"]

PROBE_TOKENS = 8
# models whose head was held to their own logits: a fact about the model, not about a batch
_CHECKED: WeakKeyDictionary[PreTrainedModel, None] = WeakKeyDictionary()


def pretrained_of(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model itself, out of a PEFT model or as it is.

    Raises:
        InvalidDtypeError: there is none. Wrappers that must see the forward call (DistributedDataParallel) are not
            opened, since gradients would then not be synchronised.
        UnsupportedModelError: a PEFT model whose adapter is more than layers of the model, such as a learnt prompt.
    """
    inner = opened(model)
    if isinstance(inner, PreTrainedModel):
        return inner
    raise InvalidDtypeError(
        f"model is a {type(model).__name__}: pass a transformers PreTrainedModel or a PEFT model around one. A wrapper "
        "that synchronises gradients (DistributedDataParallel) must be called itself: let the forward that it wraps "
        "compute the log-probabilities."
    )


def check_trainable(model: PreTrainedModel) -> None:
    """Raise `UnsupportedCallError` if training this model on folded rows would differ from training it unfolded.

    Dropout and router jitter draw once for all copies of a token, forward hooks see folded rows, and balancing losses
    of experts count unique tokens.
    """
    forward = vars(model).get("_radix")
    if forward is None:
        reason = reason_of_randomness(model) or reason_of_added_code(model)
    else:
        reason = forward.examination.reason()
    reason = reason or reason_of_whole_calls(model)
    if reason is None and getattr(model.config.get_text_config(), "output_router_logits", False):
        reason = "config.output_router_logits is on: the balancing loss of experts would count unique tokens"
    if reason is not None:
        raise UnsupportedCallError(f"{reason}. Switch it off, or train this model unfolded (radix_mlp.disable(model)).")


def check_not_wrapped(model: torch.nn.Module) -> None:
    """Raise `UnsupportedCallError` if hooks or a forward around the model's own change what it makes of hidden states.

    Functions that call its trunk and its head, and not the model, would leave them out.
    """
    inner = pretrained_of(model)
    reason = reason_of_called_module(inner)
    if reason is not None:
        raise UnsupportedCallError(
            f"{reason.removesuffix(', which would see compact rows')}, which is not called here. Remove it, or call "
            "the model itself."
        )


def language_head(model: torch.nn.Module, *, check: bool = True) -> LinearHead | Callable[[Tensor], Tensor]:
    """What makes logits of last hidden states, with the model's own scale and soft cap: for `edge_logprobs`.

    A `LinearHead` if the head is a plain linear layer; else (adapters on the head, sharded or quantised heads) a
    function that calls the layer.  The first time, it is held to the model's own logits of a few tokens.

    Args:
        model: with a language-model head.
        check: False where that cannot be done: within a forward pass, on weights that are sharded.

    Raises:
        UnsupportedModelError: the model has no language-model head, or one that does something else besides.

    >>> from radix_mlp.models.tiny import tiny_model
    >>> language_head(tiny_model()).weight.shape
    torch.Size([259, 64])
    """
    inner = pretrained_of(model)
    layer = inner.get_output_embeddings()
    if layer is None:
        raise UnsupportedModelError(
            f"{type(inner).__name__} has no language-model head, so it gives no log-probabilities. Load the "
            "checkpoint's ForCausalLM class."
        )
    scale, softcap = _scale_and_softcap(inner)
    head: LinearHead | Callable[[Tensor], Tensor]
    if is_plain_linear(layer):
        head = LinearHead(layer.weight, layer.bias, scale, softcap)
    else:

        def head(hidden: Tensor) -> Tensor:
            logits: Tensor = layer(hidden) * scale
            return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    if check and inner not in _CHECKED:
        _hold_to_own_logits(inner, head)
        _CHECKED[inner] = None
    return head


def head_logprobs(
    model: torch.nn.Module, hidden: Tensor, edges: Edges | DeviceEdges, *, check: bool = True, **options: Any
) -> EdgeLogprobs:
    """`edge_logprobs` of last hidden states `[M, h]` under the model's own head, which FSDP2 may have sharded.

    A sharded layer is called once, and the log-probabilities are computed within that call: its weight is whole there,
    and is whole again before its backward pass.  Calls for some rows at a time, and again in the backward pass, would
    confuse the hooks that see to that.

    Args:
        model: with a language-model head, called from within its own forward if that is sharded.
        hidden: `[M, h]`.
        edges: of the batch.
        check: as in `language_head`.
        options: of `edge_logprobs`.
    """
    inner = pretrained_of(model)
    layer = inner.get_output_embeddings()
    if not (isinstance(layer, FSDPModule) and isinstance(layer, torch.nn.Linear)):
        return edge_logprobs(hidden, language_head(model, check=check), edges, **options)
    scale, softcap = _scale_and_softcap(inner)
    results: list[EdgeLogprobs] = []

    def logprobs_of(inputs: Tensor) -> EdgeLogprobs:
        head = LinearHead(layer.weight, layer.bias, scale, softcap)
        results.append(edge_logprobs(inputs.to(hidden.dtype), head, edges, **options))
        return results[0]

    vars(layer)["forward"] = logprobs_of
    try:
        layer(hidden)
    finally:
        del vars(layer)["forward"]
    # not what the call returned: a mixed-precision policy may have cast that
    return results[0]


def _scale_and_softcap(model: PreTrainedModel) -> tuple[float, float | None]:
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    # what granite divides by hyperclovax multiplies with
    scale = scale * scaling if config.model_type == "hyperclovax" else scale / scaling
    return float(scale), getattr(config, "final_logit_softcapping", None)


@torch.no_grad()
def _hold_to_own_logits(model: PreTrainedModel, head: Callable[[Tensor], Tensor]) -> None:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        vocabulary = model.config.get_text_config().vocab_size
        first = max(0, vocabulary // 2 - PROBE_TOKENS)
        input_ids = torch.arange(first, min(first + PROBE_TOKENS, vocabulary), device=model.device)[None]
        # past wrappers of the instance, which may run it in mixed precision
        own = type(model).forward(model, input_ids, use_cache=False, return_dict=True).logits[0]
        hidden = decoder_of(model)(input_ids, use_cache=False, return_dict=True).last_hidden_state[0]
        ours = head(hidden)
    finally:
        for module in training:
            module.training = True
    if not own.isfinite().all() or not own.any():
        raise UnsupportedModelError(
            f"{type(model).__name__}: the model's own logits of a few tokens are all zero, or not finite in "
            f"{model.dtype}, so its head cannot be checked. Look at the weights, or load the model in another dtype."
        )
    off = float("inf")
    if ours.shape == own.shape:
        off = float((ours.float() - own.float()).abs().max() / own.float().abs().max())
    if not off < (1e-4 if own.dtype.itemsize >= 4 else 3e-2):
        raise UnsupportedModelError(
            f"{type(model).__name__} makes its logits in a way that is not known here (off by {off:.1g} of the "
            "largest). Pass a function that makes them: tree_logprobs(model, batch, head=function)."
        )
