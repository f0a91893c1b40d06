"""Whether folding a batch pays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from radix_mlp.errors import InvalidInputError
from radix_mlp.plan import RadixPlan

__all__ = ["check_threshold", "folding_pays", "should_fold"]

MIN_SAVING = 0.05
"""`auto` folds when it saves at least this share of the rows that batches would have unfolded.

Where nothing is shared, running on the tree costs 1 to 6% more than padded batches of one length, on a CPU
(`benchmarks/overhead.py`); below that, indexing eats the gain.
"""


def check_threshold(threshold: float | Literal["auto"]) -> None:
    """Raise `InvalidInputError` unless `threshold` is a number of at least 0 or "auto"."""
    if threshold == "auto":
        return
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not threshold >= 0:
        raise InvalidInputError(
            f'threshold is {threshold!r}; it must be "auto" or a number: 0 never folds, 1 or more always folds, '
            "between folds when compression is below it."
        )


def folding_pays(rows: Sequence[int], unfolded: Sequence[tuple[int, int]], pair_cost: float = 0.0) -> tuple[bool, str]:
    """Whether `auto` runs batches of `rows` rows on the tree rather than ones of `unfolded` padded rows, and why.

    Args:
        rows: of every batch.
        unfolded: sequences of every batch, and the length they are padded to; there may be more or fewer of these.
        pair_cost: what a pair of rows costs in a dense mask, relative to a row: every row is compared with every other.
            0 where attention sees only what is visible, which folding never makes more of.

    >>> folding_pays([95], [(2, 30), (1, 40)])
    (True, '95 rows instead of 100')
    >>> folding_pays([96], [(2, 30), (1, 40)])
    (False, '96 rows instead of 100 save less than 5%')
    >>> folding_pays([800], [(10, 100)], pair_cost=0.001)
    (False, '800 rows instead of 1000 save less than 5%, as a dense mask costs as much as 640 rows instead of 100')
    """
    num_unfolded = sum(count * length for count, length in unfolded)
    mask = pair_cost * sum(count * count for count in rows)
    unfolded_mask = pair_cost * sum(count * length * length for count, length in unfolded)
    pays = sum(rows) + mask <= (1 - MIN_SAVING) * (num_unfolded + unfolded_mask)
    found = f"{sum(rows)} rows instead of {num_unfolded}"
    if not pays:
        found += f" save less than {MIN_SAVING:.0%}"
    if pair_cost:
        found += f", as a dense mask costs as much as {mask:.0f} rows instead of {unfolded_mask:.0f}"
    return pays, found


def should_fold(
    plan: RadixPlan, shape: tuple[int, int], threshold: float | Literal["auto"], pair_cost: float = 0.0
) -> tuple[bool, str]:
    """Decide for one batch.

    Args:
        plan: of the batch.
        shape: sequences and the length they are padded to, which an unfolded call computes.
        threshold: as in `radix_mlp.enable`.
        pair_cost: as in `folding_pays`.
    """
    if plan.num_compact == 0:
        return False, "the batch is empty"
    if threshold == "auto":
        return folding_pays([plan.num_rows], [shape], pair_cost)
    if threshold >= 1 or plan.compression < threshold:
        return True, f"compression {plan.compression:.3f}, threshold {threshold}"
    return False, f"compression {plan.compression:.3f} is not below the threshold {threshold}"
