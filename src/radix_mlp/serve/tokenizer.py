"""The tokenizer as routes use it: tokens with their places in the text, ids back to text, texts cut."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import numpy as np
import orjson

from radix_mlp.engine.batching.scheduler import Ids
from radix_mlp.engine.engine import Engine
from radix_mlp.engine.tokenization.begin_token import encode_once
from radix_mlp.engine.tokenization.control_tokens import controls_of
from radix_mlp.engine.tokenization.token_ids import TextOrIds
from radix_mlp.engine.tokenization.tokenize import encode
from radix_mlp.errors import InvalidInputError
from radix_mlp.serve.http.limits import check_unicode, cut_characters
from radix_mlp.serve.token_texts import PlacedTokens, TokenTexts, placed

__all__ = ["Tokens"]

TOKENS_A_PIECE = 1024
TEXTS_A_TURN = 32
"""Then others may have the thread."""

P = ParamSpec("P")
T = TypeVar("T")


class Tokens:
    """Runs on its own thread with its own tokenizer: a shared one fails while another thread changes its settings."""

    def __init__(self, engine: Engine, max_length: int) -> None:
        self._tokenizer: Any = copy.deepcopy(engine.tokenizer)
        self._reader: Any = controls_of(self._tokenizer).reader or self._tokenizer
        self._folder = engine.loaded.folder
        self._max_length = max_length
        self._texts = TokenTexts(self._tokenizer)
        self._thread = ThreadPoolExecutor(1, "radix-mlp-tokenizer")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def tokenize(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, prompt_name: str | None = None
    ) -> list[orjson.Fragment]:
        """Every text's tokens as text-embeddings-inference writes them: id, text, special, start and stop; as JSON."""
        prompt = self._folder.prompt(None, prompt_name) if prompt_name is not None else None
        whole = [(prompt or "") + text for text in texts]
        for text in whole:
            check_unicode(text, "inputs")
            cut_characters(text, self._max_length, truncate=False, name="inputs")
        return await self._on_thread(self._tokenize, whole, add_special_tokens)

    async def encode(self, items: Sequence[TextOrIds], *, add_special_tokens: bool | None = None) -> list[Ids]:
        """Ids `[n]` of every text; ids as they are.

        Special tokens are those that the tokenizer adds; unless it is said whether, none to a text that starts with the
        begin token.
        """
        texts = [item for item in items if isinstance(item, str)]
        for text in texts:
            check_unicode(text, "inputs")
            cut_characters(text, self._max_length, truncate=False, name="inputs")
        rows: list[Ids] = []
        for start in range(0, len(texts), TEXTS_A_TURN):
            some = texts[start : start + TEXTS_A_TURN]
            if add_special_tokens is None:
                rows += await self._on_thread(encode_once, self._tokenizer, some)
            else:
                rows += await self._on_thread(encode, self._tokenizer, some, add_special_tokens=add_special_tokens)
        encoded = iter(rows)
        return [np.asarray(next(encoded) if isinstance(item, str) else item, np.int32) for item in items]

    async def decode(self, rows: Sequence[Sequence[int]], *, skip_special_tokens: bool = True) -> list[str]:
        """The text of every list of ids."""
        size = len(self._tokenizer)
        for row in rows:
            if len(row) > self._max_length:
                raise InvalidInputError(f"`ids`: {len(row)} of one text, and the model takes {self._max_length}.")
            if row and max(row) >= size:
                raise InvalidInputError(f"`ids`: token {max(row)}, and the tokenizer has {size}.")
        return await self._on_thread(
            lambda: [self._tokenizer.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]
        )

    async def names(self, ids: Sequence[int]) -> list[str]:
        """What each token alone spells."""
        return await self._on_thread(lambda: [self._texts.name(token) for token in ids])

    async def placed(
        self,
        prompt: TextOrIds,
        ids: Sequence[int],
        more: Sequence[int],
        *,
        add_special_tokens: bool | None,
        echo: bool,
    ) -> PlacedTokens:
        """A prompt's tokens `ids` and `more` after them in their text; without `echo`, those after it alone."""

        def pieces() -> list[bytes]:
            after = [self._texts.next(ids, token) for token in more]
            if not echo:
                return after
            if isinstance(prompt, str):
                return self._texts.of_text(prompt, add_special_tokens) + after
            return self._texts.of_ids(ids) + after

        return await self._on_thread(lambda: placed(pieces()))

    async def call(self, function: Callable[[Any], T]) -> T:
        """What a function of the tokenizer gives."""
        return await self._on_thread(function, self._tokenizer)

    async def cut(self, items: Sequence[Any], limit: int, prompt: str | None = None, *, left: bool) -> list[Any]:
        """Ids of all texts behind the prompt, at most `limit` of them, the begin cut off or the end; ids likewise."""
        for item in items:
            if isinstance(item, str):
                check_unicode(item, "inputs")
        return await self._on_thread(self._cut, list(items), limit, prompt or "", left)

    def _cut(self, items: list[Any], limit: int, prompt: str, left: bool) -> list[Any]:
        found = list(items)
        places = [index for index, item in enumerate(items) if isinstance(item, str)]
        prompt = controls_of(self._tokenizer).named(prompt)
        texts = [prompt + items[index] for index in places]
        if self._folder.lower_case:
            texts = [text.lower() for text in texts]
        self._reader.truncation_side = "left" if left else "right"
        rows = self._ids(texts, truncation=True, max_length=limit) if texts else []
        for index, row in zip(places, rows, strict=True):
            found[index] = row
        return [row[-limit:] if left else row[:limit] for row in found]

    def _ids(self, texts: list[str], **options: Any) -> list[list[int]]:
        encoded = self._reader(texts, return_attention_mask=False, return_token_type_ids=False, **options)
        own = controls_of(self._tokenizer).own
        return [own(np.asarray(row, np.int32)).tolist() for row in encoded["input_ids"]]

    def _tokenize(self, texts: list[str], add_special_tokens: bool) -> list[orjson.Fragment]:
        if not getattr(self._tokenizer, "is_fast", False):
            raise InvalidInputError("this model's tokenizer does not tell where its tokens stand in the text.")
        encoded = self._tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        rows = zip(texts, encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
        return [orjson.Fragment(self._written(text, *columns)) for text, *columns in rows]

    def _written(self, text: str, ids: list[int], offsets: list[tuple[int, int]], special: list[int]) -> bytes:
        """In pieces, between which other threads may run."""
        places = range(0, len(ids), TOKENS_A_PIECE)
        pieces = []
        for part in (slice(place, place + TOKENS_A_PIECE) for place in places):
            tokens = zip(ids[part], offsets[part], special[part], strict=True)
            pieces.append(orjson.dumps([self._token(text, *token) for token in tokens])[1:-1])
        return b"[" + b",".join(pieces) + b"]"

    def _token(self, text: str, token: int, offsets: tuple[int, int], special: int) -> dict[str, Any]:
        if special:
            name = self._tokenizer.convert_ids_to_tokens(token)
            return {"id": token, "text": name, "special": True, "start": None, "stop": None}
        start, stop = offsets
        return {"id": token, "text": text[start:stop], "special": False, "start": start, "stop": stop}

    async def _on_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*args, **kwargs))
