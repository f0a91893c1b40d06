"""Random batches that share prefixes, for tests and benchmarks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["prefix_batch", "random_batch"]


def random_batch(
    rng: np.random.Generator,
    *,
    num_sequences: int = 8,
    vocab_size: int = 100,
    max_length: int = 24,
    branch: float = 0.5,
    duplicate: float = 0.1,
    empty: float = 0.05,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A batch grown as a random tree: ids `[N]` and offsets `[S + 1]`, both int64.

    Every sequence is new, copies an earlier one, or branches from an earlier one at a random place (possibly at its
    end, which makes a chain, or without a tail, which makes a prefix).

    Args:
        rng: source of randomness; the same state gives the same batch.
        num_sequences: `S`.
        vocab_size: ids lie in `[0, vocab_size)`; a small one makes branches meet again.
        max_length: longest sequence, in tokens; at least 1.
        branch: probability that a sequence starts from a part of an earlier one.
        duplicate: probability that it repeats an earlier one whole.
        empty: probability that it has no tokens.

    Example:
        >>> import numpy as np
        >>> ids, cu = random_batch(np.random.default_rng(0), num_sequences=4)
        >>> len(cu), int(cu[-1]) == len(ids)
        (5, True)
    """
    sequences: list[NDArray[np.int64]] = []
    for _ in range(num_sequences):
        kind = rng.random()
        earlier = sequences[int(rng.integers(len(sequences)))] if sequences else np.zeros(0, np.int64)
        if kind < empty:
            sequence = np.zeros(0, np.int64)
        elif kind < empty + duplicate and len(earlier):
            sequence = earlier
        else:
            length = int(rng.integers(1, max_length + 1))
            sequence = rng.integers(0, vocab_size, length, dtype=np.int64)
            if rng.random() < branch:
                kept = min(int(rng.integers(len(earlier) + 1)), length)
                sequence[:kept] = earlier[:kept]
        sequences.append(sequence)
    return _pack(sequences)


def prefix_batch(
    rng: np.random.Generator, *, num_sequences: int, prefix: int, suffix: int, vocab_size: int = 32_000
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sequences of one shared prefix and a random suffix each: ids `[N]` and offsets `[S + 1]`, both int64."""
    shared = rng.integers(0, vocab_size, prefix, dtype=np.int64)
    tails = rng.integers(0, vocab_size, (num_sequences, suffix), dtype=np.int64)
    return _pack([np.concatenate([shared, tail]) for tail in tails])


def _pack(sequences: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    offsets = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum([len(sequence) for sequence in sequences], out=offsets[1:])
    return np.concatenate([*sequences, np.zeros(0, np.int64)]), offsets
