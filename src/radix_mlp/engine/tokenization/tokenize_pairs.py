"""Contexts with their continuations -> token ids, cut into the two as lm-evaluation-harness does it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from radix_mlp.engine.batching.scheduler import Ids
from radix_mlp.engine.tokenization.begin_token import begin_token, begins_with_token, tokens_before
from radix_mlp.engine.tokenization.token_ids import TextOrIds, as_ids
from radix_mlp.engine.tokenization.tokenize import check_pairs, encode, shown, too_long, unknown_id
from radix_mlp.errors import RejectedItemsError

__all__ = ["tokenize_pairs"]


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[TextOrIds, TextOrIds]],
    *,
    max_length: int | None = None,
    truncate: bool = False,
    add_bos: bool | None = None,
    vocabulary: int | None = None,
) -> tuple[list[Ids], list[int]]:
    """Ids of each `context + continuation`, and at which token the continuation starts; as lm-eval does it.

    Spaces at the end of the context move to the continuation.  The two are encoded as one string, and the
    continuation is what follows the first `len(encode(context))` tokens.  An empty context becomes the begin token
    (the end token where there is none).  Tokens that the tokenizer adds after a text are left out: they would stand
    between context and continuation.

    Args:
        max_length: longest allowed, in tokens; None has no limit.
        truncate: drop tokens from the left of a longer pair instead of refusing it. lm-eval keeps one token more, since
            it leaves the last one, which predicts nothing, out of its count.
        add_bos: None starts a text with what the tokenizer adds before it, True with the begin token even where the
            tokenizer adds none, False with nothing. A text that starts with the begin token already gets no second
            one. Token ids get one only with True.

    Raises:
        RejectedItemsError: continuations without a single token, or pairs longer than `max_length` or with a token that
            is not in the vocabulary.
        InvalidInputError: an empty context, and a tokenizer without a begin or end token.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_tokenizer
        >>> ids, starts = tokenize_pairs(tiny_tokenizer(), [("Hi ", "you")])
        >>> bytes(ids[0].tolist()), starts
        (b'Hi you', [2])
    """
    check_pairs(pairs, "pairs", ("context", "continuation"), ids=True)
    before = tokens_before(tokenizer, add_bos) if len(pairs) else None
    sequences: list[Ids] = []
    starts: list[int] = []
    rejected: list[tuple[int, str]] = []
    for index, (head, tail) in enumerate(_heads_and_tails(tokenizer, pairs, vocabulary)):
        if not len(tail):
            rejected.append((index, f"the continuation {shown(pairs[index][1])} has no tokens of its own"))
        head, tail = _begun(tokenizer, pairs[index], head, tail, before, add_bos)
        sequence = np.concatenate([head, tail])
        start = len(head)
        if max_length is not None and len(sequence) > max_length:
            if not truncate or len(tail) >= max_length:
                rejected.append((index, too_long(_whole(pairs[index]), len(sequence), max_length)))
            sequence, start = sequence[-max_length:], start - (len(sequence) - max_length)
        if (reason := unknown_id(_whole(pairs[index]), sequence, vocabulary)) is not None:
            rejected.append((index, reason))
        sequences.append(sequence)
        starts.append(start)
    if rejected:
        raise RejectedItemsError("pairs", rejected)
    return sequences, starts


def _begun(
    tokenizer: PreTrainedTokenizerBase, pair: tuple[Any, Any], head: Ids, tail: Ids, before: Any, add_bos: bool | None
) -> tuple[Ids, Ids]:
    """Context and continuation with something to start from."""
    is_text = isinstance(pair[0], str)
    if not len(pair[0]) or not len(head):
        begin = begin_token(tokenizer)
        if is_text and pair[0] and len(before):
            # nothing but spaces, which are the continuation's
            return before, tail
        # a continuation that brings the begin token along is conditioned on its own
        return (tail[:1], tail[1:]) if len(tail) > 1 and tail[0] == begin[0] else (begin, tail)
    if is_text:
        has_begin = not len(before) or begins_with_token(tokenizer, _whole(pair))
    else:
        has_begin = not add_bos or np.array_equal(head[: len(before)], before)
    return (head, tail) if has_begin else (np.concatenate([before, head]), tail)


def _heads_and_tails(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Any, Any]],
    vocabulary: int | None,
) -> Iterator[tuple[Ids, Ids]]:
    texts = {index: pair for index, pair in enumerate(pairs) if isinstance(pair[0], str)}
    contexts = [context.rstrip() for context, _ in texts.values()]
    # a context is shared by several continuations: encode each once
    distinct = list(dict.fromkeys(contexts))
    context_rows = dict(zip(distinct, encode(tokenizer, distinct, add_special_tokens=False), strict=True))
    wholes = [_whole(pair) for pair in texts.values()]
    whole_rows = encode(tokenizer, wholes, add_special_tokens=False)
    encoded = iter(zip(contexts, whole_rows, strict=True))
    for index, pair in enumerate(pairs):
        if index in texts:
            context, row = next(encoded)
            length = len(context_rows[context])
            yield context_rows[context], row[length:]
        else:
            names = f"pairs[{index}][0]", f"pairs[{index}][1]"
            yield as_ids(pair[0], names[0], vocabulary), as_ids(pair[1], names[1], vocabulary)


def _whole(pair: tuple[Any, Any]) -> Any:
    return pair[0] + pair[1] if isinstance(pair[0], str) else pair
