"""What Prometheus reads: text-embeddings-inference's names, and what folding adds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    # a process that only passes requests on does without torch
    from radix_mlp.engine.async_engine import Answer, BatchReport

__all__ = ["HasFailures", "Metrics"]

SECONDS = [1.5e-5 * 1.5**power for power in range(35)]
"""Buckets of durations, as text-embeddings-inference has them."""
FRACTIONS = [step / 20 for step in range(1, 21)]
TASKS = ("request", "embed", "predict")
STEPS = ("", "tokenization_", "queue_", "inference_")


def _powers(limit: int) -> list[float]:
    return list(itertools.takewhile(lambda size: size <= limit, (2.0**power for power in range(64))))


class HasFailures(Protocol):
    """Counts requests that failed, by the label `err`."""

    failures: Gauge


class Metrics:
    """The metrics of one server, in their own registry."""

    def __init__(self, max_input_length: int) -> None:
        self.registry = CollectorRegistry()
        # prometheus_client would call its counters te_request_count_total, and dashboards ask for te_request_count
        self.requests = self._gauge("te_request_count", "Requests.", ["method"])
        self.successes = self._gauge("te_request_success", "Requests answered.", ["method"])
        self.failures = self._gauge("te_request_failure", "Requests that failed.", ["err"])
        self.counts = {task: self._gauge(f"te_{task}_count", "Texts.") for task in TASKS[1:]}
        self.answered = {task: self._gauge(f"te_{task}_success", "Texts answered.") for task in TASKS[1:]}
        self.queue_size = self._gauge("te_queue_size", "Texts that wait for a batch.")
        self.durations = {
            (task, step): self._histogram(f"te_{task}_{step}duration", "Seconds a request.", SECONDS)
            for task in TASKS
            for step in STEPS
        }
        self.input_length = self._histogram(
            "te_request_input_length", "Tokens a text (mean of a request).", _powers(max_input_length)
        )
        self.batch_size = self._histogram("te_batch_next_size", "Texts a batch.", _powers(2**12))
        self.batch_tokens = self._histogram("te_batch_next_tokens", "Tokens a batch.", _powers(2**20))

        self.batch_compact = self._histogram(
            "radix_mlp_batch_compact_tokens", "Unique tokens a batch, which the model runs on.", _powers(2**20)
        )
        self.compression = self._histogram(
            "radix_mlp_batch_compression", "Unique tokens over tokens, a batch.", FRACTIONS
        )
        self.queue_age = self._histogram(
            "radix_mlp_queue_age", "Seconds that the oldest text of a batch had waited.", SECONDS
        )
        self.plan_time = self._histogram("radix_mlp_plan_duration", "Seconds to plan a batch.", SECONDS)
        self.forward_time = self._histogram("radix_mlp_forward_duration", "Seconds to run a batch.", SECONDS)
        self.batches = self._counter("radix_mlp_batches", "Batches run.", ["folded"])
        self.failed_batches = self._counter("radix_mlp_failed_batches", "Batches that failed.")
        self.tokens = self._counter("radix_mlp_tokens", "Tokens of all texts.")
        self.compact_tokens = self._counter("radix_mlp_compact_tokens", "Tokens that the model ran on.")
        self.restarts = self._counter("radix_mlp_engine_restarts", "Times the engine was restarted.")
        self.places = self._gauge("radix_mlp_places_taken", "Texts on their way, of --max-concurrent-requests.")

    def watch(self, queue_depth: Callable[[], float], places_taken: Callable[[], float]) -> None:
        """Read these whenever the numbers are asked for."""
        self.queue_size.set_function(queue_depth)
        self.places.set_function(places_taken)

    def observe_batch(self, report: BatchReport) -> None:
        """Count a batch; called from a thread of the engine."""
        if report.error is not None:
            self.failed_batches.inc()
            return
        self.batch_size.observe(report.num_requests)
        self.batch_tokens.observe(report.num_tokens)
        self.batch_compact.observe(report.num_compact)
        self.compression.observe(report.num_compact / max(1, report.num_tokens))
        self.queue_age.observe(report.oldest_seconds)
        self.plan_time.observe(report.plan_seconds)
        self.forward_time.observe(report.forward_seconds)
        self.batches.labels(folded=str(report.folded).lower()).inc()
        self.tokens.inc(report.num_tokens)
        self.compact_tokens.inc(report.num_compact)

    def observe_answer(self, task: str, method: str, num_texts: int, seconds: float, answer: Answer[Any]) -> None:
        """Count a request that was answered; a task is embed, predict or another, which TEI does not count apart."""
        self.successes.labels(method=method).inc()
        if task in self.answered:
            self.answered[task].inc(num_texts)
        steps = (seconds, answer.tokenization_seconds, answer.queue_seconds, answer.inference_seconds)
        for kind in ("request", task) if task in self.answered else ("request",):
            for step, value in zip(STEPS, steps, strict=True):
                self.durations[kind, step].observe(value)
        self.input_length.observe(answer.num_tokens / max(1, num_texts))

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str, labels: list[str] | None = None) -> Gauge:
        return Gauge(name, text, labels or [], registry=self.registry)

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(name, text, labels or [], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: list[float]) -> Histogram:
        return Histogram(name, text, registry=self.registry, buckets=buckets)
