"""`Service`: what every route does with the engine: limits, places, deadlines, metrics, large batches in parts."""

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
from radix_mlp.engine.classify import Label
from radix_mlp.engine.engine import Engine
from radix_mlp.engine.pooler import pooler_of
from radix_mlp.engine.score import Score
from radix_mlp.engine.token_ids import TextOrIds
from radix_mlp.errors import InvalidInputError
from radix_mlp.serve.errors import EmptyInputError
from radix_mlp.serve.float_json import json_rows
from radix_mlp.serve.limits import Places, check_batch_size, check_not_empty, check_unicode, cut_characters
from radix_mlp.serve.metrics import Metrics
from radix_mlp.serve.model_info import ModelInfo, model_info
from radix_mlp.serve.settings import POOLING_NAMES, ServeSettings
from radix_mlp.serve.supervisor import Supervisor
from radix_mlp.serve.tokens import Tokens

__all__ = ["Service"]

Value = TypeVar("Value")

CHARACTERS_UNCHECKED = 8
"""For each token of the limit: what is not longer is tokenised together with documents only."""


class Service:
    """One model served: the state that all routes share."""

    def __init__(self, engine: Engine, settings: ServeSettings, sha: str | None = None) -> None:
        self.settings = settings
        self.engine = engine
        self.info: ModelInfo = model_info(engine, settings, sha)
        self.metrics = Metrics(self.info.max_input_length)
        self.places = Places(settings.max_concurrent_requests)
        self.tokens = Tokens(engine, self.info.max_input_length)
        self.supervisor = Supervisor(engine, settings, self.metrics, self._probe)
        self.metrics.watch(lambda: self.supervisor.queue_depth, lambda: self.places.taken)
        self.started = int(time.time())
        self._pooling: Any = POOLING_NAMES[settings.pooling] if settings.pooling else None
        is_embedding = self.info.type == "embedding"
        self._pools_prompt = not is_embedding or pooler_of(engine.folder, self._pooling).include_prompt

    async def start(self) -> None:
        """Take requests from now on, after a first one that compiles what is compiled once."""
        await self.supervisor.start()
        await self._probe(self.supervisor.front, None)
        if self.info.type == "embedding":
            await asyncio.to_thread(json_rows, np.zeros((1, 1), np.float32))

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
        self.check_size(len(texts) if num_items is None else num_items, len(texts))
        self._check_dimensions(dimensions)
        texts, prompts, cut = await self._texts(texts, prompt_name, truncate, max_tokens, left, name)

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
        self.check_size(len(texts))
        texts, prompts, cut = await self._texts(texts, prompt_name, truncate, max_tokens, left, name)

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
        self.check_size(len(documents))
        check_not_empty([query], "query")
        if not documents:
            raise EmptyInputError(f"`{name}` cannot be empty")
        cut = self._cutting_pairs(truncate, max_tokens)
        await self._check_heads([query], instruction)
        documents = [self._cut(document, truncate=cut, name=name) for document in documents]

        async def part(front: AsyncEngine, items: Sequence[str], timeout: float | None) -> Any:
            return await front.rerank(
                query, items, instruction=instruction, raw_scores=raw_scores, truncate=cut, timeout=timeout
            )

        return await self._run("predict", part, documents, np.concatenate)

    async def rerank_pairs(
        self, pairs: Sequence[tuple[str, str]], *, instruction: str | None = None, max_tokens: int | None = None
    ) -> Answer[NDArray[np.float64]]:
        """How relevant every pair's document is to its query."""
        self.info.require("reranker")
        self.check_size(len(pairs))
        check_not_empty([query for query, _ in pairs], "query")
        cut = self._cutting_pairs(None, max_tokens)
        await self._check_heads([query for query, _ in pairs], instruction)
        checked = []
        for query, document in pairs:
            checked.append((query, self._cut(document, truncate=cut, name="documents")))

        async def part(front: AsyncEngine, items: Sequence[tuple[str, str]], timeout: float | None) -> Any:
            places: dict[str, list[int]] = {}
            for index, (query, _) in enumerate(items):
                places.setdefault(query, []).append(index)
            calls = [
                front.rerank(
                    query,
                    [items[index][1] for index in indices],
                    instruction=instruction,
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
    ) -> Answer[list[list[Label]]]:
        """The labels of every text or pair, the highest score first."""
        self.check_size(len(inputs))
        check_not_empty(["".join(item) if isinstance(item, tuple) else item for item in inputs], name)
        cut, limit = self._cutting(truncate, max_tokens)
        items: list[Any] = []
        for item in inputs:
            pair = isinstance(item, tuple)
            if pair and left and cut:
                raise InvalidInputError("`truncation_direction` left: pairs of texts are cut on the right only.")
            parts = [self._cut(part, truncate=cut, name=name, left=left) for part in (item if pair else (item,))]
            items.append(tuple(parts) if pair else parts[0])
        if (left and cut) or limit is not None:
            limit = self.info.max_input_length if limit is None else limit
            items = await self.tokens.cut(items, limit, left=left)

        async def part(front: AsyncEngine, items: Sequence[Any], timeout: float | None) -> Any:
            return await front.classify(items, raw_scores=raw_scores, truncate=cut, timeout=timeout)

        return await self._run("predict", part, items, _join, single=single)

    async def score(self, pairs: Sequence[tuple[TextOrIds, TextOrIds]], *, num_items: int) -> Answer[list[Score]]:
        """Log-probability of every continuation; the batch limit counts `num_items`, of which the pairs are made."""
        for pair in pairs:
            self._check_ids(pair, "label_token_ids and items")

        async def part(front: AsyncEngine, items: Sequence[Any], timeout: float | None) -> Any:
            return await front.score(items, timeout=timeout)

        return await self._run("score", part, pairs, _join, num_items=num_items)

    async def token_scores(self, texts: Sequence[TextOrIds], *, single: bool = False) -> Answer[list[TokenScores]]:
        """Log-probability of every token, with the likeliest in its place."""
        self.check_size(len(texts))
        check_not_empty(texts, "prompt")
        self._check_ids(texts, "prompt")

        async def part(front: AsyncEngine, items: Sequence[TextOrIds], timeout: float | None) -> Any:
            return await front.token_scores(items, top=1, timeout=timeout)

        return await self._run("score", part, texts, _join, single=single)

    def check_size(self, num_items: int, num_texts: int | None = None) -> None:
        """Refuse what could never run: too many items of a client, or more texts of them than there are places.

        Raises:
            BatchTooLargeError: it is too large, and large requests do not run in parts.
        """
        settings = self.settings
        if settings.split_client_batches:
            return
        check_batch_size(num_items, settings.max_client_batch_size)
        check_batch_size(num_texts or num_items, settings.max_concurrent_requests)

    async def _probe(self, front: AsyncEngine, timeout: float | None) -> None:
        """A small call of what the model is for."""
        texts = ["warm-up", "warm up"]
        if self.info.type == "embedding":
            await front.embed(texts, prompt="", pooling=self._pooling, timeout=timeout)
        elif self.info.type == "reranker":
            await front.rerank("warm-up", texts, timeout=timeout)
        else:
            await front.classify(texts, timeout=timeout)

    async def _texts(
        self,
        texts: Sequence[TextOrIds],
        prompt_name: str | None,
        truncate: bool | None,
        max_tokens: int | None,
        left: bool,
        name: str,
    ) -> tuple[Sequence[TextOrIds], dict[str, str | None], bool]:
        """Checked texts, the prompt that goes before them, and whether to cut."""
        check_not_empty(texts, name)
        self._check_ids(texts, name)
        cut, limit = self._cutting(truncate, max_tokens)
        if prompt_name is not None:
            prompts: dict[str, str | None] = {"prompt": None, "prompt_name": prompt_name}
        else:
            prompts = {"prompt": self.settings.default_prompt, "prompt_name": self.settings.default_prompt_name}
        found = [self._cut(text, truncate=cut, name=name, left=left) for text in texts]
        if not (cut and left) and limit is None:
            return found, prompts, cut
        prompt = self.engine.folder.prompt(prompts["prompt"], prompts["prompt_name"])
        if prompt and not self._pools_prompt:
            raise InvalidInputError(
                "`truncation_direction` left and `truncate_prompt_tokens`: not with this model, which leaves the "
                "prompt out of its vectors."
            )
        limit = self.info.max_input_length if limit is None else limit
        return await self.tokens.cut(found, limit, prompt, left=left), {"prompt": ""}, cut

    def _cutting(self, truncate: bool | None, max_tokens: int | None) -> tuple[bool, int | None]:
        """Whether to cut, and at how many tokens if not at the model's limit; -1 of vLLM's is that limit."""
        if max_tokens is None:
            return self.settings.auto_truncate if truncate is None else truncate, None
        if max_tokens != -1 and max_tokens < 1:
            raise InvalidInputError(f"`truncate_prompt_tokens` {max_tokens}: must be -1 or at least 1.")
        return True, None if max_tokens == -1 or max_tokens >= self.info.max_input_length else max_tokens

    async def _check_heads(self, queries: Sequence[str], instruction: str | None) -> None:
        """Refuse what stands before documents if it does not fit: it is not cut, and is tokenised with every one."""
        limit = self.info.max_input_length
        check_unicode(instruction or "", "instruction")
        for name, texts in (("instruction", [instruction or ""]), ("query", list(dict.fromkeys(queries)))):
            for text in texts:
                cut_characters(text, limit, truncate=False, name=name)
                if len(text) > CHARACTERS_UNCHECKED * limit:
                    count = len(await self.tokens.encode(text, add_special_tokens=False))
                    if count > limit:
                        raise InvalidInputError(f"`{name}` has {count} tokens, and the model takes {limit}.")

    def _cutting_pairs(self, truncate: bool | None, max_tokens: int | None) -> bool:
        """The same for pairs of texts, which are cut at the model's limit only."""
        cut, limit = self._cutting(truncate, max_tokens)
        if limit is not None:
            raise InvalidInputError(
                f"`truncate_prompt_tokens` {limit}: a pair is cut at the model's limit only; say -1."
            )
        return cut

    def _cut(self, text: Any, *, truncate: bool, name: str, left: bool = False) -> Any:
        if not isinstance(text, str):
            return text
        return cut_characters(text, self.info.max_input_length, truncate=truncate, name=name, left=left)

    def _check_ids(self, texts: Sequence[TextOrIds], name: str) -> None:
        size = self.info.vocab_size
        for index, ids in enumerate(texts):
            largest = 0 if isinstance(ids, str) else max(ids, default=0)
            if largest >= size:
                raise InvalidInputError(f"`{name}` number {index}: token {largest}, and the model has {size}.")

    def _check_dimensions(self, dimensions: int | None) -> None:
        most = self.info.dimensions
        if dimensions is not None and not (most is not None and 1 <= dimensions <= most):
            raise InvalidInputError(f"`dimensions` is {dimensions}: must be from 1 to {most}, the model's own.")

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
        self.check_size(len(items) if num_items is None else num_items, len(items))
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
