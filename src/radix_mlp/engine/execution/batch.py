"""One batch of items on its way: prepared on the CPU, launched on the device, collected on the host.

    prepared = prepare(engine, items)       # plan, decision to fold, rows needed; any thread
    launched = launch(engine, prepared)     # the model and what the tasks do on the device; the model's thread
    answers = collect(launched)             # waits for the device; any thread

On CUDA `launch` returns before the device is done, so the next batch is prepared and launched meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from radix_mlp.engine.execution.step import PreparedStep, hidden_states, prepare_step
from radix_mlp.engine.task import Item, Kept, Rows, Task, union_of_rows
from radix_mlp.errors import DeviceMemoryError, RadixError
from radix_mlp.ops.device_plan import DevicePlan
from radix_mlp.ops.send import send
from radix_mlp.plan import RadixPlan

if TYPE_CHECKING:
    from radix_mlp.engine.execution.loaded_model import LoadedModel

__all__ = ["FailedBatch", "LaunchedBatch", "PreparedBatch", "collect", "fill", "has_nan", "launch"]
__all__ += ["launch_or_halve", "prepare"]

OUT_OF_MEMORY = ("DefaultCPUAllocator: ", "MPS backend out of memory")
"""In messages of torch's own, which are plain RuntimeErrors."""
MAX_FAILURES = 64
"""Launches of parts of one batch that may fail before the rest of it is given up."""


@dataclass(frozen=True)
class Part:
    """The items of a batch that have one task."""

    task: Task
    places: list[int]
    """In the batch, ascending."""
    plan: RadixPlan
    """Their sequences on the batch's rows."""


@dataclass(frozen=True)
class PreparedBatch:
    """What the model's thread needs to run a batch."""

    items: Sequence[Item]
    step: PreparedStep
    parts: list[Part]
    seconds: float


@dataclass(frozen=True)
class LaunchedBatch:
    """A batch that is, or will be, computed on the device."""

    items: Sequence[Item]
    step: PreparedStep
    parts: list[tuple[Part, Any]]
    """What every task found, on its way to the host, or the error that it ended with."""
    done: torch.cuda.Event | None
    prepare_seconds: float
    began: float
    check: Callable[[], None]
    """Raises an error if what the device computed is worth nothing, once it is done."""


@dataclass(frozen=True)
class FailedBatch:
    """Items that could not be run, with the reason."""

    items: Sequence[Item]
    error: Exception


def prepare(
    engine: LoadedModel, items: Sequence[Item], threshold: float | Literal["auto"] | None = None
) -> PreparedBatch:
    """Plan a batch and start copying the plan to the device; `threshold` is the engine's unless given."""
    began = time.perf_counter()
    by_task: dict[Task, list[int]] = {}
    for place, item in enumerate(items):
        by_task.setdefault(item.task, []).append(place)

    def needed_rows(plan: RadixPlan) -> Rows | None:
        parts = [
            task.needed_rows(_part_of(plan, places), [items[place] for place in places])
            for task, places in by_task.items()
        ]
        return union_of_rows(parts)

    threshold = engine.batch_threshold if threshold is None else threshold
    step = prepare_step([item.ids for item in items], threshold, needed_rows)
    parts = [Part(task, places, _part_of(step.plan, places)) for task, places in by_task.items()]
    if step.folded:
        engine.forward.prepare(step.plan)
    else:
        step.plan.to(engine.model.device, tree=False)
    return PreparedBatch(items, step, parts, time.perf_counter() - began)


def launch(engine: LoadedModel, prepared: PreparedBatch) -> LaunchedBatch:
    """Run the model on a batch, and the tasks on what it gives. An error of one task leaves the others alone."""
    began = time.perf_counter()
    with engine.model_turn(), engine.launching(), torch.inference_mode():
        engine.rope.reset()
        hidden, found = _run_current(engine, prepared)
        done = None
        if hidden.is_cuda:
            done = torch.cuda.Event()
            # the current device may be another
            done.record(torch.cuda.current_stream(hidden.device))
    return LaunchedBatch(prepared.items, prepared.step, found, done, prepared.seconds, began, engine.forward.check)


def _run_current(engine: LoadedModel, prepared: PreparedBatch) -> tuple[Tensor, list[tuple[Part, Any]]]:
    """As `_run`, once more if the model was changed meanwhile, by an adapter perhaps: looked for while the device is at
    work."""
    if not prepared.step.folded:
        return _run(engine, prepared)
    try:
        found = _run(engine, prepared)
    except Exception:
        if not engine.forward.refresh():
            raise
        return _run(engine, prepared)
    return _run(engine, prepared) if engine.forward.refresh() else found


