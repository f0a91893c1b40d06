"""What is left to compute when texts are spread over many workers: the planner alone, no model.

Texts go to shards in one of three ways, and every shard forms its batches as the engine does (in the order of tokens,
16,384 unique tokens each):

  random      any shard: what a hash of the document's name or the order of arrival does
  hash 32     by a hash of the first 32 tokens; hash 128 of the first 128
  range       by range of the token ids, cut where a sample of the texts says (--sample texts for each shard)

Printed for each: compression (rows computed / tokens; one tree a shard would be the least), and the largest shard's
rows over the mean. Then what a closed form says for --texts of them, and how the error of the cuts falls with the
sample. The gates: every text is in one shard, the trees of random shards have as many rows as they are expected to, and
those of ranges exactly what the cuts part more than one tree.

  python benchmarks/sharding.py --data DATA     DATA holds gsm8k/, bbh/, vaswani/ and qwen.tiktoken (docs/benchmarks.md)
  python benchmarks/sharding.py --shards 1 16 256 --scale 0.1
"""

from __future__ import annotations

import argparse
import json
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grouped_texts import GroupedTexts, workload_of
from provenance import provenance
from radix_mlp.engine.batching.scheduler import common_prefix, iter_schedule
from verify import require
from workloads import Sequences, plan_of

__all__ = ["METHODS", "Levels", "expected_rows", "levels", "projected", "range_cuts", "shared_across", "split"]

SHARDS = (1, 4, 16, 64, 256, 1024, 4096)
SAMPLES = (4, 16, 64, 256)
MAX_BATCH_TOKENS = 16384
Labels = NDArray[np.int64]
"""Shard of every text, `[n]`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with real texts; generated ones unless given")
    parser.add_argument("--only", nargs="+", choices=("instruct", "few-shot", "rerank", "ms-marco"))
    parser.add_argument("--shards", type=int, nargs="+", default=list(SHARDS))
    parser.add_argument("--sample", type=int, default=64, help="texts sampled for each shard of ranges (default 64)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the groups of texts (default 1)")
    parser.add_argument("--texts", type=float, default=1e9, help="of the closed form (default 1e9)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write one JSON object a row")
    options = parser.parse_args()
    print(json.dumps(provenance(seed=options.seed, scale=options.scale, sampled=options.sample)))
    rows: list[dict[str, Any]] = []
    for name in options.only or ("instruct", "few-shot", "rerank", "ms-marco"):
        work = workload_of(name, options.data, options.scale, options.seed)
        found = [*spread(work, options), *beyond(work, options), *sampling(work, options)]
        rows += [{"workload": name} | row for row in found]
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


def spread(work: GroupedTexts, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every way to spread the texts, over every number of shards."""
    sequences = work.sequences
    num_tokens = sum(map(len, sequences))
    tree = plan_of(sequences)
    print(
        f"\n{work.name}: {work.about}; {len(sequences):,} texts, {num_tokens:,} tokens, one tree {tree.compression:.3f}"
    )
    print(f"{'':10}{'shards':>8}{'texts each':>12}{'compression':>13}{'one tree each':>15}{'largest/mean':>14}")
    for method in METHODS:
        for shards in options.shards:
            labels = METHODS[method](sequences, shards, np.random.default_rng([options.seed, shards]), options.sample)
            require(f"{work.name} {method}: texts in no shard", float((labels < 0).sum() + (labels >= shards).sum()), 1)
            parts = [[sequences[i] for i in np.flatnonzero(labels == shard)] for shard in np.unique(labels)]
            trees = sum(plan_of(part).num_compact for part in parts)
            if method == "random":
                expected = expected_rows(sequences, shards)
                require(f"{work.name} random {shards}: rows beside the expected", abs(trees / expected - 1), 0.05)
            if method == "range":
                wrong = abs(trees - tree.num_compact - shared_across(sequences, labels))
                require(f"{work.name} range {shards}: rows beside what the cuts part", wrong, 1)
            batches = [list(iter_schedule(part, MAX_BATCH_TOKENS)) for part in parts]
            loads = [sum(batch.num_compact for batch in own) for own in batches]
            row = {
                "kind": "spread",
                "method": method,
                "shards": shards,
                "texts": len(sequences),
                "tokens": num_tokens,
                "compact": sum(loads),
                "pairs": sum(batch.attention_pairs for own in batches for batch in own),
                "compression": round(sum(loads) / num_tokens, 4),
                "one_tree_each": round(trees / num_tokens, 4),
                "largest": round(max(loads) * shards / sum(loads), 3),
            }
            yield row
            print(
                f"{method:10}{shards:8,}{len(sequences) / shards:12,.1f}{row['compression']:13.3f}"
                f"{row['one_tree_each']:15.3f}{row['largest']:14.2f}",
                flush=True,
            )


