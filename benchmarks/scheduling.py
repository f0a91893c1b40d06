"""Online batches in three orders on one trace: by shared prefixes, by arrival, shortest first.

The trace mixes what servers get: a query with a hundred passages (rerank), single texts behind one of a few
instructions (embed), few-shot questions with all their answers (score). Calls arrive as a Poisson process with a fixed
seed, at rates that are parts of what the order of arrival can take; "all at once" measures throughput.

Unless `--real` is given, time is virtual: the scheduler is the engine's own, and a batch takes
    fixed + tokens x per compact token + pairs x per query-key pair
with constants that stand for Qwen3-0.6B on one H200, so results do not depend on the machine or on what else it does.

  python benchmarks/scheduling.py --data DATA      DATA holds bbh/, vaswani/ and qwen.tiktoken (docs/benchmarks.md)
  python benchmarks/scheduling.py                  generated text of the same shape, byte tokens
  python benchmarks/scheduling.py --real           through AsyncEngine on the model "tiny", byte tokens
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from provenance import provenance
from radix_mlp.engine.batching.online_scheduler import ONLINE_ORDERS, OnlineScheduler, Waiting
from radix_mlp.engine.batching.scheduler import Ids
from radix_mlp.models.load_tokenizer import load_tokenizer
from radix_mlp.plan import build_plan
from texts import INSTRUCTION, RERANK_PREFIX, RERANK_SUFFIX, trec

INSTRUCTIONS = [
    f"Instruct: {task}\nQuery: "
    for task in (
        INSTRUCTION,
        "Retrieve semantically similar text",
        "Given a question about engineering, find the abstract of the paper that answers it",
    )
]
BATCHES_IN_FLIGHT = 2


@dataclass(frozen=True)
class Call:
    kind: str
    sequences: list[Ids]


@dataclass(frozen=True)
class Costs:
    """Seconds of a batch."""

    fixed: float
    per_token: float
    per_pair: float

    def of(self, num_compact: int, num_pairs: int) -> float:
        return self.fixed + self.per_token * num_compact + self.per_pair * num_pairs


@dataclass(frozen=True)
class Row:
    load: str
    order: str
    tokens_per_s: float
    calls_per_s: float
    compression: float
    batches: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    p99_ms_by_kind: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the real text")
    parser.add_argument("--calls", type=int, default=2000, help="calls of the trace (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--loads", default="0.5,0.8,1.0,1.3", help="arrival rates, as parts of what arrival order takes"
    )
    parser.add_argument("--max-batch-tokens", type=int, default=16384)
    parser.add_argument("--max-wait-ms", type=float, default=2.0, help="wait of an idle device (default 2)")
    parser.add_argument("--max-age", type=float, default=1.0, help="seconds")
    parser.add_argument("--fixed-ms", type=float, default=3.0)
    parser.add_argument("--us-per-token", type=float, default=1.5)
    parser.add_argument("--ns-per-pair", type=float, default=0.6)
    parser.add_argument("--real", action="store_true", help='run AsyncEngine on "tiny"')
    parser.add_argument("--json", type=Path, help="also write one JSON object a row")
    options = parser.parse_args()

    calls = trace(options.data, options.calls, options.seed, bytes_only=options.real)
    print(json.dumps(provenance(real=options.real, seed=options.seed)))
    kinds = Counter(call.kind for call in calls)
    sequences = [ids for call in calls for ids in call.sequences]
    print(
        f"{len(calls):,} calls ({', '.join(f'{count:,} {kind}' for kind, count in kinds.items())}), "
        f"{len(sequences):,} sequences, {sum(map(len, sequences)):,} tokens; everything folded at once: "
        f"{folded_at_once(sequences):.3f}\n"
    )
    print("load    order      Mtok/s   calls/s  M/N   batches    p50 ms    p99 ms    max ms   p99 ms by kind")
    run = Real(options) if options.real else Simulated(options)
    capacity = 0.0
    rows = []
    for load in ["all at once", *options.loads.split(",")]:
        for order in sorted(ONLINE_ORDERS):
            arrivals = (
                arrival_times(len(calls), float(load) * capacity, options.seed) if capacity else [0.0] * len(calls)
            )
            row = run(load, order, calls, arrivals)
            rows.append(row)
            by_kind = "  ".join(f"{kind} {value:.0f}" for kind, value in row.p99_ms_by_kind.items())
            print(
                f"{load[:6]:8}{order:9}{row.tokens_per_s / 1e6:8.2f}{row.calls_per_s:10.1f}{row.compression:6.2f}"
                f"{row.batches:9,}{row.p50_ms:10.1f}{row.p99_ms:10.1f}{row.max_ms:10.1f}   {by_kind}",
                flush=True,
            )
        capacity = capacity or next(row.calls_per_s for row in rows if row.order == "arrival")
    if options.json:
        options.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def arrival_times(count: int, rate: float, seed: int) -> list[float]:
    """Seconds at which calls of a Poisson process come."""
    found: list[float] = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count)).tolist()
    return found


class Simulated:
    """The scheduler under a virtual clock, before a device that takes what the cost model says."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.costs = Costs(options.fixed_ms * 1e-3, options.us_per_token * 1e-6, options.ns_per_pair * 1e-9)

    def __call__(self, load: str, order: Any, calls: list[Call], arrivals: list[float]) -> Row:
        scheduler = OnlineScheduler(
            self.options.max_batch_tokens,
            max_wait=self.options.max_wait_ms * 1e-3,
            max_age=self.options.max_age,
            order=order,
        )
        missing = [len(call.sequences) for call in calls]
        finished = [0.0] * len(calls)
        running: list[tuple[float, int, list[Waiting]]] = []
        counts = Counter[str]()
        now = device_free = 0.0
        arrived = 0
        while arrived < len(calls) or running or len(scheduler):
            while arrived < len(calls) and arrivals[arrived] <= now:
                order_in_call = sorted(calls[arrived].sequences, key=lambda ids: ids.tolist())
                scheduler.add(Waiting(ids, arrived, arrivals[arrived]) for ids in order_in_call)
                arrived += 1
            while running and running[0][0] <= now:
                done, _, batch = heapq.heappop(running)
                for waiting in batch:
                    missing[waiting.call] -= 1
                    finished[waiting.call] = done
            wait = scheduler.seconds_to_wait(now) if len(running) < BATCHES_IN_FLIGHT else None
            if wait is not None and wait < 1e-9:
                batch = scheduler.take(now)
                plan = plan_of([waiting.ids for waiting in batch])
                counts.update(batches=1, tokens=plan.num_tokens, compact=plan.num_compact)
                device_free = max(now, device_free) + self.costs.of(plan.num_compact, int((plan.depth + 1).sum()))
                heapq.heappush(running, (device_free, counts["batches"], batch))
                continue
            coming = [arrivals[arrived]] if arrived < len(calls) else []
            coming += [running[0][0]] if running else []
            coming += [now + wait] if wait is not None else []
            if coming:
                now = min(coming)
        assert not any(missing)
        return row_of(load, order, calls, arrivals, finished, counts)


