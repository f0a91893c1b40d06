"""library.py's parts `mteb-rerank` and `mteb-classify`: whole calls of `mteb.evaluate` on tasks made of local text."""

from __future__ import annotations

from typing import Any

import mteb
import numpy as np
from datasets import Dataset, DatasetDict, disable_progress_bars
from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import CrossEncoderWrapper, SentenceTransformerEncoderWrapper

from radix_mlp.integrations.mteb import RadixCrossEncoder, RadixEncoder

__all__ = ["CLASSIFY_PROMPT", "Evaluation", "classifier", "ranker"]

CLASSIFY_PROMPT = "Instruct: Identify the kind of problem that a question poses\nQuery: "


class RerankTask(AbsTaskRetrieval):
    """Rank each query's documents; the first of them counts as the relevant one."""

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        super().__init__()
        queries = {query: f"q{place}" for place, query in enumerate(dict.fromkeys(query for query, _ in pairs))}
        documents = {text: f"d{place}" for place, text in enumerate(dict.fromkeys(text for _, text in pairs))}
        top_ranked: dict[str, list[str]] = {name: [] for name in queries.values()}
        for query, text in pairs:
            top_ranked[queries[query]].append(documents[text])
        split = {
            "queries": Dataset.from_list([{"id": name, "text": query} for query, name in queries.items()]),
            "corpus": Dataset.from_list([{"id": name, "text": text} for text, name in documents.items()]),
            "relevant_docs": {name: {ranked[0]: 1} for name, ranked in top_ranked.items()},
            "top_ranked": top_ranked,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True

    metadata = TaskMetadata(
        type="Reranking",
        name="LocalReranking",
        description="Documents that share words with a query.",
        dataset={"path": "NA", "revision": "NA"},
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="map_at_1000",
    )


class ClassifyTask(AbsTaskClassification):
    """Tell a question's task, cross-validated: every text is embedded once."""

    is_cross_validation = True
    # mteb's scores fail on a fold that knows two labels only, which the gate's small part can have
    n_splits = 2
    train_split = "test"

    def __init__(self, texts: list[tuple[str, int]]) -> None:
        super().__init__()
        columns = {"text": [text for text, _ in texts], "label": [label for _, label in texts]}
        self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
        self.data_loaded = True

    metadata = TaskMetadata(
        type="Classification",
        name="LocalClassification",
        description="Questions by the task that they belong to.",
        dataset={"path": "NA", "revision": "NA"},
        category="t2c",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="accuracy",
    )


class Evaluation:
    """`mteb.evaluate` of one wrapped model; its answers are what mteb was given by the model.

    Args:
        model: mteb's wrapper, or ours.
        method: what mteb calls once a task: `encode` or `predict`.
        task: makes the task of the items.
    """

    def __init__(self, model: Any, method: str, task: type[RerankTask] | type[ClassifyTask]) -> None:
        self.model, self.task, self.answers = model, task, []
        answer = getattr(model, method)

        def recorded(*args: Any, **options: Any) -> Any:
            self.answers.append(answer(*args, **options))
            return self.answers[-1]

        setattr(model, method, recorded)

    def __call__(self, items: list[Any], batch_size: int) -> np.ndarray:
        """The answers `[n]` or `[n, d]` of an evaluation."""
        self.answers.clear()
        disable_progress_bars()
        mteb.evaluate(
            self.model,
            self.task(items),
            cache=None,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
            show_progress_bar=False,
        )
        if len(self.answers) != 1:
            raise RuntimeError(f"mteb called the model {len(self.answers)} times where once was expected.")
        return np.asarray(self.answers[0], np.float32)


def ranker(stock: Any, ours: Any, engine: dict[str, Any]) -> tuple[Evaluation, Evaluation]:
    """The stock side and ours for two cross-encoders of the same weights."""
    return (
        Evaluation(CrossEncoderWrapper(stock), "predict", RerankTask),
        Evaluation(RadixCrossEncoder(ours, **engine), "predict", RerankTask),
    )


def classifier(stock: Any, ours: Any, engine: dict[str, Any]) -> tuple[Evaluation, Evaluation]:
    """The same for encoders, with an instruction before every text of a classification."""
    prompts = {"Classification": CLASSIFY_PROMPT}
    return (
        Evaluation(SentenceTransformerEncoderWrapper(stock, model_prompts=prompts), "encode", ClassifyTask),
        Evaluation(RadixEncoder(ours, model_prompts=prompts, **engine), "encode", ClassifyTask),
    )
