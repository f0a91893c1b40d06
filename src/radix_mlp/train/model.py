"""What training needs of a model: that folding it is exact, and log-probabilities under its output head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedCallError
from radix_mlp.hf.adapters import pretrained_of
from radix_mlp.hf.added_code import reason_of_added_code, reason_of_called_module
from radix_mlp.hf.enabled import enabled_of
from radix_mlp.hf.examination import reason_of_randomness
from radix_mlp.hf.whole_calls import reason_of_whole_calls
from radix_mlp.models.heads import language_head, scale_and_softcap
from radix_mlp.ops.head.edge_logprobs import EdgeLogprobs, edge_logprobs
from radix_mlp.ops.head.edges import DeviceEdges, Edges
from radix_mlp.ops.head.linear_head import LinearHead

__all__ = ["check_not_wrapped", "check_trainable", "head_logprobs"]


def check_trainable(model: PreTrainedModel) -> None:
    """Raise `UnsupportedCallError` if training this model on folded rows would differ from training it unfolded.

    Dropout and router jitter draw once for all copies of a token, forward hooks see folded rows, and balancing losses
    of experts count unique tokens.
    """
    enabled = enabled_of(model)
    if enabled is None:
        reason = reason_of_randomness(model) or reason_of_added_code(model)
    else:
        reason = enabled.examination.reason()
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
    scale, softcap = scale_and_softcap(inner)
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
