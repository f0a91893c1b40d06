"""Training steps made in the workers of a data loader: questions, documents, pairs to judge, text to read; folded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from radix_mlp.train import TreeBatch
from small_model.encoded import EncodedText, Vocabulary
from small_model.vocabulary import INSTRUCTIONS, QUERY_PROMPT

__all__ = ["Sizes", "Step", "Steps", "pooled_rows"]

OPENINGS = (
    "what is",
    "what are",
    "how does",
    "how do",
    "how can one measure",
    "how is",
    "why is",
    "why does",
    "which",
    "when is",
    "what is known about",
    "information on",
    "papers on",
    "the use of",
    "methods of",
    "theory of",
    "the effect of",
    "i am looking for",
    "explain",
)


@dataclass(frozen=True)
class Sizes:
    """How many sequences of each kind are in a step."""

    documents: int = 1024
    queries_each: int = 2
    """Pseudo-queries per document."""
    others: int = 512
    """Queries from texts outside the step: only the teacher knows which documents answer them."""
    cluster: int = 8
    """Documents that are similar to each other, so that distinguishing them is not too easy."""
    judged_queries: int = 64
    judged_documents: int = 12
    """Documents that a reranker judges for each of them; 0 trains no reranker."""
    read_texts: int = 96
    """Whole texts for the language model."""
    max_tokens: int = 192


@dataclass(frozen=True)
class Step:
    """One step: a tree of queries, then documents, then pairs to judge, then texts to read.

    Arrays, not tensors: those would come from the workers through shared memory, of which containers have little.
    """

    batch: TreeBatch
    documents: np.ndarray
    """`[D]` which texts the documents are."""
    positives: np.ndarray
    """`[P]` the document of each of the first P queries, a place in `documents`."""
    query_terms: list[np.ndarray]
    """`[Q]` the teacher's terms of every query."""
    pooled_rows: np.ndarray
    """Compact rows that are pooled, sequence after sequence, prompts left out."""
    pooled_sequences: np.ndarray
    """Beside them: the sequence, from 0 to Q + D - 1."""
    judged_queries: np.ndarray
    """`[J]` places of queries."""
    judged_documents: np.ndarray
    """`[J, K]` places of documents, the first the query's own."""


