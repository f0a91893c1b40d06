"""Tokens as text: what each spells, and where it stands in its prompt."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from radix_mlp.engine.tokenization.begin_token import added_tokens, begins_with_token
from radix_mlp.engine.tokenization.tokenize import encode

__all__ = ["PlacedTokens", "TokenTexts", "placed"]

PROBES = ("a b é", "a b")
WINDOW = 4
"""Tokens before one that decide how it is written: no letter has more bytes."""
BYTE = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class PlacedTokens:
    """A text and its tokens."""

    text: str
    names: list[str]
    """What each token spells; one that has only some bytes of a letter is `bytes:\\xc3`, as OpenAI writes it."""
    offsets: list[int]
    """Where each starts in the text; a part of a letter, where the letter does."""


def placed(pieces: Sequence[bytes]) -> PlacedTokens:
    """A text from the bytes of its tokens; bytes that make no letter become U+FFFD.

    >>> placed([b"caf", b"\\xc3", b"\\xa9", b" au"])
    PlacedTokens(text='café au', names=['caf', 'bytes:\\\\xc3', 'bytes:\\\\xa9', ' au'], offsets=[0, 3, 3, 4])
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    parts: list[str] = []
    names: list[str] = []
    offsets: list[int] = []
    length = 0
    for piece in pieces:
        waiting, _ = decoder.getstate()
        # the letter that waits is never completed
        starts_after = bool(waiting) and bool(piece) and piece[0] & 0xC0 != 0x80
        names.append(_name(piece))
        offsets.append(length + starts_after)
        parts.append(decoder.decode(piece))
        length += len(parts[-1])
    return PlacedTokens("".join(parts) + decoder.decode(b"", final=True), names, offsets)


class TokenTexts:
    """What the tokens of a tokenizer spell, as bytes where its vocabulary shows them.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_tokenizer
        >>> TokenTexts(tiny_tokenizer()).of_text("é!", None)
        [b'\\xc3', b'\\xa9', b'!']
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        self._special = set(tokenizer.all_special_ids)
        self._added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        self._spell: Callable[[str], bytes | None] | None = self._found_spelling()

    def name(self, token: int) -> str:
        """A token alone."""
        if self._spell is None:
            return str(self._decode([token]))
        return _name(self._spelled([token])[0])

    def of_text(self, prompt: str, add_special_tokens: bool | None) -> list[bytes]:
        """The part of the prompt that each of its tokens stands for: nothing for those that the tokenizer adds."""
        tokenizer = self._tokenizer
        with_special = not begins_with_token(tokenizer, prompt) if add_special_tokens is None else add_special_tokens
        before, after = map(len, added_tokens(tokenizer)) if with_special else (0, 0)
        [row] = encode(tokenizer, [prompt], add_special_tokens=with_special)
        ids = row.tolist()
        inner = ids[before : len(ids) - after]
        pieces = self._aligned(inner, prompt.encode())
        if pieces is None:
            pieces = self._cut(prompt) if getattr(tokenizer, "is_fast", False) else self._grown(inner)
        found = [b""] * before + pieces + [b""] * after
        if found and not pieces:
            # a text that the tokenizer drops altogether
            found[-1] = prompt.encode()
        return found

    def of_ids(self, ids: Sequence[int]) -> list[bytes]:
        """What each token adds to the text that they are together."""
        whole = self._decode(ids)
        pieces = self._aligned(ids, whole.encode())
        if pieces is None and self._spell is not None and "\ufffd" in whole:
            # bytes that make no letter: some decoders replace them together with letters beside them
            pieces = self._spelled(ids)
            if pieces[0].startswith(b" ") and not whole.startswith(" "):
                pieces[0] = pieces[0][1:]
        return self._grown(ids) if pieces is None else pieces

    def next(self, ids: Sequence[int], token: int) -> bytes:
        """What one more token adds."""
        return self._grown([*ids[-WINDOW:], token])[-1] if self._spell is None else self._spelled([token])[0]

    def _aligned(self, ids: Sequence[int], text: bytes) -> list[bytes] | None:
        return None if self._spell is None else _aligned(self._spelled(ids), text)

    def _spelled(self, ids: Sequence[int]) -> list[bytes]:
        assert self._spell is not None
        new = [token for token in dict.fromkeys(ids) if token not in self._known]
        for token, written in zip(new, self._tokenizer.convert_ids_to_tokens(new), strict=True):
            spelled = None if written is None or token in self._special else self._spell(written)
            self._known[token] = (written or "").encode() if spelled is None else spelled
        return [self._known[token] for token in ids]

    def _cut(self, prompt: str) -> list[bytes]:
        """By the offsets of the tokenizer; text that it skips goes to the next token."""
        encoded = self._tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        pieces: list[bytes] = []
        done = 0
        for _, end in encoded["offset_mapping"]:
            pieces.append(prompt[done:end].encode())
            done = max(done, end)
        if pieces:
            pieces[-1] += prompt[done:].encode()
        return pieces

    def _grown(self, ids: Sequence[int]) -> list[bytes]:
        """By what decoding gives more with each token than without."""
        pieces: list[bytes] = []
        for index in range(len(ids)):
            window = ids[max(0, index - WINDOW) : index + 1]
            shorter, longer = (self._decode(part) for part in (window[:-1], window))
            same = (index for index, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b)
            more = longer[next(same, min(len(shorter), len(longer))) :]
            # a letter that is not complete yet
            pieces.append(b"" if more.endswith("\ufffd") else more.encode())
        return pieces

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _found_spelling(self) -> Callable[[str], bytes | None] | None:
        """The way that gives known texts back."""
        for probe in PROBES:
            [ids] = encode(self._tokenizer, [probe], add_special_tokens=False)
            for spell in (_byte_level, _metaspace):
                self._known, self._spell = {}, spell
                if _aligned(self._spelled(ids.tolist()), probe.encode()) is not None:
                    return spell
        return None


def _aligned(pieces: list[bytes], text: bytes) -> list[bytes] | None:
    """The pieces without the spaces that the tokenizer put in, if they make up the text."""
    found: list[bytes] = []
    place = 0
    for piece in pieces:
        part = piece if text.startswith(piece, place) else piece.removeprefix(b" ")
        if not text.startswith(part, place):
            return None
        found.append(part)
        place += len(part)
    return found if place == len(text) else None


def _name(piece: bytes) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _metaspace(token: str) -> bytes:
    byte = BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


def _byte_level(token: str) -> bytes | None:
    """None for a token that was added in plain letters."""
    spelled = [_BYTE_LETTERS.get(letter) for letter in token]
    return None if None in spelled else bytes(byte for byte in spelled if byte is not None)


def _byte_letters() -> dict[str, int]:
    """The letters in which byte-level tokenizers write bytes: printable ones stand for themselves."""
    plain = [byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_LETTERS = _byte_letters()