class Real:
    """`AsyncEngine` on the model `"tiny"`."""

    def __init__(self, options: Any) -> None:
        from radix_mlp import Engine

        self.options = options
        self.engine = Engine("tiny", max_batch_tokens=options.max_batch_tokens)
        self.engine.embed(["compile the planner"])

    def __call__(self, load: str, order: Any, calls: list[Call], arrivals: list[float]) -> Row:
        return asyncio.run(self.run(load, order, calls, arrivals))

    async def run(self, load: str, order: Any, calls: list[Call], arrivals: list[float]) -> Row:
        from radix_mlp import AsyncEngine

        finished = [0.0] * len(calls)
        front = AsyncEngine(self.engine, order=order, max_age=self.options.max_age, max_concurrent_requests=len(calls))
        async with front:
            began = time.perf_counter()

            async def one(index: int) -> None:
                await asyncio.sleep(max(0.0, arrivals[index] - (time.perf_counter() - began)))
                await front.embed(calls[index].sequences)
                finished[index] = time.perf_counter() - began

            await asyncio.gather(*map(one, range(len(calls))))
        stats = front.stats
        counts = Counter(batches=stats.num_batches, tokens=stats.num_tokens, compact=stats.num_compact)
        return row_of(load, order, calls, arrivals, finished, counts)


