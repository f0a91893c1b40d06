"""What a job computes against the unmodified model, on the user's own texts and model: how far apart are they?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.engine.batching.scheduler import cut_by_padding
from radix_mlp.engine.engine import Engine
from radix_mlp.engine.execution.batch import collect
from radix_mlp.engine.task import Item, Kept, Request, Task
from radix_mlp.engine.tokenization.token_ids import rows_of_ids
from radix_mlp.errors import InvalidInputError, UnsupportedModelError
from radix_mlp.hf.fast_forward import COMPILED, FUSED, MODULES
from radix_mlp.hf.forward import hidden_of_one, padded_hidden
from radix_mlp.hf.layer_compiler import Mode
from radix_mlp.models.heads import language_head
from radix_mlp.ops.device_plan import DevicePlan
from radix_mlp.plan import RadixPlan
from radix_mlp.plan.build import Ids

__all__ = ["BOUNDS", "PATHS", "TextDifference", "Verification", "options_of", "require_path", "verify"]

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference allowed, as a part of the largest hidden value: what other summation orders may change."""
PATHS: dict[str, tuple[Mode, str]] = {
    "fused": ("auto", FUSED),
    "compiled": (True, COMPILED),
    "modules": (False, MODULES),
}
"""Path -> the engine's `compile` for it, and how the description of its forward begins."""
KEPT_VALUES = 2**28
"""Hidden values that are kept until the model is switched from enabled to unmodified."""

Rows = tuple[Tensor, NDArray[np.int32]]
"""Hidden states of a batch, and the rows of one text among them."""


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
    path: str = ""
    """What ran folded batches, and why not something faster."""
    num_batches: int = 0
    num_folded: int = 0
    """Batches that ran on packed rows; the others ran padded, through the unmodified model."""
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


@dataclass(frozen=True)
class HiddenStates(Task):
    """All hidden states of a batch, which stay on the device."""

    def finish(self, hidden: Tensor, plan: DevicePlan, items: Sequence[Item]) -> Kept:
        return Kept(hidden, hidden.isnan().any())

    def answers(self, found: Kept, plan: RadixPlan, items: Sequence[Item]) -> list[Rows]:
        return [(found.value, rows) for rows in np.split(plan.unfold_index, plan.cu_seq_lengths[1:-1])]


def options_of(path: str) -> dict[str, Any]:
    """The options of an `Engine` that takes a path of `verify`: `"auto"`, or one of `PATHS`, which folds all batches.

    Raises:
        InvalidInputError: there is no such path.

    >>> options_of("modules")
    {'compile': False, 'threshold': 1.0}
    """
    if path == "auto":
        return {}
    if path not in PATHS:
        raise InvalidInputError(f"path={path!r}: must be auto or one of {', '.join(PATHS)}.")
    return {"compile": PATHS[path][0], "threshold": 1.0}


def require_path(engine: Engine, path: str) -> None:
    """Raise `UnsupportedModelError` if the engine's folded batches do not take the path that `options_of` asked for."""
    runs = engine.forward.describe()
    if path != "auto" and not runs.startswith(PATHS[path][1]):
        raise UnsupportedModelError(f"path={path!r}: this model would run through {runs}. Use path='auto'.")


