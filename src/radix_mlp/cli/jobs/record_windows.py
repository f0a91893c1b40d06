"""Records -> windows, which fit into memory and are large enough to share prefixes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

from radix_mlp.cli.jobs.read import BadLine, Item, Record
from radix_mlp.errors import InvalidInputError

__all__ = ["DEFAULT_WINDOW", "MAX_CHARACTERS", "Window", "cut_windows", "whole_groups"]

DEFAULT_WINDOW = 16384
"""Records of a window."""
MAX_CHARACTERS = 2**26
"""A window with this many characters ends early."""


@dataclass(frozen=True)
class Window:
    """Neighbouring records and bad lines of the input; the same input is always cut into the same windows."""

    number: int
    items: list[Item]
    digest: str
    """Of all items up to the end of this window."""

    @property
    def records(self) -> list[Record]:
        """The items that can be run."""
        return [item for item in self.items if isinstance(item, Record)]


def cut_windows(
    items: Iterable[Item], size: int, *, with_files: bool = False, max_characters: int = MAX_CHARACTERS
) -> Iterator[Window]:
    """Cut after `size` items or `max_characters`, but never inside a group of neighbouring records.

    Args:
        with_files: whether the names of the files are part of the digest, as they are of the answers.

    Examples:
        >>> records = [Record(line, (text,), group=text) for line, text in enumerate("aabbbc", 1)]
        >>> [[record.line for record in window.records] for window in cut_windows(records, 3)]
        [[1, 2, 3, 4, 5], [6]]
    """
    digest = blake2b(digest_size=16)
    number, characters = 0, 0
    held: list[Item] = []
    for item in items:
        if held and (len(held) >= size or characters >= max_characters) and not _together(held[-1], item):
            yield Window(number, held, digest.hexdigest())
            number, characters, held = number + 1, 0, []
        held.append(item)
        values = item.values if isinstance(item, Record) else (item.reason,)
        characters += sum(map(len, values))
        parts = (str(item.line), item.file if with_files else "", str(getattr(item, "id", "")), *values)
        for part in parts:
            # the length first: no two lists of parts read the same
            encoded = part.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    if held:
        yield Window(number, held, digest.hexdigest())


def whole_groups(windows: Iterable[Window]) -> Iterator[Window]:
    """The windows unchanged, as long as no group continues in a later one.

    Raises:
        InvalidInputError: the documents of a query are too far apart to be ranked together.
    """
    seen: set[bytes] = set()
    for window in windows:
        groups: dict[bytes, Record] = {}
        for record in window.records:
            if isinstance(record.group, str):
                groups.setdefault(blake2b(record.group.encode(), digest_size=16).digest(), record)
        for key, record in groups.items():
            if key in seen:
                raise InvalidInputError(
                    f"{record.file}:{record.line}: this query came before, too far back to rank its documents "
                    "together. Sort the file by query, raise --window, or score without ranking: --no-sort."
                )
        seen.update(groups)
        yield window


def _together(one: Item, other: Item) -> bool:
    if isinstance(one, BadLine) or isinstance(other, BadLine):
        return False
    return one.group is not None and one.group == other.group