def row_of(
    load: str, order: str, calls: list[Call], arrivals: list[float], finished: list[float], counts: Counter[str]
) -> Row:
    latencies = 1e3 * (np.array(finished) - np.array(arrivals))
    kinds = np.array([call.kind for call in calls])
    seconds = max(finished) - min(arrivals)
    return Row(
        load,
        order,
        counts["tokens"] / seconds,
        len(calls) / seconds,
        counts["compact"] / counts["tokens"],
        counts["batches"],
        float(np.percentile(latencies, 50)),
        float(np.percentile(latencies, 99)),
        float(latencies.max()),
        {kind: float(np.percentile(latencies[kinds == kind], 99)) for kind in sorted(set(kinds.tolist()))},
    )


def plan_of(sequences: list[Ids]) -> Any:
    return build_plan(np.concatenate(sequences).astype(np.int64), np.cumsum([0, *map(len, sequences)]))


def folded_at_once(sequences: list[Ids]) -> float:
    """Compression if everything were one batch: no schedule can do better."""
    return float(plan_of(sequences).compression)


def trace(data: Path | None, count: int, seed: int, *, bytes_only: bool) -> list[Call]:
    """Calls in the order in which they come: 60 in 100 embed, 25 score, 15 rerank."""
    rng = np.random.default_rng(seed)
    # a byte is a token there, and the model takes 8192
    texts = Texts(data, rng, longest_prompt=1000 if bytes_only else None)
    tokenizer = load_tokenizer("tiny" if data is None or bytes_only else data / "qwen.tiktoken")

    def encode(rows: list[str]) -> list[Ids]:
        found = tokenizer(rows)["input_ids"]
        return [np.asarray(ids, np.int32) for ids in found]

    calls: list[Call] = []
    for kind in rng.choice(["embed", "score", "rerank"], count, p=[0.6, 0.25, 0.15]).tolist():
        if kind == "embed":
            rows = [INSTRUCTIONS[rng.integers(len(INSTRUCTIONS))] + texts.passage()]
        elif kind == "score":
            prompt, answers = texts.question()
            rows = [prompt + answer for answer in answers]
        else:
            # 10, 30 or 100 passages a query
            query = texts.query()
            head = f"{RERANK_PREFIX}<Instruct>: {INSTRUCTION}\n<Query>: {query}\n<Document>: "
            rows = [head + texts.passage() + RERANK_SUFFIX for _ in range(int(rng.choice([10, 30, 100])))]
        calls.append(Call(kind, encode(rows)))
    return calls


class Texts:
    """Passages, queries and few-shot questions: real ones, or made of random words."""

    def __init__(self, data: Path | None, rng: np.random.Generator, longest_prompt: int | None) -> None:
        self.rng = rng
        self.words = ["".join(rng.choice(list("abcdefghij"), rng.integers(2, 9))) for _ in range(500)]
        self.passages: list[str] = []
        self.queries: list[str] = []
        self.tasks: list[tuple[str, list[str], list[str]]] = []
        if data is None:
            self.tasks = [
                (self.some_words(150), [self.some_words(30) for _ in range(200)], [" yes", " no"]) for _ in range(8)
            ]
            return
        self.passages = trec(data / "vaswani" / "doc-text.trec", "DOC")
        self.queries = trec(data / "vaswani" / "query-text.trec", "top")
        for path in sorted((data / "bbh" / "tasks").glob("*.json")):
            examples = json.loads(path.read_text())["examples"]
            answers = [" " + answer for answer, _ in Counter(example["target"] for example in examples).most_common(4)]
            shots = (data / "bbh" / "cot-prompts" / f"{path.stem}.txt").read_text().split("-----\n")[-1]
            self.tasks.append((shots[:longest_prompt], [example["input"] for example in examples], answers))

    def passage(self) -> str:
        return self.pick(self.passages) if self.passages else self.some_words(int(self.rng.integers(10, 60)))

    def query(self) -> str:
        return self.pick(self.queries) if self.queries else self.some_words(8)

    def question(self) -> tuple[str, list[str]]:
        shots, questions, answers = self.tasks[self.rng.integers(len(self.tasks))]
        return f"{shots}\n\nQ: {self.pick(questions)}\nA:", answers

    def pick(self, values: list[str]) -> str:
        return values[self.rng.integers(len(values))]

    def some_words(self, count: int) -> str:
        return " ".join(self.rng.choice(self.words, count))


if __name__ == "__main__":
    main()
