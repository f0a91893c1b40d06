"""Text -> token ids, with the length limit enforced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from radix_mlp.engine.batching.scheduler import Ids
from radix_mlp.engine.tokenization.control_tokens import controls_of
from radix_mlp.engine.tokenization.token_ids import TextOrIds, as_ids, is_ids
from radix_mlp.errors import InvalidDtypeError, RejectedItemsError

__all__ = [
    "Encoder",
    "check_pairs",
    "check_rows",
    "check_strings",
    "cut",
    "encode",
    "encode_cut",
    "num_characters",
    "prompt_length",
    "rust_ids",
    "shown",
    "tokenize_texts",
    "too_long",
    "turn_of",
    "unknown_id",
]

TEXTS_A_CALL = 1000
TOKENIZER_THREADS = 2
"""One encodes, which happens outside of Python, while the other turns what it has into arrays."""

Encoder = Callable[..., list[Ids]]
"""As `encode`: a tokenizer, texts and options -> ids of every text."""

_TURNS: WeakKeyDictionary[PreTrainedTokenizerBase, Lock] = WeakKeyDictionary()
_NEW_TURN = Lock()


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[TextOrIds],
    *,
    prompt: str | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    lower_case: bool = False,
    vocabulary: int | None = None,
    encoder: Encoder | None = None,
) -> list[Ids]:
    """Ids of `prompt + text`, encoded as one string, with the special tokens that the tokenizer itself adds.

    Token ids in place of a text are taken as they are.

    Args:
        max_length: longest allowed, in tokens; None has no limit.
        truncate: cut longer texts to `max_length` as the tokenizer does (its own special tokens stay) instead
            of refusing them.
        lower_case: write everything in lower case first.
        vocabulary: token ids must be below.
        encoder: turns texts into ids; `encode` unless given.

    Raises:
        RejectedItemsError: texts without a single token, longer than `max_length`, or with a token that is not in the
            vocabulary.
        InvalidDtypeError: something other than a list of strings (or lists of ids).
        InvalidInputError: a token id among those given that is not in the vocabulary.
    """

    def encode_texts(places: list[int]) -> list[Ids]:
        whole = [str(texts[place]) for place in places]
        whole = [prompt + text for text in whole] if prompt else whole
        whole = [text.lower() for text in whole] if lower_case else whole
        encode_all = encoder or encode
        rows = encode_all(tokenizer, whole)
        if truncate and max_length is not None:
            encode_cut(tokenizer, rows, max_length, whole, encoder=encode_all)
        return rows

    limit = max_length if truncate else None
    rows = _texts_and_ids(texts, "texts", encode_texts, vocabulary, limit)
    check_rows(rows, texts, max_length, vocabulary, "texts")
    return rows


def _texts_and_ids(
    texts: Sequence[TextOrIds],
    name: str,
    encode_texts: Callable[[list[int]], list[Ids]],
    vocabulary: int | None,
    limit: int | None = None,
) -> list[Ids]:
    """Ids of all: those given, and those of the texts, which `encode_texts` makes from their places."""
    given = {index: as_ids(text, f"{name}[{index}]", vocabulary) for index, text in enumerate(texts) if is_ids(text)}
    places = [index for index in range(len(texts)) if index not in given]
    check_strings({place: texts[place] for place in places}, name)
    rows = {index: cut(row, limit) for index, row in given.items()}
    rows.update(zip(places, encode_texts(places), strict=True))
    return [rows[index] for index in range(len(texts))]


def cut(row: Ids, limit: int | None) -> Ids:
    """The first `limit` ids."""
    return row if limit is None else row[:limit]


def num_characters(values: Sequence[Any]) -> int:
    """Characters of all texts, also those in pairs."""
    count = 0
    for value in values:
        if isinstance(value, str):
            count += len(value)
        elif type(value) is tuple and len(value) == 2 and type(value[0]) is str and type(value[1]) is str:
            # the usual pair, without looking at it as a list of anything
            count += len(value[0]) + len(value[1])
        elif not is_ids(value):
            count += num_characters(value)
    return count


def prompt_length(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """How many tokens a prompt takes before a text, a special token at its end not counted."""
    ids = encode(tokenizer, [prompt])[0]
    return len(ids) - int(len(ids) > 0 and int(ids[-1]) in tokenizer.all_special_ids)


def check_pairs(pairs: Sequence[Any], name: str, parts: tuple[str, str], *, ids: bool = False) -> None:
    """Raise `InvalidDtypeError` for anything that is not a list of pairs of strings (or of `ids`, both of a pair)."""
    for index, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InvalidDtypeError(f"{name}[{index}] must be ({', '.join(parts)}), not {shown(pair)}.")
    texts = {place: pair for place, pair in enumerate(pairs) if not (ids and is_ids(pair[0]) and is_ids(pair[1]))}
    check_strings({place: first for place, (first, _) in texts.items()}, _plural(parts[0]))
    check_strings({place: second for place, (_, second) in texts.items()}, _plural(parts[1]))


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    others: list[str] | None = None,
    **options: Any,
) -> list[Ids]:
    """Ids of every text, or of every text with the one in its place in `others`."""
    controls = controls_of(tokenizer)
    tokenizer = controls.reader or tokenizer

    def encode_part(start: int) -> list[Ids]:
        part = slice(start, start + TEXTS_A_CALL)
        found = rust_ids(tokenizer, texts[part], None if others is None else others[part], options)
        if found is not None:
            return [controls.own(row) for row in found]
        second = {} if others is None else {"text_pair": others[part]}
        encoded = tokenizer(
            texts[part], return_attention_mask=False, return_token_type_ids=False, verbose=False, **second, **options
        )
        return [controls.own(np.asarray(row, np.int32)) for row in encoded["input_ids"]]

    with turn_of(tokenizer):
        # the first part sets the tokenizer's truncation; after it, threads may share it
        rows = encode_part(0) if texts else []
        later = range(TEXTS_A_CALL, len(texts), TEXTS_A_CALL)
        if later:
            with ThreadPoolExecutor(TOKENIZER_THREADS if tokenizer.is_fast else 1, "radix-tokenize") as threads:
                for found in threads.map(encode_part, later):
                    rows.extend(found)
    return rows


def rust_ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], others: list[str] | None, options: dict[str, Any]
) -> list[Ids] | None:
    """What `tokenizer(texts, others, **options)` gives, by the Rust tokenizer alone; None where it may give others.

    transformers' own way there takes as long again, in Python. None: a tokenizer that is not Rust's or has calls of its
    own, one that pads, cuts or splits special tokens since its last call, and options besides `add_special_tokens`.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_tokenizer
        >>> [ids.tolist() for ids in rust_ids(tiny_tokenizer(), ["Hi"], None, {})]
        [[72, 105]]
    """
    kind: Any = type(tokenizer)
    if options.keys() - {"add_special_tokens"} or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    if kind.__call__ is not PreTrainedTokenizerBase.__call__:
        return None
    if kind._encode_plus is not PreTrainedTokenizerFast._encode_plus or hasattr(kind, "_switch_to_input_mode"):
        return None
    rust: Any = tokenizer.backend_tokenizer
    if rust.truncation is not None or rust.padding is not None:
        return None
    if rust.encode_special_tokens != tokenizer.split_special_tokens:
        return None
    given = texts if others is None else list(zip(texts, others, strict=True))
    rows = (encoding.ids for encoding in rust.encode_batch_fast(given, **options))
    return [np.fromiter(row, np.int32, len(row)) for row in rows]


def turn_of(tokenizer: PreTrainedTokenizerBase) -> Lock:
    """Held while texts are encoded: a tokenizer keeps how it cuts them, and calls in other threads may share it."""
    with _NEW_TURN:
        return _TURNS.setdefault(tokenizer, Lock())


def encode_cut(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Ids],
    max_length: int,
    *columns: list[str],
    encoder: Encoder | None = None,
) -> None:
    """Encode what has more tokens than `max_length` once more, cut, and put it in its place in `rows`."""
    places = [index for index, row in enumerate(rows) if len(row) > max_length]
    cut_columns = [[column[index] for index in places] for column in columns]
    cut = (encoder or encode)(tokenizer, *cut_columns, truncation=True, max_length=max_length) if places else []
    for index, row in zip(places, cut, strict=True):
        rows[index] = row


def check_rows(
    rows: list[Ids], items: Sequence[Any], max_length: int | None, vocabulary: int | None, name: str
) -> None:
    """Raise `RejectedItemsError` for items without tokens, with too many, or with one that is not in the vocabulary."""
    rejected: list[tuple[int, str]] = []
    for index, row in enumerate(rows):
        if not len(row):
            rejected.append((index, f"{shown(items[index])} has no tokens"))
        elif max_length is not None and len(row) > max_length:
            rejected.append((index, too_long(items[index], len(row), max_length)))
        elif (reason := unknown_id(items[index], row, vocabulary)) is not None:
            rejected.append((index, reason))
    if rejected:
        raise RejectedItemsError(name, rejected)


def check_strings(texts: dict[int, Any], name: str) -> None:
    """Raise for texts, by their places in the caller's list, that are not valid strings."""
    for index, text in texts.items():
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


def unknown_id(item: object, row: Ids, vocabulary: int | None) -> str | None:
    """Why an item is rejected for which the tokenizer gives an id that the model has no embedding for, if so.

    >>> unknown_id("a", np.array([3, 9], np.int32), 9)
    "'a' has the token id 9, and this model has 0 to 8: the tokenizer has more tokens than the model's embedding"
    """
    if vocabulary is None or not len(row) or (largest := int(row.max())) < vocabulary:
        return None
    return (
        f"{shown(item)} has the token id {largest}, and this model has 0 to {vocabulary - 1}: the tokenizer has more "
        "tokens than the model's embedding"
    )


def shown(value: object) -> str:
    """A value for an error message: one line, not long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