def _run(engine: LoadedModel, prepared: PreparedBatch) -> tuple[Tensor, list[tuple[Part, Any]]]:
    """Hidden states, and what every task makes of them."""
    found: list[tuple[Part, Any]] = []
    hidden = hidden_states(engine.model, prepared.step, engine.forward)
    whole = prepared.step.plan.to(hidden.device, tree=False)
    for part in prepared.parts:
        items = [prepared.items[place] for place in part.places]
        try:
            found.append((part, _to_host(part.task.finish(hidden, _device_part(whole, part.plan), items))))
        except RadixError as error:
            found.append((part, error))
    return hidden, found


def collect(launched: LaunchedBatch) -> list[Any]:
    """One answer, or the exception in its place, for every item; waits for the device."""
    if launched.done is not None:
        launched.done.synchronize()
    launched.check()
    answers: list[Any] = [None] * len(launched.items)
    for part, found in launched.parts:
        here: Sequence[Any] = [found] * len(part.places)
        if not isinstance(found, Exception):
            try:
                here = part.task.answers(_to_numpy(found), part.plan, [launched.items[place] for place in part.places])
            except Exception as error:
                # the other tasks of the batch have their answers
                here = [error] * len(part.places)
        for place, answer in zip(part.places, here, strict=True):
            answers[place] = answer
    return answers


def has_nan(launched: LaunchedBatch) -> bool:
    """Whether an answer of the batch is not a number; waits for the device. Not of tasks that ended with an error."""
    if launched.done is not None:
        launched.done.synchronize()
    return any(
        part.task.has_nan(_to_numpy(found), part.plan, [launched.items[place] for place in part.places])
        for part, found in launched.parts
        if not isinstance(found, Exception)
    )


def fill(answers: list[Any], places: list[int], launched: LaunchedBatch) -> None:
    """Put what `collect` gives into the places of the items; raises the first that is an error."""
    for place, answer in zip(places, collect(launched), strict=True):
        if isinstance(answer, Exception):
            raise answer
        answers[place] = answer


def launch_or_halve(
    engine: LoadedModel, batch: PreparedBatch | Sequence[Item], *, retry: bool = False
) -> Iterator[LaunchedBatch | FailedBatch]:
    """Launch a batch; where the device's memory does not suffice, its halves, and so on.

    Args:
        retry: halve after any other error too, so that an item that breaks a batch fails alone.
    """
    waiting: list[PreparedBatch | Sequence[Item]] = [batch]
    failures = 0
    while waiting:
        part = waiting.pop()
        items = part.items if isinstance(part, PreparedBatch) else part
        try:
            launched = launch(engine, part if isinstance(part, PreparedBatch) else prepare(engine, part))
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
        if len(items) > 1 and (out_of_memory or failures < MAX_FAILURES):
            middle = len(items) // 2
            waiting += [items[middle:], items[:middle]]
        else:
            yield FailedBatch(items, _too_large(engine, items[0], error) if out_of_memory else error)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on whatever device: only CUDA has an exception of its own for it.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."))
    True
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)


def _too_large(engine: LoadedModel, item: Item, cause: Exception) -> DeviceMemoryError:
    error = DeviceMemoryError(
        f"a request of {len(item.ids):,} tokens does not fit into the memory of {engine.model.device}, not even in a "
        "batch of its own. Shorten it (max_length with truncate), load the model in a smaller dtype "
        "(dtype='bfloat16'), or free memory that others use."
    )
    error.__cause__ = cause
    return error


def _part_of(plan: RadixPlan, places: list[int]) -> RadixPlan:
    """The same rows with some of the sequences only."""
    if len(places) == plan.num_sequences:
        return plan
    chosen = np.asarray(places)
    starts, lengths = plan.cu_seq_lengths[chosen], np.diff(plan.cu_seq_lengths)[chosen]
    cu = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(cu[-1]) + np.repeat(starts - cu[:-1], lengths)
    return replace(plan, unfold_index=plan.unfold_index[tokens], cu_seq_lengths=cu)


def _device_part(whole: DevicePlan, plan: RadixPlan) -> DevicePlan:
    if plan is whole.plan:
        return whole
    device = whole.compact_ids.device
    moved = [send(array.astype(np.int64), device) for array in (plan.unfold_index, plan.cu_seq_lengths, plan.last_rows)]
    return replace(whole, unfold_index=moved[0], cu_seq_lengths=moved[1], last_rows=moved[2], plan=plan)


def _to_host(found: Any) -> Any:
    """Tensors copied without waiting for them; valid once the batch's event has passed."""
    if isinstance(found, tuple):
        return tuple(_to_host(value) for value in found)
    if isinstance(found, Kept):
        return replace(found, has_nan=_to_host(found.has_nan))
    if not isinstance(found, Tensor) or not found.is_cuda:
        return found
    host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    return host.copy_(found, non_blocking=True)


def _to_numpy(found: Any) -> Any:
    if isinstance(found, tuple):
        return tuple(_to_numpy(value) for value in found)
    return found.numpy() if isinstance(found, Tensor) else found
