"""Each task of the page: the answer of the service, and the call that gives the same token ids once more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from radix_mlp.engine.async_engine import Answer
from radix_mlp.engine.task import Request
from radix_mlp.engine.tasks.classify import ClassifyOptions, classify_request
from radix_mlp.engine.tasks.decide import DecideOptions, decide_request
from radix_mlp.engine.tasks.embed import EmbedOptions, embed_request
from radix_mlp.engine.tasks.rerank import RerankOptions, document_pairs, ranked, rerank_request
from radix_mlp.engine.tasks.score import ScoreOptions, score_request
from radix_mlp.serve.http.errors import WrongBodyError, WrongModelError
from radix_mlp.serve.http.limits import check_not_empty, cut_characters
from radix_mlp.serve.playground.body import PlaygroundTask, RunRequest
from radix_mlp.serve.service import Service
from radix_mlp.serve.settings import POOLING_NAMES

__all__ = ["TASKS", "Outcome", "question_of", "run_task"]


class Outcome(NamedTuple):
    """What the model found, and how its batch came about."""

    answer: Answer[Any]
    found: dict[str, Any]
    """The part of the page's answer that depends on the task."""
    call: Callable[[Any], Request[Any]]
    """A tokenizer -> the sequences that ran, one a document."""


async def run_task(service: Service, body: RunRequest) -> Outcome:
    """Run a batch.

    Raises:
        WrongModelError: the model does not do this.
        WrongBodyError: a field that the task has no use for.
        InvalidInputError, OverloadedError, ...: as the routes of the task.
    """
    if body.task not in service.info.tasks:
        does = ", ".join(service.info.tasks)
        raise WrongModelError(f"`task`: {service.info.name} does not {body.task}; it does {does}.")
    run, fields = TASKS[body.task]
    for name in ("query", "instruction"):
        if getattr(body, name) and name not in fields:
            raise WrongBodyError(f"`{name}`: {body.task} has no use for it; leave it out.")
    return await run(service, body)


async def _rerank(service: Service, body: RunRequest) -> Outcome:
    options = RerankOptions(instruction=body.instruction or None)
    answer = await service.rerank(body.query, body.documents, options, name="documents")
    places = ranked(body.documents, answer.value)
    found = {"ranking": [{"index": place.index, "score": np.float32(place.score)} for place in places]}

    template: Any = service.info.template or "auto"

    def call(tokenizer: Any) -> Request[Any]:
        return rerank_request(
            service.engine.loaded,
            tokenizer,
            document_pairs(body.query, _cut(service, body.documents)),
            replace(options, template=template, truncate=service.settings.auto_truncate),
        )

    return Outcome(answer, found, call)


async def _embed(service: Service, body: RunRequest) -> Outcome:
    check_not_empty(body.documents, "documents")
    texts = [(body.instruction or "") + document for document in body.documents]
    answer = await service.embed(texts, name="documents")
    found = {"similarity": np.round(answer.value @ answer.value.T, 4)}

    def call(tokenizer: Any) -> Request[Any]:
        settings = service.settings
        pooling: Any = POOLING_NAMES.get(settings.pooling or "")
        options = EmbedOptions(
            prompt=settings.default_prompt,
            prompt_name=settings.default_prompt_name,
            pooling=pooling,
            truncate=settings.auto_truncate,
        )
        return embed_request(service.engine.loaded, tokenizer, _cut(service, texts), options)

    return Outcome(answer, found, call)


async def _classify(service: Service, body: RunRequest) -> Outcome:
    answer = await service.classify(body.documents, name="documents")
    labels = service.info.labels
    rows = [dict(row) for row in answer.value]
    found = {
        "labels": labels,
        "classes": [
            {"index": index, "scores": [np.float32(row[label]) for label in labels]} for index, row in enumerate(rows)
        ],
    }

    def call(tokenizer: Any) -> Request[Any]:
        options = ClassifyOptions(truncate=service.settings.auto_truncate)
        return classify_request(service.engine.loaded, tokenizer, _cut(service, body.documents), options)

    return Outcome(answer, found, call)