def by_chance(sequences: Sequences, shards: int, rng: np.random.Generator, sample: int) -> Labels:
    return rng.integers(0, shards, len(sequences))


def by_hash(length: int) -> Callable[[Sequences, int, np.random.Generator, int], Labels]:
    def labels(sequences: Sequences, shards: int, rng: np.random.Generator, sample: int) -> Labels:
        # a zero byte more, so that lengths differ in the hash as well
        return np.array([zlib.crc32(ids[:length].tobytes() + b"\0") % shards for ids in sequences], np.int64)

    return labels


def by_range(sequences: Sequences, shards: int, rng: np.random.Generator, sample: int) -> Labels:
    count = min(len(sequences), shards * sample)
    chosen = [sequences[i] for i in rng.choice(len(sequences), count, replace=False)]
    return split(sequences, range_cuts(chosen, shards))


METHODS: dict[str, Callable[[Sequences, int, np.random.Generator, int], Labels]] = {
    "random": by_chance,
    "hash 32": by_hash(32),
    "hash 128": by_hash(128),
    "range": by_range,
}
"""Name -> function of texts, shards, generator and sample: the shard of every text, `[n]`."""


def range_cuts(sample: Sequences, shards: int) -> list[bytes]:
    """Keys at which a sorted sample falls into parts of as many unique tokens.

    A text counts with the tokens that it does not share with the one before it in the sample.
    """
    ordered = sorted((key_of(ids), place) for place, ids in enumerate(sample))
    texts = [sample[place] for _, place in ordered]
    own = [len(ids) - (common_prefix(ids, texts[i - 1]) if i else 0) for i, ids in enumerate(texts)]
    total = np.cumsum(own)
    places = np.searchsorted(total, total[-1] * np.arange(1, shards) / shards)
    return [ordered[place][0] for place in places]


def split(sequences: Sequences, cuts: list[bytes]) -> Labels:
    """The range of every text, `[n]`."""
    return np.array([bisect_right(cuts, key_of(ids)) for ids in sequences], np.int64)


def key_of(ids: NDArray[np.int32]) -> bytes:
    """Bytes that sort like the ids."""
    return ids.astype(">u4").tobytes()


def expected_rows(sequences: Sequences, shards: int) -> float:
    """Rows of all trees when every text goes to any of the shards: a row of c texts stands in k (1 - (1 - 1/k)^c)."""
    plan = plan_of(sequences)
    texts = np.bincount(plan.unfold_index, minlength=plan.num_compact)[: plan.num_compact]
    return float((shards * -np.expm1(texts * np.log1p(-1 / shards))).sum()) if shards > 1 else float(plan.num_compact)


@dataclass(frozen=True)
class Levels:
    """Mean tokens of a text, by who shares them."""

    head: float
    """Shared by all texts."""
    prefix: float
    """Shared by the texts of a group, beyond the head."""
    own: float
    group: float
    """Texts of a group."""

    @property
    def tokens(self) -> float:
        return self.head + self.prefix + self.own

    def pairs(self, heads: float, prefixes: float, owns: float) -> float:
        """Query-key pairs of these numbers of heads, prefixes and texts."""
        head = heads * self.head**2 / 2
        prefix = prefixes * self.prefix * (self.head + self.prefix / 2)
        return head + prefix + owns * self.own * (self.head + self.prefix + self.own / 2)


