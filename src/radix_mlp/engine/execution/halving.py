"""Batches that fail run again in halves, until the item that breaks them stands alone.

A batch fails where the device's memory does not suffice, where the model raises, or where an answer is not a number.
Attention multiplies what a row does not see by zero, and zero times infinity is NaN. So where one sequence overflows,
those that share its batch may come back NaN too. Nothing finite is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from radix_mlp.engine.execution.batch import ItemBatch, LaunchedBatch, PreparedBatch, has_nan, launch, prepare
from radix_mlp.engine.execution.loaded_model import LoadedModel
from radix_mlp.engine.task import Item
from radix_mlp.errors import DeviceMemoryError

__all__ = ["FailedBatch", "is_out_of_memory", "isolated", "launch_or_halve"]

OUT_OF_MEMORY = ("DefaultCPUAllocator: ", "MPS backend out of memory")
"""In messages of torch's own, which are plain RuntimeErrors."""
MAX_FAILURES = 64
"""Launches of parts of one batch that may fail before the rest of it is given up."""


@dataclass(frozen=True)
class FailedBatch:
    """Items that could not be run, with the reason."""

    items: Sequence[Item]
    places: Sequence[int]
    error: Exception


def launch_or_halve(
    loaded: LoadedModel, batch: ItemBatch, *, retry: bool = False
) -> Iterator[LaunchedBatch | FailedBatch]:
    """Launch a batch; where the device's memory does not suffice, its halves, and so on.

    Args:
        batch: a prepared one, or one that is prepared here.
        retry: halve after any other error too, so that an item that breaks a batch fails alone.
    """
    waiting = [batch]
    failures = 0
    while waiting:
        part = waiting.pop()
        try:
            launched = launch(loaded, part if isinstance(part, PreparedBatch) else prepare(loaded, part))
        except Exception as caught:
            out_of_memory = is_out_of_memory(caught)
            if not (retry or out_of_memory):
                raise
            # the traceback holds the tensors of the launch that failed
            error = caught.with_traceback(None)
        else:
            yield launched
            continue
        failures += 1
        if out_of_memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(part.items) > 1 and (out_of_memory or failures < MAX_FAILURES):
            middle = len(part.items) // 2
            waiting += [part.part(middle), part.part(0, middle)]
        else:
            failed = _too_large(loaded, part, error) if out_of_memory else error
            yield FailedBatch(part.items, part.places, failed)


def isolated(
    loaded: LoadedModel, launched: LaunchedBatch, *, retry: bool = False
) -> Iterator[LaunchedBatch | FailedBatch]:
    """Wait for a batch; yield it, or, where an answer in it is not a number, what its halves give.

    A batch of one item is yielded as it is: its answer is the model's own. One culprit costs about twice the batch.

    Args:
        retry: as in `launch_or_halve`.
    """
    batch = launched.batch
    try:
        broken = len(batch.items) > 1 and has_nan(launched)
    except Exception:
        # the device failed: collecting the batch raises the same
        broken = False
    if not broken:
        yield launched
        return
    middle = len(batch.items) // 2
    for half in (batch.part(0, middle), batch.part(middle)):
        for outcome in launch_or_halve(loaded, half, retry=retry):
            if isinstance(outcome, FailedBatch):
                yield outcome
            else:
                yield from isolated(loaded, outcome, retry=retry)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on any device: only CUDA has an exception of its own for it.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."))
    True
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)


def _too_large(loaded: LoadedModel, batch: ItemBatch, cause: Exception) -> DeviceMemoryError:
    error = DeviceMemoryError(
        f"a request of {len(batch.items[0].ids):,} tokens does not fit into the memory of {loaded.model.device}, not "
        "even in a batch of its own. Shorten it (max_length with truncate), load the model in a smaller dtype "
        "(dtype='bfloat16'), or free memory that others use."
    )
    error.place = batch.places[0]
    error.__cause__ = cause
    return error
