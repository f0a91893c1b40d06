"""HTTP/1.1 with limits on what comes before a request's body and between its parts; uvicorn itself sets none."""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["LimitedHttp"]

MOST_BYTES = 65536
"""Of the address and headers, or of framing and trailers beyond what small chunks need."""
BYTES_A_BODY_BYTE = 8
"""A body sent a byte a chunk has six bytes for each."""


class _Parser(httptools.HttpRequestParser):
    """Keeps what follows the headers of a request that offers another protocol; it stops there."""

    rest: bytes = b""

    def feed_data(self, data: Any) -> None:
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self.rest = data[offer.args[0] :]
            raise


class LimitedHttp(HttpToolsProtocol):
    """Closes connections whose headers are too long or never arrive: they would use up memory or file descriptors.

    Ignores offers of other protocols: Java's client sends one for HTTP/2 with every request.
    """

    parser: _Parser
    head_seconds = 75.0
    """Limit for a request's headers, and for a connection's first request: as long as an idle connection is kept."""
    _bytes = 0
    _body_bytes = 0
    _timer: TimerHandle | None = None
    _without_offer: bytes | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._start_parser()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._bytes += len(data)
        super().data_received(data)
        while self._without_offer is not None and not self.transport.is_closing():
            data, self._without_offer = self._without_offer, None
            self._start_parser()
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
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _should_upgrade(self) -> bool:
        return False

    def _unsupported_upgrade_warning(self) -> None:
        """The parser takes such a request to have no body: it is read again, without the offer."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("This is no proxy.")
            return
        head = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
        head += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self._without_offer = b"\r\n".join([*head, b"", self.parser.rest])

    def _start_parser(self) -> None:
        self.parser = _Parser(self)
        # as uvicorn itself: what comes after the last request of a connection does not spoil that
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def _wait_for_head(self) -> None:
        self._timer = self.loop.call_later(self.head_seconds, self._no_head)

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
