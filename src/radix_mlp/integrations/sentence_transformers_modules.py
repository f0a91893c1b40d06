"""Hidden states on compact rows -> what the modules after the transformer make of them.

Those modules are the library's own and are called as it calls them; they get the features of a batch padded on the
right, unfolded from the compact rows a part at a time.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.engine.batching.scheduler import Ids
from radix_mlp.engine.task import Item, Kept, Rows, Task
from radix_mlp.errors import UnsupportedCallError, UnsupportedModelError
from radix_mlp.hf.adapters import opened
from radix_mlp.hf.support import decoder_of
from radix_mlp.models.head_check import pad_token_of
from radix_mlp.models.heads import classification_head, language_head
from radix_mlp.models.model_kind import kind_of
from radix_mlp.ops.device_plan import DevicePlan
from radix_mlp.ops.pool import rows_to_classify
from radix_mlp.ops.row_copies import copy_rows
from radix_mlp.ops.send import send
from radix_mlp.plan import RadixPlan

__all__ = ["Features", "Tail", "Work", "gathered", "passed_on", "tail_of"]

Features = dict[str, Any]
"""Names -> tensors whose first dimension counts texts, or lists with one tensor a text."""

# what tokenisation hands over besides the ids, and the library's own modules may read
_KNOWN_FEATURES = {
    "attention_mask",
    "logits_to_keep",
    "mm_token_type_ids",
    "modality",
    "prompt_length",
    "token_type_ids",
}
_TEXT = {"text", "message"}
_OUTPUT_OF_KIND = {"trunk": "last_hidden_state", "causal": "logits", "classifier": "logits"}


def tail_of(model: Any) -> Tail:
    """Look at a model's modules.

    Raises:
        UnsupportedModelError: one of them does something that is not done here; says what.
    """
    name, first = next(iter(model.named_children()))
    kind = type(first)
    if not (isinstance(first, Transformer) and kind.forward is Transformer.forward):
        raise UnsupportedModelError(
            f"the model's first module is a {kind.__name__}, and only the library's own Transformer is known here. For "
            "a transformers model in another wrapper, use radix_mlp.enable."
        )
    transformer = opened(first.model)
    if not isinstance(transformer, PreTrainedModel):
        raise UnsupportedModelError(
            f"the model runs a {type(transformer).__name__}, and only transformers models in torch can be folded. Load "
            'it with backend="torch".'
        )
    reason = _why_not(first, transformer)
    if reason is not None:
        raise UnsupportedModelError(
            f"{reason}, which is not supported here. Call radix_mlp.enable on the model inside."
        )
    return Tail(model, name, transformer)


def _why_not(first: Transformer, transformer: PreTrainedModel) -> str | None:
    kind = kind_of(transformer)
    for modality, settings in first.modality_config.items():
        if modality not in _TEXT:
            # calls with such inputs run unfolded
            continue
        named: Any = settings["method_output_name"]
        output: list[str] = [named] if isinstance(named, str) else list(named or ["all"])
        if settings["method"] != "forward" or output != [_OUTPUT_OF_KIND[kind]]:
            return f"the transformer hands on {'.'.join(output)} of {settings['method']}"
    if kind == "trunk" and decoder_of(transformer) is not transformer:
        return f"{type(transformer).__name__} does something after its layers"
    if getattr(transformer.config, "output_hidden_states", False):
        return "the hidden states of all layers are asked for (output_hidden_states)"
    if getattr(first, "query_expansion", None) is not None:
        return "queries are expanded by padding (query_expansion)"
    own = {"task", "prompt_length", "modality"} & inspect.signature(type(transformer).forward).parameters.keys()
    return f"{type(transformer).__name__} reads {', '.join(sorted(own))}" if own else None


class Tail:
    """What comes after a model's transformer."""

    max_unfolded = 1 << 26
    """Numbers of unfolded hidden states held at a time: 128 MiB in bfloat16."""

    def __init__(self, model: Any, name_of_first: str, transformer: PreTrainedModel) -> None:
        self.model = model
        self.name_of_first = name_of_first
        self.transformer = transformer

    def reason_of_inputs(self, inputs: Any) -> str | None:
        """Why a call with these inputs is not text alone; None if it is."""
        modalities: dict[Any, Any] = self.model._modules[self.name_of_first].modality_config
        known = [*modalities]
        if known and not {*known} - _TEXT:
            return None
        for value in inputs if isinstance(inputs, list | tuple) else [inputs]:
            modality = infer_modality(value, known)
            if modality not in _TEXT:
                return f"an input is of the modality {modality}, and only calls of text alone fold"
        return None

    def check_features(self, features: Features) -> None:
        """Raise `UnsupportedCallError` if tokenisation hands over what a folded call would lose."""
        unknown = sorted(features.keys() - _KNOWN_FEATURES)
        for name in ("token_type_ids", "mm_token_type_ids"):
            types = features.get(name)
            if types is not None and name in inspect.signature(type(self.transformer).forward).parameters:
                unknown += [name] if any(map(any, types)) else []
        if features.get("logits_to_keep", 1) != 1:
            unknown.append("logits_to_keep")
        if unknown:
            raise UnsupportedCallError(
                f"the tokenised inputs have {', '.join(unknown)}, which folding does not know. Call "
                "radix_mlp.integrations.sentence_transformers.disable(model) for this call."
            )

    def work(self, options: Features, *, wants_tokens: bool) -> Callable[[Features], Work]:
        """What the engine does with the texts of a call, by the features that they share.

        Args:
            options: what the caller passes on to modules.
            wants_tokens: whether the vectors of all tokens are wanted besides.
        """
        first: Any = self.model._modules[self.name_of_first]
        taken = options.keys() & {*(self.model.module_kwargs or {}).get(self.name_of_first, ()), *first.forward_kwargs}
        if taken - {"task"}:
            raise UnsupportedCallError(
                f"{', '.join(sorted(taken))} would go to the transformer, and a folded call cannot pass it on. Call "
                "radix_mlp.integrations.sentence_transformers.disable(model) for this call."
            )
        rest = copy(self.model)
        modules = OrderedDict(rest._modules)
        del modules[self.name_of_first]
        rest.__dict__["_modules"] = modules
        output = first.module_output_name
        if kind_of(self.transformer) == "trunk":
            return lambda shared: FromTokens(rest, shared, options, output, wants_tokens, self.max_unfolded)
        score = None
        if kind_of(self.transformer) == "causal":
            key, module = next(iter(modules.items()), ("", None))
            if type(module) is LogitScore and module.module_input_name == output:
                # two rows of the head, in float32, instead of the whole vocabulary
                del modules[key]
                score = module
        return lambda shared: FromScores(rest, shared, options, output, self.transformer, score)


