"""Text -> token ids, with the length limit enforced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from radix_mlp.engine.scheduler import Ids
from radix_mlp.errors import InvalidDtypeError, InvalidInputError

__all__ = [
    "RejectedItemsError",
    "check_pairs",
    "encode",
    "prompt_length",
    "shown",
    "tokenize_inputs",
    "tokenize_pairs",
    "tokenize_texts",
    "too_long",
]

TEXTS_A_CALL = 1000

OnProgress = Callable[[int], None]
"""Called with the number of items finished since the last call."""


class RejectedItemsError(InvalidInputError):
    """Some items cannot be run: `rejected` holds (place in the caller's list, reason), in order."""

    def __init__(self, kind: str, rejected: list[tuple[int, str]]) -> None:
        self.rejected = rejected
        index, reason = rejected[0]
        more = f" ({len(rejected) - 1} more like it)" if len(rejected) > 1 else ""
        super().__init__(f"{kind}[{index}]: {reason}{more}")


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    prompt: str | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    lower_case: bool = False,
    on_progress: OnProgress | None = None,
) -> list[Ids]:
    """Ids of `prompt + text`, encoded as one string, with the special tokens that the tokenizer itself adds.

    Args:
        max_length: longest allowed, in tokens; None has no limit.
        truncate: cut longer texts to `max_length` as the tokenizer does (its own special tokens stay) instead
            of refusing them.
        lower_case: write everything in lower case first.

    Raises:
        RejectedItemsError: texts without a single token, or longer than `max_length`.
        InvalidDtypeError: something other than a list of strings.
    """
    _check_strings(texts, "texts")
    whole = [prompt + text for text in texts] if prompt else list(texts)
    if lower_case:
        whole = [text.lower() for text in whole]
    rows = encode(tokenizer, whole, on_progress=on_progress)
    if truncate and max_length is not None:
        _truncate(tokenizer, rows, max_length, whole)
    _check_lengths(rows, texts, max_length, "texts")
    return rows


def tokenize_inputs(
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[str | tuple[str, str]],
    *,
    max_length: int | None = None,
    truncate: bool = False,
) -> list[Ids]:
    """Ids of texts and of pairs of texts, which the tokenizer joins in its own way.

    Args:
        max_length: longest allowed, in tokens; None has no limit.
        truncate: cut longer inputs as the tokenizer does (the longer text of a pair first) instead of refusing them.

    Raises:
        RejectedItemsError: inputs without a single token, or longer than `max_length`.
        InvalidDtypeError: something other than a list of strings and pairs of strings.
    """
    if isinstance(inputs, str):
        raise InvalidDtypeError(f"inputs must be a list, not one string: write [{shown(inputs)}].")
    parts: list[Sequence[str]] = [(value,) if isinstance(value, str) else value for value in inputs]
    for index, part in enumerate(parts):
        if not isinstance(part, tuple | list) or (len(part) != 2 and not isinstance(inputs[index], str)):
            raise InvalidDtypeError(f"inputs[{index}] must be a string or a pair of strings, not {shown(part)}.")
    _check_strings([part[0] for part in parts], "inputs")
    _check_strings([part[-1] for part in parts], "inputs")
    rows: list[Ids] = [np.empty(0, np.int32)] * len(inputs)
    for count in (1, 2):
        places = [index for index, part in enumerate(parts) if len(part) == count]
        columns = [[parts[index][place] for index in places] for place in range(count)]
        found = encode(tokenizer, *columns)
        if truncate and max_length is not None:
            _truncate(tokenizer, found, max_length, *columns)
        for index, row in zip(places, found, strict=True):
            rows[index] = row
    _check_lengths(rows, inputs, max_length, "inputs")
    return rows


