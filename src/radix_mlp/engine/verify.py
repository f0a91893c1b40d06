"""Folded against unfolded, on the user's own texts and model: how far apart are they?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.engine.batching.scheduler import Batch, Ids, cut_by_padding, schedule
from radix_mlp.engine.execution.step import hidden_of_one, padded_hidden, run_batch
from radix_mlp.engine.tokenization.token_ids import rows_of_ids
from radix_mlp.errors import InvalidInputError
from radix_mlp.hf import disable, enable
from radix_mlp.hf.adapters import opened
from radix_mlp.models.heads import language_head

__all__ = ["BOUNDS", "TextDifference", "Verification", "verify"]

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference allowed, as a part of the largest hidden value: what other summation orders may change."""
KEPT_VALUES = 2**28
"""Hidden values kept while the model changes from folded to unfolded."""


@dataclass(frozen=True)
class TextDifference:
    """How one text's hidden states differ."""

    index: int
    max_abs: float
    cosine: float
    """Smallest over the text's tokens."""
    flipped: bool | None
    """Whether the likeliest next token changed; None without an output head."""


@dataclass
class Verification:
    """Hidden states after the last norm, of every token of every text."""

    bound: float
    num_tokens: int = 0
    num_compact: int = 0
    scale: float = 0.0
    """Largest absolute hidden value of the unfolded model."""
    mean_abs: float = 0.0
    texts: list[TextDifference] = field(default_factory=list)

    @property
    def max_abs(self) -> float:
        """Largest difference of two hidden values; not a number if any is not."""
        values = [text.max_abs for text in self.texts]
        return max(values) if all(value == value for value in values) else float("nan")

    @property
    def relative(self) -> float:
        """`max_abs / scale`, what the bound is for."""
        return self.max_abs / self.scale if self.scale else float("nan")

    @property
    def cosine(self) -> float:
        """Smallest cosine of any token's two hidden states."""
        return min(text.cosine for text in self.texts)

    @property
    def flips(self) -> int | None:
        """Texts whose likeliest next token changed; None without an output head."""
        if any(text.flipped is None for text in self.texts):
            return None
        return sum(bool(text.flipped) for text in self.texts)

    @property
    def passed(self) -> bool:
        """Whether `relative` keeps the bound (an answer that is not a number does not)."""
        return self.relative <= self.bound


def verify(
    model: PreTrainedModel,
    sequences: Sequence[Ids],
    *,
    against: Literal["single", "padded"] = "single",
    bound: float | None = None,
    impl: str = "auto",
    max_batch_tokens: int = 16384,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Run all texts folded, and through the unmodified model, and compare every token's last hidden state.

    The model is left not enabled.

    Args:
        against: the unmodified model fed one text at a time, or in padded batches.
        bound: on the largest difference over the largest hidden value; by dtype unless given (`BOUNDS`).

    Example:
        >>> import numpy as np
        >>> from radix_mlp.models.tiny import tiny_model
        >>> texts = [np.array(ids, np.int32) for ids in ([72, 105, 33], [72, 105, 63])]
        >>> found = verify(tiny_model(), texts)
        >>> found.passed, found.flips, found.num_compact
        (True, 0, 4)
    """
    if against not in ("single", "padded"):
        raise InvalidInputError(f"against={against!r}: must be 'single' or 'padded'.")
    sequences = rows_of_ids(sequences, "sequences")
    model = opened(model)
    result = Verification(BOUNDS[model.dtype] if bound is None else bound)
    disable(model)
    has_head = model.get_output_embeddings() is not None and bool(sequences)
    head = language_head(model, probe=sequences[0]) if has_head else None
    total = 0.0
    for batches in _groups(schedule(sequences, max_batch_tokens), model.config.get_text_config().hidden_size):
        enable(model, impl=impl, threshold=0)
        folded = {}
        for batch in batches:
            texts = [sequences[index] for index in batch.indices]
            (hidden, unfold), plan = run_batch(model, texts, lambda hidden, plan: (hidden, plan.unfold_index))
            result.num_tokens += plan.num_tokens
            result.num_compact += plan.num_compact
            starts = plan.cu_seq_lengths
            for place, index in enumerate(batch.indices):
                folded[index] = (hidden, torch.tensor(unfold[starts[place] : starts[place + 1]]))
        disable(model)
        for index, unfolded in _unfolded(model, sequences, list(folded), against, max_batch_tokens):
            hidden, rows = folded[index]
            ours = hidden[rows.to(hidden.device)]
            result.scale = max(result.scale, float(unfolded.abs().max()))
            total += float((ours - unfolded).double().abs().sum()) / unfolded.shape[1]
            result.texts.append(_difference(index, ours, unfolded, head))
            if progress is not None:
                progress(len(result.texts), len(sequences))
    result.mean_abs = total / max(result.num_tokens, 1)
    result.texts.sort(key=lambda text: text.index)
    return result


def _groups(batches: list[Batch], width: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for batch in batches:
        if group and sum(other.num_compact for other in [*group, batch]) * width > KEPT_VALUES:
            yield group
            group = []
        group.append(batch)
    if group:
        yield group


@torch.inference_mode()
def _unfolded(
    model: PreTrainedModel, sequences: Sequence[Ids], indices: list[int], against: str, max_batch_tokens: int
) -> Iterator[tuple[int, Tensor]]:
    if against == "single":
        for index in indices:
            yield index, hidden_of_one(model, sequences[index])
        return
    for places in cut_by_padding([len(sequences[index]) for index in indices], max_batch_tokens):
        texts = [sequences[indices[place]] for place in places]
        parts = padded_hidden(model, texts).split([len(text) for text in texts])
        yield from zip([indices[place] for place in places], parts, strict=True)


@torch.inference_mode()
def _difference(index: int, ours: Tensor, unfolded: Tensor, head: Callable[[Tensor], Tensor] | None) -> TextDifference:
    a, b = ours.double(), unfolded.double()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).min()
    flipped = None
    if head is not None:
        flipped = bool((head(ours[-1:]).argmax(-1) != head(unfolded[-1:]).argmax(-1)).item())
    return TextDifference(index, float((a - b).abs().max()), float(cosine), flipped)
