"""What benchmarks run on: named batches of token ids, made from a seed, and how much each of them shares.

Printed for each: sequences, tokens, compression (unique tokens over all) of everything at once, and that of batches of
--batch sequences formed in three orders, after the sequences arrive shuffled: as they came, by length, and by their
tokens, which is how this package forms batches.

  python benchmarks/workloads.py
  python benchmarks/workloads.py --only rerank no-sharing --seed 7 --scale 0.25
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from provenance import provenance
from radix_mlp.plan import RadixPlan, build_plan
from radix_mlp.report.compression import compression_table
from verify import require

__all__ = ["WORKLOADS", "Sequences", "Workload", "plan_of", "prefix_grid"]

Sequences = list[NDArray[np.int32]]
VOCABULARY = 30_000


@dataclass(frozen=True)
class Workload:
    """`make(rng, scale)` gives its sequences; `scale` multiplies how many there are."""

    name: str
    about: str
    make: Callable[[np.random.Generator, float], Sequences]

    def sequences(self, seed: int = 0, scale: float = 1.0) -> Sequences:
        """The same for the same seed and scale, on every machine."""
        return self.make(np.random.default_rng([seed, *self.name.encode()]), scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--batch", type=int, default=32, help="sequences a batch (default 32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the sequences (default 1)")
    parser.add_argument("--json", type=Path, help="also write one JSON object a row")
    options = parser.parse_args()
    print(json.dumps(provenance(seed=options.seed, scale=options.scale)))
    heading = f"{'workload':18}{'sequences':>10}{'tokens':>9}{'at once':>9}"
    print(f"{heading}   in batches of {options.batch}: arrival   length  by tokens")
    rows = []
    for name in options.only:
        sequences = WORKLOADS[name].sequences(options.seed, options.scale)
        np.random.default_rng(options.seed).shuffle(sequences)  # type: ignore[arg-type]
        plan = plan_of(sequences)
        require(f"{name}: unique tokens, counted otherwise", abs(plan.num_compact - count_unique(sequences)), 1)
        table = compression_table(sequences, sizes=[options.batch])[0].num_compact
        shares = {order: compact / plan.num_tokens for order, compact in table.items()}
        rows.append(
            {
                "workload": name,
                "sequences": len(sequences),
                "tokens": plan.num_tokens,
                "at_once": round(plan.compression, 3),
                **{order: round(share, 3) for order, share in shares.items()},
            }
        )
        arrival, length, by_tokens = shares["arrival"], shares["length"], shares["lexicographic"]
        print(
            f"{name:18}{len(sequences):10,}{plan.num_tokens:9,}{plan.compression:9.3f}"
            f"{arrival:28.3f}{length:9.3f}{by_tokens:11.3f}",
            flush=True,
        )
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


def plan_of(sequences: Sequences) -> RadixPlan:
    """The plan of sequences in this order."""
    return build_plan(np.concatenate(sequences), np.cumsum([0, *map(len, sequences)]))


def count_unique(sequences: Sequences) -> int:
    """Nodes of the prefix tree, one dictionary entry each."""
    nodes: dict[tuple[int, int], int] = {}
    for ids in sequences:
        node = -1
        for token in ids.tolist():
            node = nodes.setdefault((node, token), len(nodes))
    return len(nodes)


def prefix_grid(prefix: int, suffix: int, count: int, seed: int = 0) -> NDArray[np.int32]:
    """`[S, prefix + suffix]` ids of the paper's synthetic batches: one shared prefix, suffixes of their own."""
    ids = np.random.default_rng(seed).integers(0, 32_000, (count, prefix + suffix), dtype=np.int32)
    ids[:, :prefix] = ids[0, :prefix]
    return ids


def _ids(rng: np.random.Generator, count: int) -> NDArray[np.int32]:
    return rng.integers(0, VOCABULARY, count, dtype=np.int32)


def _some(count: float, scale: float) -> int:
    return max(2, round(count * scale))


def few_shot(rng: np.random.Generator, scale: float) -> Sequences:
    prompt = _ids(rng, 1500)
    questions = [_ids(rng, rng.integers(30, 120)) for _ in range(_some(40, scale))]
    heads = [np.concatenate([prompt, question]) for question in questions for _ in range(4)]
    return [np.append(head, _ids(rng, rng.integers(1, 20))) for head in heads]


