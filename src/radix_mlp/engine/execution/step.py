"""One batch: ids -> plan -> device -> the model on compact rows -> pooled or scored.

    plan = plan_of(sequences)
    hidden = forward_compact(model, plan)           # [M, hidden], each shared token computed once
    vectors = last_token(hidden, plan)              # [S, hidden]

The engine, the command line and the notebooks all run their batches through `run_batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.engine.batching.scheduler import Ids
from radix_mlp.hf.forward import forward_compact
from radix_mlp.hf.support import decoder_of
from radix_mlp.hf.threshold import should_fold
from radix_mlp.ops.send import send
from radix_mlp.plan import RadixPlan, build_plan

__all__ = [
    "Forward",
    "NeededRows",
    "PreparedStep",
    "hidden_of_one",
    "hidden_states",
    "padded_hidden",
    "plan_of",
    "prepare_step",
    "run_batch",
    "unshared_plan",
]

Result = TypeVar("Result")
Finish = Callable[[Tensor, RadixPlan], Result]
"""What becomes of the hidden states: `(hidden [M, h], plan)` -> vectors, log-probabilities, …"""

Rows = NDArray[np.int64]
NeededRows = Callable[[RadixPlan], Rows | None]
"""The compact rows `[R]`, ascending, whose hidden states `finish` reads; None for all of them."""
Forward = Callable[[RadixPlan, Rows | None], Tensor]
"""`(plan, needed rows)` -> hidden states after the last norm, `[M, hidden]`; other rows may hold anything."""


@dataclass(frozen=True)
class PreparedStep:
    """A batch that is planned."""

    sequences: Sequence[Ids]
    plan: RadixPlan
    """One that shares nothing if the batch is not folded."""
    folded: bool
    needed_rows: Rows | None


def run_batch(
    model: PreTrainedModel,
    sequences: Sequence[Ids],
    finish: Finish[Result],
    threshold: float | Literal["auto"] = 1.0,
    *,
    needed_rows: NeededRows | None = None,
    forward: Forward | None = None,
) -> tuple[Result, RadixPlan]:
    """Run one batch through an enabled model and `finish` it.

    Args:
        model: as `radix_mlp.enable` left it; with `threshold=0`, any model, and it runs as it is.
        sequences: token ids of each text, at least one each.
        finish: gets the hidden states after the last norm, `[M, hidden]`, and the plan.
        threshold: whether to fold this batch, as in `radix_mlp.enable`.
        needed_rows: tells which rows `finish` reads; all of them unless given.
        forward: runs the trunk on a folded batch; `forward_compact` unless given.

    Returns:
        What `finish` returned, and the plan that was run: one that shares nothing if the batch was not folded.

    Example:
        >>> import numpy as np, radix_mlp
        >>> from radix_mlp.ops import last_token
        >>> from radix_mlp.models.tiny import tiny_model
        >>> texts = [np.array([1, 2, 3], np.int32), np.array([1, 2, 4], np.int32)]
        >>> vectors, plan = run_batch(radix_mlp.enable(tiny_model()), texts, last_token)
        >>> vectors.shape, plan.num_compact
        (torch.Size([2, 64]), 4)
    """
    step = prepare_step(sequences, threshold, needed_rows)
    with torch.inference_mode():
        return finish(hidden_states(model, step, forward), step.plan), step.plan


def prepare_step(
    sequences: Sequence[Ids],
    threshold: float | Literal["auto"] = 1.0,
    needed_rows: NeededRows | None = None,
) -> PreparedStep:
    """What `run_batch` does on the CPU: plan the batch, and decide whether to fold it."""
    if threshold != 0:
        plan = plan_of(sequences)
        num_padded = len(sequences) * max(map(len, sequences))
        if should_fold(plan, num_padded, threshold)[0]:
            return PreparedStep(sequences, plan, True, None if needed_rows is None else needed_rows(plan))
    return PreparedStep(sequences, unshared_plan(sequences), False, None)


def hidden_states(model: PreTrainedModel, step: PreparedStep, forward: Forward | None = None) -> Tensor:
    """What `run_batch` does on the device: the trunk's hidden states `[M, hidden]` on the rows of the plan."""
    if not step.folded:
        return padded_hidden(model, step.sequences)
    return forward_compact(model, step.plan) if forward is None else forward(step.plan, step.needed_rows)


def plan_of(sequences: Sequence[Ids]) -> RadixPlan:
    """The batch folded into its prefix tree."""
    return build_plan(*_packed(sequences))


def unshared_plan(sequences: Sequence[Ids]) -> RadixPlan:
    """A plan in which every token is a row of its own, so that what follows treats unfolded batches alike."""
    ids, cu = _packed(sequences)
    rows = np.arange(len(ids), dtype=np.int32)
    lengths = np.diff(cu)
    positions = np.arange(len(ids)) - np.repeat(cu[:-1], lengths)
    end, depth = np.repeat(cu[1:], lengths).astype(np.int32), positions.astype(np.int32)
    return RadixPlan(len(ids), ids, positions, end, rows, rows, cu, depth)


def padded_hidden(model: PreTrainedModel, sequences: Sequence[Ids]) -> Tensor:
    """Hidden states `[N, hidden]` of the model fed all sequences in one batch, padded on the right."""
    lengths = np.array([len(sequence) for sequence in sequences])
    present = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.zeros(present.shape, np.int64)
    input_ids[present] = _packed(sequences)[0]
    trunk = decoder_of(model)
    device = trunk.device
    output = trunk(
        send(input_ids, device),
        attention_mask=send(present.astype(np.int64), device),
        use_cache=False,
        return_dict=True,
    )
    hidden: Tensor = output.last_hidden_state
    # places known on the host: a mask would make it wait for the device
    return hidden.flatten(0, 1).index_select(0, send(np.flatnonzero(present), device))


def hidden_of_one(model: PreTrainedModel, sequence: Ids) -> Tensor:
    """Hidden states `[n, hidden]` of the model fed one sequence alone: the oracle of `verify`."""
    trunk = decoder_of(model)
    input_ids = torch.from_numpy(sequence.astype(np.int64))[None].to(trunk.device)
    hidden: Tensor = trunk(input_ids, use_cache=False, return_dict=True).last_hidden_state
    return hidden[0]


def _packed(sequences: Sequence[Ids]) -> tuple[np.ndarray, np.ndarray]:
    cu = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum([len(sequence) for sequence in sequences], out=cu[1:])
    return np.concatenate(sequences).astype(np.int64), cu
