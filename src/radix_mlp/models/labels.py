"""The names of a classifier's scores."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedModelError

__all__ = ["label_names"]


def label_names(model: PreTrainedModel) -> list[str]:
    """Names of a classifier's scores, in their order; they need not be distinct.

    Raises:
        UnsupportedModelError: id2label of the configuration does not number the scores from 0.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_classifier
        >>> label_names(tiny_classifier())
        ['negative', 'neutral', 'positive']
    """
    names: dict[Any, Any] = model.config.id2label or {}
    count = _num_scores(model) or len(names)
    if sorted(map(str, names)) != sorted(map(str, range(count))):
        raise UnsupportedModelError(
            f"{model.config.name_or_path or type(model).__name__}: id2label in config.json has the numbers "
            f"{', '.join(map(str, names)) or 'none'}, and scores are numbered from 0 to {count - 1}. Give each a name."
        )
    return [str(names[index]) for index in range(count)]


def _num_scores(model: PreTrainedModel) -> int | None:
    """How many scores the head makes, if it says."""
    size = getattr(getattr(model, "score", None), "out_features", None)
    return size if isinstance(size, int) else None
