"""`JobEngine`: runs requests of any task on a loaded model, as jobs of the calling thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from radix_mlp.engine.execution.batch import FoldPolicy, LaunchedBatch
from radix_mlp.engine.execution.job import Job, JobStats, Progress
from radix_mlp.engine.execution.loaded_model import LoadedModel
from radix_mlp.engine.execution.tokenize_ahead import DEFAULT_SIZES, TokenizedAhead, cut_by_text
from radix_mlp.engine.task import Request
from radix_mlp.errors import DeviceMemoryError, InvalidInputError
from radix_mlp.hf.fast_forward import FastForward
from radix_mlp.hf.threshold import check_threshold

__all__ = ["JobEngine"]

Value = TypeVar("Value")


class JobEngine:
    """What `Engine` does for every task; arguments are those of `Engine`."""

    chunk_sizes = DEFAULT_SIZES
    """Of the chunks in which many texts are tokenized."""

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        tokenizer: str | Path | PreTrainedTokenizerBase | ProcessorMixin | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        max_batch_tokens: int = 16384,
        max_length: int | None = None,
        threshold: float | Literal["auto"] = "auto",
        impl: str = "auto",
        kind: Literal["auto", "causal", "classifier", "decision", "trunk"] = "auto",
        compile: bool | Literal["auto"] = "auto",  # noqa: A002
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        control_tokens: Literal["model", "text"] = "model",
        share: bool = True,
    ) -> None:
        _check_folding(threshold, share)
        _check_sizes(
            max_batch_tokens=max_batch_tokens, max_length=max_length, tensor_parallel_size=tensor_parallel_size
        )
        loaded = LoadedModel(
            model,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            max_length=max_length,
            impl=impl,
            kind=kind,
            compile=compile,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            control_tokens=control_tokens,
        )
        self._set_up(loaded, threshold, max_batch_tokens, share)

    def with_folding(self, *, threshold: float | Literal["auto"] = "auto", share: bool = True) -> Self:
        """Another engine on the same loaded model, which folds otherwise. Their jobs take turns with the model.

        Examples:
            >>> from radix_mlp import Engine
            >>> engine = Engine("tiny")
            >>> unfolded = engine.with_folding(threshold=0)
            >>> texts = ["Query: what is a radix? Text: a root.", "Query: what is a radix? Text: a leaf."]
            >>> bool(np.allclose(engine.embed(texts), unfolded.embed(texts), atol=1e-5))
            True
        """
        _check_folding(threshold, share)
        other = type(self).__new__(type(self))
        other._set_up(self.loaded, threshold, self.max_batch_tokens, share)
        return other

    def _set_up(
        self, loaded: LoadedModel, threshold: float | Literal["auto"], max_batch_tokens: int, share: bool
    ) -> None:
        self.loaded = loaded
        """The model with all that engines on it share."""
        self.threshold: float | Literal["auto"] = threshold
        self.max_batch_tokens = min(max_batch_tokens, loaded.max_rows or max_batch_tokens)
        self.share = share
        self.stats = JobStats()
        """Of the last job."""
        self.start()

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model."""
        return self.loaded.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The engine's own copy."""
        return self.loaded.tokenizer

    @property
    def max_length(self) -> int | None:
        """Longest request, in tokens."""
        return self.loaded.max_length

    @property
    def forward(self) -> FastForward:
        """What runs folded batches; `forward.describe()` names it."""
        return self.loaded.forward

    def close(self) -> None:
        """Leave a model that was passed in as it was before, and end the processes of `tensor_parallel_size`.

        From any thread, after the batch that runs. With such processes, later jobs end with `EngineClosedError`;
        otherwise a later job enables the model again.

        Examples:
            >>> from radix_mlp import Engine
            >>> from radix_mlp.models.tiny import tiny_model, tiny_tokenizer
            >>> model = tiny_model().train()
            >>> engine = Engine(model, tokenizer=tiny_tokenizer())
            >>> model.training
            False
            >>> engine.close()
            >>> model.training
            True
        """
        self.loaded.close()

    def start(self) -> FoldPolicy:
        """Prepare the model for a job; returns how the job folds."""
        must_fold = not self.share or (self.threshold != "auto" and self.threshold >= 1)
        self.loaded.start(folds=self.threshold != 0, must_fold=must_fold)
        return self.policy()

    def policy(self) -> FoldPolicy:
        """How batches are folded, after `start`."""
        threshold = self.threshold
        if threshold == 0:
            return FoldPolicy(self.max_batch_tokens, 0, folds=False)
        if self.loaded.why_unfolded is not None:
            return FoldPolicy(self.max_batch_tokens, 0)
        if not self.share or (threshold == "auto" and self.loaded.packs):
            # folding packed rows never costs more than leaving them unfolded
            threshold = 1.0
        return FoldPolicy(self.max_batch_tokens, threshold, share=self.share, pair_cost=self.loaded.pair_cost)

    def answer(self, request: Request[Value], progress: Progress | None = None) -> Value:
        """Run all items of a request and return its value.

        Raises:
            DeviceMemoryError: an item that does not fit into the device's memory alone; `.place` says which.
            NonFiniteAnswersError: answers that are not finite; `.rejected` lists all of them.
        """
        return request.value(self._run_whole(request, self.start(), progress))

    def run(
        self, requests: Iterable[Request[Any] | None], count: int, progress: Progress | None = None
    ) -> Iterator[LaunchedBatch]:
        """Run all items, `count` in all, of requests that may still be made, and yield each batch once it is done.

        The places of a batch's items count the items of all requests. None among the requests: run the items so far.
        """
        return self._job(self.start(), requests, count, progress).run()

    def _job(
        self, policy: FoldPolicy, requests: Iterable[Request[Any] | None], count: int, progress: Progress | None
    ) -> Job:
        # the job keeps its own: another thread's job may replace the engine's
        stats = self.stats = JobStats(num_requests=count)
        return Job(self.loaded, policy, requests, count, stats, progress)

    def _answer(
        self,
        make_request: Callable[..., Request[Value]],
        options: Any,
        given: Sequence[Any],
        progress: Progress | None,
        *,
        texts: Sequence[str] | None = None,
        **names: str,
    ) -> Value:
        """Tokenize and run the texts; many texts are tokenized while the model runs those before them.

        Args:
            texts: what orders the items of `given` if they are not texts.
        """
        encode = partial(make_request, self.loaded, self.loaded.tokenizer, options=options, **names)
        with self.loaded.inside():
            policy = self.start()
            if policy.always_folds and len(given) > self.chunk_sizes.fewest:
                chunks = cut_by_text(given if texts is None else texts, self.chunk_sizes)
                if len(chunks) > 1:
                    with TokenizedAhead(encode, given, chunks, self.loaded.device_priority) as ahead:
                        answers = self._answers_of(ahead, policy, len(given), progress)
                    if answers is not None:
                        return ahead.value(answers)
            request = encode(given)
            return request.value(self._run_whole(request, policy, progress))

    def _run_whole(self, request: Request[Any], policy: FoldPolicy, progress: Progress | None) -> list[Any]:
        """The answers to all items of a request."""
        try:
            return self._job(policy, [request], len(request.items), progress).answers()
        except DeviceMemoryError as error:
            if error.place is not None and request.owners is not None:
                error.place = request.owners[error.place]
            raise

    def _answers_of(
        self, ahead: TokenizedAhead[Any], policy: FoldPolicy, count: int, progress: Progress | None
    ) -> list[Any] | None:
        """The answers of all items; None if a text was refused, and all have to be tokenized for the right message."""
        try:
            return self._job(policy, ahead.requests(), count, progress).answers()
        except Exception as error:
            if ahead.has_failed:
                return None
            if isinstance(error, DeviceMemoryError):
                ahead.locate(error)
            raise


def _check_folding(threshold: float | Literal["auto"], share: bool) -> None:
    check_threshold(threshold)
    if not share and threshold == 0:
        raise InvalidInputError(
            "share=False with threshold=0: the first runs packed rows, the second padded batches. Leave one of them"
            " out."
        )


def _check_sizes(**sizes: int | None) -> None:
    for name, value in sizes.items():
        if value is not None and not (isinstance(value, int | np.integer) and value >= 1):
            raise InvalidInputError(f"{name}={value!r}: must be a whole number, and at least 1.")
