"""Connections that would cost memory, or a file each, for ever."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from radix_mlp.serve.http.protocol import LimitedHttp

HEAD = b"POST / HTTP/1.1\r\nhost: a\r\n"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await asyncio.sleep(0.2 if body == b"slow" else 0)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(body)).encode()})


def talk(*parts: bytes | asyncio.Event, app: Any = echo, protocol: type[LimitedHttp] = LimitedHttp) -> bytes:
    """All that the server answers until it closes the connection; sends the part after an event once it is set."""

    async def main() -> bytes:
        config = uvicorn.Config(app, log_config=None, lifespan="off")
        config.load()
        server = await asyncio.get_running_loop().create_server(
            lambda: protocol(config=config, server_state=ServerState(), app_state={}), "127.0.0.1", 0
        )
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())

            async def send() -> None:
                try:
                    for part in parts:
                        if isinstance(part, asyncio.Event):
                            await part.wait()
                            continue
                        writer.write(part)
                        await writer.drain()
                except ConnectionError:
                    pass

            async with asyncio.timeout(60):
                sending = asyncio.create_task(send())
                found = b""
                try:
                    while part := await reader.read(65536):
                        found += part
                except ConnectionError:
                    pass
                await sending
            writer.close()
            return found

    return asyncio.run(main())


@pytest.mark.parametrize(
    "parts",
    [
        [HEAD, *[b"x-%d: " % number + b"a" * 1000 + b"\r\n" for number in range(20_000)]],
        [HEAD, b"x: ", *[b"a" * 10_000] * 2000],
        [b"POST /", *[b"a" * 10_000] * 2000],
        [HEAD, b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n", *[b"x: " + b"a" * 1000 + b"\r\n"] * 20_000],
        [HEAD, b"transfer-encoding: chunked\r\n\r\n", *[b"1;" + b"a" * 10_000] * 2000],
    ],
    ids=["headers", "header", "address", "trailers", "extensions"],
)
def test_what_is_not_body_is_limited(parts: list[bytes]) -> None:
    found = talk(*parts)
    # the connection may break before the answer is read
    assert found == b"" or found.startswith(b"HTTP/1.1 400 ")


def test_bodies_of_any_form_are_read() -> None:
    close = b"connection: close\r\n"
    chunked = HEAD + close + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 50_000 + b"0\r\n\r\n"
    assert b"\r\n50000\r\n" in talk(chunked)
    assert b"\r\n1000000\r\n" in talk(HEAD + close + b"content-length: 1000000\r\n\r\n" + b"a" * 1_000_000)
    several = HEAD + b"content-length: 60000\r\n\r\n" + b"a" * 60_000
    last = HEAD + close + b"x: " + b"a" * 60_000 + b"\r\n\r\n"
    assert talk(several * 5 + last).count(b"HTTP/1.1 200 OK") == 6


@pytest.mark.parametrize("part", [b"", HEAD])
def test_headers_that_do_not_come_are_not_waited_for(part: bytes) -> None:
    class Impatient(LimitedHttp):
        head_seconds = 0.1

    assert talk(part, protocol=Impatient) == b""


@pytest.mark.parametrize("body", [b"fast", b"slow"])
def test_the_next_headers_are_waited_for_while_an_answer_takes_long(body: bytes) -> None:
    called = asyncio.Event()

    class Impatient(LimitedHttp):
        pass

    async def app(scope: Any, receive: Any, send: Any) -> None:
        # from now on: the first request may come as slowly as it likes
        Impatient.head_seconds = 0.05
        called.set()
        await echo(scope, receive, send)

    assert (
        talk(HEAD + b"content-length: 4\r\n\r\n" + body, called, HEAD, app=app, protocol=Impatient).count(
            b"HTTP/1.1 200 OK"
        )
        == 1
    )


@pytest.mark.parametrize("whole", [True, False], ids=["at once", "byte by byte"])
def test_requests_that_offer_another_protocol_keep_their_body(whole: bool) -> None:
    # as Java's client asks, until it is told no
    offer = HEAD + b"connection: Upgrade, HTTP2-Settings\r\nhttp2-settings: AAMAAABk\r\nupgrade: h2c\r\n"
    websocket = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n"
    several = (
        offer + b"content-length: 5\r\n\r\nabcde",
        offer + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n",
        websocket,
        HEAD + b"connection: close\r\ncontent-length: 2\r\n\r\nab",
    )
    sent = b"".join(several)
    found = talk(*([sent] if whole else [sent[place : place + 1] for place in range(len(sent))]))
    # each answer is the length of a body, in a chunk of its own
    assert re.findall(rb"1\r\n(\d)\r\n0\r\n", found) == [b"5", b"7", b"0", b"2"]
    assert found.count(b"HTTP/1.1 200 OK") == 4


def test_a_proxy_is_not_what_this_is() -> None:
    assert talk(b"CONNECT a:80 HTTP/1.1\r\nhost: a\r\n\r\n").startswith(b"HTTP/1.1 400 ")
