"""`Service`: what every route does with the engine: places, deadlines, metrics, large batches in parts."""

from __future__ import annotations

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
from radix_mlp.engine.task import Request
from radix_mlp.engine.tasks.classify import ClassifyOptions, Labels, classify_request
from radix_mlp.engine.tasks.decide import Decided, DecideOptions, decide_request
from radix_mlp.engine.tasks.embed import EmbedOptions, EmbedTokensOptions, embed_request, embed_tokens_request
from radix_mlp.engine.tasks.rerank import RerankOptions, rerank_request
from radix_mlp.engine.tasks.score import Score, ScoreOptions, TokenScoresOptions, score_request, token_scores_request
from radix_mlp.engine.tokenization.decision_prompts import Questions, State
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
Part = Callable[[Sequence[Any], float | None, AsyncEngine], Awaitable[Answer[Value]]]

EMBED = EmbedOptions()
EMBED_TOKENS = EmbedTokensOptions()
RERANK = RerankOptions()
CLASSIFY = ClassifyOptions()


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
        options: EmbedOptions = EMBED,
        *,
        truncate: bool | None = None,
        max_tokens: int | None = None,
        left: bool = False,
        name: str = "inputs",
        single: bool = False,
        num_items: int | None = None,
    ) -> Answer[NDArray[np.float32]]:
        """A vector a text, `[n, d]`; the batch limit counts `num_items`, unless all texts.

        The server decides on pooling, on truncation (by `truncate`, `max_tokens` and its settings), and on the prompt
        where `options` names none; it replaces these fields of `options`.
        """
        self.info.require("embedding")
        self.inputs.check_size(len(texts) if num_items is None else num_items, len(texts))
        self.inputs.check_dimensions(options.dimensions)
        texts, options = await self.inputs.texts(texts, options, truncate, max_tokens, left, name)
        options = replace(options, pooling=self._pooling)
        part = _part(embed_request, options)
        return await self._run("embed", part, texts, np.concatenate, single=single, num_items=num_items)

    async def embed_tokens(
        self,
        texts: Sequence[TextOrIds],
        options: EmbedTokensOptions = EMBED_TOKENS,
        *,
        truncate: bool | None = None,
        max_tokens: int | None = None,
        left: bool = False,
        name: str = "inputs",
        single: bool = False,
    ) -> Answer[list[NDArray[np.float32]]]:
        """A vector a token; arguments as in `embed`."""
        self.info.require("embedding")
        self.inputs.check_size(len(texts))
        texts, options = await self.inputs.texts(texts, options, truncate, max_tokens, left, name)
        return await self._run("embed", _part(embed_tokens_request, options), texts, _join, single=single)

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        options: RerankOptions = RERANK,
        *,
        truncate: bool | None = None,
        max_tokens: int | None = None,
        name: str = "texts",
    ) -> Answer[NDArray[np.float64]]:
        """The relevance of every document; the server's template and truncation replace those of `options`."""
        self.info.require("reranker")
        self.inputs.check_size(len(documents))
        check_not_empty([query], "query")
        if not documents:
            raise EmptyInputError(f"`{name}` cannot be empty")
        pairs = [(query, document) for document in documents]
        return await self.rerank_pairs(pairs, options, truncate=truncate, max_tokens=max_tokens, name=name)

    async def rerank_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        options: RerankOptions = RERANK,
        *,
        truncate: bool | None = None,
        max_tokens: int | None = None,
        name: str = "documents",
    ) -> Answer[NDArray[np.float64]]:
        """How relevant every pair's document is to its query; as `rerank`."""
        self.info.require("reranker")
        self.inputs.check_size(len(pairs))
        queries = [query for query, _ in pairs]
        check_not_empty(queries, "query")
        cut = self.inputs.cutting_pairs(truncate, max_tokens)
        await self.inputs.check_heads(queries, options.instruction)
        pairs = [(query, self.inputs.cut(document, truncate=cut, name=name)) for query, document in pairs]
        options = replace(options, template=self._template, truncate=cut)
        part = _part(rerank_request, options, what="documents")
        return await self._run("predict", part, pairs, np.concatenate)

    async def classify(
        self,
        inputs: Sequence[TextOrIds | tuple[str, str]],
        options: ClassifyOptions = CLASSIFY,
        *,
        truncate: bool | None = None,
        max_tokens: int | None = None,
        left: bool = False,
        single: bool = False,
        name: str = "inputs",
    ) -> Answer[list[Labels]]:
        """The labels of every text or pair, the highest score first."""
        self.inputs.check_size(len(inputs))
        items, cut = await self.inputs.texts_or_pairs(inputs, truncate, max_tokens, left, name)
        options = replace(options, truncate=cut)
        return await self._run("predict", _part(classify_request, options), items, _join, single=single)

    async def decide(self, state: State, questions: Questions) -> Answer[list[Decided]]:
        """The answers to questions about one state, as a list of one."""
        part = _part(decide_request, DecideOptions())
        return await self._run("predict", part, [(state, questions)], _join, single=True)

    async def score(self, pairs: Sequence[tuple[TextOrIds, TextOrIds]], *, num_items: int) -> Answer[list[Score]]:
        """Log-probability of every continuation; the batch limit counts `num_items`, of which the pairs are made."""
        for pair in pairs:
            self.inputs.check_ids(pair, "label_token_ids and items")
        return await self._run("score", _part(score_request, ScoreOptions()), pairs, _join, num_items=num_items)

    async def token_scores(self, texts: Sequence[TextOrIds], *, single: bool = False) -> Answer[list[TokenScores]]:
        """Log-probability of every token, with the likeliest in its place."""
        self.inputs.check_size(len(texts))
        check_not_empty(texts, "prompt")
        self.inputs.check_ids(texts, "prompt")
        return await self._run("score", _part(token_scores_request, TokenScoresOptions()), texts, _join, single=single)

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
        part: Part[Value],
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
                answers.append(await self.supervisor.run(partial(part, some, left)))
        answer = answers[0] if len(answers) == 1 else _joined(answers, join)
        self.metrics.observe_answer(task, method, len(items), time.monotonic() - began, answer)
        return answer


def _part(make_request: Callable[..., Request[Value]], options: Any, **names: str) -> Part[Value]:
    """Runs some of a request's items."""

    async def run(items: Sequence[Any], timeout: float | None, front: AsyncEngine) -> Answer[Value]:
        return await front.answer(make_request, timeout, list(items), options, **names)

    return run


def _join(parts: list[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(parts))


def _joined(answers: list[Answer[Value]], join: Callable[[list[Value]], Value]) -> Answer[Value]:
    """One answer from those of the parts."""

    def total(field: str) -> Any:
        return sum(getattr(answer, field) for answer in answers)

    fields = [field for field in Answer.__dataclass_fields__ if field != "value"]
    return Answer(value=join([answer.value for answer in answers]), **{field: total(field) for field in fields})
