"""Whether folding a batch pays."""

from __future__ import annotations

from typing import Literal

from radix_mlp.errors import InvalidInputError
from radix_mlp.plan import RadixPlan

__all__ = ["check_threshold", "folding_pays", "should_fold"]

MIN_SAVING = 0.05
"""`auto` folds when at least this share of the rows that would run is saved.

Where nothing is shared, running on the tree costs 1 to 6% more than padded batches of one length, on a CPU
(`benchmarks/overhead.py`); below that, indexing eats the gain. It is a constant and nothing measured when an engine
starts, so that the same texts give the same bits.
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


def folding_pays(num_rows: int, num_unfolded_rows: int) -> bool:
    """Whether `auto` runs `num_rows` rows on the tree rather than `num_unfolded_rows` padded ones.

    >>> folding_pays(95, 100), folding_pays(96, 100)
    (True, False)
    """
    return num_rows <= (1 - MIN_SAVING) * num_unfolded_rows


def should_fold(plan: RadixPlan, num_unfolded_rows: int, threshold: float | Literal["auto"]) -> tuple[bool, str]:
    """Decide for one batch; `num_unfolded_rows` counts padding, which an unfolded call computes too."""
    if plan.num_compact == 0:
        return False, "the batch is empty"
    if threshold == "auto":
        if folding_pays(plan.num_rows, num_unfolded_rows):
            return True, f"{plan.num_rows} rows instead of {num_unfolded_rows}"
        return False, f"{plan.num_rows} rows instead of {num_unfolded_rows} save less than {MIN_SAVING:.0%}"
    if threshold >= 1 or plan.compression < threshold:
        return True, f"compression {plan.compression:.3f}, threshold {threshold}"
    return False, f"compression {plan.compression:.3f} is not below the threshold {threshold}"
