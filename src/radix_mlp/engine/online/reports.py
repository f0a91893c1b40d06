"""What the online engine reports: an answer, a batch, and counts since the start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Answer", "BatchReport", "FrontStats"]

Value = TypeVar("Value")


@dataclass(frozen=True)
class Answer(Generic[Value]):
    """A call's value and what it took."""

    value: Value
    tokenization_seconds: float
    """Waiting for a tokenization worker counted."""
    queue_seconds: float
    """From token ids to the start of the first batch with a sequence of this call."""
    inference_seconds: float
    """From there to the answer."""
    num_characters: int
    num_tokens: int
    """Of this call's own sequences."""
    num_batch_tokens: int
    """Tokens of all batches that it was in, with those of other calls."""
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
    """Tokens that the model computed; 0 if the batch failed."""
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
    """Ended with an error, wrong arguments among them."""
    num_cancelled: int = 0
    num_expired: int = 0
    """Not answered before their deadline."""
    num_refused: int = 0
    """Because of overload; not among those accepted."""
    num_batches: int = 0
    num_requests: int = 0
    """Sequences run."""
    num_tokens: int = 0
    num_compact: int = 0

    def count(self, report: BatchReport) -> None:
        """Add a batch, unless it failed."""
        if report.error is None:
            self.num_batches += 1
            self.num_requests += report.num_requests
            self.num_tokens += report.num_tokens
            self.num_compact += report.num_compact
