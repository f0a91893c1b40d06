"""What a caller of an enabled model asks for: its padded or packed input as one row of sequences, or why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from radix_mlp.hf.media import placeholders_of, reason_of_media, says_text, without_axes
from radix_mlp.hf.padding import PaddedLayout, row_with_holes
from radix_mlp.hf.pictures.read import Pictures, arguments_of_pictures, image_token_of, read_pictures
from radix_mlp.hf.prefill_cache import reason_of_cache, reason_of_continuation, uses_cache
from radix_mlp.hf.spans import span_rule_of, spans_of_types
from radix_mlp.hf.support import decoder_of
from radix_mlp.hf.tracing import reason_of_tracing
from radix_mlp.plan import RadixPlan, build_plan
from radix_mlp.plan.spans import span_keys

__all__ = ["FoldableCall", "packed_by", "read_call", "selects_logits"]

# arguments with a meaning of their own here, and those that do not change what a token's row computes
_OWN_ARGUMENTS = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "labels",
    "logits_to_keep",
    "past_key_values",
    "cache_params",
}
_HARMLESS_ARGUMENTS = {
    "num_items_in_batch",
    # refused above where they are asked for
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "shift_labels",
    "use_cache",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
}

_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class FoldableCall:
    """The real tokens of a call, sequence after sequence, and where they stand in the caller's layout."""

    layout: PaddedLayout
    input_ids: NDArray[np.int64]
    """`[N]`"""
    position_ids: NDArray[np.int64] | None
    """`[N]` if the caller gave them, else None: every sequence counts from 0."""
    cu_seq_lengths: NDArray[np.int64]
    """`[S + 1]`"""
    spans: NDArray[np.int64] | None = None
    """`[N]` number of the span of each token, whose tokens see one another; -1 for none. None: there are no spans."""
    pictures: Pictures | None = None

    def plan(self) -> RadixPlan:
        """The plan of the tokens, those of pictures shared by what they show."""
        keys = None if self.pictures is None else self.pictures.keys(self.input_ids)
        if self.spans is None:
            return build_plan(self.input_ids, self.cu_seq_lengths, self.position_ids, keys=keys)
        compared = self.input_ids if keys is None else keys
        keys = span_keys(compared, self.spans, self.cu_seq_lengths, self.position_ids)
        plan = build_plan(self.input_ids, self.cu_seq_lengths, self.position_ids, keys=keys)
        return plan.with_spans(self.spans)

    @property
    def is_packed(self) -> bool:
        """Whether some row holds several sequences."""
        return len(self.cu_seq_lengths) - 1 > self.layout.shape[0]


def read_call(model: PreTrainedModel, arguments: Mapping[str, Any]) -> FoldableCall | str:
    """Read the arguments of a forward call; a string is the reason why this call cannot be folded."""
    given = {
        name: value for name, value in arguments.items() if value is not None and not says_text(model, name, value)
    }
    trunk = decoder_of(model)
    rule = span_rule_of(trunk)
    types = None if rule is None else given.pop(rule.argument, None)
    of_pictures = arguments_of_pictures(trunk, given)
    reason = _reason_of_arguments(model, given, of_pictures)
    if reason is not None:
        return reason
    input_ids: torch.Tensor = given["input_ids"]
    if types is not None and (not isinstance(types, torch.Tensor) or types.shape != input_ids.shape):
        return "token types are not a [B, T] tensor"
    batch, length = input_ids.shape
    mask, boundaries = given.get("attention_mask"), given.get("cu_seq_lens_q")
    positions = _read_positions(model, given, has_pictures=bool(of_pictures))
    if isinstance(positions, str):
        return positions
    ids = _to_numpy(input_ids).reshape(-1)
    position_ids = None if positions is None else _to_numpy(positions.expand(batch, length))
    if position_ids is not None and (position_ids < 0).any():
        return "position_ids are negative in places"
    if mask is None:
        starts = np.arange(batch, dtype=np.int64) * length
        if position_ids is not None:
            found = _starts_of_packed(position_ids)
            if isinstance(found, str):
                return found
            starts = found
        if boundaries is not None and not np.array_equal(_to_numpy(boundaries)[:-1], starts):
            return "cu_seq_lens_q starts sequences where position_ids do not start again at 0"
        layout = PaddedLayout((batch, length), np.arange(batch * length))
        cu_seq_lengths = np.append(starts, batch * length)
    else:
        present = (mask != 0).cpu().numpy()
        if row_with_holes(present) is not None:
            return "attention_mask has holes between real tokens"
        if boundaries is not None and len(boundaries) - 1 > batch:
            return "cu_seq_lens_q puts several sequences into a row, and attention_mask says that it is one"
        layout, cu_seq_lengths = PaddedLayout.of_mask(present)
    pictures: Pictures | None = None
    cu_seq_lengths = cu_seq_lengths.astype(np.int64)
    if of_pictures:
        read = read_pictures(trunk, given, layout.token_index, cu_seq_lengths)
        if isinstance(read, str):
            return read
        pictures = read
    if position_ids is not None:
        position_ids = position_ids.reshape(-1)[layout.token_index]
    elif pictures is not None:
        position_ids = pictures.position_ids
    call = FoldableCall(layout, ids[layout.token_index], position_ids, cu_seq_lengths, pictures=pictures)
    if rule is not None and types is not None:
        spans = spans_of_types(rule, _to_numpy(types).reshape(-1)[layout.token_index], call.cu_seq_lengths)
        call = replace(call, spans=spans if (spans >= 0).any() else None)
    return (
        _reason_of_placeholders(model, call)
        or _reason_of_packed_spans(call)
        or _reason_of_labels(given, call)
        or (_reason_of_cached_call(model, call) if uses_cache(given) else None)
        or call
    )


