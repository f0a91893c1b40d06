"""`Upstream`: requests over kept connections to a server that listens at a Unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httptools

__all__ = ["Reply", "Upstream", "UpstreamLostError", "UpstreamRefusedError"]

WHOLE_BYTES = 16 << 20
"""Answers up to this size are read to their end before a byte of them is handed on."""
BUFFERED_BYTES = 1 << 20
"""Of a longer answer, what waits for a client that reads slowly."""
IDLE_SECONDS = 30.0
"""Connections unused for longer are not used again: the server closes them after 75."""

Headers = list[tuple[bytes, bytes]]


class UpstreamLostError(ConnectionError):
    """The server closed the connection, or took none, before it had answered."""


class UpstreamRefusedError(UpstreamLostError):
    """The server takes no connection, so the request was not sent."""


class Upstream:
    """A server at a Unix socket.

    Args:
        path: the socket.

    Example:
        >>> Upstream(Path("/no/such/socket")).num_idle
        0
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._idle: list[_Connection] = []

    @property
    def num_idle(self) -> int:
        """Connections that wait for a request."""
        return len(self._idle)

    async def ask(self, head: bytes, body: bytes = b"") -> Reply:
        """Send a request, and wait for the head of the answer, or for all of it where it is not too long.

        Args:
            head: request line and headers, with the empty line after them; `content-length` is one if it has a body.
            body: the request's.

        Raises:
            UpstreamRefusedError: the server takes no connection.
            UpstreamLostError: the connection ended first.
        """
        connection = self._taken()
        if connection is not None:
            try:
                return await connection.ask(head, body)
            except _StaleError:
                # it was closed while nobody used it; the request did not arrive
                pass
        connection = await self._connected()
        return await connection.ask(head, body)

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().abort()

    def _taken(self) -> _Connection | None:
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and now - connection.used < IDLE_SECONDS:
                return connection
            connection.abort()
        return None

    async def _connected(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_unix_connection(lambda: _Connection(self._idle), str(self.path))
        except OSError as error:
            raise UpstreamRefusedError(f"{self.path}: {error.strerror or error}") from error
        return connection


class Reply:
    """The answer to a request."""

    def __init__(self, status: int, headers: Headers, connection: _Connection) -> None:
        self.status = status
        self.headers = headers
        self._connection = connection

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body, in parts as they come: in one, unless it is long or its length is not told.

        Raises:
            UpstreamLostError: the connection ended first.
        """
        while chunk := await self._connection.next_chunk():
            yield chunk

    def abort(self) -> None:
        """Do not read the rest."""
        self._connection.end_of_interest()


class _StaleError(UpstreamLostError):
    """A connection that was used before ended without a byte of an answer."""


class _Connection(asyncio.Protocol):
    """One request at a time; goes back to `idle` when its answer has been read."""

    def __init__(self, idle: list[_Connection]) -> None:
        self._idle = idle
        self._transport: Any = None
        self._changed = asyncio.Event()
        self._num_requests = 0
        self._parser: Any = None
        self._is_done = True
        self.is_open = False
        self.used = 0.0

    async def ask(self, head: bytes, body: bytes) -> Reply:
        self._num_requests += 1
        self._headers: Headers = []
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._has_head = self._has_answered = self._is_done = self._is_whole = False
        self._has_no_body = head.startswith(b"HEAD ")
        self._parser = httptools.HttpResponseParser(self)
        self._changed.clear()
        try:
            self._transport.writelines((head, body) if body else (head,))
            while not (self._is_done if self._is_whole else self._has_head):
                if not self.is_open:
                    raise self._lost()
                await self._change()
        except BaseException:
            self.abort()
            raise
        return Reply(self._parser.get_status_code(), self._headers, self)

    async def next_chunk(self) -> bytes:
        """What has come of the body; nothing at its end."""
        while not self._chunks and not self._is_done:
            if not self.is_open:
                raise self._lost()
            await self._change()
        found = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        if self._buffered > BUFFERED_BYTES and self.is_open:
            self._transport.resume_reading()
        self._buffered = 0
        if not found:
            self.end_of_interest()
        return found

    def end_of_interest(self) -> None:
        """Keep the connection if all of the answer was read; a second call does nothing."""
        if self._parser is None:
            return
        reusable = self._is_done and self.is_open and self._can_be_kept
        self._parser = None
        if reusable:
            self.used = asyncio.get_running_loop().time()
            self._idle.append(self)
        else:
            self.abort()

    def abort(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _lost(self) -> UpstreamLostError:
        stale = self._num_requests > 1 and not self._has_answered
        return (_StaleError if stale else UpstreamLostError)("the connection ended before the answer did")

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.is_open = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._changed.set()

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._is_done:
            # nothing was asked
            self.abort()
            return
        self._has_answered = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort()
        self._changed.set()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._has_head = True
        # known here only: at the end of the message the parser is ready for another
        self._can_be_kept = self._parser.should_keep_alive() and not self._has_no_body
        length = dict(self._headers).get(b"content-length", b"")
        self._is_whole = length.isdigit() and int(length) <= WHOLE_BYTES
        if self._has_no_body:
            self._is_done = True

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        if not self._is_whole:
            self._buffered += len(body)
            if self._buffered > BUFFERED_BYTES:
                self._transport.pause_reading()

    def on_message_complete(self) -> None:
        self._is_done = True
