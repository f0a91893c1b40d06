"""`ReplicaClient`: HTTP to a server that listens at a Unix socket, over kept connections (aiohttp)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import aiohttp
from yarl import URL

__all__ = ["ReplicaClient", "ReplicaLostError", "ReplicaRefusedError", "Reply"]

WHOLE_BYTES = 16 << 20
"""Answers up to this size are read to their end before a byte of them is passed on."""
BUFFERED_BYTES = 1 << 20
"""How much of a longer answer waits for a client that reads slowly."""
IDLE_SECONDS = 30.0
"""Idle connections are closed after this time; the server closes them after 75 s."""

Headers = list[tuple[bytes, bytes]]


class ReplicaLostError(ConnectionError):
    """The server closed the connection, or accepted none, before it had answered."""


class ReplicaRefusedError(ReplicaLostError):
    """The server accepts no connection, so the request was not sent."""


class ReplicaClient:
    """A server at a Unix socket. Make it and use it within one event loop.

    Args:
        path: the socket.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, method: str, target: str, headers: Iterable[tuple[str, str]] = (), body: bytes = b"") -> Reply:
        """Send a request and wait for the head of the answer, or for all of it where it is not too long.

        Args:
            method: `GET`, `POST`, ...
            target: path and query, percent-encoded.
            headers: sent as they are; aiohttp adds the host and the length of the body.
            body: the request's body.

        Raises:
            ReplicaRefusedError: the server accepts no connection.
            ReplicaLostError: the connection ended before the answer did.
        """
        url = URL(f"http://replica{target}", encoded=True)
        data = None if method in ("GET", "HEAD") and not body else body
        try:
            response = await self._open().request(method, url, headers=list(headers), data=data, allow_redirects=False)
            length = response.content_length
            whole = None if length is None or length > WHOLE_BYTES else await response.read()
        except aiohttp.ClientConnectorError as error:
            raise ReplicaRefusedError(f"{self.path}: {error.os_error.strerror or error}") from error
        except aiohttp.ClientError as error:
            raise _lost(error) from error
        return Reply(response, whole)

    async def close(self) -> None:
        """Close all connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # the number of requests is limited by the server
                connector=aiohttp.UnixConnector(str(self.path), limit=0, keepalive_timeout=IDLE_SECONDS),
                timeout=aiohttp.ClientTimeout(total=None),
                read_bufsize=BUFFERED_BYTES,
                # bodies and headers are passed on unchanged
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("accept", "accept-encoding", "content-type", "user-agent"),
            )
        return self._session


class Reply:
    """The answer to a request."""

    def __init__(self, response: aiohttp.ClientResponse, whole: bytes | None) -> None:
        self.status = response.status
        self.headers: Headers = [(name.lower(), value) for name, value in response.raw_headers]
        self._response = response
        self._whole = whole

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body: in one part, or in parts as they arrive where it is long or its length is unknown.

        Raises:
            ReplicaLostError: the connection ended first.
        """
        if self._whole is not None:
            if self._whole:
                yield self._whole
            return
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except aiohttp.ClientError as error:
            raise _lost(error) from error

    def abort(self) -> None:
        """Drop what has not been read; after the end of the body this does nothing."""
        self._response.close()


def _lost(error: Exception) -> ReplicaLostError:
    return ReplicaLostError(f"the connection ended before the answer did: {error}")
