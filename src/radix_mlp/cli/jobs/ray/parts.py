"""Which part of a job an item belongs to: ranges of token prefixes, cut where neighbours share least."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from zlib import crc32

from radix_mlp.cli.jobs.ray.items import BY_LINE, BY_QUERY
from radix_mlp.cli.jobs.store import Stretch

__all__ = ["Keys", "Sample", "choose_boundaries", "choose_stretches", "part_of"]

SAMPLES_A_PART = 64
MAX_SAMPLES = 200_000
BYTES_A_TOKEN = 4
STRETCHES, STRETCH_ITEMS = 4, 4096
"""How many items, in the order of arrival, are used to measure compression without the parts."""


@dataclass(frozen=True)
class Keys:
    """Makes the keys by which items are sorted.

    Args:
        model: whose tokenizer is used.
        trust_remote_code: as in `Engine`.
        ranked: documents of one query must stay in one part.
    """

    model: str
    trust_remote_code: bool
    ranked: bool

    def __call__(self, rows: Sequence[dict[str, Any]]) -> list[bytes]:
        """The ids of all tokens, then a suffix that distinguishes equal texts, unless they have to stay together."""
        from radix_mlp.integrations.ray import prefix_keys

        together = [self.ranked and row["group"] != 0 for row in rows]
        texts = [row["values"][:1] if whole else row["values"] for row, whole in zip(rows, together, strict=True)]
        keys = prefix_keys(_tokenizer(self.model, self.trust_remote_code), texts)
        return [key + self._end(row) for key, row in zip(keys, rows, strict=True)]

    def _end(self, row: dict[str, Any]) -> bytes:
        if self.ranked and row["group"] == BY_QUERY:
            return b""
        last = row["line"] if self.ranked and row["group"] == BY_LINE else row["number"]
        return b"".join(int(part).to_bytes(8, "big") for part in (0, row["file"], last))


@cache
def _tokenizer(model: str, trust_remote_code: bool) -> Any:
    from radix_mlp.models.load_tokenizer import tokenizer_of

    return tokenizer_of(model, trust_remote_code=trust_remote_code)


@dataclass
class Sample:
    """A sample of the keys that does not depend on the order in which the items arrive.

    Args:
        rate: one of this many items is taken; grows if there would be more than `most`.
        most: keys to keep.
    """

    rate: float
    keys: list[tuple[float, bytes]] = field(default_factory=list)
    most: int = MAX_SAMPLES

    @staticmethod
    def priority(file: int, number: int) -> float:
        """In [0, 1), the same for the same item."""
        return crc32(f"{file}:{number}".encode()) / 2**32

    def add(self, found: Iterable[tuple[float, bytes]]) -> None:
        """Take the items whose priority is low enough."""
        self.keys.extend((priority, key) for priority, key in found if priority < 1 / self.rate)
        while len(self.keys) > self.most:
            self.rate *= 2
            self.keys = [(priority, key) for priority, key in self.keys if priority < 1 / self.rate]


def choose_boundaries(keys: Iterable[bytes], num_parts: int) -> list[bytes]:
    """The first key of every part but the first, ascending, no longer than needed to distinguish neighbours.

    A boundary moves by an eighth of a part at most, to where the texts on both sides share least.

    >>> choose_boundaries([b"aaaa0001", b"aaaa0002", b"bbbb0003", b"bbbb0004"], 2)
    [b'bbbb']
    """
    ordered = sorted(keys)
    size = len(ordered) / max(num_parts, 1)
    found: list[bytes] = []
    for part in range(1, num_parts):
        middle = round(part * size)
        reach = int(size / 8)
        places = [place for place in range(middle - reach, middle + reach + 1) if 0 < place < len(ordered)]
        if not places:
            continue
        shared, _, best = min(
            (_shared(ordered[place - 1], ordered[place]), abs(place - middle), place) for place in places
        )
        boundary = ordered[best][: (shared // BYTES_A_TOKEN + 1) * BYTES_A_TOKEN]
        if boundary > ordered[best - 1] and (not found or boundary > found[-1]):
            found.append(boundary)
    return found


def part_of(key: bytes, boundaries: Sequence[bytes]) -> int:
    """The part in which a key lies."""
    return bisect_right(boundaries, key)


def choose_stretches(counts: Sequence[int]) -> list[Stretch]:
    """Neighbouring items, spread over all files; all items where they are few.

    >>> choose_stretches([10, 20])
    [(0, 0, 10), (1, 0, 20)]
    """
    total = sum(counts)
    if total <= STRETCHES * STRETCH_ITEMS:
        wanted = [(0, total)]
    else:
        starts = [(total - STRETCH_ITEMS) * place // (STRETCHES - 1) for place in range(STRETCHES)]
        wanted = [(start, start + STRETCH_ITEMS) for start in starts]
    found: list[Stretch] = []
    for start, end in wanted:
        before = 0
        for file, count in enumerate(counts):
            first, last = max(start - before, 0), min(end - before, count)
            if first < last:
                found.append((file, first, last))
            before += count
    return found


def _shared(one: bytes, other: bytes) -> int:
    """Bytes that two keys have in common at their beginning."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    low, high = 0, length
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
    return low
