"""How likely continuations are after their contexts: a task of the engine for evaluation harnesses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.engine.engine import Engine
from radix_mlp.engine.task import Item, Rows, Task
from radix_mlp.engine.tasks.score import scored_rows
from radix_mlp.models.heads import language_head
from radix_mlp.ops.device_plan import DevicePlan
from radix_mlp.ops.head.edge_logprobs import edge_logprobs
from radix_mlp.ops.head.edges import Edges, edges_to_tokens
from radix_mlp.plan import RadixPlan

__all__ = ["Answer", "Continuation", "Continuations", "target_edges"]

Answer = tuple[float, bool]
"""(log-probability, whether it is the greedy continuation)."""


@dataclass(frozen=True, eq=False)
class Continuation(Item):
    """A sequence without its last token, which predicts nothing."""

    target: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """What follows each of the sequence's tokens from `start` on."""


@dataclass(frozen=True)
class Continuations(Task):
    """How likely the targets of sequences are."""

    engine: Engine

    def needed_rows(self, plan: RadixPlan, items: Sequence[Item]) -> Rows:
        return target_edges(plan, items).parents

    def finish(self, hidden: Tensor, plan: DevicePlan, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        head = language_head(self.engine.model, probe=items[0].ids)
        edges = target_edges(plan.plan, items)
        found = edge_logprobs(hidden, head, edges, statistics=("is_greedy",))
        assert found.is_greedy is not None
        return edges_to_tokens(found.logprob, edges), edges_to_tokens(found.is_greedy, edges)

    def answers(self, found: Any, plan: RadixPlan, items: Sequence[Item]) -> list[Answer]:
        bounds = np.cumsum([len(item.ids) - item.start for item in items])[:-1]
        logprobs, greedy = np.split(found[0].astype(np.float64), bounds), np.split(found[1], bounds)
        return [(float(values.sum()), bool(tokens.all())) for values, tokens in zip(logprobs, greedy, strict=True)]


def target_edges(plan: RadixPlan, items: Sequence[Item]) -> Edges:
    """The distinct predictions (row, target) of a batch; the `N` tokens of the edges are all targets in turn."""
    rows = np.concatenate(scored_rows(plan, items)).astype(np.int64)
    parts = [item.target for item in items if isinstance(item, Continuation)]
    targets = np.concatenate(parts)
    width = int(targets.max()) + 1
    keys, edge = np.unique(rows * width + targets, return_inverse=True)
    parents, parent_at = np.unique(keys // width, return_inverse=True)
    sequence = np.repeat(np.arange(len(items)), [len(part) for part in parts])
    return Edges(parents, parent_at, keys % width, edge, sequence, len(items), plan.num_rows)
