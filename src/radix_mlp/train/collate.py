"""`TreeCollator`: features of a dataset -> a folded batch, in the workers of a data loader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from radix_mlp.arguments import items_of
from radix_mlp.errors import InvalidInputError
from radix_mlp.train.batch import IGNORE_INDEX, TreeBatch

__all__ = ["TreeCollator"]

Feature = Mapping[str, Any]


@dataclass(frozen=True)
class TreeCollator:
    """Folds features into a `TreeBatch`: `DataLoader(dataset, collate_fn=TreeCollator(), num_workers=4)`.

    A feature has `input_ids` and, if its predictions do not all count, `labels` (unshifted) or the field `wanted`.  An
    item of the dataset may also be a list of features that belong together: a pair, the answers to one prompt.
    `batch.sequences["group"]` then holds each sequence's item.

    Examples:
        >>> batch = TreeCollator()([[{"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 8]}], {"input_ids": [9, 9]}])
        >>> batch.num_compact, batch.sequences["group"].tolist()
        (6, [0, 0, 1])
    """

    tokens: tuple[str, ...] = ()
    """Fields with one value a token, packed to `batch.tokens`."""
    sequences: tuple[str, ...] = ()
    """Fields with one value a sequence, for `batch.sequences`."""
    labels: str = "labels"
    """The field of labels, where features have it."""
    wanted: str = "completion_mask"
    """The field that says, token by token, whether its prediction counts; read where there are no labels."""
    ignore_index: int = IGNORE_INDEX

    def __call__(self, items: Sequence[Feature | Sequence[Feature]]) -> TreeBatch:
        """Fold the items of one batch."""
        groups = [
            [item] if isinstance(item, Mapping) else items_of(item, "an item") for item in items_of(items, "items")
        ]
        features = [feature for group in groups for feature in group]
        if not features:
            raise InvalidInputError("the batch is empty: a sampler must give at least one item")
        for number, feature in enumerate(features):
            if not all(feature.get("attention_mask", ())):
                raise InvalidInputError(
                    f"feature {number} is padded (its attention_mask has zeros), and padding would be learnt: "
                    "tokenize without padding"
                )
        labels = self._field(features, self.labels, optional=True)
        wanted = None if labels is not None else self._field(features, self.wanted, optional=True)
        return TreeBatch.from_sequences(
            [feature["input_ids"] for feature in features],
            labels=labels,
            wanted=None if wanted is None else [[bool(value) for value in values] for values in wanted],
            tokens={name: self._required(features, name) for name in self.tokens},
            sequences={
                "group": [number for number, group in enumerate(groups) for _ in group],
                **{name: self._required(features, name) for name in self.sequences},
            },
            ignore_index=self.ignore_index,
        )

    def _required(self, features: list[Feature], name: str) -> list[Any]:
        values = self._field(features, name, optional=False)
        assert values is not None
        return values

    def _field(self, features: list[Feature], name: str, *, optional: bool) -> list[Any] | None:
        has = [name in feature for feature in features]
        if optional and not any(has):
            return None
        if not all(has):
            raise InvalidInputError(f"feature {has.index(False)} has no {name!r}: give it to all features or to none")
        return [feature[name] for feature in features]
