"""Token scores -> the choices of OpenAI's completions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from radix_mlp.engine.async_engine import TokenScores
from radix_mlp.serve.api.openai_bodies import CompletionsRequest
from radix_mlp.serve.tokenizer import Tokens

__all__ = ["completed"]


async def completed(tokens: Tokens, scores: Sequence[TokenScores], body: CompletionsRequest) -> list[dict[str, Any]]:
    """One choice a prompt.

    With `max_tokens` 1, the last of each prompt's scores is of a token that stands for the next: what is likeliest
    there is what comes.
    """
    distinct = {token for score in scores for row in score.top_ids for token in row or []}
    distinct.update(itertools.chain.from_iterable(score.ids for score in scores))
    known = sorted(distinct)
    texts = dict(zip(known, await tokens.texts_of(known), strict=True))
    return [
        _choice(index, score, texts, body, whole=await _whole(tokens, score, body))
        for index, score in enumerate(scores)
    ]


async def _whole(tokens: Tokens, score: TokenScores, body: CompletionsRequest) -> str:
    """The answer's text, decoded together: a letter may be made of several tokens."""
    ids, _, _ = _answered_tokens(score, body)
    return (await tokens.decode([ids], skip_special_tokens=False))[0]


Places = list[dict[int, float] | None]


def _answered_tokens(score: TokenScores, body: CompletionsRequest) -> tuple[list[int], list[float | None], Places]:
    """Ids, log-probabilities, and the likeliest tokens with theirs, of what is answered."""
    ids, logprobs = list(score.ids), list(score.logprobs)
    tops: Places = [
        None if row is None else dict(zip(row, values or [], strict=True))
        for row, values in zip(score.top_ids, score.top_logprobs, strict=True)
    ]
    if body.max_tokens:
        likeliest = tops[-1] or {}
        ids[-1], logprobs[-1] = next(iter(likeliest.items()))
    first = 0 if body.echo else len(ids) - 1
    return ids[first:], logprobs[first:], tops[first:]


def _choice(
    index: int, score: TokenScores, texts: dict[int, str], body: CompletionsRequest, *, whole: str
) -> dict[str, Any]:
    ids, logprobs, tops = _answered_tokens(score, body)
    choice: dict[str, Any] = {"index": index, "text": whole, "logprobs": None, "finish_reason": "length"}
    if body.logprobs is None:
        return choice
    names = [texts[token] for token in ids]
    offsets = itertools.accumulate((len(name) for name in names), initial=0)
    places = zip(ids, logprobs, tops, strict=True)
    choice["logprobs"] = {
        "tokens": names,
        "token_logprobs": logprobs,
        "top_logprobs": [_likeliest(texts, *place, with_top=body.logprobs > 0) for place in places],
        "text_offset": list(offsets)[:-1],
    }
    return choice


def _likeliest(
    texts: dict[int, str], token: int, logprob: float | None, top: dict[int, float] | None, *, with_top: bool
) -> dict[str, float] | None:
    """The token itself and the likeliest one; parts of a letter look alike, so the second goes by its id then."""
    if logprob is None:
        return None
    found = {texts[token]: logprob}
    for other, value in (top or {}).items():
        if with_top and other != token:
            found[f"token_id:{other}" if texts[other] in found else texts[other]] = value
    return found