def prompt_length(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """How many tokens a prompt takes before a text, a special token at its end not counted."""
    ids = encode(tokenizer, [prompt])[0]
    return len(ids) - int(len(ids) > 0 and int(ids[-1]) in tokenizer.all_special_ids)


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    max_length: int | None = None,
    truncate: bool = False,
    add_bos: bool = False,
    on_progress: OnProgress | None = None,
) -> tuple[list[Ids], list[int]]:
    """Ids of each `context + continuation`, and at which token the continuation starts; as lm-eval does it.

    Spaces at the end of the context move to the continuation.  The two are encoded as one string, and the
    continuation is what follows the first `len(encode(context))` tokens.  No special tokens are added unless
    `add_bos` asks for a begin token, except that an empty context becomes the begin token (the end token
    where there is none).

    Args:
        max_length: longest allowed, in tokens; None has no limit.
        truncate: drop tokens from the left of a longer pair, as lm-eval does, instead of refusing it.
        add_bos: start every context with the begin token, which Gemma and Llama models expect.

    Raises:
        RejectedItemsError: continuations without a single token, or pairs longer than `max_length`.
        InvalidInputError: an empty context, and a tokenizer without a begin or end token.
    """
    check_pairs(pairs, "pairs", ("context", "continuation"))
    contexts = [context.rstrip() for context, _ in pairs]
    wholes = [context + continuation for context, continuation in pairs]
    # a context is shared by several continuations: encode each once
    distinct = {context: place for place, context in enumerate(dict.fromkeys(contexts))}
    context_rows = encode(tokenizer, list(distinct), add_special_tokens=False)
    whole_rows = encode(tokenizer, wholes, add_special_tokens=False, on_progress=on_progress)
    sequences: list[Ids] = []
    starts: list[int] = []
    rejected: list[tuple[int, str]] = []
    for index, (context, row) in enumerate(zip(contexts, whole_rows, strict=True)):
        head = context_rows[distinct[context]]
        tail = row[len(head) :]
        if not len(tail):
            rejected.append((index, f"the continuation {shown(pairs[index][1])} has no tokens of its own"))
        if not len(head):
            begin = _begin_token(tokenizer)
            # a continuation that brings the begin token along is conditioned on its own
            head, tail = (tail[:1], tail[1:]) if len(tail) > 1 and tail[0] == begin[0] else (begin, tail)
        elif add_bos:
            head = np.concatenate([_begin_token(tokenizer), head])
        sequence = np.concatenate([head, tail])
        start = len(head)
        if max_length is not None and len(sequence) > max_length:
            if not truncate or len(tail) >= max_length:
                rejected.append((index, too_long(wholes[index], len(sequence), max_length)))
            sequence, start = sequence[-max_length:], start - (len(sequence) - max_length)
        sequences.append(sequence)
        starts.append(start)
    if rejected:
        raise RejectedItemsError("pairs", rejected)
    return sequences, starts


def check_pairs(pairs: Sequence[Any], name: str, parts: tuple[str, str]) -> None:
    """Raise `InvalidDtypeError` for anything that is not a list of pairs of strings."""
    if isinstance(pairs, str):
        raise InvalidDtypeError(f"{name} must be a list of pairs, not one string: write [({shown(pairs)}, ...)].")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InvalidDtypeError(f"{name}[{index}] must be ({', '.join(parts)}), not {shown(pair)}.")
    _check_strings([first for first, _ in pairs], _plural(parts[0]))
    _check_strings([second for _, second in pairs], _plural(parts[1]))


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    others: list[str] | None = None,
    *,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> list[Ids]:
    """Ids of every text, or of every text with the one in its place in `others`."""
    rows: list[Ids] = []
    for start in range(0, len(texts), TEXTS_A_CALL):
        part = texts[start : start + TEXTS_A_CALL]
        if others is not None:
            options["text_pair"] = others[start : start + TEXTS_A_CALL]
        encoded = tokenizer(part, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)
        rows.extend(np.asarray(row, np.int32) for row in encoded["input_ids"])
        if on_progress is not None:
            on_progress(len(part))
    return rows


def _truncate(tokenizer: PreTrainedTokenizerBase, rows: list[Ids], max_length: int, *columns: list[str]) -> None:
    """Encode what is too long once more, cut."""
    places = [index for index, row in enumerate(rows) if len(row) > max_length]
    cut_columns = [[column[index] for index in places] for column in columns]
    cut = encode(tokenizer, *cut_columns, truncation=True, max_length=max_length) if places else []
    for index, row in zip(places, cut, strict=True):
        rows[index] = row


def _check_lengths(rows: list[Ids], items: Sequence[Any], max_length: int | None, name: str) -> None:
    rejected: list[tuple[int, str]] = []
    for index, row in enumerate(rows):
        if not len(row):
            rejected.append((index, f"{shown(items[index])} has no tokens"))
        elif max_length is not None and len(row) > max_length:
            rejected.append((index, too_long(items[index], len(row), max_length)))
    if rejected:
        raise RejectedItemsError(name, rejected)


def _begin_token(tokenizer: PreTrainedTokenizerBase) -> Ids:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return np.asarray([token], np.int32)
    raise InvalidInputError(
        "a context is empty or add_bos is set, and the tokenizer has neither a begin nor an end token to put "
        "there. Give every continuation a context, and leave add_bos off."
    )


def _check_strings(texts: Sequence[Any], name: str) -> None:
    if isinstance(texts, str):
        raise InvalidDtypeError(f"{name} must be a list of strings, not one string: write [{shown(texts)}].")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidDtypeError(f"{name}[{index}] must be a string, not {shown(text)}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            reason = f"{text[:40]!a} is not valid Unicode: {error.reason}"
            raise RejectedItemsError(name, [(index, reason)]) from None


def _plural(noun: str) -> str:
    return f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"


def too_long(item: object, length: int, max_length: int, with_what: str = "") -> str:
    """Why an item is rejected that has more tokens than the limit."""
    return (
        f"{shown(item)} {with_what}has {length:,} tokens, more than the limit of {max_length:,}; shorten it, or allow "
        "cutting with truncate (--truncate)"
    )


def shown(value: object) -> str:
    """A value for an error message: one line, not long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
