"""Several clients at once, one of which sends texts that overflow: only its requests are refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import httpx
import torch
from fastapi import FastAPI

Running = Callable[..., AbstractAsyncContextManager[tuple[httpx.AsyncClient, FastAPI]]]


def test_only_the_culprits_requests_are_refused(running: Running) -> None:
    async def main() -> None:
        async with running() as (client, app):
            engine = app.state.service.engine
            engine.threshold = 1
            with torch.no_grad():
                engine.model.get_input_embeddings().weight[ord("~")] = float("inf")

            async def ask(number: int) -> list[int]:
                texts = [f"the {'~' if number == 0 else 'sky'} is {number} {turn}" for turn in range(10)]
                return [(await client.post("/embed", json={"inputs": text})).status_code for text in texts]

            culprit, *others = await asyncio.gather(*(ask(number) for number in range(8)))
            assert culprit == [424] * 10
            assert others == [[200] * 10] * 7

    asyncio.run(main())


def test_a_token_without_an_embedding_is_refused_alone(running: Running) -> None:
    async def main() -> None:
        async with running() as (client, app):
            # below the tokenizer's ids, as where it has more tokens than the model
            app.state.service.engine.model.resize_token_embeddings(ord("z"))
            asked = [
                client.post("/embed", json={"inputs": f"a {'z' if turn == 3 else 'y'} {turn}"}) for turn in range(6)
            ]
            codes = [answer.status_code for answer in await asyncio.gather(*asked)]
            assert codes == [200, 200, 200, 422, 200, 200]

    asyncio.run(main())