def packed_by(arguments: Mapping[str, Any]) -> str | None:
    """The name of the argument that puts several sequences into a row, or None.

    Positions that start again do so where no mask says that the row is one sequence.

    >>> packed_by({"position_ids": torch.tensor([[0, 1, 0, 1]])})
    'position_ids'
    >>> packed_by({"input_ids": torch.tensor([[5, 6, 7]]), "cu_seq_lens_q": torch.tensor([0, 2, 3])})
    'cu_seq_lens_q'
    >>> packed_by({"input_ids": torch.tensor([[5, 6], [5, 7]]), "cu_seq_lens_q": torch.tensor([0, 2, 4])})
    """
    positions, numbers, boundaries = (arguments.get(name) for name in ("position_ids", "seq_idx", "cu_seq_lens_q"))
    has_mask = arguments.get("attention_mask") is not None
    if isinstance(positions, torch.Tensor) and not has_mask and _start_again(positions):
        return "position_ids"
    if isinstance(numbers, torch.Tensor) and bool((numbers[..., 1:] != numbers[..., :-1]).any()):
        return "seq_idx"
    rows = [x for x in map(arguments.get, ("input_ids", "inputs_embeds")) if isinstance(x, torch.Tensor)]
    if isinstance(boundaries, torch.Tensor) and rows and len(boundaries) - 1 > len(rows[0]):
        return "cu_seq_lens_q"
    return None


def _start_again(positions: torch.Tensor) -> bool:
    """Whether positions `[B, T]`, or `[3, B, T]` or `[4, B, T]` of a multimodal model, fall or repeat in a row."""
    if positions.shape[-1] == 1:
        # a step of generation must not wait for the device
        return False
    steps = positions[..., 1:] - positions[..., :-1]
    if positions.ndim < 3:
        return bool((steps <= 0).any())
    if len(positions) != 3:
        # the first axis counts tokens
        return bool((steps[0] <= 0).any())
    # all tokens of an image have one time, and differ in height or width
    return bool(((steps[0] < 0) | (steps == 0).all(0)).any())


def _starts_of_packed(position_ids: NDArray[np.int64]) -> NDArray[np.int64] | str:
    """Where the sequences of rows `[B, T]` without a mask start in `[B * T]`, or why that cannot be said."""
    is_break = np.diff(position_ids, axis=1) != 1
    if (np.diff(position_ids, axis=1) > 1).any():
        return "position_ids jump ahead and there is no attention_mask to say that a row is one sequence"
    broken = position_ids[is_break.any(1)]
    # what packs sequences counts up from 0 again and again, and nothing else is packed without a mask
    if (broken[:, :1] != 0).any() or (position_ids[:, 1:][is_break] != 0).any() or (broken == 0).all(1).any():
        return (
            "position_ids repeat or fall, other than by starting again at 0, and there is no attention_mask to say "
            "that a row is one sequence"
        )
    return np.flatnonzero(np.pad(is_break, ((0, 0), (1, 0)), constant_values=True))


