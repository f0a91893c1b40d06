"""Random batches of texts with pictures, whose tokens see one another."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from radix_mlp.plan import RadixPlan, build_plan

Piece = tuple[str, int]
"""`("text", token)` or `("picture", number)`."""

FIRST_PICTURE = 1000


class Batch(NamedTuple):
    """A plan with spans, and the number of each token's span, `[N]`, -1 for words."""

    plan: RadixPlan
    spans: np.ndarray


@st.composite
def batches(draw: st.DrawFn, largest: int = 9) -> Batch:
    """Sequences that share beginnings: words, and pictures of up to `largest` tokens; with padding or none."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    sizes = rng.integers(1, largest + 1, 4)
    return random_batch(rng, sizes, draw(st.integers(1, 12)), draw(st.sampled_from([None, 8])))


def random_batch(
    rng: np.random.Generator, sizes: np.ndarray, num_sequences: int, pad_multiple_of: int | None = None
) -> Batch:
    """Sequences of up to 12 words and pictures, most of them after a part of an earlier one."""
    sequences: list[list[Piece]] = []
    for _ in range(num_sequences):
        earlier = sequences[int(rng.integers(len(sequences)))] if sequences else []
        kept = earlier[: int(rng.integers(len(earlier) + 1))]
        count = 1 + int(rng.integers(12 - min(len(kept), 11)))
        sequences.append([*kept[:11], *(random_piece(rng, len(sizes)) for _ in range(count))])
    return batch_of(sequences, sizes, pad_multiple_of)


def random_piece(rng: np.random.Generator, num_pictures: int) -> Piece:
    return ("picture", int(rng.integers(num_pictures))) if rng.random() < 0.5 else ("text", int(rng.integers(3)))


def batch_of(sequences: list[list[Piece]], sizes: np.ndarray, pad_multiple_of: int | None = None) -> Batch:
    """Sequences of pieces, where picture `p` has `sizes[p]` tokens. Each picture is a span of its own."""
    ids: list[int] = []
    spans: list[int] = []
    lengths: list[int] = []
    for sequence in sequences:
        start = len(ids)
        for place, (kind, number) in enumerate(sequence):
            size = int(sizes[number]) if kind == "picture" else 1
            first = FIRST_PICTURE + number * int(max(sizes)) if kind == "picture" else number
            ids += range(first, first + size)
            spans += [place if kind == "picture" else -1] * size
        lengths.append(len(ids) - start)
    plan = build_plan(ids, np.cumsum([0, *lengths]), pad_multiple_of=pad_multiple_of)
    return Batch(plan.with_spans(spans), np.array(spans))


def one_at_a_time(
    tensors: list[Tensor], batch: Batch, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """`[M, Hq, Dv]`, zero for padding: attention in each sequence alone, masked as transformers masks it."""
    q, k, v, *sinks = tensors
    plan = batch.plan
    group = q.shape[1] // k.shape[1]
    out: dict[int, Tensor] = {}
    for start, stop in zip(plan.cu_seq_lengths[:-1], plan.cu_seq_lengths[1:], strict=True):
        path = torch.from_numpy(plan.unfold_index[start:stop].astype(np.int64))
        span = torch.from_numpy(batch.spans[start:stop])
        key, value = (x[path].repeat_interleave(group, dim=1) for x in (k, v))
        score = torch.einsum("ihd,jhd->hij", q[path], key) * scale
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        row = torch.arange(len(path))
        seen = (row <= row[:, None]) | ((span == span[:, None]) & (span >= 0))
        if window is not None:
            seen &= row > row[:, None] - window
        score = score.masked_fill(~seen, -torch.inf)
        if sinks:
            score = torch.cat([score, sinks[0][:, None, None].expand(-1, len(path), 1)], dim=2)
        mixed = torch.einsum("hij,jhd->ihd", score.softmax(2)[:, :, : len(path)], value)
        # sequences that share a row agree on it, which the test of the whole relies on
        out.update(zip(path.tolist(), mixed, strict=True))
    nothing = torch.zeros(q.shape[1], v.shape[2], dtype=q.dtype)
    return torch.stack([out.get(row, nothing) for row in range(plan.num_rows)])
