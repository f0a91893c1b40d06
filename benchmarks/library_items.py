"""What library.py asks libraries for: texts, pairs of query and document, requests of lm-eval."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from texts import generated, trec

__all__ = ["abstracts", "labelled_questions", "lm_eval_requests", "reranking_pairs"]


def abstracts(data: Path | None) -> list[str]:
    if data is None:
        return generated(2000, 60)
    return trec(data / "vaswani" / "doc-text.trec", "DOC")


def reranking_pairs(data: Path | None, queries: int, documents: int) -> list[tuple[str, str]]:
    """Every query with the abstracts that share most of its rarer words."""
    texts = abstracts(data)
    words = [set(re.findall(r"\w+", text.lower())) for text in texts]
    frequency = Counter(word for found in words for word in found)
    asked = generated(queries, 10) if data is None else trec(data / "vaswani" / "query-text.trec", "top")[:queries]
    pairs = []
    for query in asked:
        weights = {word: math.log(len(texts) / (1 + frequency[word])) for word in re.findall(r"\w+", query.lower())}
        scores = np.asarray([sum(weights[word] for word in found & weights.keys()) for found in words])
        best = np.argsort(-scores, kind="stable")[:documents]
        pairs += [(query.lower(), texts[place]) for place in best]
    return pairs


def labelled_questions(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Questions with the number of their task: the first of every task, then the second of every task, and so on."""
    if options.data is None:
        questions = [generated(options.texts // 4 + 1, 20, seed=label) for label in range(4)]
    else:
        files = sorted((options.data / "bbh" / "tasks").glob("*.json"))
        questions = [[example["input"] for example in json.loads(path.read_text())["examples"]] for path in files]
    deepest = max(len(of_task) for of_task in questions)
    labelled = [
        (of_task[place], label)
        for place in range(deepest)
        for label, of_task in enumerate(questions)
        if place < len(of_task)
    ]
    return labelled[: options.texts]


def lm_eval_requests(options: argparse.Namespace) -> list[Any]:
    """One request for each possible answer of every question, behind the task's three-shot prompt."""
    from lm_eval.api.instance import Instance

    requests = []
    for prompt, examples, answers in tasks(options):
        for example in examples[: options.questions]:
            context = f"{prompt}\n\nQ: {example}\nA:"
            requests += [Instance("loglikelihood", {}, (context, f" {answer}"), len(requests)) for answer in answers]
    return requests


def tasks(options: argparse.Namespace) -> list[tuple[str, list[str], list[str]]]:
    """(prompt, questions, answers) of each task that has a few answers only."""
    if options.data is None:
        shots = generated(options.tasks, 300)
        return [(shot, generated(options.questions, 20, seed=7), ["yes", "no", "(A) maybe"]) for shot in shots]
    found = []
    for path in sorted((options.data / "bbh" / "tasks").glob("*.json")):
        examples = json.loads(path.read_text())["examples"]
        answers = sorted({example["target"] for example in examples})
        if len(answers) <= 8 and len(found) < options.tasks:
            prompt = (options.data / "bbh" / "cot-prompts" / f"{path.stem}.txt").read_text().split("-----\n", 1)[-1]
            found.append((prompt, [example["input"] for example in examples], answers))
    return found
