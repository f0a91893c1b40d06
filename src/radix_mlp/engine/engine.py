"""`Engine`: texts in, embeddings or log-probabilities out, in the caller's order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from radix_mlp.engine.head import output_head
from radix_mlp.engine.load import load, max_length_of
from radix_mlp.engine.scheduler import Ids, cut_by_padding, schedule
from radix_mlp.engine.step import plan_of, run_batch
from radix_mlp.engine.tokenize import tokenize_pairs, tokenize_texts
from radix_mlp.errors import InvalidInputError, RadixError
from radix_mlp.hf import disable, enable
from radix_mlp.hf.threshold import check_threshold
from radix_mlp.ops import cls, last_token, mean, token_logprobs, weighted_mean
from radix_mlp.plan import RadixPlan

__all__ = ["Engine", "JobStats", "Progress", "Score"]

POOLINGS: dict[str, Callable[[Tensor, RadixPlan], Tensor]] = {
    "last": last_token,
    "mean": mean,
    "weighted_mean": weighted_mean,
    "cls": cls,
}

Progress = Callable[[int, int], None]
"""Called with (requests answered, requests in all)."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Score:
    """How likely a model finds a continuation."""

    logprob: float
    """Sum of `token_logprobs`: log p(continuation | context), natural logarithm."""
    is_greedy: bool
    """Whether every token of the continuation is the likeliest one in its place."""
    token_logprobs: list[float]
    """One a token of the continuation."""


@dataclass
class JobStats:
    """What a job took."""

    num_requests: int = 0
    num_tokens: int = 0
    """Tokens of all requests."""
    num_compact: int = 0
    """Tokens that the model computed (padding not counted)."""
    num_batches: int = 0
    seconds: float = 0.0
    """From token ids to results on the host; tokenization is not in it."""

    @property
    def compression(self) -> float:
        """`num_compact / num_tokens`."""
        return self.num_compact / self.num_tokens if self.num_tokens else 1.0


