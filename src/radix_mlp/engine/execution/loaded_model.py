"""`LoadedModel`: a loaded model and what it takes to run requests through it; the tasks build on it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from radix_mlp.engine.execution.batch import LaunchedBatch, fill
from radix_mlp.engine.execution.device_priority import DevicePriority
from radix_mlp.engine.execution.job import JobStats, Progress, Window, run_job
from radix_mlp.engine.execution.model_lock import lock_of
from radix_mlp.engine.execution.tokenize_ahead import SMALL_CHUNKS
from radix_mlp.engine.task import Request
from radix_mlp.engine.tokenization.control_tokens import check_control_tokens, keep_as_text
from radix_mlp.errors import InvalidInputError, NonFiniteAnswersError, UnsupportedModelError
from radix_mlp.hf import disable, enable
from radix_mlp.hf.enable import folding_forward_of, state_of
from radix_mlp.hf.fast_forward import FastForward
from radix_mlp.hf.forward import why_not_compact
from radix_mlp.hf.length_dependent_rope import LengthDependentRope
from radix_mlp.hf.support import decoder_of
from radix_mlp.hf.threshold import check_threshold
from radix_mlp.models.load import check_max_length, load, max_length_of
from radix_mlp.models.pooler import Pooler, pooler_of
from radix_mlp.models.sentence_transformers_folder import FolderSettings, read_folder
from radix_mlp.models.tiny import TINY_NAMES

__all__ = ["LoadedModel"]

Value = TypeVar("Value")


class LoadedModel:
    """Runs requests of token ids in batches, folded or not; arguments are those of `Engine`."""

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        max_batch_tokens: int = 16384,
        max_length: int | None = None,
        threshold: float | Literal["auto"] = "auto",
        impl: str = "auto",
        kind: Literal["auto", "causal", "classifier", "trunk"] = "auto",
        compile: bool | Literal["auto"] = "auto",  # noqa: A002
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        control_tokens: Literal["model", "text"] = "model",
    ) -> None:
        check_threshold(threshold)
        check_control_tokens(control_tokens)
        sizes = {"max_batch_tokens": max_batch_tokens, "max_length": max_length}
        for name, value in (sizes | {"tensor_parallel_size": tensor_parallel_size}).items():
            if value is not None and not (isinstance(value, int | np.integer) and value >= 1):
                raise InvalidInputError(f"{name}={value!r}: must be a whole number, and at least 1.")
        self.folder = FolderSettings()
        """What a sentence-transformers folder says about its model."""
        if isinstance(model, str | Path) and str(model) not in TINY_NAMES:
            self.folder = read_folder(str(model))
            model = self.folder.checkpoint
        self.forward: FastForward
        """Runs the trunk on a folded batch: `(plan, needed rows or None) -> [M, hidden]`."""
        how: dict[str, Any] = {"tokenizer": tokenizer, "device": device, "dtype": dtype, "kind": kind}
        self.num_processes = tensor_parallel_size
        if tensor_parallel_size > 1:
            from radix_mlp.engine.parallel.tensor_parallel import lead

            how |= {"trust_remote_code": trust_remote_code, "impl": impl, "mode": compile}
            self.model, self.tokenizer, self.forward = lead(model, tensor_parallel_size, **how)
        else:
            self.model, self.tokenizer = load(model, trust_remote_code=trust_remote_code, **how)
            self.forward = FastForward(self.model, impl=impl, mode=compile)
        if control_tokens == "text":
            keep_as_text(self.tokenizer)
        self.max_batch_tokens = max_batch_tokens
        self.max_length = max_length or self.folder.max_length or max_length_of(self.model, self.tokenizer)
        check_max_length(self.model, self.max_length)
        self.threshold: float | Literal["auto"] = threshold
        self.impl = impl
        self.rope = LengthDependentRope(decoder_of(self.model))
        """Which lengths may share a batch."""
        self.stats = JobStats()
        """Of the last job."""
        self.device_priority = DevicePriority()
        """Held while a batch is cut, planned or launched; those who tokenize ahead wait for it."""
        self._poolers: dict[str | None, Pooler] = {}
        self._enabled_as: list[Any] | None = None
        self._reason_unfolded: str | None = None
        self._model_lock = lock_of(self.model)
        self._prepare()

    def unfolded(self) -> Self:
        """An engine on the same model that never folds: the unmodified model on padded batches.

        The two take turns: do not run their jobs at the same time.
        """
        other = copy(self)
        other.threshold, other.stats = 0, JobStats()
        return other

    @property
    def batch_threshold(self) -> float | Literal["auto"]:
        """Whether a batch is folded: always where packed rows run anyway, to which padding could only add."""
        if self._reason_unfolded is not None:
            return 0
        if self.threshold != "auto":
            return self.threshold
        # what is made of the model is held to its modules, for which it has to be enabled
        with nullcontext() if self.forward.is_made else self.model_turn():
            packs = self.num_processes > 1 or self.forward.is_fused
        return 1.0 if packs else "auto"

    def close(self) -> None:
        """End the processes that were started for `tensor_parallel_size`, after the batch that runs; from any thread.

        Later jobs end with `EngineClosedError`. Where there are no such processes, nothing: the engine works on.
        """
        self.forward.close()

    def _prepare(self) -> None:
        """Enable the model as this engine wants it, unless it is so since the last time."""
        if self.threshold == 0:
            disable(self.model)
        elif self._enabled_as is None or self._enabled_as != [self.impl, *state_of(self.model)]:
            # a direct call of the model then runs unfolded; folded batches go through forward_compact
            enable(self.model, impl=self.impl, threshold=0)
            self.forward.reconsider()
            self._reason_unfolded = self._why_unfolded()
            self._enabled_as = [self.impl, *state_of(self.model)]

    def _why_unfolded(self) -> str | None:
        """Why batches run unfolded although folding was asked for, if something was put into the model."""
        reason = why_not_compact(self.model)
        if reason is None:
            return None
        if self.threshold != "auto" and self.threshold >= 1:
            raise UnsupportedModelError(f"{reason}. Undo that, or make the engine with threshold='auto' or 0.")
        warnings.warn(f"radix-mlp runs this model unfolded: {reason}.", UserWarning, stacklevel=2)
        return reason

    def _is_prepared(self) -> bool:
        """Whether the model is as this engine wants it; another one may have had it."""
        enabled = folding_forward_of(self.model)
        if self.threshold == 0 or enabled is None:
            return (enabled is None) == (self.threshold == 0)
        return enabled.settings.impl == self.impl

    def inside(self) -> AbstractContextManager[None]:
        """Held for a job, by the thread that runs it; `EngineDeadError` in a process forked from the midst of one."""
        return self._model_lock.inside()

    def _start_job(self) -> None:
        # another thread may be in the middle of a batch
        with self._model_lock, self.launching():
            self._prepare()

    @contextmanager
    def model_turn(self) -> Iterator[None]:
        """The model to oneself, enabled as this engine wants it, for one batch."""
        with self._model_lock:
            if not self._is_prepared():
                self._prepare()
            yield

    def launching(self) -> AbstractContextManager[None]:
        """`feeding`, but on a CPU, where to launch is to compute, nobody is kept waiting."""
        return nullcontext() if self.model.device.type == "cpu" else self.device_priority

    @property
    def always_folds(self) -> bool:
        """Whether every batch is folded, so that a job can begin before all of its texts are known."""
        return self.batch_threshold not in (0, "auto")

    def answer(self, call: Request[Value], progress: Progress | None = None) -> Value:
        """Run all items of a call and return its value."""
        answers: list[Any] = [None] * len(call.items)
        for places, launched in self.run_windows([(call.items, call.order)], len(answers), progress):
            fill(answers, places, launched)
        return call.value(answers)

    def answers_of(
        self, calls: Sequence[Future[Request[Any]]], count: int, progress: Progress | None = None
    ) -> list[list[Any]]:
        """Run all items, `count` in all, of calls that are being made, each as soon as it is; the answers of each."""
        answers: list[Any] = [None] * count
        for places, launched in self.run_calls(calls, count, progress):
            fill(answers, places, launched)
        found = iter(answers)
        return [list(itertools.islice(found, len(call.result().items))) for call in calls]

    def run_calls(
        self, calls: Sequence[Future[Request[Any]]], count: int, progress: Progress | None = None
    ) -> Iterator[tuple[list[int], LaunchedBatch]]:
        """Run all items, `count` in all, of calls that are being made, each as soon as it is.

        Yields each batch once the device is done with it, and the places of its items, counted over all calls.
        What the first few calls leave over is run at once, so that the device need not wait; which texts share a batch
        depends on nothing but the texts.
        """

        def windows() -> Iterator[Window | None]:
            for number, call in enumerate(calls):
                made = self.device_priority.take(call)
                yield made.items, made.order
                if number < SMALL_CHUNKS:
                    yield None

        with self.device_priority.expecting(calls[:1]):
            yield from self.run_windows(windows(), count, progress)

    def run_windows(
        self, windows: Iterable[Window | None], count: int, progress: Progress | None = None
    ) -> Iterator[tuple[list[int], LaunchedBatch]]:
        """As `run_calls`, of items with an order in which those that share are neighbours; None: no more for now."""
        with self.inside():
            self._start_job()
            # another thread's job may put its own in its place
            stats = self.stats = JobStats(num_requests=count)
            yield from run_job(self, windows, count, stats, progress)

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        embeddings: Any = self.model.get_input_embeddings()
        return int(embeddings.weight.shape[0])

    def pooler(self, pooling: str | None) -> Pooler:
        """`pooler_of` this model's folder, made once."""
        if pooling not in self._poolers:
            self._poolers[pooling] = pooler_of(self.folder, pooling)
        return self._poolers[pooling]

    def check_finite(self, finite: NDArray[np.bool_], kind: str) -> None:
        """Raise `NonFiniteAnswersError` with all places of answers that are not finite."""
        if not finite.all():
            reason = f"the model's answer is not a number. If {self.model.dtype} overflows, try dtype='float32'"
            raise NonFiniteAnswersError(kind, [(int(place), reason) for place in np.flatnonzero(~finite)])