@dataclass(frozen=True, eq=False)
class Work(Task):
    """The modules after the transformer, on the hidden states of a batch."""

    rest: Any
    """The model without its first module."""
    shared: Features
    """Features that are the same for all texts."""
    options: Features
    output: str
    """How the first module calls what it hands on."""

    def run(self, features: Features) -> Features:
        # past a forward of the instance, which may be ours
        made: Features = type(self.rest).forward(self.rest, {**self.shared, **features}, **self.options)
        return made


@dataclass(frozen=True, eq=False)
class FromTokens(Work):
    """Modules that read the hidden states of all tokens."""

    wants_tokens: bool
    max_unfolded: int

    def finish(self, hidden: Tensor, plan: DevicePlan, items: Sequence[Item]) -> Kept:
        answers = []
        for features, lengths in _padded(hidden, plan, self.output, self.max_unfolded):
            answers.append(_answer(self.run(features), lengths if self.wants_tokens else None))
        return Kept(_joined(answers), hidden.isnan().any())


@dataclass(frozen=True, eq=False)
class FromScores(Work):
    """Modules that read what the transformer's head makes of one token."""

    transformer: PreTrainedModel
    score: LogitScore | None
    """Done here, in place of the head and itself."""

    def needed_rows(self, plan: RadixPlan, items: Sequence[Item]) -> Rows:
        return np.unique(self._rows(plan))

    def finish(self, hidden: Tensor, plan: DevicePlan, items: Sequence[Item]) -> Kept:
        rows = copy_rows(hidden, send(self._rows(plan.plan), hidden.device))
        return Kept({"scores": self.run(self._head(rows, items[0].ids))["scores"]}, rows.isnan().any())

    def _rows(self, plan: RadixPlan) -> Rows:
        if kind_of(self.transformer) == "causal":
            return plan.last_rows.astype(np.int64)
        return rows_to_classify(plan, pad_token_of(self.transformer))

    def _head(self, hidden: Tensor, probe: Ids) -> Features:
        """The features that the transformer's head adds, `hidden [S, h]`."""
        if kind_of(self.transformer) == "classifier":
            return {self.output: classification_head(self.transformer, probe=probe)(hidden)}
        if self.score is None:
            return {self.output: language_head(self.transformer, probe=probe)(hidden)[:, None]}
        tokens = [token for token in (self.score.true_token_id, self.score.false_token_id) if token is not None]
        logits = language_head(self.transformer, tokens, probe=probe)(hidden)
        return {"scores": logits[:, :1] if len(tokens) == 1 else logits[:, :1] - logits[:, 1:]}


