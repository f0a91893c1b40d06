"""What `load.py` sends, by route and workload, and the numbers in what comes back."""

from __future__ import annotations

import argparse
import base64
import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from texts import bbh_questions, gsm8k_questions, vaswani, vaswani_pairs

__all__ = ["LABELS", "ROUTES", "WORKLOADS", "body_of", "items_of", "numbers_of"]

WORKLOADS = ("synthetic", "vaswani", "gsm8k", "bbh")
LABELS = (32, 33, 34, 35)
"""The tokens A, B, C and D of most byte-level vocabularies; any others would cost the same."""
WORDS = "the of and to in is it that for was on are as with they be at one have this from or had by hot but some what"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Route(NamedTuple):
    """A way to ask."""

    path: str
    field: str
    """Of the body that has the texts."""


ROUTES = {
    "tei": Route("/embed", "inputs"),
    "openai": Route("/v1/embeddings", "input"),
    "openai-base64": Route("/v1/embeddings", "input"),
    "rerank": Route("/v1/rerank", "documents"),
    "tei-rerank": Route("/rerank", "texts"),
    "generative": Route("/generative_scoring", "items"),
}


def items_of(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """(query, items) without end; what is embedded is the items behind the query.

    Args:
        options: of `load.py`: workload, texts, seed, api, data, units and swap.
    """
    rng = random.Random(options.seed)
    if options.workload == "synthetic":
        yield from _synthetic(rng, options)
    index = 0
    rows = gsm8k_questions(options.data) if options.workload == "gsm8k" else []
    while True:
        if options.workload == "gsm8k":
            yield "Represent the question for retrieval: ", rng.sample(rows, options.texts)
        elif options.workload == "bbh":
            yield bbh_questions(options.data, index % 27, options.texts)
        elif "rerank" in options.api:
            yield vaswani_pairs(options.data, index % 93, options.texts)
        else:
            # a reranker's prompt stands before each document
            yield "", vaswani(options.data, index % 93, options.texts)
        index += 1


def _synthetic(rng: random.Random, options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    units = [*LETTERS] if options.units == "letters" else [" " + word for word in WORDS.split()]

    def text(num_units: int) -> str:
        return "".join(rng.choices(units, k=num_units))

    # 44 of 150 tokens are common to all, 17 to those of one query: 0.61 unique, as MS MARCO behind a reranker's prompt;
    # with the query last 0.71, the query being shared no more
    head = text(44)
    while True:
        documents: list[str] = []
        while len(documents) < options.texts:
            query = text(17)
            lengths = (
                rng.randint(15, 140) if rng.random() < 0.4 else rng.randint(70, 120)
                for _ in range(rng.choice((8, 8, 8, 8, 9)))
            )
            documents.extend(text(length) + query if options.swap else query + text(length) for length in lengths)
        yield head, documents[: options.texts]


def body_of(api: str, query: str, items: list[str]) -> dict[str, Any]:
    """The request of one route."""
    field = ROUTES[api].field
    if api == "tei":
        return {field: [query + item for item in items]}
    if api in ("openai", "openai-base64"):
        more = {"encoding_format": "base64"} if api == "openai-base64" else {}
        return {field: [query + item for item in items], "model": "any", **more}
    body: dict[str, Any] = {"query": query or "a query", field: items}
    if api == "tei-rerank":
        # log-odds: a probability near 0 or 1 hides what is wrong
        body["raw_scores"] = True
    if api == "generative":
        body["label_token_ids"] = LABELS
    return body


def numbers_of(api: str, content: bytes) -> np.ndarray:
    """The vectors, scores or log-probabilities of an answer, in the order of the texts."""
    found = json.loads(content)
    if api == "tei":
        return np.asarray(found)
    if api == "openai":
        return np.asarray([each["embedding"] for each in found["data"]])
    if api == "openai-base64":
        return np.stack([np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in found["data"]])
    if api == "generative":
        rows = sorted(found["data"], key=lambda each: each["index"])
        return np.log([[each["token_probs"][str(label)] for label in LABELS] for each in rows])
    ranks = found if api == "tei-rerank" else found["results"]
    name = "score" if api == "tei-rerank" else "relevance_score"
    return np.asarray([each[name] for each in sorted(ranks, key=lambda each: each["index"])])
