"""`AsyncEngine`: many requests at a time, batched by shared prefixes, for servers and other asyncio programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from radix_mlp.engine.classify import Label
from radix_mlp.engine.engine import Engine
from radix_mlp.engine.score import Score

__all__ = ["Answer", "AsyncEngine", "BatchReport", "FrontStats", "TokenScores"]

Value = TypeVar("Value")

TextOrIds = str | Sequence[int] | NDArray[np.integer[Any]]
"""A text, or token ids that are taken as they are."""


@dataclass(frozen=True)
class Answer(Generic[Value]):
    """A request's value and what it took."""

    value: Value
    tokenization_seconds: float
    """Waiting for a tokenization worker counted."""
    queue_seconds: float
    """From token ids to the start of the first batch with a sequence of this request."""
    inference_seconds: float
    """From there to the answer."""
    num_characters: int
    num_tokens: int
    """Of this request's own sequences."""
    num_batch_tokens: int
    """Tokens of all batches that it was in, with those of other requests."""
    num_batch_compact: int
    """Unique tokens of these batches: what the model ran on."""
    num_batches: int


@dataclass(frozen=True)
class BatchReport:
    """One batch that was run, or failed."""

    num_calls: int
    """Calls with a sequence in it."""
    num_requests: int
    """Sequences."""
    num_tokens: int
    num_compact: int
    folded: bool
    plan_seconds: float
    forward_seconds: float
    """From its launch until its results were on the host."""
    oldest_seconds: float
    """How long its oldest sequence had waited when the batch was formed."""
    error: Exception | None = None


@dataclass
class FrontStats:
    """Counts since the start."""

    num_calls: int = 0
    """Accepted."""
    num_answered: int = 0
    num_failed: int = 0
    num_cancelled: int = 0
    num_expired: int = 0
    num_refused: int = 0
    """Because of overload."""
    num_batches: int = 0
    num_requests: int = 0
    """Sequences run."""
    num_tokens: int = 0
    num_compact: int = 0


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of a whole text, token by token."""

    ids: list[int]
    logprobs: list[float | None]
    """log p(token | tokens before it); None for the first."""
    top_ids: list[list[int] | None]
    """The likeliest tokens in that place, the likeliest first; None for the first."""
    top_logprobs: list[list[float] | None]


class AsyncEngine:
    """Answers many calls at a time; their texts share batches, and batches are formed by shared prefixes.

    Every method returns an `Answer`. One thread owns the model; call it from one event loop.

    Args:
        max_concurrent_requests: calls accepted at a time; one more is refused at once with `OverloadedError`.
        max_wait: seconds that an idle device waits for more to come before it starts on a batch that is not full.
        max_age: seconds after which what waits is run in the order of arrival, whatever it shares.
        order: how batches are formed: by shared prefixes, in order of arrival, or shortest first.
        tokenization_workers: threads that turn texts into token ids.
        on_batch: called after every batch, from a thread of the engine; must not block.

    Raises (all methods):
        InvalidInputError: as the method of `Engine` does.
        OverloadedError, DeadlineExceededError, EngineClosedError, EngineDeadError, InferenceError: see `errors`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_concurrent_requests: int = 512,
        max_wait: float = 0.002,
        max_age: float = 1.0,
        order: Literal["prefix", "arrival", "shortest"] = "prefix",
        tokenization_workers: int | None = None,
        on_batch: Callable[[BatchReport], None] | None = None,
    ) -> None:
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        raise NotImplementedError

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def aclose(self, drain: bool = True) -> None:
        """Take no more calls; answer those accepted (`drain`), or end them with `EngineClosedError`."""
        raise NotImplementedError

    @property
    def is_healthy(self) -> bool:
        """Whether calls are still answered: False once a thread has died or the engine is closed."""
        raise NotImplementedError

    @property
    def queue_depth(self) -> int:
        """Sequences that wait for a batch."""
        raise NotImplementedError

    @property
    def num_active(self) -> int:
        """Calls that are accepted and not answered."""
        raise NotImplementedError

    @property
    def stats(self) -> FrontStats:
        """Counts since the start."""
        raise NotImplementedError

    async def embed(
        self,
        texts: Sequence[TextOrIds],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
        pooling: Literal["last", "mean", "weighted_mean", "cls"] | None = None,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> Answer[NDArray[np.float32]]:
        """`Engine.embed`: `[n, d]` float32."""
        raise NotImplementedError

    async def embed_tokens(
        self,
        texts: Sequence[TextOrIds],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> Answer[list[NDArray[np.float32]]]:
        """`Engine.embed_tokens`: a `[tokens, hidden]` float32 array a text, neither pooled nor scaled."""
        raise NotImplementedError

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        prompt_name: str | None = None,
        template: Literal["auto", "qwen3", "chat", "pair"] = "auto",
        raw_scores: bool = False,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> Answer[NDArray[np.float64]]:
        """Relevance of every document, `[n]` float64 in the caller's order; `ranked` sorts them."""
        raise NotImplementedError

    async def classify(
        self,
        inputs: Sequence[TextOrIds | tuple[str, str]],
        *,
        raw_scores: bool = False,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> Answer[list[list[Label]]]:
        """`Engine.classify`: all `(label, score)` of every input, the highest score first."""
        raise NotImplementedError

    async def score(
        self,
        pairs: Sequence[tuple[TextOrIds, TextOrIds]],
        *,
        add_bos: bool = False,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> Answer[list[Score]]:
        """`Engine.score`: log-probability of every continuation after its context."""
        raise NotImplementedError

    async def token_scores(
        self, texts: Sequence[TextOrIds], *, top: int = 1, truncate: bool = False, timeout: float | None = None
    ) -> Answer[list[TokenScores]]:
        """`Engine.token_scores`: log-probability of every token of whole texts, and the `top` likeliest ones."""
        raise NotImplementedError
