"""Reranking: one relevance score for every (query, document), from the last token's hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from radix_mlp.engine.execution.loaded_model import LoadedModel
from radix_mlp.engine.task import Item, Request, Rows, Task
from radix_mlp.engine.tasks.classify import label_scores
from radix_mlp.engine.tasks.rerank_template import Template, check_template, choose_template, encode_pairs
from radix_mlp.engine.tokenization.tokenize import check_pairs, encode, num_characters
from radix_mlp.engine.tokenization.tokenize_messages import ReadMessages, as_content, is_message, read_all
from radix_mlp.errors import InvalidDtypeError, InvalidInputError, UnsupportedModelError
from radix_mlp.models.head_check import pad_token_of
from radix_mlp.models.heads import language_head
from radix_mlp.models.labels import label_names
from radix_mlp.models.model_kind import kind_of, require_kind
from radix_mlp.models.sentence_transformers_folder import FolderSettings
from radix_mlp.ops import last_token
from radix_mlp.ops.device_plan import DevicePlan
from radix_mlp.ops.pool import rows_to_classify
from radix_mlp.plan import RadixPlan

__all__ = [
    "Ranked",
    "Relevance",
    "RerankKeywords",
    "RerankOptions",
    "check_top_n",
    "document_pairs",
    "ranked",
    "rerank_request",
]

ANSWERS = ("yes", "no")
TemplateName = Literal["auto", "qwen3", "chat", "pair"]


@dataclass(frozen=True, kw_only=True)
class RerankOptions:
    """Options of `Engine.rerank` and `Engine.rerank_pairs`.

    Raises:
        InvalidInputError: no such template.
    """

    instruction: str | None = None
    """What relevant means, in words; None takes the model's default."""
    prompt_name: str | None = None
    """The name of one of the model's prompts, which becomes the instruction."""
    template: TemplateName = "auto"
    """How the model reads query and document."""
    raw_scores: bool = False
    """The model's own scores, log-odds for instance, instead of probabilities."""
    truncate: bool = False
    """Cut documents that are too long at their end instead of refusing them."""

    def __post_init__(self) -> None:
        check_template(self.template)


class RerankKeywords(TypedDict, total=False):
    """The fields of `RerankOptions`, for signatures."""

    instruction: str | None
    prompt_name: str | None
    template: TemplateName
    raw_scores: bool
    truncate: bool


class Ranked(NamedTuple):
    """A document and how relevant it is."""

    # a record's fields come before the methods of a tuple
    index: int  # type: ignore[assignment]
    """Its place in the caller's list."""
    score: float
    document: Any
    """As the caller gave it."""


@dataclass(frozen=True)
class Relevance(Task):
    """One score a sequence, from the hidden state of one token."""

    loaded: LoadedModel
    tokens: tuple[int, ...]
    """Of a causal model: the answer for relevant and, if there is one, for not relevant. Empty for a classifier."""
    relevant: int
    """Of a classifier: which of one or two labels means relevant."""
    as_probability: bool

    def needed_rows(self, plan: RadixPlan, items: Sequence[Item]) -> Rows | None:
        if self.tokens:
            return np.unique(plan.last_rows).astype(np.int64)
        return np.unique(rows_to_classify(plan, pad_token_of(self.loaded.model)))

    def finish(self, hidden: Tensor, plan: DevicePlan, items: Sequence[Item]) -> Tensor:
        if self.tokens:
            head = language_head(self.loaded.model, self.tokens, probe=items[0].text_ids)
            scores = head(last_token(hidden, plan))
            score = scores[:, 0] if len(self.tokens) == 1 else scores[:, 0] - scores[:, 1]
        else:
            scores = label_scores(self.loaded, hidden, plan, items)
            score = scores[:, 0] if scores.shape[1] == 1 else scores[:, self.relevant] - scores[:, 1 - self.relevant]
        return torch.sigmoid(score) if self.as_probability else score

    def answers(self, found: Any, plan: RadixPlan, items: Sequence[Item]) -> Sequence[float]:
        scores: list[float] = found.astype(np.float64).tolist()
        return scores


