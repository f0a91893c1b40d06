"""The loss of a step: contrast, the teacher's ranking, judged pairs, the language model; all of one folded forward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, normalize
from transformers import Qwen3ForCausalLM

from radix_mlp.ops import edge_logprobs, last_token
from radix_mlp.train import cross_entropy, info_nce, kl_distillation, language_head, tree_hidden
from small_model.batches import Step
from small_model.bm25 import BM25

__all__ = ["Objective", "autocast_on", "mean_of_rows"]


@dataclass(frozen=True)
class Objective:
    """Weights and temperatures of the parts."""

    yes: int
    no: int
    contrast: float = 0.5
    teacher: float = 0.5
    judged: float = 0.5
    language: float = 0.1
    temperature: float = 0.05
    teacher_temperature: float = 3.0
    same: float = 0.9
    """Documents that the teacher scores this near to a query's own are no negatives for it."""

    def __call__(self, model: Qwen3ForCausalLM, step: Step, teacher: BM25) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts."""
        device = model.device
        batch = step.batch.to(device)
        num_queries, num_documents = len(step.query_terms), len(step.documents)
        with autocast_on(device):
            hidden = tree_hidden(model, batch.plan).float()
        rows, owners = _to(step.pooled_rows, device), _to(step.pooled_sequences, device)
        vectors = normalize(mean_of_rows(hidden, rows, owners, num_queries + num_documents), dim=-1)
        queries, documents = vectors[:num_queries], vectors[num_queries:]
        positives = _to(step.positives, device)
        asked = len(positives)
        known = teacher.scores(step.query_terms, _to(step.documents, device))
        own = known[:asked].gather(1, positives[:, None])
        parts = {
            "contrast": info_nce(
                queries[:asked],
                documents,
                positives,
                temperature=self.temperature,
                same=known[:asked] >= self.same * own,
            ),
            "teacher": kl_distillation(queries @ documents.T / self.temperature, known / self.teacher_temperature),
        }
        if step.judged_documents.size:
            parts["judged"] = self._judge(model, hidden, step, known)
        if len(step.batch.edges.targets):
            head = language_head(model)
            parts["language"] = cross_entropy(edge_logprobs(hidden, head, batch.edges).logprob, batch)
        weights = {name: getattr(self, name) for name in parts}
        return torch.stack([weights[name] * part for name, part in parts.items()]).sum(), parts

    def _judge(self, model: Qwen3ForCausalLM, hidden: Tensor, step: Step, known: Tensor) -> Tensor:
        """A reranker's answers: as the teacher ranks, and above one half for a query's own document alone."""
        device = hidden.device
        candidates = _to(step.judged_documents, device)
        first = len(step.query_terms) + len(step.documents)
        last = last_token(hidden, step.batch.plan)[first : first + candidates.numel()].float()
        weight = model.get_input_embeddings().weight
        answers = (last @ (weight[self.yes] - weight[self.no]).float()).view(candidates.shape)
        of_teacher = known[_to(step.judged_queries, device)].gather(1, candidates)
        relevant = (of_teacher >= self.same * of_teacher[:, :1]).float()
        ranking = kl_distillation(answers, of_teacher / self.teacher_temperature)
        return ranking + 0.5 * binary_cross_entropy_with_logits(answers, relevant)


def autocast_on(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU; losses stay in float32."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, torch.int64)


def mean_of_rows(hidden: Tensor, rows: Tensor, owners: Tensor, count: int) -> Tensor:
    """`[M, h] -> [count, h]`: the mean of the rows of each owner, in float32."""
    total = torch.zeros(count, hidden.shape[1], device=hidden.device)
    total = total.index_add(0, owners, hidden.index_select(0, rows).float())
    return total / torch.bincount(owners, minlength=count)[:, None]
