"""Text written for this project: a library's leaflets to search in, and questions with examples to score."""

from __future__ import annotations

import json
from importlib.resources import files

__all__ = ["few_shot_pairs", "rerank_texts"]

NUM_EXAMPLES = 6


def rerank_texts() -> list[str]:
    """Every query with every passage, under one instruction, as a reranker reads them."""
    instruction, queries, passages = (_read(f"{name}.txt") for name in ("instruction", "queries", "passages"))
    return [
        f"{instruction.strip()}\nQuestion: {query}\nPassage: {passage}"
        for query in queries.splitlines()
        for passage in passages.splitlines()
    ]


def few_shot_pairs() -> list[tuple[str, str]]:
    """(examples and a question, an option) for every option of every question."""
    questions = [json.loads(line) for line in _read("questions.jsonl").splitlines()]
    examples = "".join(f"Question: {q['question']}\nAnswer: {q['answer']}\n\n" for q in questions[:NUM_EXAMPLES])
    return [
        (f"{examples}Question: {question['question']}\nAnswer:", f" {option}")
        for question in questions[NUM_EXAMPLES:]
        for option in question["options"]
    ]


def _read(name: str) -> str:
    return (files(__name__) / name).read_text(encoding="utf-8")
