"""Texts as arrays of token ids with their words, terms and sentences: what pseudo-queries are cut from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from small_model.bm25 import BM25, STOP_WORDS, words_of
from small_model.corpus import Text

__all__ = ["EncodedText", "Vocabulary"]


class _Word(NamedTuple):
    ids: np.ndarray
    term: int
    weight: float


@dataclass(frozen=True)
class EncodedText:
    """One text; a word may have several tokens, and a mark counts as a word."""

    ids: np.ndarray
    """`[tokens]`"""
    word_starts: np.ndarray
    """`[words + 1]`, tokens where words start."""
    sentence_starts: np.ndarray
    """`[sentences + 1]`, words where sentences start."""
    terms: np.ndarray
    """`[words]`, the teacher's term of every word, -1 for words that it does not know."""
    weights: np.ndarray
    """`[words]`, how rare the word is; 0 for function words and marks."""

    @property
    def num_words(self) -> int:
        return len(self.terms)

    @property
    def num_sentences(self) -> int:
        return len(self.sentence_starts) - 1

    def tokens(self, keep: np.ndarray) -> np.ndarray:
        """Ids of the words that are kept, `keep [words]` bool."""
        return self.ids[np.repeat(keep, np.diff(self.word_starts))]

    def word(self, place: int) -> np.ndarray:
        return self.ids[self.word_starts[place] : self.word_starts[place + 1]]


class Vocabulary:
    """Cuts texts into words and encodes them; knows which words share a stem."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, teacher: BM25) -> None:
        self.teacher = teacher
        self._backend = tokenizer.backend_tokenizer
        self._words: dict[str, _Word] = {}
        self.forms: dict[int, list[np.ndarray]] = {}
        """Term -> the ids of every word that has this stem."""
        self.question_mark = self.ids("?")

    def ids(self, text: str) -> np.ndarray:
        return np.asarray(self._backend.encode(text, add_special_tokens=False).ids, np.int32)

    def encode(self, text: Text, *, marks: bool) -> EncodedText:
        """`marks`: a full stop after every sentence that has no mark, as the abstracts have none."""
        found: list[_Word] = []
        sentences = [0]
        for sentence in text.sentences:
            found += [self._word(word) for word in words_of(sentence)]
            if marks and sentence[-1].isalnum():
                found.append(self._word("."))
            sentences.append(len(found))
        return EncodedText(
            np.concatenate([word.ids for word in found]),
            np.cumsum([0, *(len(word.ids) for word in found)]),
            np.asarray(sentences),
            np.asarray([word.term for word in found], np.int64),
            np.asarray([word.weight for word in found]),
        )

    def _word(self, text: str) -> _Word:
        found = self._words.get(text)
        if found is None:
            terms = self.teacher.term_ids([text])
            term = int(terms[0]) if len(terms) else -1
            rare = term >= 0 and text not in STOP_WORDS and text.isalpha()
            found = _Word(self.ids(text), term, float(self.teacher.idf[term]) if rare else 0.0)
            self._words[text] = found
            if rare:
                self.forms.setdefault(term, []).append(found.ids)
        return found
