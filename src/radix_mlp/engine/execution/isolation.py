"""A batch with an answer that is not a number runs again in halves, until the culprit stands alone.

Attention multiplies what a row does not see by zero, and zero times infinity is NaN. So where one sequence overflows,
those that share its batch may come back NaN too. Nothing finite is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from radix_mlp.engine.execution.batch import FailedBatch, LaunchedBatch, has_nan, launch_or_halve

if TYPE_CHECKING:
    from radix_mlp.engine.execution.loaded_model import LoadedModel

__all__ = ["isolated"]


def isolated(
    engine: LoadedModel, launched: LaunchedBatch, *, retry: bool = False
) -> Iterator[LaunchedBatch | FailedBatch]:
    """Wait for a batch; yield it, or what its halves give where an answer in it is not a number.

    A batch of one item is yielded as it is: its answer is the model's own. One culprit costs about twice the batch.

    Args:
        retry: as in `launch_or_halve`; a half that fails is then yielded instead of raised.
    """
    items = launched.items
    try:
        broken = len(items) > 1 and has_nan(launched)
    except Exception:
        # the device failed: collecting the batch raises the same
        broken = False
    if not broken:
        yield launched
        return
    middle = len(items) // 2
    for half in (items[:middle], items[middle:]):
        for outcome in launch_or_halve(engine, half, retry=retry):
            if isinstance(outcome, FailedBatch):
                yield outcome
            else:
                yield from isolated(engine, outcome, retry=retry)
