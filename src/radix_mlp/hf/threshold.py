"""Whether folding a batch pays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from radix_mlp.errors import InvalidInputError
from radix_mlp.plan import RadixPlan

if TYPE_CHECKING:
    from radix_mlp.hf.measured_costs import Costs

__all__ = ["check_threshold", "folding_pays", "should_fold"]

MIN_SAVING = 0.05
"""`auto` folds when at least this share of the time that batches would take unfolded is saved, or, where nothing was
measured, this share of the rows.

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


def folding_pays(rows: Sequence[int], unfolded_rows: Sequence[int], costs: Costs | None = None) -> tuple[bool, str]:
    """Whether `auto` runs batches of `rows` rows on the tree rather than ones of `unfolded_rows` padded rows, and why.

    Args:
        rows: of every batch.
        unfolded_rows: of every batch, padding counted; there may be more or fewer of these.
        costs: what rows cost here; None goes by their number.

    >>> folding_pays([95], [60, 40])
    (True, '95 rows instead of 100')
    >>> folding_pays([96], [60, 40])[0]
    False
    """
    counted = f"{sum(rows)} rows instead of {sum(unfolded_rows)}"
    if costs is None:
        pays = sum(rows) <= (1 - MIN_SAVING) * sum(unfolded_rows)
        return pays, counted if pays else f"{counted} save less than {MIN_SAVING:.0%}"
    folded, unfolded = costs.folded_ms(rows), costs.unfolded_ms(unfolded_rows)
    pays = folded <= (1 - MIN_SAVING) * unfolded
    times = f"{folded:.1f} ms instead of {unfolded:.1f} by what was measured here"
    return pays, f"{counted}, {times}" if pays else f"{counted}, {times}, save less than {MIN_SAVING:.0%}"


def should_fold(
    plan: RadixPlan, num_unfolded_rows: int, threshold: float | Literal["auto"], costs: Costs | None = None
) -> tuple[bool, str]:
    """Decide for one batch; `num_unfolded_rows` counts padding, which an unfolded call computes too."""
    if plan.num_compact == 0:
        return False, "the batch is empty"
    if threshold == "auto":
        return folding_pays([plan.num_rows], [num_unfolded_rows], costs)
    if threshold >= 1 or plan.compression < threshold:
        return True, f"compression {plan.compression:.3f}, threshold {threshold}"
    return False, f"compression {plan.compression:.3f} is not below the threshold {threshold}"
