"""What goes from the front to a replica, and back."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Answered", "Forwarded", "Headers"]

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class Forwarded:
    """A request, read to its end."""

    method: str
    path: str
    query: bytes = b""
    headers: Headers = ()
    body: bytes = field(default=b"", repr=False)
    key: bytes | None = field(default=None, repr=False)
    """Of `routing_key`."""


@dataclass(frozen=True)
class Answered:
    """Its answer."""

    status: int
    headers: Headers
    body: bytes = field(repr=False)
