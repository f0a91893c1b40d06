"""A path-compressed prefix tree of waiting sequences: who shares how much with whom. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np

from radix_mlp.engine.batching.scheduler import Ids, common_prefix

__all__ = ["RadixNode", "RadixTree"]

Entry = TypeVar("Entry")

_NO_IDS: Ids = np.zeros(0, np.int32)


class RadixNode(Generic[Entry]):
    """The end of a run of tokens; its entries end here or below."""

    __slots__ = ("children", "depth", "entries", "ids", "num_entries", "parent")

    def __init__(self, ids: Ids, parent: RadixNode[Entry] | None) -> None:
        self.ids = ids
        """Tokens between the parent and this node."""
        self.parent = parent
        self.depth: int = len(ids) + (parent.depth if parent is not None else 0)
        """Tokens from the root to here."""
        self.children: dict[int, RadixNode[Entry]] = {}
        """By their first token."""
        self.entries: dict[Entry, None] = {}
        """Those that end here, in the order in which they came."""
        self.num_entries = 0
        """Of the whole subtree."""


class RadixTree(Generic[Entry]):
    """Sequences by their prefixes, with an entry of the caller's for each.

    Examples:
        >>> import numpy as np
        >>> tree = RadixTree()
        >>> for name, ids in [("a", [1, 2, 3]), ("b", [1, 2, 4]), ("c", [9])]:
        ...     tree.insert(name, np.array(ids, np.int32))
        >>> tree.num_compact, list(tree.neighbours("a"))
        (5, ['a', 'b', 'c'])
    """

    def __init__(self) -> None:
        self.root: RadixNode[Entry] = RadixNode(_NO_IDS, None)
        self.num_compact = 0
        """Nodes of the uncompressed tree: unique tokens of all entries."""
        self._node_of: dict[Entry, RadixNode[Entry]] = {}

    def __len__(self) -> int:
        return len(self._node_of)

    def node_of(self, entry: Entry) -> RadixNode[Entry]:
        """Where the entry's sequence ends."""
        return self._node_of[entry]

    def insert(self, entry: Entry, ids: Ids) -> None:
        """Add an entry, which must not be in the tree; copies of a sequence share a node."""
        node, place = self.root, 0
        while place < len(ids):
            child = node.children.get(int(ids[place]))
            if child is None:
                # a copy: a slice would keep the whole sequence alive as long as the node
                child = self._add(node, ids[place:].copy())
                self.num_compact += len(child.ids)
            else:
                shared = common_prefix(child.ids, ids[place:])
                if shared < len(child.ids):
                    child = self._split(child, shared)
            node, place = child, child.depth
        node.entries[entry] = None
        self._node_of[entry] = node
        _count(node, 1)

    def remove(self, entry: Entry) -> None:
        """Take an entry out, and the tokens that were its alone."""
        node = self._node_of.pop(entry)
        del node.entries[entry]
        _count(node, -1)
        while node.num_entries == 0 and node.parent is not None:
            parent = node.parent
            del parent.children[int(node.ids[0])]
            self.num_compact -= len(node.ids)
            node = parent
        self._merge(node)

    def neighbours(self, entry: Entry, min_shared: int = 0) -> Iterator[Entry]:
        """All entries that share at least `min_shared` tokens with this one, those that share most first."""
        node: RadixNode[Entry] | None = self._node_of[entry]
        seen: RadixNode[Entry] | None = None
        while node is not None and node.depth >= min_shared:
            yield from node.entries
            waiting = [child for child in reversed(node.children.values()) if child is not seen]
            while waiting:
                below = waiting.pop()
                yield from below.entries
                waiting.extend(reversed(below.children.values()))
            node, seen = node.parent, node

    def _add(self, parent: RadixNode[Entry], ids: Ids) -> RadixNode[Entry]:
        child: RadixNode[Entry] = RadixNode(ids, parent)
        parent.children[int(ids[0])] = child
        return child

    def _split(self, child: RadixNode[Entry], length: int) -> RadixNode[Entry]:
        """A new node `length` tokens into the child's run."""
        assert child.parent is not None
        upper = self._add(child.parent, child.ids[:length])
        upper.num_entries = child.num_entries
        child.ids, child.parent = child.ids[length:], upper
        upper.children[int(child.ids[0])] = child
        return upper

    def _merge(self, node: RadixNode[Entry]) -> None:
        """Join a node with its only child, where nothing ends between them."""
        if node.parent is None or node.entries or len(node.children) != 1:
            return
        (child,) = node.children.values()
        child.ids, child.parent = np.concatenate([node.ids, child.ids]), node.parent
        node.parent.children[int(node.ids[0])] = child


def _count(node: RadixNode[Entry], change: int) -> None:
    above: RadixNode[Entry] | None = node
    while above is not None:
        above.num_entries += change
        above = above.parent