def _reason_of_arguments(model: PreTrainedModel, given: Mapping[str, Any], of_pictures: set[str]) -> str | None:
    if uses_cache(given) and (reason := reason_of_cache(model, given)) is not None:
        return reason
    input_ids, mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2:
        return "input_ids [B, T] are not given (embeddings have no token identity)"
    reason = reason_of_tracing(input_ids)
    if reason is not None:
        return reason
    if input_ids.numel() == 0:
        return "input_ids hold no tokens"
    if input_ids.dtype not in _INTEGERS:
        return f"input_ids are {input_ids.dtype}, not int64 or int32"
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != input_ids.shape):
        return "attention_mask is not a [B, T] tensor"
    if given.get("output_attentions", getattr(model.config, "output_attentions", False)):
        return "attention weights are asked for (output_attentions)"
    if given.get("output_router_logits", getattr(model.config, "output_router_logits", False)):
        return "router logits are asked for (output_router_logits): balancing losses count tokens, not unique tokens"
    if not _is_plain_selection(given.get("logits_to_keep", 0)):
        return "logits_to_keep is neither an int nor a 1-D tensor of columns"
    unknown = min(given.keys() - _OWN_ARGUMENTS - _HARMLESS_ARGUMENTS - of_pictures, default=None)
    if unknown is None:
        return None
    return reason_of_media(unknown) or f"the argument {unknown} is given, which folding does not know"


def _read_positions(
    model: PreTrainedModel, given: Mapping[str, Any], *, has_pictures: bool
) -> torch.Tensor | str | None:
    """`[B, T]` or `[1, T]`, or why the caller's positions do not fold; those of pictures are read with them."""
    input_ids, positions = given["input_ids"], given.get("position_ids")
    if positions is None or (has_pictures and positions.ndim == 3):
        return None
    if positions.ndim == 3:
        positions = without_axes(model, positions, has_mask=given.get("attention_mask") is not None)
        if isinstance(positions, str):
            return positions
    if positions.ndim != 2 or positions.shape[1] != input_ids.shape[1] or len(positions) not in (1, len(input_ids)):
        return "position_ids are not a [B, T] tensor"
    if positions.dtype not in _INTEGERS:
        return f"position_ids are {positions.dtype}, not int64 or int32"
    checked: torch.Tensor = positions
    return checked


def _reason_of_cached_call(model: PreTrainedModel, call: FoldableCall) -> str | None:
    if call.is_packed:
        return "several sequences share a row, which is one sequence to a key-value cache"
    if call.pictures is not None:
        return "a key-value cache is used, which calls with images do not fill"
    return reason_of_continuation(model, call.layout.present, has_positions=call.position_ids is not None)


def _reason_of_placeholders(model: PreTrainedModel, call: FoldableCall) -> str | None:
    placeholders = placeholders_of(model.config)
    if call.pictures is not None:
        placeholders.pop(image_token_of(decoder_of(model)))
    found = call.input_ids[np.isin(call.input_ids, [*placeholders])]
    if not len(found):
        return None
    token = int(found[0])
    return (
        f"input_ids hold {token} ({placeholders[token]}), which stands for an image, a video or a sound, and only "
        "calls of text alone fold"
    )


def _reason_of_packed_spans(call: FoldableCall) -> str | None:
    """transformers lets spans at the seam of two sequences of a row see one another."""
    if call.spans is None or not call.is_packed:
        return None
    return "several sequences share a row, and tokens of some see later ones: give every sequence a row of its own"


def _is_plain_selection(logits_to_keep: object) -> bool:
    if isinstance(logits_to_keep, torch.Tensor):
        return logits_to_keep.ndim == 1 and logits_to_keep.dtype in _INTEGERS
    return type(logits_to_keep) is int


def selects_logits(arguments: Mapping[str, Any]) -> bool:
    """Whether `logits_to_keep` asks for some columns only; 0 and None stand for all."""
    kept = arguments.get("logits_to_keep")
    return isinstance(kept, torch.Tensor) or bool(kept)


def _reason_of_labels(given: Mapping[str, Any], call: FoldableCall) -> str | None:
    """Labels that are predicted from padding have no folded row to come from."""
    labels, shifted = given.get("labels"), given.get("shift_labels")
    if not call.layout.is_padded or (labels is None and shifted is None):
        return None
    if selects_logits(given):
        return "there are labels for a part of the logits of a padded batch (logits_to_keep)"
    shape, real = call.layout.shape, call.layout.present
    counted = [(labels[:, 1:], real[:, :-1])] if labels is not None and labels.shape == shape else []
    counted += [(shifted, real)] if shifted is not None and shifted.shape == shape else []
    for targets, predictors in counted:
        if ((_to_numpy(targets) != -100) & ~predictors).any():
            return "labels count tokens that follow padding (set them to -100)"
    return None


def _to_numpy(tensor: torch.Tensor) -> NDArray[np.int64]:
    return tensor.detach().to("cpu", torch.int64).numpy()
