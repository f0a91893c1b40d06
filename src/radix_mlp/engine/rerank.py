"""Reranking: one relevance score for every (query, document), from the last token's hidden state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from radix_mlp.engine.classify import classified_rows, label_names
from radix_mlp.engine.head import classification_head, output_head, pad_token_of
from radix_mlp.engine.job import JobStats, Progress
from radix_mlp.engine.kind import kind_of, require_kind
from radix_mlp.engine.runner import Runner
from radix_mlp.engine.scheduler import Ids
from radix_mlp.engine.sentence_transformers_folder import FolderSettings
from radix_mlp.engine.template import Template, choose_template, encode_pairs
from radix_mlp.engine.tokenize import check_pairs
from radix_mlp.errors import InvalidInputError, UnsupportedModelError
from radix_mlp.ops import last_token
from radix_mlp.plan import RadixPlan

__all__ = ["Ranked", "check_top_n", "ranked", "rerank_pairs"]

ANSWERS = ("yes", "no")


class Ranked(NamedTuple):
    """A document and how relevant it is."""

    # a record's fields come before the methods of a tuple
    index: int  # type: ignore[assignment]
    """Its place in the caller's list."""
    score: float
    document: str


def rerank_pairs(
    engine: Runner,
    pairs: Sequence[tuple[str, str]],
    *,
    instruction: str | None,
    prompt_name: str | None,
    template: str,
    raw_scores: bool,
    truncate: bool,
    progress: Progress | None,
    what: str = "pairs",
) -> NDArray[np.float64]:
    """`Engine.rerank_pairs`."""
    check_pairs(pairs, what, ("query", "document"))
    chosen = _check_model(engine, template)
    sequences = encode_pairs(
        chosen,
        pairs,
        instruction=engine.folder.prompt(instruction, prompt_name, "instruction"),
        max_length=engine.max_length,
        truncate=truncate,
        what=what,
    )
    scores = np.empty(len(sequences))
    if not sequences:
        engine.stats = JobStats()
        return scores
    relevance = _relevance(engine, sequences[0])
    as_probability = not raw_scores and _is_probability(engine)

    def finish(indices: list[int], hidden: Tensor, plan: RadixPlan) -> Tensor:
        score = relevance([sequences[index] for index in indices], hidden, plan)
        return torch.sigmoid(score) if as_probability else score

    for indices, _, found in engine.run(sequences, finish, progress):
        scores[indices] = found.cpu().double().numpy()
    engine.check_finite(np.isfinite(scores), what)
    # copies of a document tie, though a last bit may depend on a row's place in its batch
    first: dict[tuple[str, str], int] = {}
    return scores[[first.setdefault((query, document), index) for index, (query, document) in enumerate(pairs)]]


def check_top_n(top_n: int | None) -> None:
    if top_n is not None and top_n < 1:
        raise InvalidInputError(f"top_n={top_n}: must be at least 1, or None for all documents.")


def ranked(documents: Sequence[str], scores: NDArray[np.float64], top_n: int | None = None) -> list[Ranked]:
    """The best first, those with equal scores in the caller's order.

    >>> [place.index for place in ranked(["a", "b", "c"], np.array([0.1, 0.7, 0.7]), top_n=2)]
    [1, 2]
    """
    order = np.argsort(-scores, kind="stable")[:top_n]
    return [Ranked(int(index), float(scores[index]), documents[index]) for index in order]


Relevance = Callable[[list[Ids], Tensor, RadixPlan], Tensor]
"""(sequences, hidden `[M, h]`, plan) -> `[S]`, the log-odds of being relevant or another score, float32 or wider."""


def _check_model(engine: Runner, template: str) -> Template:
    require_kind(engine.model, ("causal", "classifier"), "rerank")
    folder = engine.folder
    if not folder.looked_up and template == "auto":
        raise InvalidInputError(
            f"model={folder.name!r}: without a network it cannot be told whether it has a modules.json that says how "
            "it reads queries and documents. Give the downloaded folder, or say template=, as 'qwen3'."
        )
    if folder.is_sentence_transformers:
        folder.check_transformer(("logits",))
        if folder.lower_case:
            raise folder.unsupported("it reads lower case only")
    return choose_template(template, engine.model, engine.tokenizer, folder)


def _relevance(engine: Runner, probe: Ids) -> Relevance:
    if kind_of(engine.model) == "causal":
        tokens = _answer_tokens(engine.folder, engine.tokenizer)
        answers = output_head(engine.model, probe, tokens)

        def from_answers(sequences: list[Ids], hidden: Tensor, plan: RadixPlan) -> Tensor:
            logits = answers(last_token(hidden, plan))
            return logits[:, 0] if len(tokens) == 1 else logits[:, 0] - logits[:, 1]

        return from_answers
    if engine.folder.modules:
        raise engine.folder.unsupported(f"its scores go through {engine.folder.modules[0].kind}")
    relevant = _relevant_label(engine)
    head = classification_head(engine.model, probe)

    def from_labels(sequences: list[Ids], hidden: Tensor, plan: RadixPlan) -> Tensor:
        scores = head(classified_rows(hidden, plan, sequences, pad_token_of(engine.model)))
        return scores[:, 0] if scores.shape[1] == 1 else scores[:, relevant] - scores[:, 1 - relevant]

    return from_labels


def _answer_tokens(folder: FolderSettings, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens for relevant and, if there is one, for not relevant."""
    if folder.modules:
        module = folder.modules[0]
        if module.kind != "LogitScore" or len(folder.modules) > 1:
            raise folder.unsupported(f"its modules are {', '.join(module.kind for module in folder.modules)}")
        found = (module.config.get("true_token_id"), module.config.get("false_token_id"))
        return [int(token) for token in found if token is not None]
    tokens: list[int] = []
    for answer in ANSWERS:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise UnsupportedModelError(
                f"the tokenizer has no single token for {answer!r}, so this model does not answer as Qwen3-Reranker "
                "does. Use a reranker ('tiny-reranker' is built in)."
            )
        tokens.append(ids[0])
    return tokens


def _relevant_label(engine: Runner) -> int:
    """Which of one or two labels means relevant: the one called yes, else the last."""
    labels = label_names(engine.model)
    if len(labels) > 2:
        raise UnsupportedModelError(
            f"{type(engine.model).__name__} has {len(labels)} labels ({', '.join(labels)}), and a reranker one or two. "
            "Use classify."
        )
    lower = [label.lower() for label in labels]
    return lower.index("yes") if "yes" in lower else len(lower) - 1


def _is_probability(engine: Runner) -> bool:
    """Whether the score is turned into a probability, which it is unless the model's files say otherwise."""
    config = engine.model.config
    if kind_of(engine.model) == "classifier" and config.num_labels == 2:
        # a softmax over two labels; what a library does with each is no help
        return True
    name = engine.folder.activation
    name = name or (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
    name = name or getattr(config, "sbert_ce_default_activation_function", None)
    if name is None or name.endswith(".Sigmoid"):
        return True
    if name.endswith(".Identity"):
        return False
    raise UnsupportedModelError(
        f"{engine.folder.name}: its activation {name} is not supported here. Ask for scores without: raw_scores=True."
    )
