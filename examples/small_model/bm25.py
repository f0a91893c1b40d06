"""BM25 over words cut to their stems: the teacher of the pseudo-queries, and the baseline that is reported."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import snowballstemmer
import torch
from torch import Tensor

__all__ = ["BM25", "STOP_WORDS", "stem", "words_of"]

STOP_WORDS = frozenset(
    [
        "a",
        "about",
        "above",
        "after",
        "all",
        "also",
        "an",
        "and",
        "any",
        "are",
        "as",
        "at",
        "be",
        "been",
        "between",
        "both",
        "but",
        "by",
        "can",
        "do",
        "does",
        "for",
        "from",
        "given",
        "has",
        "have",
        "how",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "made",
        "may",
        "more",
        "most",
        "not",
        "obtained",
        "of",
        "on",
        "one",
        "only",
        "or",
        "other",
        "over",
        "shown",
        "some",
        "such",
        "than",
        "that",
        "the",
        "their",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "through",
        "to",
        "two",
        "under",
        "up",
        "use",
        "used",
        "using",
        "various",
        "very",
        "was",
        "were",
        "what",
        "when",
        "where",
        "which",
        "while",
        "who",
        "will",
        "with",
        "without",
    ]
)


class BM25:
    """Scores of queries and documents, `sum idf(w) tf(w) (k1 + 1) / (tf(w) + k1 (1 - b + b length / mean length))`."""

    def __init__(self, documents: Sequence[str], *, k1: float = 0.9, b: float = 0.4, stemmed: bool = True) -> None:
        self.stemmed = stemmed
        self.terms: dict[str, int] = {}
        places: list[int] = []
        for document in documents:
            keys = self._keys(words_of(document))
            places += [self.terms.setdefault(key, len(self.terms)) for key in keys]
        lengths = torch.tensor([sum(word.isalnum() for word in words_of(document)) for document in documents])
        rows = torch.arange(len(documents)).repeat_interleave(lengths)
        tf = torch.zeros(len(documents), len(self.terms))
        tf.index_put_((rows, torch.tensor(places)), torch.ones(len(places)), accumulate=True)
        frequency = (tf > 0).sum(0)
        self.idf = torch.log(1 + (len(documents) - frequency + 0.5) / (frequency + 0.5))
        """`[terms]`"""
        self._k1, self._b, self._mean_length = k1, b, float(lengths.float().mean())
        self.weights = self._weights(tf, lengths).T.contiguous()
        """`[terms, documents]`"""

    def to(self, device: torch.device | str) -> BM25:
        self.weights = self.weights.to(device)
        return self

    def term_ids(self, words: Iterable[str]) -> np.ndarray:
        """Terms of a text, one per known word."""
        found = (self.terms.get(key) for key in self._keys(words))
        return np.asarray([term for term in found if term is not None], np.int64)

    def scores(self, queries: Sequence[np.ndarray], documents: Tensor | None = None) -> Tensor:
        """`[queries, documents]`, queries as their terms: of all documents, or of those with these indices."""
        weights = self.weights if documents is None else self.weights[:, documents]
        return self._counts(queries).to(weights.device) @ weights

    def scores_of_texts(self, queries: Sequence[np.ndarray], texts: Sequence[np.ndarray]) -> Tensor:
        """`[queries, texts]`: of texts given as their terms, too."""
        lengths = torch.tensor([len(terms) for terms in texts])
        weights = self._weights(self._counts(texts).to_dense(), lengths).T.contiguous().to(self.weights.device)
        return self._counts(queries).to(weights.device) @ weights

    def _counts(self, texts: Sequence[np.ndarray]) -> Tensor:
        """`[texts, terms]`, sparse."""
        rows = np.repeat(np.arange(len(texts)), [len(terms) for terms in texts])
        places = torch.from_numpy(np.stack([rows, np.concatenate(texts)]))
        return torch.sparse_coo_tensor(places, torch.ones(places.shape[1]), (len(texts), len(self.terms)))

    def _weights(self, tf: Tensor, lengths: Tensor) -> Tensor:
        norm = self._k1 * (1 - self._b + self._b * lengths / self._mean_length)
        return tf * (self._k1 + 1) / (tf + norm[:, None]) * self.idf

    def _keys(self, words: Iterable[str]) -> list[str]:
        return [stem(word) if self.stemmed else word for word in words if word.isalnum()]


def words_of(text: str) -> list[str]:
    """Words, digits and marks in lower case: the pieces that the tokenizer cuts before it looks for pairs.

    >>> words_of("Noise at 20 MHz.")
    ['noise', 'at', '2', '0', 'mhz', '.']
    """
    return re.findall(r"[^\W\d_]+|\d|[^\w\s]|_", unicodedata.normalize("NFKC", text).lower())


@cache
def stem(word: str) -> str:
    """Porter's second stemmer (Snowball's "english")."""
    return _STEMMER.stemWord(word)


_STEMMER = snowballstemmer.stemmer("english")
