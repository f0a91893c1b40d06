"""`TreeBatch`: sequences folded for training, with what belongs to their tokens, and the way to and from padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from radix_mlp.arguments import items_of, refuse_tables
from radix_mlp.errors import InvalidDtypeError, InvalidInputError
from radix_mlp.hf.padding import PaddedLayout, row_with_holes
from radix_mlp.ops.device_plan import DevicePlan, to_device
from radix_mlp.ops.head.edges import DeviceEdges, Edges, label_edges, tree_edges
from radix_mlp.ops.tensors import check_tensors
from radix_mlp.plan import RadixPlan, build_plan

__all__ = ["IGNORE_INDEX", "TreeBatch"]

IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class TreeBatch:
    """A folded batch of `S` sequences and `N` tokens, as a data loader hands it over. Pickles, pins, moves.

    Make one with `TreeBatch.from_sequences`, `TreeBatch.from_padded` or a `TreeCollator`.
    """

    plan: RadixPlan
    edges: Edges
    """Predictions that count."""
    tokens: dict[str, Tensor] = field(default_factory=dict)
    """Name -> `[N]`, one value a token, sequence after sequence: weights, advantages, old log-probabilities, …"""
    sequences: dict[str, Tensor] = field(default_factory=dict)
    """Name -> `[S, ...]`: rewards, groups, …"""
    layout: PaddedLayout | None = None
    """Set where the batch came padded."""

    @classmethod
    def from_sequences(
        cls,
        input_ids: Sequence[ArrayLike],
        *,
        labels: Sequence[ArrayLike] | None = None,
        wanted: Sequence[ArrayLike] | None = None,
        tokens: Mapping[str, Sequence[ArrayLike]] | None = None,
        sequences: Mapping[str, ArrayLike] | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> TreeBatch:
        """Fold sequences that are given one by one.

        Args:
            input_ids: token ids of every sequence, at least one each.
            labels: beside them, `ignore_index` where nothing counts, unshifted as transformers has them.
            wanted: instead of labels: bool beside the ids, tokens whose prediction counts. Without either all count.
            tokens: name -> values beside the ids.
            sequences: name -> one value a sequence.
            ignore_index: the label that does not count.

        Raises:
            InvalidInputError: lengths do not fit, or both labels and wanted are given.

        Examples:
            >>> batch = TreeBatch.from_sequences([[5, 6, 7], [5, 6, 8]], labels=[[-100, 6, 7], [-100, -100, 8]])
            >>> batch.num_compact, batch.edges.num_predictions
            (4, 3)
        """
        ids = [_ids(sequence) for sequence in items_of(input_ids, "input_ids")]
        lengths = [len(sequence) for sequence in ids]
        if 0 in lengths:
            raise InvalidInputError(f"sequence {lengths.index(0)} is empty: leave it out of the batch")
        plan = build_plan(_joined(ids, np.int64), np.cumsum([0, *lengths]))
        edges = _edges(
            plan,
            None if labels is None else _packed("labels", labels, lengths),
            None if wanted is None else _packed("wanted", wanted, lengths),
            ignore_index,
        )
        of_tokens = {n: torch.from_numpy(_packed(n, v, lengths)) for n, v in (tokens or {}).items()}
        of_sequences = {n: _values(n, v) for n, v in (sequences or {}).items()}
        _check_sequences(of_sequences, len(ids))
        return cls(plan, edges, of_tokens, of_sequences)

    @classmethod
    def from_padded(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        wanted: Tensor | None = None,
        tokens: Mapping[str, Tensor] | None = None,
        sequences: Mapping[str, Tensor] | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> TreeBatch:
        """Fold a padded batch (left or right); `batch.layout.pad` brings results back.

        Args:
            input_ids: `[B, T]`, every row one sequence.
            attention_mask: `[B, T]`, 0 at padding; None if there is none.
            labels: `[B, T]` as transformers takes them, before its shift.
            wanted: `[B, T]` instead of labels: nonzero for tokens whose prediction counts.
            tokens: name -> `[B, T]`, packed to `[N]`.
            sequences: name -> `[B, ...]`.
            ignore_index: the label that does not count.

        Raises:
            InvalidInputError: shapes do not fit, the mask has holes or an empty row, or a label counts that padding
                would predict or that stands on padding.
        """
        check_tensors(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, wanted=wanted, **(tokens or {})
        )
        if input_ids.dim() != 2:
            raise InvalidInputError(f"input_ids is {tuple(input_ids.shape)}: pass [B, T]")
        of_sequences = {name: _values(name, values) for name, values in (sequences or {}).items()}
        _check_sequences(of_sequences, len(input_ids))
        shape = (input_ids.shape[0], input_ids.shape[1])
        present = (
            np.ones(shape, bool) if attention_mask is None else _same_shape("attention_mask", attention_mask, shape)
        )
        present = present != 0
        lengths = present.sum(1)
        if (lengths == 0).any():
            raise InvalidInputError(f"row {int((lengths == 0).argmax())} is all padding: leave it out of the batch")
        row = row_with_holes(present)
        if row is not None:
            raise InvalidInputError(f"attention_mask has holes between the tokens of row {row}: pad at the ends only")
        layout, cu_seq_lengths = PaddedLayout.of_mask(present)
        token_index = layout.token_index
        plan = build_plan(input_ids.detach().cpu().numpy().reshape(-1)[token_index], cu_seq_lengths)
        flat_labels = flat_wanted = None
        if labels is not None:
            array = _same_shape("labels", labels, shape)
            _refuse_labels_of_padding(array != ignore_index, present)
            flat_labels = array.reshape(-1)[token_index]
        if wanted is not None:
            flat_wanted = (_same_shape("wanted", wanted, shape) != 0).reshape(-1)[token_index]
        return cls(
            plan,
            _edges(plan, flat_labels, flat_wanted, ignore_index),
            {name: layout.pack(values) for name, values in (tokens or {}).items()},
            of_sequences,
            layout,
        )

    @property
    def num_sequences(self) -> int:
        """`S`"""
        return self.plan.num_sequences

    @property
    def num_tokens(self) -> int:
        """`N`"""
        return self.plan.num_tokens

    @property
    def num_compact(self) -> int:
        """`M`"""
        return self.plan.num_compact

    @property
    def num_predictions(self) -> int:
        """Tokens whose prediction counts: `num_items_in_batch` of transformers."""
        return self.edges.num_predictions

    def device_plan(self, device: torch.device | str) -> DevicePlan:
        """The plan on a device."""
        return to_device(self.plan, device)

    def device_edges(self, device: torch.device | str) -> DeviceEdges:
        """The edges on a device."""
        return self.edges.to(device)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> TreeBatch:
        """Values on `device`; plan and edges are copied there, too, and kept for the forward call."""
        to_device(self.plan, device)
        self.edges.to(device)
        return self._with(lambda values: values.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TreeBatch:
        """Values in pinned memory: what a `DataLoader(pin_memory=True)` calls. Plan and edges pin when they move."""
        return self._with(Tensor.pin_memory)

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> TreeBatch:
        """The batch of some of the sequences, folded again. A padded layout is dropped."""
        plan, cu = self.plan, self.plan.cu_seq_lengths
        chosen = np.asarray(items_of(indices, "indices"))
        if len(chosen) == 0:
            raise InvalidInputError("indices is empty: select at least one sequence")
        # a mask would be read as places 0 and 1
        if not np.issubdtype(chosen.dtype, np.integer) or chosen.min() < 0 or chosen.max() >= self.num_sequences:
            raise InvalidInputError(
                f"indices is {chosen.dtype} from {chosen.min()} to {chosen.max()}: pass places of sequences, integers "
                f"from 0 to {self.num_sequences - 1}"
            )
        chosen = chosen.astype(np.int64)
        pieces = [np.arange(cu[index], cu[index + 1]) for index in chosen]
        token = np.concatenate(pieces)
        rows = plan.unfold_index[token]
        part = build_plan(plan.compact_ids[rows], np.cumsum([0, *map(len, pieces)]), plan.compact_positions[rows])
        edge = self.edges.token_edge[token]
        labels = np.where(edge >= 0, self.edges.targets[edge] if self.edges.num_edges else 0, IGNORE_INDEX)
        index = torch.from_numpy(token)
        sequence = torch.from_numpy(chosen)
        return TreeBatch(
            part,
            label_edges(part, labels),
            {name: values.index_select(0, index.to(values.device)) for name, values in self.tokens.items()},
            {name: values.index_select(0, sequence.to(values.device)) for name, values in self.sequences.items()},
        )

    def _with(self, move: Any) -> TreeBatch:
        return replace(
            self,
            tokens={name: move(values) for name, values in self.tokens.items()},
            sequences={name: move(values) for name, values in self.sequences.items()},
        )


def _edges(plan: RadixPlan, labels: NDArray[Any] | None, wanted: NDArray[Any] | None, ignore_index: int) -> Edges:
    if labels is None:
        return tree_edges(plan, wanted)
    if wanted is not None:
        raise InvalidInputError("labels and wanted are both given: labels say what counts by themselves")
    return label_edges(plan, labels, ignore_index=ignore_index)


def _check_sequences(sequences: Mapping[str, Tensor], count: int) -> None:
    for name, values in sequences.items():
        if values.shape[:1] != (count,):
            raise InvalidInputError(f"{name} is {tuple(values.shape)}: pass one value for each of {count} sequences")


def _refuse_labels_of_padding(counts: NDArray[np.bool_], present: NDArray[np.bool_]) -> None:
    if (counts & ~present).any():
        raise InvalidInputError("labels count places of padding: set them to the ignore_index there")
    if (counts[:, 1:] & ~present[:, :-1]).any():
        raise InvalidInputError(
            "labels count the first token of a row that is padded on the left, which transformers would let padding "
            "predict: set it to the ignore_index"
        )


def _same_shape(name: str, values: Tensor, shape: tuple[int, int]) -> NDArray[Any]:
    if tuple(values.shape) != shape:
        raise InvalidInputError(f"{name} is {tuple(values.shape)}: input_ids is {shape}")
    array: NDArray[Any] = values.detach().cpu().numpy()
    return array


def _ids(sequence: ArrayLike) -> NDArray[Any]:
    array: NDArray[Any] = sequence.cpu().numpy() if isinstance(sequence, Tensor) else np.asarray(sequence)
    if array.ndim != 1:
        raise InvalidInputError(f"a sequence of input_ids is {array.shape}: pass token ids [n] for each sequence")
    return array


def _values(name: str, values: ArrayLike) -> Tensor:
    """One value a sequence, as a tensor of its own."""
    if isinstance(values, Tensor):
        return values.clone()
    refuse_tables(values, name)
    try:
        return torch.as_tensor(np.array(values if hasattr(values, "__array__") else items_of(values, name)))
    except (TypeError, ValueError) as error:
        raise InvalidDtypeError(f"{name} must hold one number a sequence: {error}") from error


def _packed(name: str, values: Sequence[ArrayLike], lengths: list[int]) -> NDArray[Any]:
    arrays = [v.detach().cpu().numpy() if isinstance(v, Tensor) else np.asarray(v) for v in items_of(values, name)]
    if [array.shape for array in arrays] != [(length,) for length in lengths]:
        raise InvalidInputError(f"{name} does not stand beside input_ids: pass one value a token of every sequence")
    return _joined(arrays, np.float32)


def _joined(arrays: list[NDArray[Any]], dtype_of_nothing: Any) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype_of_nothing)
