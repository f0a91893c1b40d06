"""`FoldPolicy`: whether a job folds its batches, a plain value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from radix_mlp.engine.execution.loaded_model import LoadedModel

__all__ = ["FoldPolicy", "fold_policy"]


@dataclass(frozen=True)
class FoldPolicy:
    """How batches are cut and folded."""

    max_batch_tokens: int
    threshold: float | Literal["auto"]
    """As in `radix_mlp.enable`, for each batch."""
    folds: bool = True
    """Whether the model is enabled for folding while batches run; False: it is the unmodified model."""
    share: bool = True
    """False: a row for every token, packed, whatever the sequences share."""

    @property
    def always_folds(self) -> bool:
        """Whether every batch is folded, so that a job can begin before all of its texts are known."""
        return self.threshold not in (0, "auto")


def fold_policy(
    loaded: LoadedModel, threshold: float | Literal["auto"], max_batch_tokens: int, *, share: bool = True
) -> FoldPolicy:
    """The policy of a job on a model that was `start`ed."""
    if threshold == 0:
        return FoldPolicy(max_batch_tokens, 0, folds=False)
    if loaded.why_unfolded is not None:
        return FoldPolicy(max_batch_tokens, 0)
    if not share or (threshold == "auto" and loaded.packs):
        # folding packed rows never costs more than leaving them unfolded
        threshold = 1.0
    return FoldPolicy(max_batch_tokens, threshold, share=share)
