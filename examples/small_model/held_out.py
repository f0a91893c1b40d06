"""Abstracts that training never sees: does the model find the rest of an abstract by its title?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import Qwen3ForCausalLM

from radix_mlp.ops import last_token
from radix_mlp.train import TreeBatch, cross_entropy, tree_hidden, tree_logprobs
from small_model.batches import pooled_rows
from small_model.bm25 import BM25
from small_model.encoded import EncodedText, Vocabulary
from small_model.objective import autocast_on, mean_of_rows
from small_model.vocabulary import QUERY_PROMPT

__all__ = ["HeldOut", "choose_held_out", "places_of_own"]

BATCH = 2048
JUDGED_QUERIES, JUDGED_DOCUMENTS = 128, 32


def choose_held_out(texts: Sequence[EncodedText], num_abstracts: int, count: int) -> np.ndarray:
    """Abstracts with a title of at least three words and at least fifteen words after it."""
    usable = [
        index
        for index, text in enumerate(texts[:num_abstracts])
        if text.num_sentences > 1 and text.sentence_starts[1] >= 3 and text.num_words - text.sentence_starts[1] >= 15
    ]
    return np.sort(np.random.default_rng(0).choice(usable, count, replace=False))


def places_of_own(scores: Tensor) -> Tensor:
    """`[Q, K] -> [Q]`: at which place, from 1, query q ranks document q; of equals it comes last."""
    return (scores >= scores.diagonal()[:, None]).sum(1)


@dataclass(frozen=True)
class HeldOut:
    """Titles as queries; the rest of each abstract among all other abstracts."""

    queries: list[TreeBatch]
    documents: list[TreeBatch]
    pairs: TreeBatch
    whole: TreeBatch
    prompt: int
    bm25: dict[str, float]

    @classmethod
    def build(
        cls, vocabulary: Vocabulary, texts: Sequence[EncodedText], held_out: np.ndarray, others: np.ndarray
    ) -> HeldOut:
        """`others`: abstracts that are further candidates."""
        titles, rests, terms, rest_terms = [], [], [], []
        for index in held_out:
            text = texts[index]
            is_title = np.arange(text.num_words) < text.sentence_starts[1]
            titles.append(text.tokens(is_title))
            rests.append(text.tokens(~is_title))
            terms.append(text.terms[is_title & (text.terms >= 0)])
            rest_terms.append(text.terms[~is_title & (text.terms >= 0)])
        prompt = vocabulary.ids(QUERY_PROMPT)
        known = _teacher_scores(vocabulary.teacher, terms, rest_terms, others)
        # the hardest candidates by the teacher, after the query's own document
        hard = known.clone()
        hard.fill_diagonal_(torch.inf)
        hard = hard[:JUDGED_QUERIES].topk(JUDGED_DOCUMENTS).indices.cpu().numpy()
        documents = [*rests, *(texts[index].ids for index in others)]
        head, middle, tail = (vocabulary.ids(text) for text in ("Query:", "\nPassage:", "\nRelevant:"))
        pairs = [
            np.concatenate([head, titles[query], middle, documents[place], tail])
            for query, row in enumerate(hard)
            for place in row
        ]
        return cls(
            _batches([np.concatenate([prompt, title]) for title in titles]),
            _batches(documents),
            TreeBatch.from_sequences(pairs),
            TreeBatch.from_sequences([texts[index].ids for index in held_out[:256]]),
            len(prompt),
            _summary(places_of_own(known)),
        )

    @torch.no_grad()
    def measure(self, model: Qwen3ForCausalLM, answers: tuple[int, int], *, judged: bool) -> dict[str, float]:
        """recall@10 and MRR of the embedder; MRR of the reranker over 32 candidates; perplexity."""
        queries = torch.cat([_vectors(model, batch, self.prompt) for batch in self.queries])
        documents = torch.cat([_vectors(model, batch, 0) for batch in self.documents])
        found = _summary(places_of_own(queries @ documents.T))
        if judged:
            with autocast_on(model.device):
                hidden = tree_hidden(model, self.pairs.plan)
            last = last_token(hidden, self.pairs.plan).float()
            yes, no = model.get_input_embeddings().weight[list(answers)].float()
            scores = (last @ (yes - no)).view(-1, JUDGED_DOCUMENTS)
            places = (scores >= scores[:, :1]).sum(1)
            found["reranker_mrr"] = float((1 / places).mean())
        found["perplexity"] = float(cross_entropy(tree_logprobs(model, self.whole).logprob, self.whole).exp())
        return found


def _teacher_scores(teacher: BM25, titles: list[np.ndarray], rests: list[np.ndarray], others: np.ndarray) -> Tensor:
    """`[Q, Q + others]`"""
    device = teacher.weights.device
    of_others = teacher.scores(titles, torch.from_numpy(others).to(device))
    return torch.cat([teacher.scores_of_texts(titles, rests), of_others], dim=1)


def _batches(sequences: list[np.ndarray]) -> list[TreeBatch]:
    return [TreeBatch.from_sequences(sequences[start : start + BATCH]) for start in range(0, len(sequences), BATCH)]


def _vectors(model: Qwen3ForCausalLM, batch: TreeBatch, prompt: int) -> Tensor:
    rows, owners = pooled_rows(batch, batch.num_sequences if prompt else 0, batch.num_sequences, prompt)
    with autocast_on(model.device):
        hidden = tree_hidden(model, batch.plan)
    device = hidden.device
    rows_on_device, owners_on_device = torch.from_numpy(rows).to(device), torch.from_numpy(owners).to(device)
    return normalize(mean_of_rows(hidden, rows_on_device, owners_on_device, batch.num_sequences), dim=-1)


def _summary(places: Tensor) -> dict[str, float]:
    return {"recall_at_10": float((places <= 10).float().mean()), "mrr": float((1 / places).mean())}
