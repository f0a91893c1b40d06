"""Options of the tasks: one list per task, the same for `Engine`, `AsyncEngine` and the command line."""

from __future__ import annotations

import asyncio
import inspect
from dataclasses import fields
from typing import get_type_hints

import pytest

from radix_mlp import AsyncEngine, Engine
from radix_mlp.engine.tasks import classify, embed, rerank, score
from radix_mlp.errors import InvalidInputError

TASKS = {
    "embed": (embed.EmbedOptions, embed.EmbedKeywords),
    "embed_tokens": (embed.EmbedTokensOptions, embed.EmbedTokensKeywords),
    "rerank": (rerank.RerankOptions, rerank.RerankKeywords),
    "rerank_pairs": (rerank.RerankOptions, rerank.RerankKeywords),
    "classify": (classify.ClassifyOptions, classify.ClassifyKeywords),
    "score": (score.ScoreOptions, score.ScoreKeywords),
    "token_scores": (score.TokenScoresOptions, score.TokenScoresKeywords),
}
NOT_OPTIONS = {"progress", "top_n"}


@pytest.mark.parametrize("task", TASKS)
def test_the_keywords_of_a_method_are_the_options_of_its_task(task):
    options, keywords = TASKS[task]
    types = get_type_hints(options)
    assert types == get_type_hints(keywords)
    parameters = inspect.signature(getattr(Engine, task)).parameters.values()
    named = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in NOT_OPTIONS}
    assert named == {field.name: field.default for field in fields(options)}
    hints = get_type_hints(getattr(Engine, task))
    assert {name: hints[name] for name in named} == types


@pytest.mark.parametrize("task", TASKS)
def test_a_wrong_keyword_is_a_type_error(task):
    arguments = ("query", ["text"]) if task == "rerank" else (["text"],)

    async def main():
        async with AsyncEngine(Engine("tiny")) as front:
            with pytest.raises(TypeError, match="unexpected keyword argument 'normalise'"):
                await getattr(front, task)(*arguments, normalise=True)
            return front.stats.num_calls

    assert asyncio.run(main()) == 0
    with pytest.raises(TypeError, match="unexpected keyword argument 'normalise'"):
        getattr(Engine("tiny"), task)(*arguments, normalise=True)


@pytest.mark.parametrize("options", [rerank.RerankOptions, classify.ClassifyOptions])
def test_a_template_that_does_not_exist_is_refused_by_the_options(options):
    with pytest.raises(InvalidInputError, match="template='jinja': must be"):
        options(template="jinja")