async def _score(service: Service, body: RunRequest) -> Outcome:
    check_not_empty(body.documents, "documents")
    for name, texts in (("query", [body.query]), ("documents", body.documents)):
        for text in texts:
            cut_characters(text, service.info.max_input_length, truncate=False, name=name)
    pairs = [(body.query, document) for document in body.documents]
    answer = await service.score(pairs, num_items=len(pairs))
    logprobs = np.array([score.logprob for score in answer.value])
    # the share of each among those given, against the largest so that none is too small for a number
    shares = np.exp(logprobs - logprobs.max())
    shares /= shares.sum()
    found = {
        "continuations": [
            {
                "index": int(index),
                "logprob": np.float32(logprobs[index]),
                "share": np.float32(shares[index]),
                "is_greedy": answer.value[index].is_greedy,
                "num_tokens": len(answer.value[index].token_logprobs),
            }
            for index in np.argsort(-logprobs, kind="stable")
        ]
    }

    def call(tokenizer: Any) -> Request[Any]:
        return score_request(service.engine.loaded, tokenizer, pairs, ScoreOptions())

    return Outcome(answer, found, call)


async def _decide(service: Service, body: RunRequest) -> Outcome:
    check_not_empty(body.documents, "documents")
    questions = {str(place): question_of(line) for place, line in enumerate(body.documents)}
    answer = await service.decide(body.query, questions)
    decisions = [_decision(place, question, answer.value[0][place]) for place, question in questions.items()]

    def call(tokenizer: Any) -> Request[Any]:
        loaded = service.engine.loaded
        request = decide_request(loaded, tokenizer, [(body.query, questions)], DecideOptions())
        # a model may read several questions from one prompt
        for row, item in enumerate(request.items):
            for asked in item.questions:  # type: ignore[attr-defined]
                decisions[int(asked.name)]["row"] = row
        return request

    return Outcome(answer, {"decisions": decisions}, call)


def question_of(line: str) -> dict[str, Any]:
    """A question as System One has it.

    Raises:
        WrongBodyError: a choice or a scale of a single option.

    Examples:
        >>> question_of("Is it urgent?")
        {'type': 'noul', 'instructions': 'Is it urgent?'}
        >>> question_of("About what? | billing | delivery")["criteria"]
        {'billing': None, 'delivery': None}
        >>> question_of("How urgent? | can wait < this week < today")["criteria"]
        ['can wait', 'this week', 'today']
    """
    text, *options = (part.strip() for part in line.split("|"))
    if not options:
        return {"type": "noul", "instructions": text}
    levels = [level.strip() for level in options[0].split("<")]
    if len(options) == 1 and len(levels) > 1:
        return {"type": "score", "instructions": text, "criteria": levels}
    if len(set(options)) < max(2, len(options)) or not all(options):
        raise WrongBodyError(f"`documents`: {line!r:.80} needs two different options at least, as in: text | yes | no")
    return {"type": "choice", "instructions": text, "criteria": dict.fromkeys(options)}


def _decision(place: str, question: dict[str, Any], found: Any) -> dict[str, Any]:
    """The probability of every option of a question."""
    if question["type"] == "noul":
        options = {"yes": found["noul"], "no": 1 - found["noul"]}
    else:
        options = dict(zip(question["criteria"], found["probabilities"].values(), strict=True))
    rows = [{"name": name, "probability": np.float32(value)} for name, value in options.items()]
    return {"index": int(place), "type": question["type"], "options": rows, "expected": found.get("score")}


def _cut(service: Service, texts: list[str]) -> list[str]:
    """As the service does before texts are tokenised; what must not be cut it has refused by then."""
    limit = service.info.max_input_length
    return [cut_characters(text, limit, truncate=True, name="documents") for text in texts]


Run = Callable[[Service, RunRequest], Any]

TASKS: dict[PlaygroundTask, tuple[Run, frozenset[str]]] = {
    "rerank": (_rerank, frozenset(("query", "instruction"))),
    "embed": (_embed, frozenset(("instruction",))),
    "classify": (_classify, frozenset()),
    "score": (_score, frozenset(("query",))),
    "decide": (_decide, frozenset(("query",))),
}
"""How a task runs, and the fields that it reads besides the documents."""
