"""The edges of a folded batch: every distinct prediction (row, next token) once, with the tokens it predicts.

A row that branches predicts several next tokens, so a loss needs one number per edge, not one label per row.
Values of tokens (weights, advantages, masks) are summed onto edges, and values of edges are copied to tokens. Both
move a few numbers per token; everything as wide as the vocabulary or the model runs once per edge or row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from radix_mlp.errors import InvalidDtypeError, InvalidInputError
from radix_mlp.ops.row_copies import copy_rows, segment_sum
from radix_mlp.ops.tensors import check_tensors
from radix_mlp.plan.radix_plan import RadixPlan

__all__ = ["DeviceEdges", "Edges", "edges_to_tokens", "label_edges", "sequence_sums", "tokens_to_edges", "tree_edges"]


@dataclass(frozen=True, eq=False, repr=False)
class Edges:
    """`E` distinct predictions of `N` tokens, on the host. Pickles. Made by `tree_edges` or `label_edges`."""

    parents: NDArray[np.int64]
    """`[P]` rows that predict something, ascending, each once: the rows that the output head runs on."""
    parent_at: NDArray[np.int64]
    """`[E]` edge -> index of its row in `parents`; ascending."""
    targets: NDArray[np.int64]
    """`[E]` the predicted token."""
    token_edge: NDArray[np.int64]
    """`[N]` token -> the edge that predicts it, -1 for first tokens of sequences and tokens not selected."""
    token_sequence: NDArray[np.int64]
    """`[N]` token -> its sequence."""
    num_sequences: int
    """`S`, empty sequences included."""
    num_rows: int
    """Rows of the plan."""

    @property
    def num_edges(self) -> int:
        """Distinct predictions `E`."""
        return len(self.targets)

    @property
    def num_tokens(self) -> int:
        """Tokens `N` of the batch before folding."""
        return len(self.token_edge)

    @property
    def num_predictions(self) -> int:
        """Tokens that an edge predicts: the denominator of a mean over tokens."""
        return int((self.token_edge >= 0).sum())

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """`[E]` number of tokens that each edge predicts."""
        return np.bincount(self.token_edge[self.token_edge >= 0], minlength=self.num_edges)

    def to(self, device: torch.device | str) -> DeviceEdges:
        """The edges as tensors on `device`, in one (pinned, asynchronous) copy; kept for the next call."""
        device = torch.empty(0, device=device).device
        cache: dict[torch.device, list[Tensor]] = self.__dict__.setdefault("_tensors", {})
        if device not in cache:
            arrays = [self.parents, self.parent_at, self.targets, self.token_edge, self.token_sequence]
            with torch.inference_mode(False):
                packed = torch.empty(sum(map(len, arrays)), dtype=torch.int64, pin_memory=device.type == "cuda")
                np.concatenate(arrays, out=packed.numpy())
                cache[device] = list(packed.to(device, non_blocking=True).split([len(array) for array in arrays]))
        parents, parent_at, targets, token_edge, token_sequence = cache[device]
        return DeviceEdges(parents, parent_at, targets, token_edge, token_sequence, self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tensors"}

    def __repr__(self) -> str:
        return f"Edges({self.num_edges} of {len(self.parents)} rows, for {self.num_tokens} tokens)"


@dataclass(frozen=True, eq=False)
class DeviceEdges:
    """`Edges` as int64 tensors on one device. Made by `Edges.to`."""

    parents: Tensor
    """`[P]`"""
    parent_at: Tensor
    """`[E]`"""
    targets: Tensor
    """`[E]`"""
    token_edge: Tensor
    """`[N]`"""
    token_sequence: Tensor
    """`[N]`"""
    edges: Edges
    """On the host."""


def tree_edges(plan: RadixPlan, wanted: ArrayLike | None = None) -> Edges:
    """The edges of the tree: the row before a token predicts it.

    Args:
        plan: of the batch.
        wanted: `[N]` bool, tokens whose prediction counts (an answer, not its prompt); all if None. First tokens of
            sequences have no prediction and never count.

    Raises:
        InvalidInputError: `wanted` has another length; InvalidDtypeError: it is not bool.

    Examples:
        >>> from radix_mlp.plan import build_plan
        >>> plan = build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6])
        >>> edges = tree_edges(plan)
        >>> edges.parents[edges.parent_at].tolist(), edges.targets.tolist(), edges.token_edge.tolist()
        ([0, 1, 1], [6, 7, 8], [-1, 0, 1, -1, 0, 2])
    """
    counts = _not_first(plan)
    if wanted is not None:
        counts &= _of_tokens("wanted", wanted, plan, np.bool_)
    rows = np.zeros(plan.num_rows, bool)
    rows[plan.unfold_index[counts]] = True
    children = np.flatnonzero(rows)
    order = np.argsort(plan.parent[children], kind="stable")
    children = children[order]
    edge_of_row = np.full(plan.num_rows, -1, np.int64)
    edge_of_row[children] = np.arange(len(children))
    token_edge = np.where(counts, edge_of_row[plan.unfold_index], -1)
    return _edges(plan, plan.parent[children].astype(np.int64), plan.compact_ids[children], token_edge)


def label_edges(plan: RadixPlan, labels: ArrayLike, *, ignore_index: int = -100) -> Edges:
    """Edges to labels, which need not be the batch's tokens: the row before a token predicts the token's label.

    Labels are aligned as in transformers, before its shift: `labels[i]` belongs to `input_ids[i]`.

    Args:
        plan: of the batch.
        labels: `[N]` integers; `ignore_index` where nothing counts.
        ignore_index: the label that does not count.

    Raises:
        InvalidInputError: `labels` has another length, or a label is neither an id (0 to 2**31 - 1) nor
            `ignore_index`.
        InvalidDtypeError: they are not integers.

    Examples:
        >>> from radix_mlp.plan import build_plan
        >>> plan = build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6])
        >>> edges = label_edges(plan, [-100, -100, 7, -100, 9, 8])
        >>> edges.parents[edges.parent_at].tolist(), edges.targets.tolist(), edges.token_edge.tolist()
        ([0, 1, 1], [9, 7, 8], [-1, -1, 1, -1, 0, 2])
    """
    values = _of_tokens("labels", labels, plan, np.integer).astype(np.int64)
    counts = _not_first(plan) & (values != ignore_index)
    tokens = np.flatnonzero(counts)
    for extreme in (values[tokens].min(initial=0), values[tokens].max(initial=0)):
        if not 0 <= extreme < 1 << 31:
            raise InvalidInputError(f"labels has {extreme}: labels are token ids, or {ignore_index} for none")
    rows = plan.unfold_index[tokens - 1].astype(np.int64)
    width = int(values[tokens].max(initial=0)) + 1
    keys, edge = np.unique(rows * width + values[tokens], return_inverse=True)
    token_edge = np.full(plan.num_tokens, -1, np.int64)
    token_edge[tokens] = edge
    return _edges(plan, keys // width, keys % width, token_edge)


def tokens_to_edges(values: Tensor, edges: Edges | DeviceEdges) -> Tensor:
    """`[N] -> [E]`: sums over the tokens that an edge predicts; first tokens and tokens not selected are left out.

    Turns the weights of a loss over tokens into weights of the same loss over edges.  Integers and bools are summed as
    float32.  Differentiable; the order of summation is fixed.

    Examples:
        >>> from radix_mlp.plan import build_plan
        >>> edges = tree_edges(build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6]))
        >>> tokens_to_edges(torch.tensor([9.0, 1.0, 2.0, 9.0, 3.0, 4.0]), edges)
        tensor([4., 2., 4.])
    """
    device_edges = _on_device("values", values, edges, "tokens")
    count = device_edges.edges.num_edges
    index = device_edges.token_edge
    values = values if values.is_floating_point() else values.float()
    # one more slot, for the tokens that no edge predicts
    return segment_sum(values, torch.where(index < 0, count, index), count + 1)[:count]


def edges_to_tokens(values: Tensor, edges: Edges | DeviceEdges) -> Tensor:
    """`[E] -> [N]`: every token's value from the edge that predicts it; 0 (False) for tokens without an edge.

    Differentiable; the order in which the gradient is summed is fixed.

    Examples:
        >>> from radix_mlp.plan import build_plan
        >>> edges = tree_edges(build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6]))
        >>> edges_to_tokens(torch.tensor([-1.0, -2.0, -3.0]), edges)
        tensor([ 0., -1., -2.,  0., -1., -3.])
    """
    device_edges = _on_device("values", values, edges, "edges")
    index = device_edges.token_edge
    if values.shape[0] == 0:
        # stays in the autograd graph, so that backward runs even if nothing is predicted
        return values.new_zeros(index.shape[0], *values.shape[1:]) + values.sum()
    copied = copy_rows(values, index.clamp(min=0))
    return copied.masked_fill((index < 0).view(-1, *[1] * (values.dim() - 1)), 0)


def sequence_sums(values: Tensor, edges: Edges | DeviceEdges) -> Tensor:
    """`[N] -> [S]`: sums over the tokens of every sequence, 0 for empty ones. Differentiable, in a fixed order.

    The log-probability of every sequence is `sequence_sums(edges_to_tokens(logprob, edges), edges)`.

    Examples:
        >>> from radix_mlp.plan import build_plan
        >>> edges = tree_edges(build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6]))
        >>> sequence_sums(torch.tensor([0.0, -1.0, -2.0, 0.0, -1.0, -3.0]), edges)
        tensor([-3., -4.])
    """
    device_edges = _on_device("values", values, edges, "tokens")
    values = values if values.is_floating_point() else values.float()
    return segment_sum(values, device_edges.token_sequence, device_edges.edges.num_sequences)


def _edges(
    plan: RadixPlan, rows: NDArray[np.int64], targets: NDArray[np.int64], token_edge: NDArray[np.int64]
) -> Edges:
    """From the ascending rows `[E]` of the edges."""
    parents, parent_at = np.unique(rows, return_inverse=True)
    sequence = np.repeat(np.arange(plan.num_sequences), np.diff(plan.cu_seq_lengths))
    return Edges(parents, parent_at, targets, token_edge, sequence, plan.num_sequences, plan.num_rows)


def _not_first(plan: RadixPlan) -> NDArray[np.bool_]:
    """`[N]` whether a token is not the first of its sequence."""
    counts = np.ones(plan.num_tokens, bool)
    starts = plan.cu_seq_lengths[:-1]
    counts[starts[starts < plan.num_tokens]] = False
    return counts


def _of_tokens(name: str, values: ArrayLike, plan: RadixPlan, kind: Any) -> NDArray[Any]:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.shape != (plan.num_tokens,):
        raise InvalidInputError(f"{name} is {array.shape}: pass one value per token, ({plan.num_tokens},), packed")
    if len(array) and not np.issubdtype(array.dtype, kind):
        raise InvalidDtypeError(f"{name} is {array.dtype}: pass {'bool' if kind is np.bool_ else 'integers'}")
    return array


def _on_device(name: str, values: Tensor, edges: Edges | DeviceEdges, what: str) -> DeviceEdges:
    check_tensors(**{name: values})
    host = edges if isinstance(edges, Edges) else edges.edges
    expected = host.num_tokens if what == "tokens" else host.num_edges
    if values.dim() == 0 or values.shape[0] != expected:
        raise InvalidInputError(f"{name} is {tuple(values.shape)}: the batch has {expected} {what}, which come first")
    device_edges = edges.to(values.device) if isinstance(edges, Edges) else edges
    if device_edges.token_edge.device != values.device:
        raise InvalidInputError(
            f"{name} is on {values.device}, the edges on {device_edges.token_edge.device}: use one device"
        )
    return device_edges
