"""The bytes of a file -> its text: compression and encoding are recognised by the first bytes."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterable
from typing import Any

from radix_mlp.errors import InvalidInputError

__all__ = ["COMPRESSED_SUFFIXES", "text_of"]

COMPRESSED_SUFFIXES = (".gz", ".zst", ".zstd")
"""Endings of names that say that the file is compressed."""

GZIP, ZSTD = "gzip", "zstd"
COMPRESSIONS = {
    b"\x1f\x8b": GZIP,
    b"\x28\xb5\x2f\xfd": ZSTD,
    # a frame to be skipped, with which parallel compressors begin
    **{bytes([0x50 + kind]) + b"\x2a\x4d\x18": ZSTD for kind in range(16)},
}
OTHERS = {
    **{b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)},
    b"\xfd7zXZ\x00": "xz",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "a zip archive (or a spreadsheet)",
    b"PAR1\x15": "Parquet",
    b"ARROW1\x00\x00": "Arrow",
    b"\x93NUMPY": "a NumPy array",
}
"""Formats that are recognised but not read."""
ENCODINGS = {
    b"\xef\xbb\xbf": "utf-8",
    # before UTF-16, whose mark it begins with
    b"\xff\xfe\x00\x00": "utf-32-le",
    b"\x00\x00\xfe\xff": "utf-32-be",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}
"""By their byte-order marks."""
ZEROS = ([False, True, False, True], [True, False, True, False], [False, True, True, True], [True, True, True, False])
"""Where bytes are 0 in two letters of UTF-16 or one of UTF-32."""
BUFFER_BYTES = 2**16


def text_of(stream: Any, shown: str, on_read: Callable[[int], None], *, may_hold_nul: bool) -> io.TextIOWrapper:
    r"""The text of a binary stream, with its line ends; bytes that are not UTF-8 become lone surrogates.

    Args:
        stream: read once, from its current position, and left open.
        shown: the file's name; if it ends in one of `COMPRESSED_SUFFIXES`, its content must be compressed.
        on_read: gets the number of bytes each time that some are read.
        may_hold_nul: whether texts may begin with NUL characters, which then do not reveal an encoding.

    Raises:
        InvalidInputError: a format of other first bytes than text.

    Examples:
        >>> text_of(io.BytesIO("naïve".encode("utf-16")), "a.txt", lambda count: None, may_hold_nul=True).read()
        'naïve'
    """
    head, whole = _peeked(stream, (*COMPRESSIONS, *OTHERS, *ENCODINGS), on_read)
    compression = _known(head, COMPRESSIONS)
    if compression is None and shown.lower().endswith(COMPRESSED_SUFFIXES):
        raise InvalidInputError(f"{shown}: neither gzip nor zstd, as its name says. Rename it, or compress it again.")
    if compression is not None:
        head, whole = _peeked(_decompressed(whole, compression), (*OTHERS, *ENCODINGS), lambda count: None)
    if (other := _known(head, OTHERS)) is not None:
        raise InvalidInputError(f"{shown}: this is {other}, by its first bytes. {_remedy(other)}")
    encoding = _known(head, ENCODINGS)
    if encoding is None and not may_hold_nul and [byte == 0 for byte in head[:4]] in ZEROS:
        raise InvalidInputError(
            f"{shown}: not UTF-8: its first bytes look like UTF-16 or UTF-32 without a byte-order mark. Save it as "
            "UTF-8."
        )
    whole.read(0 if encoding is None else next(len(mark) for mark in ENCODINGS if head.startswith(mark)))
    errors = "surrogateescape" if encoding in (None, "utf-8") else "surrogatepass"
    return io.TextIOWrapper(whole, encoding=encoding or "utf-8", errors=errors, newline="\n")


class _Rejoined(io.RawIOBase):
    """A stream whose first bytes were read already; closing it leaves the stream open."""

    def __init__(self, head: bytes, stream: Any, on_read: Callable[[int], None]) -> None:
        self.head = head
        self.on_read = on_read
        # from a pipe, only what has arrived: waiting for more may take long
        self.read_some = getattr(stream, "read1", stream.read)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.head:
            found, self.head = self.head[: len(buffer)], self.head[len(buffer) :]
        else:
            found = self.read_some(len(buffer))
        buffer[: len(found)] = found
        self.on_read(len(found))
        return len(found)


def _peeked(stream: Any, marks: Iterable[bytes], on_read: Callable[[int], None]) -> tuple[bytes, io.BufferedReader]:
    """The first bytes, enough to recognise one of `marks`, and a stream of all bytes."""
    head = b""
    read_some = getattr(stream, "read1", stream.read)
    marks = list(marks)
    while not head or any(len(head) < len(mark) and mark.startswith(head) for mark in marks):
        more = read_some(max(map(len, marks)) - len(head))
        if not more:
            break
        head += more
    return head, io.BufferedReader(_Rejoined(head, stream, on_read), BUFFER_BYTES)


def _known(head: bytes, marks: dict[bytes, str]) -> str | None:
    return next((name for mark, name in marks.items() if head.startswith(mark)), None)


def _decompressed(stream: io.BufferedReader, compression: str) -> Any:
    if compression == GZIP:
        return gzip.GzipFile(fileobj=stream)
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), ZSTD)


def _remedy(other: str) -> str:
    if other == "Parquet":
        return "Say so with --format parquet."
    if other in ("bzip2", "xz", "lz4") or "archive" in other:
        return "Unpack it first; gzip and zstd are read as they are."
    return "Convert it to JSON lines, CSV or Parquet."
