"""The forward of a model that a trainer calls with labels: log-probabilities of edges in place of logits.

It stands where the trainer's own call ends, in the model's forward, so whatever wraps the model (accelerate,
DistributedDataParallel, FSDP, PEFT) sees the calls that it expects.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf.enable import enable
from radix_mlp.hf.enabled import Enabled, enabled_of
from radix_mlp.hf.foldable_call import FoldableCall
from radix_mlp.hf.folding_forward import FoldingForward
from radix_mlp.hf.layer_compiler import Mode
from radix_mlp.hf.origin import foreign_function
from radix_mlp.hf.prefill_cache import uses_cache
from radix_mlp.hf.support import why_unsupported
from radix_mlp.ops import label_edges
from radix_mlp.train import TreeBatch, check_trainable, language_head, pretrained_of

__all__ = [
    "EdgeForward",
    "autocast_dtype_of",
    "check_in_training",
    "install_edge_forward",
    "is_sharded",
]

IGNORE_INDEX = -100


class EdgeForward(FoldingForward):
    """Base: reads a call with labels into a folded batch, or reports why it stays unfolded."""

    # under which mixed precision a call runs that does not come through accelerate's own wrapper
    autocast_dtype: torch.dtype | None = None

    def read_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any], own: Collection[str]) -> TreeBatch | None:
        """The folded batch, or None if this call is to run unfolded, which the settings then report.

        Args:
            args: of the call.
            kwargs: of the call, with `labels`.
            own: arguments besides that the caller knows how to treat.

        Raises:
            UnsupportedCallError: the model was enabled with a threshold of 1 and the call cannot be folded.
        """
        arguments = self._named(args, kwargs)
        labels: torch.Tensor = arguments["labels"]
        known = {name: value for name, value in arguments.items() if name not in own}
        found = self.planned(
            known, lambda call: _reason_of_cache(known) or _reason_of_pictures(call) or _reason_of_labels(labels, call)
        )
        if found is None:
            return None
        call, plan = found
        edges = label_edges(plan, _flat(labels)[call.layout.token_index], ignore_index=IGNORE_INDEX)
        return TreeBatch(plan, edges, layout=call.layout)

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision as the trainer has it."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.module.device.type, dtype=self.autocast_dtype)


def install_edge_forward(
    model: torch.nn.Module,
    make: Callable[[Enabled], EdgeForward],
    *,
    impl: str,
    threshold: Any,
    compile: Mode = False,  # noqa: A002
    autocast_dtype: torch.dtype | None = None,
    check_head: bool = True,
) -> None:
    """Enable a model with a language-model head and put the forward that `make` builds in place of the usual one.

    Raises:
        UnsupportedModelError: the model cannot be folded, or its head is not known; the model is as it was.
        UnsupportedCallError: training it folded would differ.
    """
    inner = pretrained_of(model)
    check_in_training(model)
    # calls of a model with a forward of the user's run unfolded and need no head
    is_own = foreign_function(vars(inner).get("forward")) is not None
    enable(model, impl=impl, threshold=threshold, compile=compile)
    # a reference model that FSDP2 has sharded already has the class of the policy, which is checked
    if check_head and not is_own:
        language_head(inner)
    usual = enabled_of(inner)
    assert usual is not None
    forward = make(usual)
    forward.previous = usual.previous
    forward.autocast_dtype = autocast_dtype
    forward.install()


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP2 has its weights already."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def autocast_dtype_of(trainer: Any) -> torch.dtype | None:
    """The dtype of a trainer's mixed precision, None without."""
    accelerator = trainer.accelerator
    if not accelerator.native_amp:
        return None
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)


def check_in_training(model: torch.nn.Module) -> None:
    """Raise if the model cannot be folded, or not in training; one that needs no gradients is checked as it is."""
    inner = pretrained_of(model)
    reason = why_unsupported(inner)
    if reason is not None:
        raise UnsupportedModelError(reason)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        check_trainable(inner)
        return
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        check_trainable(inner)
    finally:
        for module, training in modes.items():
            module.training = training


def _reason_of_cache(arguments: dict[str, Any]) -> str | None:
    return "a key-value cache is used, which a loss from edges does not fill" if uses_cache(arguments) else None


def _reason_of_pictures(call: FoldableCall) -> str | None:
    return None if call.pictures is None else "a loss from edges does not read images"


def _reason_of_labels(labels: torch.Tensor, call: FoldableCall) -> str | None:
    """Labels that count and are no token's: at padding, or a first token's that transformers has something predict."""
    shape, flat = call.layout.shape, _flat(labels)
    if labels.shape != shape:
        return f"labels are {tuple(labels.shape)}, not beside input_ids {shape}"
    counts = (flat != IGNORE_INDEX).reshape(shape)
    # the first column is shifted away
    if (counts & ~call.layout.present)[:, 1:].any():
        return "labels count places of padding (set them to -100)"
    # rows of nothing but padding have no first token
    first = call.cu_seq_lengths[:-1][np.diff(call.cu_seq_lengths) > 0]
    starts = call.layout.token_index[first]
    if (flat[starts[starts % shape[1] > 0]] != IGNORE_INDEX).any():
        return "labels count the first token of a sequence, which nothing before it in its sequence predicts"
    return None


def _flat(labels: torch.Tensor) -> np.ndarray:
    return labels.detach().to("cpu", torch.int64).numpy().reshape(-1)