def passed_on(features: Features) -> Features:
    """What of the tokenised inputs' features the modules after the transformer read."""
    return {name: features[name] for name in ("modality", "prompt_length") if name in features}


def gathered(places: list[NDArray[np.int64]], batches: list[Features]) -> Features:
    """Answers of batches in the order of the texts: `places` has those of each batch's texts."""
    joined = _joined(batches)
    back = np.argsort(np.concatenate(places))
    return {
        name: value[send(back, value.device)] if isinstance(value, Tensor) else [value[place] for place in back]
        for name, value in joined.items()
    }


def _padded(hidden: Tensor, plan: DevicePlan, name: str, most: int) -> Iterator[tuple[Features, list[int]]]:
    """Features of the batch, padded on the right, in parts of at most `most` numbers; the lengths of their texts."""
    lengths = np.diff(plan.plan.cu_seq_lengths)
    start = 0
    while start < len(lengths):
        longest = np.maximum.accumulate(lengths[start:])
        sizes = longest * np.arange(1, len(longest) + 1) * hidden.shape[1]
        stop = start + max(1, int(np.searchsorted(sizes, most, side="right")))
        width = int(longest[stop - start - 1])
        offsets = plan.cu_seq_lengths[start : stop + 1]
        column = torch.arange(width, device=hidden.device)
        present = column < offsets.diff()[:, None]
        # padding repeats a token that is there, and the mask leaves it out
        rows = plan.unfold_index[torch.where(present, offsets[:-1, None] + column, offsets[:-1, None])]
        features = {
            "input_ids": plan.compact_ids[rows],
            "attention_mask": present.long(),
            name: hidden[rows],
        }
        yield features, lengths[start:stop].tolist()
        start = stop


def _answer(features: Features, lengths: list[int] | None) -> Features:
    answer: Features = {name: features[name] for name in ("sentence_embedding", "scores") if name in features}
    if lengths is not None:
        tokens, mask = features["token_embeddings"], features["attention_mask"]
        for name, value in (("token_embeddings", tokens), ("attention_mask", mask)):
            answer[name] = [row[:length].clone() for row, length in zip(value, lengths, strict=True)]
    return answer


def _joined(parts: list[Features]) -> Features:
    return {
        name: torch.cat([part[name] for part in parts])
        if isinstance(parts[0][name], Tensor)
        else [row for part in parts for row in part[name]]
        for name in parts[0]
    }