def levels(work: GroupedTexts) -> Levels:
    """Those of a workload."""
    head = shared_by(work.sequences)
    groups = [[work.sequences[i] for i in np.flatnonzero(work.groups == group)] for group in np.unique(work.groups)]
    count = len(work.sequences)
    # a group of one shares nothing with itself
    prefixes = [shared_by(group) - head if len(group) > 1 else 0 for group in groups]
    prefix = sum(p * len(group) for p, group in zip(prefixes, groups, strict=True)) / count
    return Levels(head, prefix, sum(map(len, work.sequences)) / count - head - prefix, count / len(groups))


def shared_across(sequences: Sequences, labels: Labels) -> int:
    """Tokens that neighbours in the order of tokens share although a cut lies between them."""
    ordered = sorted(range(len(sequences)), key=lambda place: key_of(sequences[place]))
    return sum(common_prefix(sequences[a], sequences[b]) for a, b in pairwise(ordered) if labels[a] != labels[b])


def shared_by(sequences: Sequences) -> int:
    """The longest common prefix of them all."""
    first, last = min(sequences, key=key_of), max(sequences, key=key_of)
    return common_prefix(first, last)


def projected(found: Levels, texts: float, shards: int, method: str) -> tuple[float, float]:
    """Rows and query-key pairs a text, of any number of texts in groups like these and batches of 16,384 rows.

    random: a group of g leaves its prefix in k (1 - (1 - 1/k)^g) shards. range: in one, or two where a cut parts it.
    Either way all texts' head is computed once a batch.
    """
    copies = shards * -np.expm1(found.group * np.log1p(-1 / shards)) if method == "random" and shards > 1 else 1.0
    prefixes = texts / found.group * copies + (shards - 1 if method == "range" else 0)
    rows = texts * found.own + prefixes * found.prefix
    batches = max(rows / (MAX_BATCH_TOKENS - found.head), min(shards, texts))
    # a batch's end parts a group as a cut does; random shards hold the rest of few groups only
    prefixes += batches * (1 if method == "range" else min(1.0, found.group / shards))
    rows = texts * found.own + prefixes * found.prefix + batches * found.head
    return float(rows / texts), found.pairs(batches, prefixes, texts) / texts


def beyond(work: GroupedTexts, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The closed form for many more texts in groups of the same size."""
    found = levels(work)
    about = {name: round(value, 2) for name, value in asdict(found).items()}
    print(f"{options.texts:,.0f} texts like these ({', '.join(f'{k} {v:g}' for k, v in about.items())}):")
    for shards in options.shards:
        rows = {method: projected(found, options.texts, shards, method)[0] for method in ("random", "range")}
        both = {method: round(each / found.tokens, 4) for method, each in rows.items()}
        yield {"kind": "projected", "shards": shards, "texts": options.texts} | about | both
        print(f"{'':10}{shards:8,}   random {both['random']:.3f}   range {both['range']:.3f}")


def sampling(work: GroupedTexts, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of the largest of 16 ranges over their mean, by the number of texts sampled for each."""
    shards, draws = 16, 9
    for sample in SAMPLES:
        if shards * sample > len(work.sequences) / 2:
            continue
        largest = []
        for draw in range(draws):
            labels = by_range(work.sequences, shards, np.random.default_rng([options.seed, draw]), sample)
            parts = [[work.sequences[i] for i in np.flatnonzero(labels == shard)] for shard in np.unique(labels)]
            loads = [plan_of(part).num_compact for part in parts]
            largest.append(max(loads) * shards / sum(loads))
        row = {"kind": "sampling", "shards": shards, "sample": sample, "largest": round(float(np.median(largest)), 3)}
        yield row
        print(f"{'':10}sample of {sample:4} a shard: the largest of {shards} has {row['largest']:.2f} times the mean")


if __name__ == "__main__":
    main()
