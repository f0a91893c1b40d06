"""Real text for benchmarks, from the folder that `--data` names (`docs/benchmarks.md`), and made-up text instead."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

__all__ = [
    "INSTRUCTION",
    "RERANK_PREFIX",
    "RERANK_SUFFIX",
    "bbh",
    "bbh_questions",
    "generated",
    "gsm8k_questions",
    "trec",
    "vaswani",
    "vaswani_pairs",
]

RERANK_PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
RERANK_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def bbh(data: Path, index: int, count: int) -> list[str]:
    """Questions of one task behind its three-shot prompt."""
    prompt, questions = bbh_questions(data, index, count)
    return [prompt + question for question in questions]


def bbh_questions(data: Path, index: int, count: int) -> tuple[str, list[str]]:
    """The three-shot prompt of one task, and questions that follow it."""
    task = sorted((data / "bbh" / "tasks").glob("*.json"))[index]
    prompt = (data / "bbh" / "cot-prompts" / f"{task.stem}.txt").read_text().split("-----\n", 1)[-1]
    examples = json.loads(task.read_text())["examples"][:count]
    return f"{prompt}\n\n", [f"Q: {example['input']}\nA: Let's think step by step." for example in examples]


def gsm8k_questions(data: Path) -> list[str]:
    """All of them, without their answers."""
    lines = (data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["question"] for line in lines]


def vaswani(data: Path, index: int, count: int) -> list[str]:
    """One query with passages, in the reranker's template."""
    query, passages = vaswani_pairs(data, index, count)
    head = f"{RERANK_PREFIX}<Instruct>: {INSTRUCTION}\n<Query>: {query}\n<Document>: "
    return [head + passage + RERANK_SUFFIX for passage in passages]


def vaswani_pairs(data: Path, index: int, count: int) -> tuple[str, list[str]]:
    """One query, and passages."""
    query = trec(data / "vaswani" / "query-text.trec", "top")[index].lower()
    return query, trec(data / "vaswani" / "doc-text.trec", "DOC")[index * count : (index + 1) * count]


def trec(path: Path, tag: str) -> list[str]:
    """The texts of a TREC file, without their numbers."""
    records = re.findall(rf"<{tag}>(.*?)</{tag}>", path.read_text(errors="replace"), re.DOTALL)
    return [" ".join(re.sub(r"<(\w+)>\s*\d+\s*</\1>|</?\w+>", " ", record).split()) for record in records]


def generated(count: int, num_words: int, seed: int = 0) -> list[str]:
    """Texts of made-up words."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(2, 9))) for _ in range(500)]
    return [" ".join(rng.choice(words, num_words)) for _ in range(count)]
