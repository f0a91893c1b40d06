"""What a caller of an enabled model asks for: its padded or packed input as one row of sequences, or why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

__all__ = ["USES_CACHE", "FoldableCall", "read_call"]

USES_CACHE = "a key-value cache is used"

# arguments with a meaning of their own here, and those that do not change what a token's row computes
_OWN_ARGUMENTS = {"input_ids", "attention_mask", "position_ids", "labels", "logits_to_keep"}
_HARMLESS_ARGUMENTS = {
    "num_items_in_batch",
    "output_hidden_states",
    "return_dict",
    "shift_labels",
    "use_cache",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
}


@dataclass(frozen=True)
class FoldableCall:
    """The real tokens of a call, sequence after sequence, and where they stand in the caller's layout."""

    batch_shape: tuple[int, int]
    """`(B, T)` of the caller's input."""
    token_index: NDArray[np.int64]
    """`[N]` place of every real token in the flattened `[B * T]`; ascending."""
    input_ids: NDArray[np.int64]
    """`[N]`"""
    position_ids: NDArray[np.int64] | None
    """`[N]` if the caller gave them, else None: every sequence counts from 0."""
    cu_seq_lengths: NDArray[np.int64]
    """`[S + 1]`"""

    @property
    def is_padded(self) -> bool:
        """Whether some places of the caller's layout hold no token."""
        return len(self.token_index) < self.batch_shape[0] * self.batch_shape[1]


def read_call(model: PreTrainedModel, arguments: Mapping[str, Any]) -> FoldableCall | str:
    """Read the arguments of a forward call; a string is the reason why this call cannot be folded."""
    reason = _reason_not_to_fold(model, arguments)
    if reason is not None:
        return reason
    input_ids: torch.Tensor = arguments["input_ids"]
    batch, length = input_ids.shape
    mask, positions, boundaries = (arguments.get(n) for n in ("attention_mask", "position_ids", "cu_seq_lens_q"))
    ids = _to_numpy(input_ids).reshape(-1)
    position_ids = None if positions is None else _to_numpy(positions.expand(batch, length))
    if mask is None:
        starts = _row_starts(batch, length)
        if boundaries is not None:
            if batch != 1:
                return "cu_seq_lens_q is given for more than one row"
            starts = _to_numpy(boundaries)[:-1]
            if position_ids is None:
                return "cu_seq_lens_q is given without position_ids"
        elif position_ids is not None:
            starts = _packed_starts(position_ids)
        token_index = np.arange(batch * length)
        cu_seq_lengths = np.append(starts, batch * length)
    else:
        present = _to_numpy(mask) != 0
        lengths = present.sum(1)
        spans = np.where(lengths > 0, length - present[:, ::-1].argmax(1) - present.argmax(1), 0)
        if (spans != lengths).any():
            return "attention_mask has holes between real tokens"
        token_index = np.flatnonzero(present)
        cu_seq_lengths = np.concatenate(([0], np.cumsum(lengths)))
    call = FoldableCall(
        (batch, length),
        token_index,
        ids[token_index],
        None if position_ids is None else position_ids.reshape(-1)[token_index],
        cu_seq_lengths.astype(np.int64),
    )
    return _reason_of_labels(arguments, call) or call


def _reason_not_to_fold(model: PreTrainedModel, arguments: Mapping[str, Any]) -> str | None:
    given = {name: value for name, value in arguments.items() if value is not None}
    if given.get("past_key_values") is not None or given.get("use_cache"):
        return USES_CACHE
    input_ids, mask, positions = (given.get(n) for n in ("input_ids", "attention_mask", "position_ids"))
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2:
        return "input_ids [B, T] are not given (embeddings have no token identity)"
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != input_ids.shape):
        return "attention_mask is not a [B, T] tensor"
    if positions is not None and (
        positions.ndim != 2 or positions.shape[1] != input_ids.shape[1] or len(positions) not in (1, len(input_ids))
    ):
        return "position_ids are not a [B, T] tensor"
    if given.get("output_attentions", getattr(model.config, "output_attentions", False)):
        return "attention weights are asked for (output_attentions)"
    if given.get("output_router_logits", getattr(model.config, "output_router_logits", False)):
        return "router logits are asked for (output_router_logits): balancing losses count tokens, not unique tokens"
    if model.training and (dropout := _active_dropout(model)):
        return f"{dropout} is a dropout above 0 in training: copies of a token would share one mask"
    for name, value in given.items():
        if name not in _OWN_ARGUMENTS | _HARMLESS_ARGUMENTS and value is not False:
            return f"the argument {name} is given, which folding does not know"
    return None


def _active_dropout(model: PreTrainedModel) -> str | None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
            return name
        for attribute in ("attention_dropout", "dropout", "dropout_prob"):
            value = getattr(module, attribute, 0.0)
            if isinstance(value, float) and value > 0 and not isinstance(module, torch.nn.Dropout):
                return f"{name}.{attribute}"
    return None


def _reason_of_labels(arguments: Mapping[str, Any], call: FoldableCall) -> str | None:
    """Labels that are predicted from padding have no folded row to come from."""
    labels = arguments.get("labels")
    if labels is None or not call.is_padded or labels.shape != call.batch_shape:
        return None
    real = np.zeros(call.batch_shape[0] * call.batch_shape[1], bool)
    real[call.token_index] = True
    counted = _to_numpy(labels)[:, 1:] != -100
    if (counted & ~real.reshape(call.batch_shape)[:, :-1]).any():
        return "labels count tokens that follow padding (set them to -100)"
    return None


def _row_starts(batch: int, length: int) -> NDArray[np.int64]:
    return np.arange(batch, dtype=np.int64) * length


def _packed_starts(position_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sequence starts in packed rows, by transformers' own rule: wherever a position does not follow the last."""
    is_start = np.ones(position_ids.shape, bool)
    is_start[:, 1:] = np.diff(position_ids, axis=1) != 1
    return np.flatnonzero(is_start)


def _to_numpy(tensor: torch.Tensor) -> NDArray[np.int64]:
    return tensor.detach().to("cpu", torch.int64).numpy()
