"""`Service`: what every route does with the engine: places, deadlines, metrics, large batches in parts."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from radix_mlp.engine.async_engine import Answer, AsyncEngine, TokenScores
from radix_mlp.engine.engine import Engine
from radix_mlp.engine.tasks.classify import Labels
from radix_mlp.engine.tasks.score import Score
from radix_mlp.engine.tokenization.token_ids import TextOrIds
from radix_mlp.serve.checked_inputs import Inputs
from radix_mlp.serve.http.errors import EmptyInputError
from radix_mlp.serve.http.limits import Places, check_not_empty
from radix_mlp.serve.metrics import Metrics
from radix_mlp.serve.model_info import ModelInfo, model_info
from radix_mlp.serve.settings import POOLING_NAMES, ServeSettings
from radix_mlp.serve.supervisor import Supervisor
from radix_mlp.serve.tokenizer import Tokens

__all__ = ["Service"]

Value = TypeVar("Value")


class Service:
    """One model served: the state that all routes share."""

    def __init__(self, engine: Engine, settings: ServeSettings, sha: str | None = None) -> None:
        self.settings = settings
        self.engine = engine
        self.info: ModelInfo = model_info(engine, settings, sha)
        self.metrics = Metrics(self.info.max_input_length)
        self.places = Places(settings.max_concurrent_requests)
        self.tokens = Tokens(engine, self.info.max_input_length)
        self.inputs = Inputs(engine, settings, self.info, self.tokens)
        self.supervisor = Supervisor(engine, settings, self.metrics, self._probe)
        self.metrics.watch(lambda: self.supervisor.queue_depth, lambda: self.places.taken)
        self.started = int(time.time())
        self._pooling: Any = POOLING_NAMES[settings.pooling] if settings.pooling else None
        self._template: Any = self.info.template or "auto"

    async def start(self) -> None:
        """Take requests from now on, after a first one that compiles what is compiled once."""
        await self.supervisor.start()
        await self._probe(self.supervisor.front, None)

    async def aclose(self) -> None:
        """Answer what was accepted, and end."""
        await self.supervisor.aclose(self.settings.shutdown_timeout)
        self.tokens.close()

    async def embed(
        self,
        texts: Sequence[TextOrIds],
        *,
        prompt_name: str | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
        truncate: bool | None = None,
        max_tokens: int | None = None,
        left: bool = False,
        name: str = "inputs",
        single: bool = False,
        num_items: int | None = None,
    ) -> Answer[NDArray[np.float32]]:
        """A vector a text, `[n, d]`; the batch limit counts `num_items`, unless all texts."""
        self.info.require("embedding")
        self.inputs.check_size(len(texts) if num_items is None else num_items, len(texts))
        self.inputs.check_dimensions(dimensions)
        texts, prompts, cut = await self.inputs.texts(texts, prompt_name, truncate, max_tokens, left, name)

        async def part(front: AsyncEngine, items: Sequence[TextOrIds], timeout: float | None) -> Any:
            return await front.embed(
                items,
                **prompts,
                normalize=normalize,
                dimensions=dimensions,
                pooling=self._pooling,
                truncate=cut,
                timeout=timeout,
            )

        return await self._run("embed", part, texts, np.concatenate, single=single, num_items=num_items)

    async def embed_tokens(
        self,
        texts: Sequence[TextOrIds],
        *,
        prompt_name: str | None = None,
        truncate: bool | None = None,
        max_tokens: int | None = None,
        left: bool = False,
        name: str = "inputs",
        single: bool = False,
    ) -> Answer[list[NDArray[np.float32]]]:
        """A vector a token."""
        self.info.require("embedding")
        self.inputs.check_size(len(texts))
        texts, prompts, cut = await self.inputs.texts(texts, prompt_name, truncate, max_tokens, left, name)

        async def part(front: AsyncEngine, items: Sequence[TextOrIds], timeout: float | None) -> Any:
            return await front.embed_tokens(items, **prompts, truncate=cut, timeout=timeout)

        return await self._run("embed", part, texts, _join, single=single)

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        raw_scores: bool = False,
        truncate: bool | None = None,
        max_tokens: int | None = None,
        name: str = "texts",
    ) -> Answer[NDArray[np.float64]]:
        """How relevant every document is to the query."""
        self.info.require("reranker")
        self.inputs.check_size(len(documents))
        check_not_empty([query], "query")
        if not documents:
            raise EmptyInputError(f"`{name}` cannot be empty")
        cut = self.inputs.cutting_pairs(truncate, max_tokens)
        await self.inputs.check_heads([query], instruction)
        documents = [self.inputs.cut(document, truncate=cut, name=name) for document in documents]

        async def part(front: AsyncEngine, items: Sequence[str], timeout: float | None) -> Any:
            return await front.rerank(
                query,
                items,
                instruction=instruction,
                template=self._template,
                raw_scores=raw_scores,
                truncate=cut,
                timeout=timeout,
            )

        return await self._run("predict", part, documents, np.concatenate)

    async def rerank_pairs(
        self, pairs: Sequence[tuple[str, str]], *, instruction: str | None = None, max_tokens: int | None = None
    ) -> Answer[NDArray[np.float64]]:
        """How relevant every pair's document is to its query."""
        self.info.require("reranker")
        self.inputs.check_size(len(pairs))
        check_not_empty([query for query, _ in pairs], "query")
        cut = self.inputs.cutting_pairs(None, max_tokens)
        await self.inputs.check_heads([query for query, _ in pairs], instruction)
        checked = []
        for query, document in pairs:
            checked.append((query, self.inputs.cut(document, truncate=cut, name="documents")))

        async def part(front: AsyncEngine, items: Sequence[tuple[str, str]], timeout: float | None) -> Any:
            places: dict[str, list[int]] = {}
            for index, (query, _) in enumerate(items):
                places.setdefault(query, []).append(index)
            calls = [
                front.rerank(
                    query,
                    [items[index][1] for index in indices],
                    instruction=instruction,
                    template=self._template,
                    truncate=cut,
                    timeout=timeout,
                )
                for query, indices in places.items()
            ]
            answer = _joined(list(await asyncio.gather(*calls)), np.concatenate)
            order = np.concatenate(list(places.values()))
            scores = np.empty(len(items))
            scores[order] = answer.value
            return replace(answer, value=scores)

        return await self._run("predict", part, checked, np.concatenate)

    async def classify(
        self,
        inputs: Sequence[TextOrIds | tuple[str, str]],
        *,
        raw_scores: bool = False,
        truncate: bool | None = None,
        max_tokens: int | None = None,
        left: bool = False,
        single: bool = False,
        name: str = "inputs",
    ) -> Answer[list[Labels]]:
        """The labels of every text or pair, the highest score first."""
        self.inputs.check_size(len(inputs))
        items, cut = await self.inputs.texts_or_pairs(inputs, truncate, max_tokens, left, name)

        async def part(front: AsyncEngine, items: Sequence[Any], timeout: float | None) -> Any:
            return await front.classify(items, raw_scores=raw_scores, truncate=cut, timeout=timeout)

        return await self._run("predict", part, items, _join, single=single)

    async def score(self, pairs: Sequence[tuple[TextOrIds, TextOrIds]], *, num_items: int) -> Answer[list[Score]]:
        """Log-probability of every continuation; the batch limit counts `num_items`, of which the pairs are made."""
        for pair in pairs:
            self.inputs.check_ids(pair, "label_token_ids and items")

        async def part(front: AsyncEngine, items: Sequence[Any], timeout: float | None) -> Any:
            return await front.score(items, timeout=timeout)

        return await self._run("score", part, pairs, _join, num_items=num_items)

    async def token_scores(self, texts: Sequence[TextOrIds], *, single: bool = False) -> Answer[list[TokenScores]]:
        """Log-probability of every token, with the likeliest in its place."""
        self.inputs.check_size(len(texts))
        check_not_empty(texts, "prompt")
        self.inputs.check_ids(texts, "prompt")

        async def part(front: AsyncEngine, items: Sequence[TextOrIds], timeout: float | None) -> Any:
            return await front.token_scores(items, top=1, timeout=timeout)

        return await self._run("score", part, texts, _join, single=single)

    async def _probe(self, front: AsyncEngine, timeout: float | None) -> None:
        """A small call of what the model is for."""
        texts = ["warm-up", "warm up"]
        if self.info.type == "embedding":
            await front.embed(texts, prompt="", pooling=self._pooling, timeout=timeout)
        elif self.info.type == "reranker":
            await front.rerank("warm-up", texts, template=self._template, timeout=timeout)
        else:
            await front.classify(texts, timeout=timeout)

    async def _run(
        self,
        task: str,
        part: Callable[..., Awaitable[Answer[Value]]],
        items: Sequence[Any],
        join: Callable[[list[Value]], Value],
        *,
        single: bool = False,
        num_items: int | None = None,
    ) -> Answer[Value]:
        """Run all items, in parts where that is allowed and needed; `num_items` is what the client sent."""
        settings = self.settings
        self.inputs.check_size(len(items) if num_items is None else num_items, len(items))
        most = len(items)
        if settings.split_client_batches:
            most = max(settings.max_client_batch_size, settings.max_concurrent_requests // 4)
        method: Literal["single", "batch"] = "single" if single else "batch"
        self.metrics.requests.labels(method=method).inc()
        if task in self.metrics.counts:
            self.metrics.counts[task].inc(len(items))
        began = time.monotonic()
        deadline = None if settings.request_timeout is None else began + settings.request_timeout
        answers: list[Answer[Value]] = []
        with self.places.take(min(most, len(items))):
            for first in range(0, len(items), most):
                left = None if deadline is None else max(0.001, deadline - time.monotonic())
                some = items[first : first + most]
                answers.append(await self.supervisor.run(partial(part, items=some, timeout=left)))
        answer = answers[0] if len(answers) == 1 else _joined(answers, join)
        self.metrics.observe_answer(task, method, len(items), time.monotonic() - began, answer)
        return answer


def _join(parts: list[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(parts))


def _joined(answers: list[Answer[Value]], join: Callable[[list[Value]], Value]) -> Answer[Value]:
    """One answer from those of the parts."""

    def total(field: str) -> Any:
        return sum(getattr(answer, field) for answer in answers)

    fields = [field for field in Answer.__dataclass_fields__ if field != "value"]
    return Answer(value=join([answer.value for answer in answers]), **{field: total(field) for field in fields})
