"""The definition of folding: a trie of Python dictionaries, one node per token. Slow, and meant to be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

__all__ = ["ReferenceFold", "reference_fold"]


@dataclass
class _Node:
    token: int
    children: dict[tuple[int, int], _Node] = field(default_factory=dict)
    row: int = -1


@dataclass
class ReferenceFold:
    """`compact[j] = original[fold_index[j]]`, `unfolded[i] = compact[unfold_index[i]]`."""

    fold_index: list[int]
    unfold_index: list[int]
    end: list[int] | None


def reference_fold(
    input_ids: Sequence[int], position_ids: Sequence[int], cu_seq_lengths: Sequence[int], *, depth_first: bool
) -> ReferenceFold:
    """Fold a batch: rows in depth-first preorder with `end`, or in order of first occurrence without it."""
    root = _Node(-1)
    node_of_token: list[_Node] = []
    for start, stop in pairwise(cu_seq_lengths):
        node = root
        for token in range(start, stop):
            node = node.children.setdefault((input_ids[token], position_ids[token]), _Node(token))
            node_of_token.append(node)
    nodes = list(_preorder(root))
    if not depth_first:
        nodes.sort(key=lambda node: node.token)
    for row, node in enumerate(nodes):
        node.row = row
    end = [row + sum(1 for _ in _preorder(node)) + 1 for row, node in enumerate(nodes)] if depth_first else None
    return ReferenceFold([node.token for node in nodes], [node.row for node in node_of_token], end)


def _preorder(root: _Node) -> Iterator[_Node]:
    stack = list(reversed(root.children.values()))
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.children.values()))
