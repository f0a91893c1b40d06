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

__all__ = ["abstracts", "lm_eval_requests", "question_pairs", "reranking_pairs"]


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


def question_pairs(options: argparse.Namespace) -> list[tuple[str, str, int]]:
    """Two questions and 1 if they are of one task, in turn with 0; `options.texts` texts in all."""
    if options.data is None:
        by_task = [generated(50, 20, seed=label) for label in range(4)]
    else:
        files = sorted((options.data / "bbh" / "tasks").glob("*.json"))
        by_task = [[example["input"] for example in json.loads(path.read_text())["examples"]] for path in files]
    rng = np.random.default_rng(0)
    pairs = []
    for place in range(options.texts // 2):
        first, other = rng.choice(len(by_task), 2, replace=False)
        second = first if place % 2 == 0 else other
        pairs.append((str(rng.choice(by_task[first])), str(rng.choice(by_task[second])), 1 - place % 2))
    return pairs


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
