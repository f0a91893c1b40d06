"""One batch of items: prepared on the CPU, launched on the device, collected on the host.

    prepared = prepare(loaded, batch)       # plan, decision to fold, rows needed; any thread
    launched = launch(loaded, prepared)     # the model and what the tasks do on the device; the model's thread
    answers = collect(launched)             # waits for the device; any thread

On CUDA `launch` returns before the device is done, so the next batch is prepared and launched meanwhile. Jobs and
servers run the three steps in different threads; `run_batch` runs them in one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from radix_mlp.engine.execution.loaded_model import LoadedModel
from radix_mlp.engine.task import Item, Kept, Rows, Task, union_of_rows
from radix_mlp.errors import RadixError
from radix_mlp.hf.forward import padded_hidden
from radix_mlp.hf.pictures.prepared import PictureSequence, padded_pictures, pictures_of_batch, with_inputs
from radix_mlp.hf.pictures.read import Pictures, image_token_of
from radix_mlp.hf.support import decoder_of
from radix_mlp.hf.threshold import should_fold
from radix_mlp.ops.device_plan import DevicePlan, to_device
from radix_mlp.ops.send import send
from radix_mlp.plan import RadixPlan
from radix_mlp.plan.build import plan_of, unshared_plan

__all__ = [
    "FoldPolicy",
    "ItemBatch",
    "LaunchedBatch",
    "PreparedBatch",
    "collect",
    "fill",
    "has_nan",
    "launch",
    "prepare",
    "run_batch",
]


@dataclass(frozen=True)
class FoldPolicy:
    """How a job cuts and folds its batches."""

    max_batch_tokens: int
    threshold: float | Literal["auto"]
    """As in `radix_mlp.enable`, for each batch."""
    folds: bool = True
    """Whether the model is enabled for folding while batches run; False: it is the unmodified model."""
    share: bool = True
    """False: a row for every token, packed, whatever the sequences share."""
    pair_cost: float = 0.0
    """As in `folding_pays`."""

    @property
    def always_folds(self) -> bool:
        """Whether every batch is folded, so that a job can begin before all of its texts are known."""
        return self.threshold not in (0, "auto")


@dataclass(frozen=True)
class ItemBatch:
    """Items that are to run together."""

    items: Sequence[Item]
    places: Sequence[int]
    """Of the items, wherever the caller counts them."""
    policy: FoldPolicy

    def part(self, start: int, stop: int | None = None) -> ItemBatch:
        """Some of the items."""
        return ItemBatch(self.items[start:stop], self.places[start:stop], self.policy)


@dataclass(frozen=True)
class Part:
    """The items of a batch that have one task."""

    task: Task
    places: list[int]
    """In the batch, ascending."""
    items: list[Item]
    plan: RadixPlan
    """Their sequences on the batch's rows."""


@dataclass(frozen=True)
class PreparedBatch(ItemBatch):
    """What the model's thread needs to run a batch."""

    plan: RadixPlan
    """One that shares nothing if the batch is not folded."""
    folded: bool
    """Whether it runs on packed rows."""
    needed_rows: Rows | None
    parts: list[Part]
    seconds: float
    pictures: Pictures | None = None
    """Those of a batch that is folded."""


@dataclass(frozen=True)
class LaunchedBatch:
    """A batch that is, or will be, computed on the device."""

    batch: PreparedBatch
    parts: list[tuple[Part, Any]]
    """What every task found, on its way to the host, or the error that it ended with."""
    done: torch.cuda.Event | None
    began: float
    check: Callable[[], None]
    """Call after `done`: raises if another rank failed and the results are invalid."""


def run_batch(loaded: LoadedModel, batch: ItemBatch) -> list[Any]:
    """One answer, or the exception in its place, for every item.

    Examples:
        >>> from radix_mlp import Engine
        >>> from radix_mlp.engine.tasks.embed import TokenEmbedding
        >>> engine = Engine("tiny")
        >>> items = [Item(np.array(ids, np.int32), TokenEmbedding(engine.loaded)) for ids in ([5, 6, 7], [5, 6])]
        >>> [answer.shape for answer in run_batch(engine.loaded, ItemBatch(items, range(2), engine.start()))]
        [(3, 64), (2, 64)]
    """
    return collect(launch(loaded, prepare(loaded, batch)))


def prepare(loaded: LoadedModel, batch: ItemBatch) -> PreparedBatch:
    """Plan a batch and start copying the plan to the device."""
    began = time.perf_counter()
    by_task: dict[Task, list[int]] = {}
    for place, item in enumerate(batch.items):
        by_task.setdefault(item.task, []).append(place)
    plan, folded = _plan_of(batch)
    pictures = None
    if _shows_pictures(batch.items):
        plan = with_inputs(plan, loaded.vocabulary, image_token_of(decoder_of(loaded.model)))
        if folded:
            pictures = pictures_of_batch(loaded.model, _sequences(batch.items), loaded.vocabulary)
    parts = [
        Part(task, places, [batch.items[place] for place in places], _part_of(plan, places))
        for task, places in by_task.items()
    ]
    needed = union_of_rows([part.task.needed_rows(part.plan, part.items) for part in parts]) if folded else None
    if folded:
        loaded.forward.prepare(plan)
    else:
        to_device(plan, loaded.model.device, tree=False)
    seconds = time.perf_counter() - began
    return PreparedBatch(batch.items, batch.places, batch.policy, plan, folded, needed, parts, seconds, pictures)


