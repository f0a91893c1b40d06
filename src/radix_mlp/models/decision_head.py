"""The head of a decision model as a function of hidden states, compared with the model's own scores before use."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedModelError
from radix_mlp.models.head_check import check_head, hidden_of_probe, on_device
from radix_mlp.models.heads import Head, widened_head
from radix_mlp.ops.head.linear_head import LinearHead, is_plain_linear

__all__ = ["decision_head", "first_rows"]


def decision_head(model: PreTrainedModel, *, probe: NDArray[np.int32] | None = None) -> Head:
    """Hidden states `[R, h]` before a mark -> scores `[R, V]` of a `JevForDecision`, in float32 or wider.

    The options of a question are scored by the columns from `first_rows` of its type on, in order.

    Args:
        model: a decision model of transformers.
        probe: `[n]` token ids to compare on, as in `language_head`.

    Raises:
        UnsupportedModelError: the head is not a linear layer on the hidden state before each mark.
    """
    layer = getattr(model, "proj", None)
    if not is_plain_linear(layer) or not isinstance(getattr(model.config, "offsets", None), dict):
        raise UnsupportedModelError(
            f"{type(model).__name__} reads its answers in a way that is not known here: only JevForDecision's linear "
            "head on the token before each mark is. Run it with transformers' own pipeline."
        )
    head = widened_head(LinearHead(layer.weight, layer.bias, softcap=model.config.softcap))

    def scores_of(begin: NDArray[np.int32]) -> Tensor:
        scores = head(hidden_of_probe(model, begin)[0])
        return torch.cat([scores[row, start:stop] for row, (start, stop) in enumerate(_probed(model, len(begin)))])[
            None
        ]

    check_head(model, layer, (1.0, model.config.softcap), probe, scores_of, own=_own_scores)
    return head


def first_rows(model: PreTrainedModel) -> dict[str, int]:
    """Type of a question -> the first column of its scores."""
    return {name: int(start) for name, start in model.config.offsets.items()}


def _question_types() -> tuple[str, ...]:
    from transformers.decision.template_utils import Question

    return tuple(Question.questions_types)


def _probed(model: PreTrainedModel, length: int) -> list[tuple[int, int]]:
    """The columns that a comparison reads at each token: the types of questions in turn, as many options as fit."""
    starts, types = first_rows(model), _question_types()
    bounds = sorted({*starts.values(), int(model.config.num_verbalizers)})
    stops = dict(pairwise(bounds))
    return [(starts[kind], stops[starts[kind]]) for kind in (types[row % len(types)] for row in range(length))]


def _own_scores(model: PreTrainedModel, begin: NDArray[np.int32]) -> Tensor:
    """What the model's class gives for a mark after every token, `[1, 1, scores]`."""
    probed = _probed(model, len(begin))
    device = model.device
    own: Any = type(model).forward.__get__(model)
    scores: Tensor = own(
        on_device(model, begin),
        marks=torch.arange(1, len(begin) + 1, device=device)[None],
        num_options=torch.tensor([[stop - start for start, stop in probed]], device=device),
        question_type_ids=torch.arange(len(begin), device=device)[None] % len(_question_types()),
    )
    return scores[None, None]
