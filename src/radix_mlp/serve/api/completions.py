"""Token scores -> the choices of OpenAI's completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from radix_mlp.engine.async_engine import TokenScores
from radix_mlp.engine.tokenization.token_ids import TextOrIds
from radix_mlp.serve.api.openai_bodies import CompletionsRequest
from radix_mlp.serve.token_texts import PlacedTokens
from radix_mlp.serve.tokenizer import Tokens

__all__ = ["completed"]


async def completed(
    tokens: Tokens, prompts: Sequence[TextOrIds], scores: Sequence[TokenScores], body: CompletionsRequest
) -> list[dict[str, Any]]:
    """One choice a prompt.

    With `max_tokens` 1, the last of each prompt's scores is of a token that stands for the next: what is likeliest
    there is what comes.
    """
    known = sorted({token for score in scores for row in score.top_ids for token in row or []})
    names = dict(zip(known, await tokens.names(known), strict=True)) if body.logprobs else {}
    choices = []
    for index, (prompt, score) in enumerate(zip(prompts, scores, strict=True)):
        num_prompt = len(score.ids) - (body.max_tokens or 0)
        answer = _answered_tokens(score, body)
        where = await tokens.placed(
            prompt,
            score.ids[:num_prompt],
            answer[0][-1:] if body.max_tokens else [],
            add_special_tokens=body.add_special_tokens,
            echo=body.echo,
        )
        choices.append(_choice(index, answer, where, names, body))
    return choices


Places = list[dict[int, float] | None]
Answered = tuple[list[int], list[float | None], Places]


def _answered_tokens(score: TokenScores, body: CompletionsRequest) -> Answered:
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
    index: int, answer: Answered, where: PlacedTokens, names: dict[int, str], body: CompletionsRequest
) -> dict[str, Any]:
    ids, logprobs, tops = answer
    choice: dict[str, Any] = {"index": index, "text": where.text, "logprobs": None, "finish_reason": "length"}
    if body.logprobs is None:
        return choice
    places = zip(ids, where.names, logprobs, tops, strict=True)
    choice["logprobs"] = {
        "tokens": where.names,
        "token_logprobs": logprobs,
        "top_logprobs": [_likeliest(names, *place) for place in places],
        "text_offset": where.offsets,
    }
    return choice


def _likeliest(
    names: dict[int, str], token: int, name: str, logprob: float | None, top: dict[int, float] | None
) -> dict[str, float] | None:
    """The token itself and, if asked for, the likeliest one, by its id where the two look alike."""
    if logprob is None:
        return None
    found = {name: logprob}
    for other, value in (top or {}).items():
        if names and other != token:
            found[f"token_id:{other}" if names[other] in found else names[other]] = value
    return found