def _plan_of(batch: ItemBatch) -> tuple[RadixPlan, bool]:
    """The plan, and whether it runs folded, on packed rows."""
    sequences, policy = [item.ids for item in batch.items], batch.policy
    if policy.threshold != 0:
        plan = plan_of(sequences) if policy.share else unshared_plan(sequences)
        if should_fold(plan, (len(sequences), max(map(len, sequences))), policy.threshold, policy.pair_cost)[0]:
            return plan, True
    return unshared_plan(sequences), False


def launch(loaded: LoadedModel, prepared: PreparedBatch) -> LaunchedBatch:
    """Run the model on a batch, and the tasks on what it gives. An error of one task leaves the others alone."""
    began = time.perf_counter()
    with loaded.turn(folds=prepared.policy.folds), loaded.launching(), torch.inference_mode():
        if loaded.rope is not None:
            loaded.rope.reset()
        # whether the model has been changed, perhaps by an adapter, is checked while the device computes
        try:
            hidden, found = _run(loaded, prepared)
            is_old = prepared.folded and loaded.forward.refresh()
        except Exception:
            is_old = prepared.folded and loaded.forward.refresh()
            if not is_old:
                raise
        if is_old:
            hidden, found = _run(loaded, prepared)
        done = None
        if hidden.is_cuda:
            done = torch.cuda.Event()
            # the current device may be another
            done.record(torch.cuda.current_stream(hidden.device))
    return LaunchedBatch(prepared, found, done, began, loaded.forward.check)


def _run(loaded: LoadedModel, prepared: PreparedBatch) -> tuple[Tensor, list[tuple[Part, Any]]]:
    """Hidden states, and what every task makes of them."""
    found: list[tuple[Part, Any]] = []
    if prepared.folded:
        more = {} if prepared.pictures is None else {"pictures": prepared.pictures}
        hidden = loaded.forward(prepared.plan, prepared.needed_rows, **more)
    elif _shows_pictures(prepared.items):
        sequences, trunk = _sequences(prepared.items), decoder_of(loaded.model)
        ids = [sequence.ids(loaded.vocabulary, image_token_of(trunk)) for sequence in sequences]
        hidden = padded_hidden(loaded.model, ids, partial(padded_pictures, loaded.model, sequences))
    else:
        hidden = padded_hidden(loaded.model, [item.ids for item in prepared.items])
    whole = to_device(prepared.plan, hidden.device, tree=False)
    for part in prepared.parts:
        try:
            found.append((part, _to_host(part.task.finish(hidden, _device_part(whole, part.plan), part.items))))
        except RadixError as error:
            found.append((part, error))
    return hidden, found


def collect(launched: LaunchedBatch) -> list[Any]:
    """One answer, or the exception in its place, for every item; waits for the device."""
    if launched.done is not None:
        launched.done.synchronize()
    launched.check()
    answers: list[Any] = [None] * len(launched.batch.items)
    for part, found in launched.parts:
        here: Sequence[Any] = [found] * len(part.places)
        if not isinstance(found, Exception):
            try:
                here = part.task.answers(_to_numpy(found), part.plan, part.items)
            except Exception as error:
                # the other tasks of the batch have their answers
                here = [error] * len(part.places)
        for place, answer in zip(part.places, here, strict=True):
            answers[place] = answer
    return answers


def has_nan(launched: LaunchedBatch) -> bool:
    """Whether an answer of the batch is not a number; waits for the device. Ignores tasks that ended with an error."""
    if launched.done is not None:
        launched.done.synchronize()
    return any(
        part.task.has_nan(_to_numpy(found), part.plan, part.items)
        for part, found in launched.parts
        if not isinstance(found, Exception)
    )


def fill(answers: list[Any], launched: LaunchedBatch) -> None:
    """Put what `collect` gives into the places of the batch's items; raises the first answer that is an error."""
    for place, answer in zip(launched.batch.places, collect(launched), strict=True):
        if isinstance(answer, Exception):
            raise answer
        answers[place] = answer


def _shows_pictures(items: Sequence[Item]) -> bool:
    return any(item.pictures for item in items)


def _sequences(items: Sequence[Item]) -> list[PictureSequence]:
    return [PictureSequence(item.ids, item.pictures) for item in items]


def _part_of(plan: RadixPlan, places: list[int]) -> RadixPlan:
    """The same rows with only some of the sequences."""
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
    """Tensors copied without waiting for them; valid after the batch's event."""
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
