"""Batches with poisoned texts at random places, and what the unmodified model says of every text alone."""

import random
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from radix_mlp import Engine
from radix_mlp.engine.tasks.classify import ClassifyOptions, classify_request
from radix_mlp.engine.tasks.embed import EmbedOptions, EmbedTokensOptions, embed_request, embed_tokens_request
from radix_mlp.engine.tasks.rerank import RerankOptions, rerank_request
from radix_mlp.engine.tasks.score import ScoreOptions, TokenScoresOptions, score_request, token_scores_request
from radix_mlp.models.tiny import tiny_classifier, tiny_model, tiny_reranker, tiny_reranker_tokenizer, tiny_tokenizer

POISON = "~"
"""Its embedding is infinite, as where a model overflows."""
STEMS = ("a radix is a root", "a radix is a fruit", "why", "")


def poisoned(model):
    """The model with an embedding that makes every text with `POISON` in it NaN."""
    head = model.get_output_embeddings()
    if head is not None:
        # not tied: a head with such a row makes every text NaN
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.get_input_embeddings().weight[ord(POISON)] = float("inf")
    return model


def random_texts(seed, count=12):
    """Texts with shared beginnings, and the places of one to three that hold the poison anywhere but at the end."""
    draw = random.Random(seed)
    texts = [
        f"{draw.choice(STEMS)} {draw.choice('abc')}{draw.choice('xyz') * draw.randint(0, 9)}" for _ in range(count)
    ]
    places = sorted(draw.sample(range(count), draw.randint(1, 3)))
    for place in places:
        at = draw.randint(0, len(texts[place]) - 1)
        texts[place] = texts[place][:at] + POISON + texts[place][at:]
    return texts, places


@dataclass(frozen=True)
class TaskCase:
    """A task of the engine: how its call is made of texts, and the answer of the unmodified model to one item."""

    model: object
    tokenizer: object
    call: object
    alone: object
    values: object
    """An answer of the engine as an array."""
    method: str
    """Of `Engine` and `AsyncEngine`."""
    arguments: object = staticmethod(lambda texts: texts)
    """Texts as the method takes them."""
    options: tuple = ()

    def engine(self, **options):
        return Engine(poisoned(self.model()), tokenizer=self.tokenizer(), **options)

    def make(self, engine, texts):
        return self.call(engine.loaded, engine.tokenizer, self.arguments(texts))


def _hidden(model, item):
    with torch.no_grad():
        return model.model(torch.tensor(item.ids.tolist())[None], use_cache=False).last_hidden_state[0]


def _logits(model, item):
    with torch.no_grad():
        return model(torch.tensor(item.ids.tolist())[None], use_cache=False).logits[0]


def _vector(model, item):
    return torch.nn.functional.normalize(_hidden(model, item)[-1], dim=0)


def _token_logprobs(model, item):
    ids = torch.tensor(item.ids.tolist())
    logprobs = _logits(model, item)[:-1].log_softmax(-1)
    return logprobs[torch.arange(len(ids) - 1), ids[1:]][item.start - 1 :]


def _relevance(model, item):
    yes, no = (item.task.tokens[place] for place in (0, 1))
    return _logits(model, item)[-1, [yes, no]].softmax(-1)[0]


def _by_name(answer):
    return [score for _, score in sorted(answer)]


def _labels(model, item):
    scores = _logits(model, item).softmax(-1).tolist()
    return torch.tensor(_by_name(zip(("negative", "neutral", "positive"), scores, strict=True)))


def _pairs(texts):
    return [("What", text) for text in texts]


CASES = {
    "embed": TaskCase(
        tiny_model, tiny_tokenizer, partial(embed_request, options=EmbedOptions()), _vector, np.asarray, "embed"
    ),
    "embed_tokens": TaskCase(
        tiny_model,
        tiny_tokenizer,
        partial(embed_tokens_request, options=EmbedTokensOptions()),
        _hidden,
        np.asarray,
        "embed_tokens",
    ),
    "score": TaskCase(
        tiny_model,
        tiny_tokenizer,
        partial(score_request, options=ScoreOptions(add_bos=False)),
        _token_logprobs,
        lambda answer: np.asarray(answer.token_logprobs),
        "score",
        _pairs,
    ),
    "token_scores": TaskCase(
        tiny_model,
        tiny_tokenizer,
        partial(token_scores_request, options=TokenScoresOptions(top=2)),
        _token_logprobs,
        lambda answer: np.asarray(answer.logprobs[1:]),
        "token_scores",
    ),
    "rerank": TaskCase(
        tiny_reranker,
        tiny_reranker_tokenizer,
        partial(rerank_request, options=RerankOptions()),
        _relevance,
        np.asarray,
        "rerank_pairs",
        _pairs,
    ),
    "classify": TaskCase(
        tiny_classifier,
        tiny_tokenizer,
        partial(classify_request, options=ClassifyOptions()),
        _labels,
        lambda answer: np.asarray(_by_name(answer)),
        "classify",
    ),
}
