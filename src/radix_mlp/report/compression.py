"""How much folding saves by batch size and by the order of the texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from radix_mlp.arguments import items_of
from radix_mlp.engine.batching.scheduler import ORDERS, Batch, Ids, cut_by_budget, cut_by_count
from radix_mlp.engine.tokenization.token_ids import rows_of_ids

__all__ = ["BATCH_SIZES", "CompressionRow", "compression_table"]

BATCH_SIZES = (16, 32, 64)


@dataclass(frozen=True)
class CompressionRow:
    """One way to form batches, with the compact tokens left for each order of the texts."""

    label: str
    num_batches: dict[str, int]
    """order -> batches."""
    num_compact: dict[str, int]
    """order -> compact tokens of all batches."""
    attention_pairs: dict[str, int]
    """order -> query-key pairs of all batches."""


def compression_table(
    sequences: Sequence[Ids], *, sizes: Sequence[int] = BATCH_SIZES, max_batch_tokens: int = 16384
) -> list[CompressionRow]:
    """One row per batch size, then one for the token budget, each with the orders in `ORDERS`.

    Examples:
        >>> import numpy as np
        >>> texts = [np.array(ids, np.int32) for ids in ([1, 2, 3], [9, 9], [1, 2, 4])]
        >>> compression_table(texts, sizes=[2])[0].num_compact
        {'arrival': 8, 'length': 6, 'lexicographic': 6}
    """
    sequences, sizes = rows_of_ids(sequences, "sequences"), items_of(sizes, "sizes")
    orders = {name: order(sequences) for name, order in ORDERS.items()}
    lexicographic = orders["lexicographic"]
    rows = [
        _row(f"{size} texts", {k: cut_by_count(sequences, o, lexicographic, size) for k, o in orders.items()})
        for size in sizes
    ]
    budget = {k: cut_by_budget(sequences, o, lexicographic, max_batch_tokens) for k, o in orders.items()}
    return [*rows, _row(f"{max_batch_tokens:,} compact tokens", budget)]


def _row(label: str, cuts: dict[str, list[Batch]]) -> CompressionRow:
    return CompressionRow(
        label,
        {name: len(batches) for name, batches in cuts.items()},
        {name: sum(batch.num_compact for batch in batches) for name, batches in cuts.items()},
        {name: sum(batch.attention_pairs for batch in batches) for name, batches in cuts.items()},
    )