def rerank_request(
    loaded: LoadedModel,
    tokenizer: Any,
    pairs: Sequence[tuple[Any, Any]],
    options: RerankOptions,
    what: str = "pairs",
) -> Request[NDArray[np.float64]]:
    """What `Engine.rerank_pairs` does before and after the model; errors call the pairs `what`."""
    instruction = loaded.folder.prompt(options.instruction, options.prompt_name, "instruction")
    if any(is_message(part) for pair in pairs if isinstance(pair, tuple | list) for part in pair):
        rows = _read_pairs(loaded, pairs, options, instruction, what)
    else:
        check_pairs(pairs, what, ("query", "document"))
        sequences = encode_pairs(
            _check_model(loaded, tokenizer, options.template),
            pairs,
            instruction=instruction,
            max_length=loaded.max_length,
            truncate=options.truncate,
            what=what,
            vocabulary=loaded.vocabulary,
        )
        rows = [ReadMessages(ids, ()) for ids in sequences]
    # copies of a document tie, though a last bit may depend on a row's place in its batch
    first: dict[bytes, int] = {}
    same = [first.setdefault(row.keys.tobytes(), index) for index, row in enumerate(rows)]

    def value(answers: list[float]) -> NDArray[np.float64]:
        scores = np.asarray(answers, np.float64)
        loaded.check_finite(np.asarray(np.isfinite(scores)), what)
        return scores[same]

    items: list[Item] = []
    if rows:
        task = _relevance(loaded, tokenizer, as_probability=not options.raw_scores and _is_probability(loaded))
        items = [Item(row.keys, task, 0, row.pictures) for row in rows]
    return Request(items, value, what, num_characters(pairs))


def _read_pairs(
    loaded: LoadedModel, pairs: Sequence[Any], options: RerankOptions, instruction: str | None, what: str
) -> list[ReadMessages]:
    """What the model reads of pairs with images, through its processor's chat template."""
    require_kind(loaded.model, ("causal", "classifier"), "rerank")
    if options.template not in ("auto", "chat"):
        raise InvalidInputError(f"template={options.template!r} is for texts: images need 'chat'.")
    if options.truncate:
        raise InvalidInputError("truncate=True is for texts: images and messages are not cut.")
    if loaded.folder.is_sentence_transformers:
        loaded.folder.check_transformer(("logits",))
    reader = loaded.message_reader()
    reader.check_roles("query", "document")

    def read(pair: Any) -> ReadMessages:
        query, document = pair
        turns = [("query", query), ("document", document)]
        if instruction:
            turns.insert(0, ("system", instruction))
        messages = [{"role": role, "content": as_content(value)} for role, value in turns]
        return reader.read(messages, generation_prompt=loaded.folder.has_generation_prompt)

    return read_all(read, pairs, what, loaded.max_length)


def document_pairs(query: Any, documents: Sequence[Any]) -> list[tuple[Any, Any]]:
    """One query with each of its documents; `InvalidDtypeError` if it is neither a string nor a dictionary."""
    if not isinstance(query, str) and not is_message(query):
        raise InvalidDtypeError(f"query must be a string, not {query!r:.60}. One with an image is a dictionary.")
    return [(query, document) for document in documents]


def check_top_n(top_n: int | None) -> None:
    if top_n is not None and top_n < 1:
        raise InvalidInputError(f"top_n={top_n}: must be at least 1, or None for all documents.")


def ranked(documents: Sequence[Any], scores: NDArray[np.float64], top_n: int | None = None) -> list[Ranked]:
    """The best first, those with equal scores in the caller's order.

    >>> [place.index for place in ranked(["a", "b", "c"], np.array([0.1, 0.7, 0.7]), top_n=2)]
    [1, 2]
    """
    order = np.argsort(-scores, kind="stable")[:top_n]
    return [Ranked(int(index), float(scores[index]), documents[index]) for index in order]


