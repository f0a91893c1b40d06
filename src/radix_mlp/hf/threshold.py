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


def folding_pays(rows: Sequence[int], unfolded_rows: Sequence[int]) -> tuple[bool, str]:
    """Whether `auto` runs batches of `rows` rows on the tree rather than ones of `unfolded_rows` padded rows, and why.

    Args:
        rows: of every batch.
        unfolded_rows: of every batch, padding counted; there may be more or fewer of these.

    >>> folding_pays([95], [60, 40])
    (True, '95 rows instead of 100')
    >>> folding_pays([96], [60, 40])
    (False, '96 rows instead of 100 save less than 5%')
    """
    counted = f"{sum(rows)} rows instead of {sum(unfolded_rows)}"
    pays = sum(rows) <= (1 - MIN_SAVING) * sum(unfolded_rows)
    return pays, counted if pays else f"{counted} save less than {MIN_SAVING:.0%}"


def should_fold(plan: RadixPlan, num_unfolded_rows: int, threshold: float | Literal["auto"]) -> tuple[bool, str]:
    """Decide for one batch; `num_unfolded_rows` counts padding, which an unfolded call computes too."""
    if plan.num_compact == 0:
        return False, "the batch is empty"
    if threshold == "auto":
        return folding_pays([plan.num_rows], [num_unfolded_rows])
    if threshold >= 1 or plan.compression < threshold:
        return True, f"compression {plan.compression:.3f}, threshold {threshold}"
    return False, f"compression {plan.compression:.3f} is not below the threshold {threshold}"
