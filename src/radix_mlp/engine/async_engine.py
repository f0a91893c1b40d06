"""`AsyncEngine`: many calls at a time, batched by shared prefixes, for servers and other asyncio programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from radix_mlp.arguments import items_of
from radix_mlp.engine.online.dispatcher import Dispatcher
from radix_mlp.engine.online.reports import Answer, BatchReport, FrontStats
from radix_mlp.engine.tasks.classify import ClassifyKeywords, ClassifyOptions, Labels, classify_request
from radix_mlp.engine.tasks.decide import Decided, DecideKeywords, DecideOptions, decide_request, with_questions
from radix_mlp.engine.tasks.embed import (
    EmbedKeywords,
    EmbedOptions,
    EmbedTokensKeywords,
    EmbedTokensOptions,
    embed_request,
    embed_tokens_request,
)
from radix_mlp.engine.tasks.rerank import RerankKeywords, RerankOptions, document_pairs, rerank_request
from radix_mlp.engine.tasks.score import (
    Score,
    ScoreKeywords,
    ScoreOptions,
    TokenScores,
    TokenScoresKeywords,
    TokenScoresOptions,
    score_request,
    token_scores_request,
)
from radix_mlp.engine.tokenization.decision_prompts import Questions, State
from radix_mlp.engine.tokenization.token_ids import TextOrIds
from radix_mlp.engine.tokenization.tokenize_chats import Chat

__all__ = ["Answer", "AsyncEngine", "BatchReport", "FrontStats", "TokenScores"]


class AsyncEngine(Dispatcher):
    """Answers many calls at a time; their texts share batches, and batches are formed by shared prefixes.

    Every method takes the options of `Engine`'s method of the same name, and `timeout`, in seconds; a wrong keyword is
    a `TypeError`. Every method returns an `Answer`. The texts of a call may be spread over several batches, and calls
    with different tasks and options may share one. One thread owns the model. Use it from one event loop.

    Args:
        engine: its options hold, `max_batch_tokens`, `max_length` and `threshold` among them.
        max_concurrent_requests: calls that are accepted at a time; one more is refused at once.
        max_wait: seconds that an idle device waits for calls that are being tokenized, before it starts on a batch that
            is not full.
        max_age: seconds after which what waits is run in the order of arrival, whatever it shares.
        order: how batches are formed: by shared prefixes, in order of arrival, or shortest first.
        tokenization_workers: threads that turn texts into token ids; one less than there are processors, and at most
            four, unless given.
        on_batch: called after every batch, from a thread of the engine; must not block.

    Raises:
        InvalidInputError: a wrong argument; from the methods, also what those of `Engine` raise.
        OverloadedError: `max_concurrent_requests` calls are being answered already.
        DeadlineExceededError: no answer within the call's `timeout`, in seconds; what had not started is not run.
        EngineClosedError: the engine is closed, or closing.
        InferenceError: the model failed on this call; others in its batch are not concerned.
        EngineDeadError: a thread of the engine has died, and `is_healthy` is False.

    Cancelling the task that awaits a call takes what waits of it out of the queue.

    Examples:
        >>> import asyncio
        >>> from radix_mlp import AsyncEngine, Engine
        >>> async def main():
        ...     async with AsyncEngine(Engine("tiny")) as front:
        ...         calls = [front.embed([f"Query: what is a radix? Text: {end}"]) for end in ("root", "vegetable")]
        ...         answers = await asyncio.gather(*calls)
        ...     return [answer.value.shape for answer in answers], front.stats.num_requests
        >>> asyncio.run(main())
        ([(1, 64), (1, 64)], 2)
    """

    async def embed(
        self, texts: Sequence[TextOrIds], *, timeout: float | None = None, **options: Unpack[EmbedKeywords]
    ) -> Answer[NDArray[np.float32]]:
        """`Engine.embed`: `[n, d]` float32."""
        return await self.answer(embed_request, timeout, items_of(texts, "texts"), EmbedOptions(**options))

    async def embed_tokens(
        self, texts: Sequence[TextOrIds], *, timeout: float | None = None, **options: Unpack[EmbedTokensKeywords]
    ) -> Answer[list[NDArray[np.float32]]]:
        """`Engine.embed_tokens`: a `[tokens, hidden]` float32 array per text, neither pooled nor scaled."""
        return await self.answer(embed_tokens_request, timeout, items_of(texts, "texts"), EmbedTokensOptions(**options))

    async def rerank(
        self, query: str, documents: Sequence[str], *, timeout: float | None = None, **options: Unpack[RerankKeywords]
    ) -> Answer[NDArray[np.float64]]:
        """Relevance of every document, `[n]` float64 in the caller's order; `ranked` sorts them."""
        pairs = document_pairs(query, items_of(documents, "documents"))
        return await self.answer(rerank_request, timeout, pairs, RerankOptions(**options), what="documents")

    async def rerank_pairs(
        self, pairs: Sequence[tuple[str, str]], *, timeout: float | None = None, **options: Unpack[RerankKeywords]
    ) -> Answer[NDArray[np.float64]]:
        """`Engine.rerank_pairs`: the relevance of every (query, document), `[n]` float64."""
        return await self.answer(rerank_request, timeout, items_of(pairs, "pairs"), RerankOptions(**options))

    async def classify(
        self,
        inputs: Sequence[TextOrIds | tuple[str, str] | Chat],
        *,
        timeout: float | None = None,
        **options: Unpack[ClassifyKeywords],
    ) -> Answer[list[Labels]]:
        """`Engine.classify`: all `(label, score)` of every input, the highest score first."""
        return await self.answer(classify_request, timeout, items_of(inputs, "inputs"), ClassifyOptions(**options))

    async def decide(
        self, state: State, questions: Questions, *, timeout: float | None = None, **options: Unpack[DecideKeywords]
    ) -> Answer[list[Decided]]:
        """`Engine.decide`; the value is a list of the one answer."""
        return await self.decide_many([state], questions, timeout=timeout, **options)

    async def decide_many(
        self,
        states: Sequence[State],
        questions: Questions | Sequence[Questions],
        *,
        timeout: float | None = None,
        **options: Unpack[DecideKeywords],
    ) -> Answer[list[Decided]]:
        """`Engine.decide_many`: the answers to questions about every state."""
        given = with_questions(items_of(states, "states"), questions)
        return await self.answer(decide_request, timeout, given, DecideOptions(**options))

    async def score(
        self,
        pairs: Sequence[tuple[TextOrIds, TextOrIds]],
        *,
        timeout: float | None = None,
        **options: Unpack[ScoreKeywords],
    ) -> Answer[list[Score]]:
        """`Engine.score`: log-probability of every continuation after its context."""
        return await self.answer(score_request, timeout, items_of(pairs, "pairs"), ScoreOptions(**options))

    async def token_scores(
        self, texts: Sequence[TextOrIds], *, timeout: float | None = None, **options: Unpack[TokenScoresKeywords]
    ) -> Answer[list[TokenScores]]:
        """`Engine.token_scores`: log-probability of every token of whole texts, and the `top` likeliest ones."""
        return await self.answer(token_scores_request, timeout, items_of(texts, "texts"), TokenScoresOptions(**options))
