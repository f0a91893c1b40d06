"""HTTP/1.1 with limits on what comes before a request's body and between its parts; uvicorn itself sets none."""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["LimitedHttp"]

MOST_BYTES = 65536
"""Of the address and headers, or of framing and trailers beyond what small chunks need."""
BYTES_A_BODY_BYTE = 8
"""A body sent a byte a chunk has six bytes for each."""
HEAD_SECONDS = 75.0
"""For the headers of a request, and for the first request of a connection: as long as an idle one is kept."""


class LimitedHttp(HttpToolsProtocol):
    """Closes connections whose headers are too long or do not come, which would cost memory, or a file each."""

    _bytes = 0
    _body_bytes = 0
    _timer: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._bytes += len(data)
        super().data_received(data)
        if self._bytes > MOST_BYTES + BYTES_A_BODY_BYTE * self._body_bytes and not self.transport.is_closing():
            self.send_400_response("Request header fields too large.")

    def on_message_begin(self) -> None:
        self._bytes = self._body_bytes = 0
        self._head_came()
        self._wait_for_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_came()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def _wait_for_head(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._no_head)

    def _head_came(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _no_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            # the request before is still being answered, and until then nothing more is read
            self._wait_for_head()
        else:
            self.transport.close()