class Engine:
    """Runs texts through a model so that tokens which texts share are computed once.

    Args:
        model: a hub id, a folder, a loaded transformers model, or `"tiny"`.
        tokenizer: needed with a loaded model; else the model's own.
        device: CUDA where there is one, else the CPU; a loaded model stays where it is.
        dtype: the checkpoint's own unless given, as `torch.float32` or `"float32"`.
        max_batch_tokens: budget of a batch, in compact tokens.
        max_length: longest request, in tokens; what model and tokenizer allow unless given.
        threshold: 0 never folds and runs padded batches through the unmodified model; 1 or more always folds;
            between, batches whose compression is below it; `"auto"` those where it pays.
        impl: the way to run attention.
        trust_remote_code: run code that comes with the model.

    A loaded model that is passed in is enabled for folding by the jobs, or disabled when `threshold` is 0.

    Raises:
        InvalidInputError: a wrong argument.
        UnsupportedModelError: the model cannot be folded exactly (`threshold=0` runs it unfolded).

    Example:
        >>> engine = Engine("tiny")
        >>> engine.embed(["Query: what is a radix? Text: a root.", "Query: what is a radix? Text: a vegetable."]).shape
        (2, 64)
        >>> engine.stats.num_tokens, engine.stats.num_compact
        (79, 47)
    """

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
        trust_remote_code: bool = False,
    ) -> None:
        check_threshold(threshold)
        for name, value in (("max_batch_tokens", max_batch_tokens), ("max_length", max_length)):
            if value is not None and value < 1:
                raise InvalidInputError(f"{name}={value}: must be at least 1.")
        self.model, self.tokenizer = load(
            model, tokenizer=tokenizer, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
        self.max_batch_tokens = max_batch_tokens
        self.max_length = max_length or max_length_of(self.model, self.tokenizer)
        self.threshold: float | Literal["auto"] = threshold
        self.impl = impl
        self.stats = JobStats()
        """Of the last job."""
        self._prepare()

    def embed(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
        pooling: Literal["last", "mean", "weighted_mean", "cls"] = "last",
        truncate: bool = False,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """One vector a text, `[n, d]` float32.

        Args:
            prompt: put before every text, as one string with it.
            normalize: scale every vector to length 1.
            dimensions: keep this many leading dimensions (before scaling), for models trained to allow it.
            pooling: which hidden states of the last layer make the vector.
            truncate: cut texts longer than `max_length` instead of refusing them.
            progress: called as texts are done.

        Raises:
            RejectedItemsError: texts that are empty or too long; `.rejected` lists all of them.
        """
        if pooling not in POOLINGS:
            raise InvalidInputError(f"pooling={pooling!r}: must be one of {', '.join(POOLINGS)}.")
        sequences = tokenize_texts(self.tokenizer, texts, prompt=prompt, max_length=self.max_length, truncate=truncate)

        def finish(indices: list[int], hidden: Tensor, plan: RadixPlan) -> Tensor:
            if dimensions is not None and not 1 <= dimensions <= hidden.shape[1]:
                raise InvalidInputError(f"dimensions={dimensions}: the model has {hidden.shape[1]}.")
            pooled = POOLINGS[pooling](hidden, plan)[:, :dimensions].float()
            return torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled

        vectors = np.empty((0, dimensions or self.model.config.get_text_config().hidden_size), np.float32)
        for indices, _, pooled in self._run(sequences, finish, progress):
            if not len(vectors):
                vectors = np.empty((len(sequences), pooled.shape[1]), np.float32)
            vectors[indices] = pooled.cpu().numpy()
        self._check_finite(np.asarray(np.isfinite(vectors).all(axis=1)), "texts")
        return vectors

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        add_bos: bool = False,
        truncate: bool = False,
        progress: Progress | None = None,
    ) -> list[Score]:
        """Log-probability of every continuation after its context, as lm-evaluation-harness counts it.

        Context and continuation are encoded as one string, spaces at the end of the context moved to the
        continuation, and the continuation is what follows the first `len(encode(context))` tokens.

        Args:
            pairs: (context, continuation); an empty context stands for the begin (or end) token.
            add_bos: start every context with the begin token, which Gemma and Llama models expect.
            truncate: drop tokens from the left of pairs longer than `max_length` instead of refusing them.
            progress: called as pairs are done.

        Raises:
            RejectedItemsError: pairs that are too long or have no continuation; `.rejected` lists all of them.
            UnsupportedModelError: the model has no language-model head.
        """
        sequences, starts = tokenize_pairs(
            self.tokenizer, pairs, max_length=self.max_length, truncate=truncate, add_bos=add_bos
        )
        if not sequences:
            self.stats = JobStats()
            return []
        head = output_head(self.model, sequences[0])

        def finish(indices: list[int], hidden: Tensor, plan: RadixPlan) -> tuple[Tensor, Tensor]:
            rows = np.concatenate(_continuation_rows(plan, [starts[index] for index in indices]))
            scored = token_logprobs(hidden, head, plan, np.unique(rows))
            return scored.logprob, scored.is_greedy

        scores: dict[int, Score] = {}
        for indices, plan, (logprob, is_greedy) in self._run(sequences, finish, progress):
            values, greedy = logprob.cpu().numpy().astype(np.float64), is_greedy.cpu().numpy()
            for index, rows in zip(
                indices, _continuation_rows(plan, [starts[index] for index in indices]), strict=True
            ):
                tokens = values[rows]
                scores[index] = Score(float(tokens.sum()), bool(greedy[rows].all()), tokens.tolist())
        answers = [scores[index] for index in range(len(sequences))]
        self._check_finite(np.asarray([not np.isnan(answer.logprob) for answer in answers]), "pairs")
        return answers

    def unfolded(self) -> Engine:
        """An engine on the same model that never folds: the unmodified model on padded batches.

        The two take turns: do not run their jobs at the same time.
        """
        other = copy(self)
        other.threshold, other.stats = 0, JobStats()
        return other

    def _prepare(self) -> None:
        if self.threshold == 0:
            disable(self.model)
        else:
            # a direct call of the model then runs unfolded; folded batches go through forward_compact
            enable(self.model, impl=self.impl, threshold=0)

    def _run(
        self,
        sequences: Sequence[Ids],
        finish: Callable[[list[int], Tensor, RadixPlan], Result],
        progress: Progress | None,
    ) -> Iterator[tuple[list[int], RadixPlan, Result]]:
        """Schedule and run all requests; yields each batch's indices, plan and result, one batch behind the device."""
        self._prepare()
        stats = self.stats = JobStats(num_requests=len(sequences))
        if self.threshold != 0 and sequences:
            # the planner compiles once on a machine; that is not the job's time
            plan_of(sequences[:1]).to(self.model.device)
        began = time.perf_counter()
        if self.threshold == 0:
            batches = cut_by_padding([len(sequence) for sequence in sequences], self.max_batch_tokens)
        else:
            batches = [batch.indices for batch in schedule(sequences, self.max_batch_tokens)]
        done = 0
        waiting: tuple[list[int], RadixPlan, Result] | None = None
        for indices in [*batches, None]:
            started = None
            if indices is not None:
                batch = [sequences[index] for index in indices]
                result, plan = run_batch(self.model, batch, partial(finish, indices), self.threshold)
                started = (indices, plan, result)
                stats.num_batches += 1
                stats.num_tokens += plan.num_tokens
                stats.num_compact += plan.num_compact
            if waiting is not None:
                yield waiting
                done += len(waiting[0])
                if progress is not None:
                    progress(done, len(sequences))
            waiting = started
        stats.seconds = time.perf_counter() - began

    def _check_finite(self, finite: NDArray[np.bool_], kind: str) -> None:
        if not finite.all():
            raise RadixError(
                f"{kind}[{int((~finite).argmax())}]: the model's answer is not a number. If {self.model.dtype} "
                "overflows, try dtype='float32'."
            )


def _continuation_rows(plan: RadixPlan, starts: list[int]) -> list[Any]:
    """Compact rows of every sequence's tokens from its start on."""
    bounds = zip(plan.cu_seq_lengths[:-1], plan.cu_seq_lengths[1:], starts, strict=True)
    return [plan.unfold_index[begin + start : end] for begin, end, start in bounds]