def _check_model(loaded: LoadedModel, tokenizer: Any, template: str) -> Template:
    if require_kind(loaded.model, ("causal", "classifier"), "rerank") == "classifier":
        _relevant_label(loaded)
    folder = loaded.folder
    if not folder.looked_up and template == "auto":
        raise InvalidInputError(
            f"model={folder.name!r}: without a network it cannot be told whether it has a modules.json that says how "
            "it reads queries and documents. Give the downloaded folder, or say template=, as 'qwen3'."
        )
    if folder.is_sentence_transformers:
        folder.check_transformer(("logits",))
        if folder.lower_case:
            raise folder.unsupported("it reads lower case only")
    return choose_template(template, loaded.model, tokenizer, folder)


def _relevance(loaded: LoadedModel, tokenizer: Any, *, as_probability: bool) -> Relevance:
    if kind_of(loaded.model) == "causal":
        return Relevance(loaded, tuple(_answer_tokens(loaded.folder, tokenizer)), 0, as_probability)
    if loaded.folder.modules:
        raise loaded.folder.unsupported(f"its scores go through {loaded.folder.modules[0].kind}")
    return Relevance(loaded, (), _relevant_label(loaded), as_probability)


def _answer_tokens(folder: FolderSettings, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens for relevant and, if there is one, for not relevant."""
    if folder.modules:
        module = folder.modules[0]
        if module.kind == "Pooling":
            raise UnsupportedModelError(
                f"model={Path(folder.name).name!r} is an embedder: it makes vectors, and does not score pairs. Embed "
                "query and documents and rank by dot products, or use a reranker, as Qwen/Qwen3-Reranker-0.6B."
            )
        if module.kind != "LogitScore" or len(folder.modules) > 1:
            raise folder.unsupported(f"its modules are {', '.join(module.kind for module in folder.modules)}")
        found = (module.config.get("true_token_id"), module.config.get("false_token_id"))
        if found[0] is None:
            raise InvalidInputError(
                f"{folder.name}/{module.path}/config.json: true_token_id is missing, the token that means relevant."
            )
        return [int(token) for token in found if token is not None]
    tokens: list[int] = []
    for answer in ANSWERS:
        [ids] = encode(tokenizer, [answer], add_special_tokens=False)
        if len(ids) != 1:
            raise UnsupportedModelError(
                f"the tokenizer has no single token for {answer!r}, so this model does not answer as Qwen3-Reranker "
                "does. Use a reranker ('tiny-reranker' is built in)."
            )
        tokens.append(int(ids[0]))
    return tokens


def _relevant_label(loaded: LoadedModel) -> int:
    """Which of one or two labels means relevant: the one called yes, else the last."""
    labels = label_names(loaded.model)
    if len(labels) > 2:
        raise UnsupportedModelError(
            f"{type(loaded.model).__name__} has {len(labels)} labels ({', '.join(labels)}), and a reranker one or two. "
            "Use classify."
        )
    lower = [label.lower() for label in labels]
    if lower.count("yes") > 1:
        raise UnsupportedModelError(
            f"{type(loaded.model).__name__} calls both of its labels yes: which one means relevant? Name them apart "
            "(id2label of its configuration)."
        )
    return lower.index("yes") if "yes" in lower else len(lower) - 1


def _is_probability(loaded: LoadedModel) -> bool:
    """Whether the score is turned into a probability, which it is unless the model's files say otherwise."""
    config = loaded.model.config
    if kind_of(loaded.model) == "classifier" and config.num_labels == 2:
        # a softmax over two labels; what a library does with each is no help
        return True
    name = loaded.folder.activation
    name = name or (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
    name = name or getattr(config, "sbert_ce_default_activation_function", None)
    if name is None or name.endswith(".Sigmoid"):
        return True
    if name.endswith(".Identity"):
        return False
    raise UnsupportedModelError(
        f"{loaded.folder.name}: its activation {name} is not supported here. Ask for scores without: raw_scores=True."
    )
