"""The 93 judged queries against all abstracts: the model, BM25, both together, and the same model untrained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from radix_mlp.engine import Engine
from small_model.bm25 import BM25, words_of
from small_model.corpus import read_abstracts, read_judged

__all__ = ["TRANSFORMER", "evaluate", "table"]

TRANSFORMER = "0_Transformer"
"""Of the folder, what is a plain checkpoint: by itself it is the reranker."""
RERANKED = 50
FUSION = 60


def evaluate(folder: Path, data: Path, *, device: str | None = None) -> dict[str, dict[str, float]]:
    """Way to rank -> recall@10, MRR, nDCG@10, mean over the queries."""
    abstracts, judged = read_abstracts(data), read_judged(data)
    texts, queries = [text.whole for text in abstracts], list(judged.queries)
    relevant = torch.tensor([[text.name in names for text in abstracts] for names in judged.relevant])
    found: dict[str, Tensor] = {}
    for name, stemmed in (("BM25", True), ("BM25, words as they stand", False)):
        bm25 = BM25(texts, stemmed=stemmed)
        found[name] = bm25.scores([bm25.term_ids(words_of(query)) for query in queries])
    tokenizer = AutoTokenizer.from_pretrained(folder / TRANSFORMER)
    torch.manual_seed(0)
    random = Qwen3ForCausalLM(Qwen3Config.from_pretrained(folder / TRANSFORMER))
    engine = Engine(random, tokenizer=tokenizer, device=device)
    found["random weights"] = torch.from_numpy(
        engine.embed(queries, pooling="mean") @ engine.embed(texts, pooling="mean").T
    )
    engine = Engine(folder, device=device)
    found["small"] = torch.from_numpy(engine.embed(queries, prompt_name="query") @ engine.embed(texts).T)
    found["small and BM25"] = _fused(found["small"], found["BM25"])
    engine = Engine(folder / TRANSFORMER, device=device)
    for first in ("small", "BM25"):
        found[f"{first}, its first {RERANKED} reranked"] = _reranked(engine, found[first], queries, texts)
    measures: dict[str, Callable[[Tensor], Tensor]] = {"recall_at_10": _recall, "mrr": _mrr, "ndcg_at_10": _ndcg}
    return {
        name: {key: round(float(measure(_hits(scores, relevant)).mean()), 4) for key, measure in measures.items()}
        for name, scores in found.items()
    }


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = ["| | recall@10 | MRR | nDCG@10 |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {of['recall_at_10']:.3f} | {of['mrr']:.3f} | {of['ndcg_at_10']:.3f} |"
        for name, of in found.items()
    ]
    return "\n".join(lines)


def _hits(scores: Tensor, relevant: Tensor) -> Tensor:
    """`[Q, D]` bool: whether the document at each place is relevant."""
    return relevant.gather(1, torch.argsort(scores, dim=1, descending=True, stable=True))


def _recall(hits: Tensor) -> Tensor:
    return hits[:, :10].sum(1) / hits.sum(1)


def _mrr(hits: Tensor) -> Tensor:
    return 1 / (1 + hits.float().argmax(1))


def _ndcg(hits: Tensor) -> Tensor:
    gains = 1 / torch.log2(torch.arange(2, 12, dtype=torch.float64))
    best = gains.cumsum(0)[hits.sum(1).clamp(max=10) - 1]
    return (hits[:, :10] * gains).sum(1) / best


def _fused(*scores: Tensor) -> Tensor:
    """Reciprocal rank fusion."""
    places = [torch.argsort(torch.argsort(one, dim=1, descending=True, stable=True), dim=1) for one in scores]
    return torch.stack([1 / (FUSION + 1 + place) for place in places]).sum(0)


def _reranked(engine: Engine, scores: Tensor, queries: list[str], texts: list[str]) -> Tensor:
    first = scores.topk(RERANKED, dim=1).indices.numpy()
    pairs = [(query, texts[place]) for query, row in zip(queries, first, strict=True) for place in row]
    answers = engine.rerank_pairs(pairs).reshape(first.shape)
    out = np.full(scores.shape, -np.inf)
    np.put_along_axis(out, first, answers, axis=1)
    return torch.from_numpy(out)
