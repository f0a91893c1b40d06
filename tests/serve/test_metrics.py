"""The numbers for Prometheus, under text-embeddings-inference's names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import httpx
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

Running = Callable[..., AbstractAsyncContextManager[tuple[httpx.AsyncClient, FastAPI]]]


def test_requests_are_counted(running: Running) -> None:
    async def main() -> None:
        async with running() as (client, _):
            before = await numbers(client)
            text = "Query: what is a radix? Text: "
            assert (await client.post("/embed", json={"inputs": [text + "a root", text + "a fruit"]})).is_success
            assert (await client.post("/embed", json={"inputs": "a"})).is_success
            await client.post("/embed", json={"inputs": ["a"] * 33})
            await client.post("/embed", json={"inputs": []})
            await client.post("/predict", json={"inputs": "a"})
            now = await numbers(client)

        def more(name: str) -> float:
            return now[name] - before.get(name, 0.0)

        assert more('te_request_count{method="batch"}') == 1
        assert more('te_request_count{method="single"}') == 1
        assert more('te_request_success{method="batch"}') == 1
        assert more('te_request_failure{err="batch_size"}') == 1
        assert more('te_request_failure{err="validation"}') == 1
        assert more('te_request_failure{err="model_type"}') == 1
        assert (more("te_embed_count"), more("te_embed_success")) == (3, 3)
        assert more("te_request_duration_count") == 2
        assert more("te_embed_inference_duration_count") == 2
        assert more("te_batch_next_size_sum") == 3
        assert more("te_batch_next_tokens_sum") == more("radix_mlp_tokens_total") == 2 * len(text) + 14
        assert more("radix_mlp_compact_tokens_total") < more("radix_mlp_tokens_total")
        assert now["te_queue_size"] == now["radix_mlp_places_taken"] == 0

    asyncio.run(main())


async def numbers(client: httpx.AsyncClient) -> dict[str, float]:
    """Sample -> value, by a parser of the same format."""
    text = (await client.get("/metrics")).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found