class Steps(Dataset[Step]):
    """Step number i is the same in every run with this seed, in whichever worker."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        plain: Sequence[EncodedText],
        marked: Sequence[EncodedText],
        neighbours: np.ndarray,
        readable: np.ndarray,
        *,
        sizes: Sizes,
        num_steps: int,
        seed: int,
    ) -> None:
        """`neighbours [texts, n]`: texts near each text; `readable`: all texts that may be trained on."""
        self.vocabulary, self.plain, self.marked = vocabulary, plain, marked
        self.neighbours, self.readable = neighbours, readable
        self.sizes, self.num_steps, self.seed = sizes, num_steps, seed
        self.prompt = vocabulary.ids(QUERY_PROMPT)
        self.openings = [vocabulary.ids(opening) for opening in OPENINGS]
        self.heads = [vocabulary.ids(f"Instruct: {text}\nQuery:" if text else "Query:") for text in INSTRUCTIONS]
        self.middle, self.tail = vocabulary.ids("\nPassage:"), vocabulary.ids("\nRelevant:")

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, index: int) -> Step:
        rng = np.random.default_rng((self.seed, index))
        sizes = self.sizes
        chosen = self._choose(rng)
        queries: list[np.ndarray] = []
        terms: list[np.ndarray] = []
        documents: list[np.ndarray] = []
        for text in chosen:
            encoded = (self.marked if rng.random() < 0.5 else self.plain)[text]
            asked = [self._query(encoded, rng) for _ in range(sizes.queries_each)]
            queries += [ids for ids, _ in asked]
            terms += [of for _, of in asked]
            documents.append(self._document(encoded, asked[0][1], rng))
        positives = np.repeat(np.arange(len(chosen)), sizes.queries_each)
        for text in self._others(chosen, rng):
            ids, of = self._query(self.plain[text], rng)
            queries.append(ids)
            terms.append(of)
        embedded = [np.concatenate([self.prompt, ids]) for ids in queries] + documents
        judged, candidates = self._judged(positives, rng)
        head = self.heads[rng.integers(len(self.heads))]
        pairs = [
            np.concatenate([head, queries[query], self.middle, documents[document], self.tail])
            for query, row in zip(judged, candidates, strict=True)
            for document in row
        ]
        read = [self._whole(rng) for _ in range(sizes.read_texts)]
        sequences = embedded + pairs + read
        first_read = len(sequences) - len(read)
        batch = TreeBatch.from_sequences(
            sequences, wanted=[np.full(len(ids), place >= first_read) for place, ids in enumerate(sequences)]
        )
        rows, owners = pooled_rows(batch, len(queries), len(embedded), len(self.prompt))
        return Step(batch, chosen, positives, terms, rows.astype(np.int32), owners.astype(np.int32), judged, candidates)

    def _choose(self, rng: np.random.Generator) -> np.ndarray:
        """Different texts, most of them in clusters."""
        sizes = self.sizes
        seeds = rng.choice(self.readable, -(-sizes.documents // sizes.cluster), replace=False)
        near = [rng.choice(self.neighbours[seed], sizes.cluster - 1, replace=False) for seed in seeds]
        found = np.concatenate([np.concatenate([[seed], row]) for seed, row in zip(seeds, near, strict=True)])
        _, first = np.unique(found, return_index=True)
        found = found[np.sort(first)]
        more = np.setdiff1d(rng.choice(self.readable, 2 * sizes.documents, replace=False), found)
        rng.shuffle(more)
        return np.concatenate([found, more])[: sizes.documents]

    def _others(self, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Texts outside the step, similar to some in it."""
        near = self.neighbours[rng.choice(chosen, self.sizes.others), rng.integers(self.neighbours.shape[1])]
        return near[~np.isin(near, chosen)]

    def _query(self, text: EncodedText, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Ids and terms of a short question that the text answers."""
        places = self._query_words(text, rng)
        if len(places) > 3:
            kept = places[rng.random(len(places)) > 0.1]
            places = kept if len(kept) else places
        words = []
        for place in places:
            forms = self.vocabulary.forms.get(int(text.terms[place]), []) if text.weights[place] else []
            other = len(forms) > 1 and rng.random() < 0.15
            words.append(forms[rng.integers(len(forms))] if other else text.word(place))
        if rng.random() < 0.3:
            words.insert(0, self.openings[rng.integers(len(self.openings))])
        if rng.random() < 0.3:
            words.append(self.vocabulary.question_mark)
        terms = text.terms[places]
        return np.concatenate(words), terms[terms >= 0]

    def _query_words(self, text: EncodedText, rng: np.random.Generator) -> np.ndarray:
        starts = text.sentence_starts
        kind = rng.random()
        if kind < 0.35:
            return np.arange(starts[0], min(starts[1], starts[0] + 24))
        if kind < 0.5:
            sentence = rng.integers(text.num_sentences)
            return np.arange(starts[sentence], min(starts[sentence + 1], starts[sentence] + 20))
        if kind < 0.65:
            length = min(int(rng.integers(4, 15)), text.num_words)
            first = rng.integers(text.num_words - length + 1)
            return np.arange(first, first + length)
        rare = np.flatnonzero(text.weights)
        if len(rare) < 2:
            return np.arange(min(text.num_words, 12))
        count = min(int(rng.integers(2, 9)), len(rare))
        chance = text.weights[rare] ** 1.5
        places = rng.choice(rare, count, replace=False, p=chance / chance.sum())
        return places if rng.random() < 0.3 else np.sort(places)

    def _document(self, text: EncodedText, asked: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The text, often without its title, a sentence, some words, or the words of the query."""
        keep = np.ones(text.num_words, bool)
        starts = text.sentence_starts
        if text.num_sentences > 1 and rng.random() < 0.4:
            keep[: starts[1]] = False
        if text.num_sentences > 2 and rng.random() < 0.3:
            sentence = rng.integers(1, text.num_sentences)
            keep[starts[sentence] : starts[sentence + 1]] = False
        if rng.random() < 0.5:
            keep &= rng.random(text.num_words) > rng.random() * 0.2
        if rng.random() < 0.3:
            without = keep & ~(np.isin(text.terms, asked) & (text.weights > 0))
            keep = without if without.sum() >= 5 else keep
        if keep.sum() < 3:
            keep[:] = True
        return text.tokens(keep)[: self.sizes.max_tokens]

    def _judged(self, positives: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Queries, and for each its document, others of the same cluster, and some from anywhere."""
        sizes = self.sizes
        num = sizes.judged_queries if sizes.judged_documents else 0
        judged = rng.choice(len(positives), num, replace=False)
        rows = []
        for own in positives[judged]:
            first = own - own % sizes.cluster
            near = np.setdiff1d(np.arange(first, min(first + sizes.cluster, sizes.documents)), [own])
            far = np.setdiff1d(rng.choice(sizes.documents, 2 * sizes.judged_documents, replace=False), [own, *near])
            rng.shuffle(far)
            rows.append(np.concatenate([[own], near, far])[: sizes.judged_documents])
        return judged, np.asarray(rows, np.int64).reshape(num, sizes.judged_documents)

    def _whole(self, rng: np.random.Generator) -> np.ndarray:
        texts = self.marked if rng.random() < 0.7 else self.plain
        return texts[rng.choice(self.readable)].ids[: self.sizes.max_tokens]


def pooled_rows(batch: TreeBatch, num_queries: int, count: int, prompt: int) -> tuple[np.ndarray, np.ndarray]:
    """Compact rows of the first `count` sequences and their owners; of the first queries without the prompt."""
    plan = batch.plan
    lengths = np.diff(plan.cu_seq_lengths[: count + 1]).astype(np.int64)
    owners = np.repeat(np.arange(count), lengths)
    places = np.arange(len(owners)) - np.repeat(plan.cu_seq_lengths[:count].astype(np.int64), lengths)
    kept = (owners >= num_queries) | (places >= prompt)
    return plan.unfold_index[: len(owners)][kept].astype(np.int64), owners[kept]
