"""Text written for this project: leaflets of a radio museum to search in, and questions with examples to score."""

from __future__ import annotations

import json
from importlib.resources import files

__all__ = ["few_shot_pairs", "passages", "queries", "rerank_texts"]

NUM_EXAMPLES = 6


def queries() -> list[str]:
    """Four questions of visitors."""
    return _read("queries.txt").splitlines()


def passages() -> list[str]:
    """Forty passages: ten near every question, of which two or three answer it."""
    return _read("passages.txt").splitlines()


def rerank_texts() -> list[str]:
    """Every query with every passage, under one instruction, as a reranker reads them."""
    instruction = _read("instruction.txt").strip()
    return [f"{instruction}\nQuestion: {query}\nPassage: {passage}" for query in queries() for passage in passages()]


def few_shot_pairs() -> list[tuple[str, str]]:
    """(examples and a question, an option) for every option of every question."""
    questions = [json.loads(line) for line in _read("questions.jsonl").splitlines()]
    asked = [f"Question {number}: {question['question']}\nAnswer:" for number, question in enumerate(questions, 1)]
    solved = [f"{text} {question['answer']}\n\n" for text, question in zip(asked, questions, strict=True)]
    examples = "".join(solved[:NUM_EXAMPLES])
    return [
        (examples + text, f" {option}")
        for text, question in zip(asked[NUM_EXAMPLES:], questions[NUM_EXAMPLES:], strict=True)
        for option in question["options"]
    ]


def _read(name: str) -> str:
    return (files(__name__) / name).read_text(encoding="utf-8")