def verify(
    engine: Engine,
    sequences: Sequence[Ids],
    *,
    against: Literal["single", "padded"] = "single",
    bound: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Run all texts as a job of the engine runs them, and through the unmodified model; compare every hidden state.

    The engine's own forward computes the batches (fused layers and CUDA graphs, where jobs use them), which are cut and
    folded as its options say: under `threshold="auto"`, texts that share little may not be folded.

    Args:
        against: the unmodified model fed one text at a time, or in padded batches.
        bound: on the largest difference over the largest hidden value; by dtype unless given (`BOUNDS`).

    Examples:
        >>> found = verify(Engine("tiny"), [np.array(ids, np.int32) for ids in ([72, 105, 33], [72, 105, 63])])
        >>> found.passed, found.flips, found.num_compact, found.num_folded
        (True, 0, 4, 1)
        >>> found.path
        "the model's own modules: the model is on cpu"
    """
    if against not in ("single", "padded"):
        raise InvalidInputError(f"against={against!r}: must be 'single' or 'padded'.")
    sequences = rows_of_ids(sequences, "sequences")
    model = engine.model
    result = Verification(BOUNDS[model.dtype] if bound is None else bound, engine.forward.describe())
    comparison = _Comparison(engine, sequences, against, result, progress)
    request = Request([Item(ids, HiddenStates()) for ids in sequences], list)
    for launched in engine.run([request], len(sequences)):
        comparison.add(launched.batch.places, collect(launched), launched.batch.plan.num_rows)
    comparison.finish()
    stats = engine.stats
    result.num_batches, result.num_folded = stats.num_batches, stats.num_folded
    result.num_tokens, result.num_compact = stats.num_tokens, stats.num_compact
    result.mean_abs /= max(result.num_tokens, 1)
    result.texts.sort(key=lambda text: text.index)
    return result


class _Comparison:
    """Compares hidden states with those of the unmodified model, some batches at a time."""

    def __init__(
        self,
        engine: Engine,
        sequences: Sequence[Ids],
        against: str,
        result: Verification,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.engine = engine
        self.sequences = sequences
        self.against = against
        self.result = result
        self.progress = progress
        self._kept: dict[int, Rows] = {}
        self._num_rows = 0
        self._width = engine.model.config.get_text_config().hidden_size
        self._head: Callable[[Tensor], Tensor] | None = None
        if engine.model.get_output_embeddings() is not None and sequences:
            with engine.loaded.turn(folds=False):
                self._head = language_head(engine.model, probe=sequences[0])

    def add(self, places: Sequence[int], answers: Sequence[Any], num_rows: int) -> None:
        """Keep the answers of a batch, after comparing those kept so far if there is no room for more."""
        if self._kept and (self._num_rows + num_rows) * self._width > KEPT_VALUES:
            self.finish()
        for place, answer in zip(places, answers, strict=True):
            if isinstance(answer, Exception):
                raise answer
            self._kept[place] = answer
        self._num_rows += num_rows

    @torch.inference_mode()
    def finish(self) -> None:
        """Compare what is kept."""
        with self.engine.loaded.turn(folds=False):
            for index, unfolded in self._unfolded():
                hidden, rows = self._kept[index]
                ours = hidden[torch.tensor(rows, device=hidden.device)]
                self.result.scale = max(self.result.scale, float(unfolded.abs().max()))
                # NaN - NaN is NaN: an answer that is not a number never passes
                self.result.mean_abs += float((ours - unfolded).double().abs().sum()) / unfolded.shape[1]
                self.result.texts.append(_difference(index, ours, unfolded, self._head))
                if self.progress is not None:
                    self.progress(len(self.result.texts), len(self.sequences))
        self._kept, self._num_rows = {}, 0

    def _unfolded(self) -> Iterator[tuple[int, Tensor]]:
        return _unfolded(
            self.engine.model,
            {index: self.sequences[index] for index in self._kept},
            self.against,
            self.engine.max_batch_tokens,
        )


def _unfolded(
    model: PreTrainedModel, sequences: Mapping[int, Ids], against: str, max_batch_tokens: int
) -> Iterator[tuple[int, Tensor]]:
    indices = list(sequences)
    if against == "single":
        for index in indices:
            yield index, hidden_of_one(model, sequences[index])
        return
    for places in cut_by_padding([len(sequences[index]) for index in indices], max_batch_tokens):
        texts = [sequences[indices[place]] for place in places]
        parts = padded_hidden(model, texts).split([len(text) for text in texts])
        yield from zip([indices[place] for place in places], parts, strict=True)


def _difference(index: int, ours: Tensor, unfolded: Tensor, head: Callable[[Tensor], Tensor] | None) -> TextDifference:
    a, b = ours.double(), unfolded.double()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).min()
    flipped = None
    if head is not None:
        flipped = bool((head(ours[-1:]).argmax(-1) != head(unfolded[-1:]).argmax(-1)).item())
    return TextDifference(index, float((a - b).abs().max()), float(cosine), flipped)