def rerank(rng: np.random.Generator, scale: float) -> Sequences:
    head, tail, found = _ids(rng, 60), _ids(rng, 12), []
    for _ in range(_some(4, scale)):
        query = _ids(rng, rng.integers(5, 25))
        documents = [_ids(rng, rng.integers(40, 240)) for _ in range(100)]
        found += [np.concatenate([head, query, document, tail]) for document in documents]
    return found


def instruct_embed(rng: np.random.Generator, scale: float) -> Sequences:
    heads = [_ids(rng, rng.integers(15, 40)) for _ in range(3)]
    return [
        np.concatenate([heads[rng.integers(3)], _ids(rng, int(np.clip(rng.lognormal(4.3, 0.7), 8, 512)))])
        for _ in range(_some(256, scale))
    ]


def chat_tree(rng: np.random.Generator, scale: float) -> Sequences:
    found: Sequences = []
    for _ in range(_some(4, scale)):
        chat = _ids(rng, 100)
        for _ in range(16):
            turns = [np.concatenate([chat, _ids(rng, rng.integers(20, 110))]) for _ in range(4)]
            found += turns
            chat = turns[int(rng.integers(4))]
    return found


def grpo_group(rng: np.random.Generator, scale: float) -> Sequences:
    found: Sequences = []
    for _ in range(_some(4, scale)):
        prompt = _ids(rng, 2048)
        found += [np.concatenate([prompt, _ids(rng, rng.integers(128, 513))]) for _ in range(16)]
    return found


def ms_marco(rng: np.random.Generator, scale: float, *, query_first: bool = True) -> Sequences:
    # a template of 44 tokens, a query of 17 with 8.2 passages: texts of 75 to 200 tokens, 150 in the mean
    head, found = _ids(rng, 44), []
    for _ in range(_some(64, scale)):
        query = _ids(rng, 17)
        for _ in range(int(rng.choice([8, 8, 8, 8, 9]))):
            document = _ids(rng, int(np.clip(rng.normal(89, 25), 14, 139)))
            found.append(np.concatenate([head, query, document] if query_first else [head, document, query]))
    return found


def no_sharing(rng: np.random.Generator, scale: float) -> Sequences:
    count = _some(128, scale)
    # first tokens differ, so nothing is shared
    lengths = rng.integers(16, 512, count)
    return [np.append(np.int32(VOCABULARY + i), _ids(rng, length)) for i, length in enumerate(lengths)]


def adversarial(rng: np.random.Generator, scale: float) -> Sequences:
    """Runs of one token, a deep comb, prefixes of one another, copies, lone tokens."""
    spine = _ids(rng, _some(256, scale))
    comb = [np.append(spine[:depth], np.int32(VOCABULARY + depth)) for depth in range(1, len(spine))]
    prefixes = [spine[:depth] for depth in range(1, len(spine), 7)]
    lone = [np.array([VOCABULARY + 1000 + i], np.int32) for i in range(_some(256, scale))]
    return [*comb, *prefixes, *[spine] * 16, *lone]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("few-shot", "questions with four answers each behind one prompt of 1,500 tokens", few_shot),
        Workload("rerank", "queries with 100 documents each, in a reranker's template", rerank),
        Workload("instruct-embed", "texts behind one of three instructions", instruct_embed),
        Workload("chat-tree", "chats of 16 turns, 4 alternatives each", chat_tree),
        Workload("grpo-group", "16 answers to each prompt of 2,048 tokens", grpo_group),
        Workload("ms-marco", "8.2 passages a query, the query before the passage", ms_marco),
        Workload(
            "ms-marco-swapped",
            "the same, the passage before the query",
            lambda rng, scale: ms_marco(rng, scale, query_first=False),
        ),
        Workload("no-sharing", "all first tokens differ: the honest zero", no_sharing),
        Workload("adversarial", "runs of one token, a deep comb, copies, lone tokens", adversarial),
    )
}
"""Name -> workload."""

if __name__ == "__main__":
    main()
