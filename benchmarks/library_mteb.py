"""library.py's parts `mteb-rerank` and `mteb-sts`: whole calls of `mteb.evaluate` on tasks made of local text."""

from __future__ import annotations

from typing import Any

import mteb
import numpy as np
from datasets import Dataset, DatasetDict, disable_progress_bars
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import CrossEncoderWrapper, SentenceTransformerEncoderWrapper

from radix_mlp.engine.engine import JobStats
from radix_mlp.integrations.mteb import RadixCrossEncoder, RadixEncoder

__all__ = ["SIMILARITY_PROMPT", "Evaluation", "comparer", "ranker"]

SIMILARITY_PROMPT = "Instruct: Retrieve questions that pose the same kind of problem\nQuery: "


def metadata_of(name: str, kind: Any, main_score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        type=kind,
        main_score=main_score,
        description="Local text.",
        dataset={"path": "NA", "revision": "NA"},
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
    )


class RerankTask(AbsTaskRetrieval):
    """Rank each query's documents; the first of them counts as the relevant one."""

    metadata = metadata_of("LocalReranking", "Reranking", "map_at_1000")

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


class SimilarityTask(AbsTaskSTS):
    """Tell which pairs of questions belong to one task; the instruction stands before every text."""

    metadata = metadata_of("LocalSimilarity", "STS", "cosine_spearman")
    min_score = 0
    max_score = 1

    def __init__(self, pairs: list[tuple[str, str, int]]) -> None:
        super().__init__()
        first, second, same = zip(*pairs, strict=True)
        columns = {"sentence1": first, "sentence2": second, "score": same}
        self.dataset = DatasetDict(
            {"test": Dataset.from_dict({name: list(column) for name, column in columns.items()})}
        )
        self.data_loaded = True


class Evaluation:
    """`mteb.evaluate` of one wrapped model; its answers are what mteb was given by the model.

    Args:
        model: mteb's wrapper, or ours.
        method: what mteb calls, once a task or more: `encode` or `predict`.
        task: makes the task of the items.
    """

    def __init__(self, model: Any, method: str, task: type[RerankTask] | type[SimilarityTask]) -> None:
        self.model, self.task = model, task
        self.answers: list[np.ndarray] = []
        self.all_stats: list[JobStats] = []
        answer = getattr(model, method)

        def recorded(*args: Any, **options: Any) -> Any:
            answered = answer(*args, **options)
            self.answers.append(np.asarray(answered, np.float32))
            if hasattr(model, "stats"):
                self.all_stats.append(model.stats)
            return answered

        setattr(model, method, recorded)

    def __call__(self, items: list[Any], batch_size: int) -> np.ndarray:
        """All answers of an evaluation, `[n]` or `[n, d]`."""
        self.answers.clear()
        self.all_stats.clear()
        disable_progress_bars()
        mteb.evaluate(
            self.model,
            self.task(items),
            cache=None,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
            show_progress_bar=False,
        )
        return np.concatenate(self.answers)

    def stats(self) -> JobStats:
        """Sums over the calls of the last evaluation."""
        names = ("num_requests", "num_tokens", "num_compact", "num_batches", "seconds")
        return JobStats(**{name: sum(getattr(stats, name) for stats in self.all_stats) for name in names})


def ranker(stock: Any, ours: Any, engine: dict[str, Any]) -> tuple[Evaluation, Evaluation]:
    """The stock side and ours for two cross-encoders of the same weights."""
    return (
        Evaluation(CrossEncoderWrapper(stock), "predict", RerankTask),
        Evaluation(RadixCrossEncoder(ours, **engine), "predict", RerankTask),
    )


def comparer(stock: Any, ours: Any, engine: dict[str, Any]) -> tuple[Evaluation, Evaluation]:
    """The same for encoders, with an instruction before every text."""
    prompts = {"STS": SIMILARITY_PROMPT}
    return (
        Evaluation(SentenceTransformerEncoderWrapper(stock, model_prompts=prompts), "encode", SimilarityTask),
        Evaluation(RadixEncoder(ours, model_prompts=prompts, **engine), "encode", SimilarityTask),
    )
