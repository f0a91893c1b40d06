"""`AsyncEngine`: many calls at a time, batched by shared prefixes, for servers and other asyncio programs."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from radix_mlp.engine.classify import Label, classify_call
from radix_mlp.engine.embed import embed_call, embed_tokens_call
from radix_mlp.engine.engine import Engine
from radix_mlp.engine.online_scheduler import OnlineOrder, OnlineScheduler
from radix_mlp.engine.rerank import document_pairs, rerank_call
from radix_mlp.engine.score import Score, TokenScores, score_call, token_scores_call
from radix_mlp.engine.serving_loop import ServingLoop
from radix_mlp.engine.task import Call
from radix_mlp.engine.ticket import Answer, BatchReport, FrontStats, Ticket
from radix_mlp.engine.token_ids import TextOrIds
from radix_mlp.errors import (
    DeadlineExceededError,
    EngineClosedError,
    InferenceError,
    InvalidInputError,
    OverloadedError,
    RadixError,
)

__all__ = ["Answer", "AsyncEngine", "BatchReport", "FrontStats", "TokenScores", "num_tokenization_workers"]

Value = TypeVar("Value")

MAX_TOKENIZATION_WORKERS = 4
"""Unless more are asked for: each has its own copy of the tokenizer."""


class AsyncEngine:
    """Answers many calls at a time; their texts share batches, and batches are formed by shared prefixes.

    Every method returns an `Answer`. A call's texts may be spread over several batches, and calls with different tasks
    and options may share one. One thread owns the model. Use it from one event loop.

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

    Example:
        >>> async def main():
        ...     async with AsyncEngine(Engine("tiny")) as front:
        ...         calls = [front.embed([f"Query: what is a radix? Text: {end}"]) for end in ("root", "vegetable")]
        ...         answers = await asyncio.gather(*calls)
        ...     return [answer.value.shape for answer in answers], front.stats.num_requests
        >>> asyncio.run(main())
        ([(1, 64), (1, 64)], 2)
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_concurrent_requests: int = 512,
        max_wait: float = 0.002,
        max_age: float = 1.0,
        order: OnlineOrder = "prefix",
        tokenization_workers: int | None = None,
        on_batch: Callable[[BatchReport], None] | None = None,
    ) -> None:
        if tokenization_workers is None:
            tokenization_workers = num_tokenization_workers()
        for name, number in (
            ("max_concurrent_requests", max_concurrent_requests),
            ("tokenization_workers", tokenization_workers),
        ):
            if number < 1:
                raise InvalidInputError(f"{name}={number}: must be at least 1.")
        self.engine = engine
        self.max_concurrent_requests = max_concurrent_requests
        scheduler = OnlineScheduler(
            engine.max_batch_tokens, max_wait=max_wait, max_age=max_age, order=order, padded=engine.threshold == 0
        )
        # a tokenizer keeps how it cuts texts between calls, so two threads never share one
        self._tokenizers: SimpleQueue[Any] = SimpleQueue()
        for _ in range(tokenization_workers):
            self._tokenizers.put(copy.deepcopy(engine.tokenizer))
        self._workers = ThreadPoolExecutor(tokenization_workers, "radix-tokenize")
        self._loop = ServingLoop(engine, scheduler, on_batch, is_expecting=self._is_expecting)
        self._num_active = 0
        self._is_closing = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def aclose(self, drain: bool = True) -> None:
        """Take no more calls; answer those accepted (`drain`), or end them with `EngineClosedError`."""
        self._is_closing = True
        if not drain:
            self._loop.drop_all("the engine was closed before this request was answered.")
        await self._is_idle.wait()
        await asyncio.to_thread(self._loop.stop)
        self._workers.shutdown(wait=False)

    @property
    def is_healthy(self) -> bool:
        """Whether calls are answered: False once a thread has died or the engine is closed."""
        return self._loop.is_alive and not self._is_closing

    @property
    def queue_depth(self) -> int:
        """Sequences that wait for a batch."""
        return len(self._loop.scheduler)

    @property
    def pending_tokens(self) -> int:
        """Unique tokens that wait or are being run: the work that is left."""
        return self._loop.pending_tokens

    @property
    def num_active(self) -> int:
        """Calls that are accepted and not answered."""
        return self._num_active

    @property
    def stats(self) -> FrontStats:
        """Counts since the start."""
        return self._loop.stats

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
        return await self._answer(
            embed_call,
            timeout,
            texts,
            prompt=prompt,
            prompt_name=prompt_name,
            normalize=normalize,
            dimensions=dimensions,
            pooling=pooling,
            truncate=truncate,
        )

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
        return await self._answer(
            embed_tokens_call, timeout, texts, prompt=prompt, prompt_name=prompt_name, truncate=truncate
        )

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
        return await self._answer(
            rerank_call,
            timeout,
            document_pairs(query, documents),
            instruction=instruction,
            prompt_name=prompt_name,
            template=template,
            raw_scores=raw_scores,
            truncate=truncate,
            what="documents",
        )

    async def rerank_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        instruction: str | None = None,
        prompt_name: str | None = None,
        template: Literal["auto", "qwen3", "chat", "pair"] = "auto",
        raw_scores: bool = False,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> Answer[NDArray[np.float64]]:
        """`Engine.rerank_pairs`: the relevance of every (query, document), `[n]` float64."""
        return await self._answer(
            rerank_call,
            timeout,
            pairs,
            instruction=instruction,
            prompt_name=prompt_name,
            template=template,
            raw_scores=raw_scores,
            truncate=truncate,
        )

    async def classify(
        self,
        inputs: Sequence[TextOrIds | tuple[str, str]],
        *,
        raw_scores: bool = False,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> Answer[list[list[Label]]]:
        """`Engine.classify`: all `(label, score)` of every input, the highest score first."""
        return await self._answer(classify_call, timeout, inputs, raw_scores=raw_scores, truncate=truncate)

    async def score(
        self,
        pairs: Sequence[tuple[TextOrIds, TextOrIds]],
        *,
        add_bos: bool = False,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> Answer[list[Score]]:
        """`Engine.score`: log-probability of every continuation after its context."""
        return await self._answer(score_call, timeout, pairs, add_bos=add_bos, truncate=truncate)

    async def token_scores(
        self,
        texts: Sequence[TextOrIds],
        *,
        top: int = 1,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> Answer[list[TokenScores]]:
        """`Engine.token_scores`: log-probability of every token of whole texts, and the `top` likeliest ones."""
        return await self._answer(token_scores_call, timeout, texts, top=top, truncate=truncate)

    async def _answer(
        self, make_call: Callable[..., Call[Value]], timeout: float | None, *arguments: Any, **options: Any
    ) -> Answer[Value]:
        if timeout is not None and not timeout > 0:
            raise InvalidInputError(f"timeout={timeout}: must be above 0 seconds.")
        self._admit()
        try:
            return await self._until(timeout, partial(make_call, self.engine), arguments, options)
        except DeadlineExceededError:
            self.stats.num_expired += 1
            raise
        except asyncio.CancelledError:
            self.stats.num_cancelled += 1
            raise
        except Exception:
            self.stats.num_failed += 1
            raise
        finally:
            self._num_active -= 1
            if not self._num_active:
                self._is_idle.set()

    def _is_expecting(self) -> bool:
        """Whether a call is accepted and not in the queue yet; nobody is kept waiting for others who may come."""
        return self._num_active > self._loop.num_calls

    def _admit(self) -> None:
        self._loop.check()
        if self._is_closing:
            raise EngineClosedError("the engine is closing and takes no more requests.")
        if self._num_active >= self.max_concurrent_requests:
            self.stats.num_refused += 1
            raise OverloadedError(
                f"{self._num_active} requests are being answered, as many as max_concurrent_requests allows; try again "
                "later."
            )
        self._num_active += 1
        self.stats.num_calls += 1
        self._is_idle.clear()

    async def _until(
        self, timeout: float | None, make_call: Callable[..., Call[Value]], arguments: Any, options: dict[str, Any]
    ) -> Answer[Value]:
        """The answer, or `DeadlineExceededError`; whatever ends the wait, nothing of the call waits on."""
        running = asyncio.get_running_loop()
        answered: asyncio.Future[Answer[Value]] = running.create_future()
        now = self._loop.clock()
        deadline = None if timeout is None else now + timeout
        ticket = Ticket(partial(_tell, running, answered), now, deadline)
        try:
            async with asyncio.timeout(timeout) as limit:
                await running.run_in_executor(self._workers, self._submit, ticket, make_call, arguments, options)
                answer = await answered
        except TimeoutError as error:
            if not limit.expired():
                raise
            late = f"no answer within timeout={timeout} seconds; what of the request had not started was not run."
            raise DeadlineExceededError(late) from error
        finally:
            # whoever waited is gone: no outcome to tell
            answered.cancel()
            self._loop.drop(ticket, EngineClosedError("nobody waits for this request any more."))
        self.stats.num_answered += 1
        return answer

    def _submit(
        self, ticket: Ticket, make_call: Callable[..., Call[Value]], arguments: Any, options: dict[str, Any]
    ) -> None:
        """Tokenize a call and let it wait for batches; in a worker thread."""
        if ticket.is_finished:
            return
        tokenizer = self._tokenizers.get()
        try:
            call = make_call(tokenizer, *arguments, **options)
        except RadixError:
            raise
        except BaseException as error:
            # a tokenizer that panics raises what is no Exception, and would end the event loop
            raise InferenceError(f"tokenization failed with {type(error).__name__}: {error}") from error
        finally:
            self._tokenizers.put(tokenizer)
        self._loop.submit(ticket, call)


def num_tokenization_workers() -> int:
    """How many threads tokenize unless a number is asked for."""
    return min(MAX_TOKENIZATION_WORKERS, max(1, (os.cpu_count() or 1) - 1))


def _tell(
    running: asyncio.AbstractEventLoop, answered: asyncio.Future[Answer[Value]], outcome: Answer[Value] | Exception
) -> None:
    """Hand an outcome to the event loop, from any thread."""

    def tell() -> None:
        if answered.done():
            return
        if isinstance(outcome, Exception):
            answered.set_exception(outcome)
        else:
            answered.set_result(outcome)

    try:
        running.call_soon_threadsafe(tell)
    except RuntimeError:
        # the event loop has ended, and with it whoever waited
        return
