"""Texts that come in groups, as token ids: real ones from the folder that `--data` names, made-up ones instead."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from radix_mlp.models.load_tokenizer import load_tokenizer
from texts import INSTRUCTION, RERANK_PREFIX, RERANK_SUFFIX, bbh, gsm8k_questions, trec
from workloads import WORKLOADS, Sequences

__all__ = ["GroupedTexts", "workload_of"]


@dataclass(frozen=True)
class GroupedTexts:
    """Texts and the group, such as the query, of each."""

    name: str
    about: str
    sequences: Sequences
    groups: NDArray[np.int64]
    """`[n]`."""


def workload_of(name: str, data: Path | None, scale: float = 1.0, seed: int = 0) -> GroupedTexts:
    """`instruct`, `few-shot`, `rerank` or `ms-marco`; the last is always made up."""
    if name == "ms-marco":
        return ms_marco(scale, seed)
    if data is None:
        return made_up(name, scale, seed)
    about, texts, groups = {"instruct": gsm8k, "few-shot": all_bbh, "rerank": all_vaswani}[name](data, scale)
    tokenizer = load_tokenizer(data / "qwen.tiktoken")
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return GroupedTexts(name, about, [np.asarray(each, np.int32) for each in ids], np.asarray(groups, np.int64))


def gsm8k(data: Path, scale: float) -> tuple[str, list[str], list[int]]:
    questions = gsm8k_questions(data)
    questions = questions[: max(2, round(len(questions) * scale))]
    head = "Instruct: Given a maths problem, retrieve problems that are solved in the same way\nQuery: "
    return "GSM8K behind an embedding instruction", [head + each for each in questions], list(range(len(questions)))


def all_bbh(data: Path, scale: float) -> tuple[str, list[str], list[int]]:
    tasks = len(list((data / "bbh" / "tasks").glob("*.json")))
    texts = [bbh(data, task, 250) for task in range(max(2, round(tasks * scale)))]
    groups = [task for task, own in enumerate(texts) for _ in own]
    return "BIG-Bench-Hard, three-shot", [text for own in texts for text in own], groups


def all_vaswani(data: Path, scale: float) -> tuple[str, list[str], list[int]]:
    queries = trec(data / "vaswani" / "query-text.trec", "top")
    documents = trec(data / "vaswani" / "doc-text.trec", "DOC")
    texts, groups = [], []
    for place, query in enumerate(queries[: max(2, round(len(queries) * scale))]):
        head = f"{RERANK_PREFIX}<Instruct>: {INSTRUCTION}\n<Query>: {query}\n<Document>: "
        for number in range(100):
            texts.append(head + documents[(place * 7919 + number) % len(documents)] + RERANK_SUFFIX)
            groups.append(place)
    return "Vaswani, 100 documents a query, a reranker's template", texts, groups


def ms_marco(scale: float, seed: int) -> GroupedTexts:
    # 64 queries are the workload's own size; 4,096 are more than any shard holds
    sequences = WORKLOADS["ms-marco"].sequences(seed, 64 * scale)
    queries = [ids[44:61].tobytes() for ids in sequences]
    groups = np.unique(queries, return_inverse=True)[1]
    return GroupedTexts("ms-marco", "made up: 8.2 passages a query", sequences, groups.astype(np.int64))


def made_up(name: str, scale: float, seed: int) -> GroupedTexts:
    rng = np.random.default_rng([seed, *name.encode()])

    def ids(count: int) -> NDArray[np.int32]:
        return rng.integers(0, 30_000, count, dtype=np.int32)

    head, prefix, own, size, num_groups = {
        "instruct": (18, 0, 60, 1, 1300),
        "few-shot": (0, 1100, 60, 250, 27),
        "rerank": (60, 15, 75, 100, 93),
    }[name]
    shared, sequences, groups = ids(head), [], []
    for group in range(max(2, round(num_groups * scale))):
        start = np.concatenate([shared, ids(prefix)])
        sequences += [np.concatenate([start, ids(int(rng.integers(own // 2, own * 3 // 2)))]) for _ in range(size)]
        groups += [group] * size
    return GroupedTexts(name, "made up", sequences, np.asarray(groups, np.int64))
