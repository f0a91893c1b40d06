"""Texts encoded one after another, of which each repeats much of the one before: only the rest is encoded.

A text is cut before a space between two ASCII letters. There a cut is exact if no token of the vocabulary has a letter
followed by a space, so that no merge crosses it, and if words are found from left to right by what stands near them.
`can_cut` looks for both; and what is encoded begins and ends in words whose tokens are known, and is used only if they
come out the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radix_mlp.engine.batching.scheduler import Ids

__all__ = ["SharedText", "can_cut"]

CUT = re.compile("(?<=[A-Za-z]) (?=[A-Za-z])")
SHORTEST = 200
"""Characters in common for which a comparison pays."""
REACHES = (400, 4000)
"""Characters in which cuts are looked for."""
KNOWN_WORDS = 4
"""Cuts at either end of what is encoded: words between them are compared."""

MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")
NORMALIZERS = (
    *("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Lowercase", "StripAccents", "BertNormalizer"),
    *("Replace", "Prepend", "Strip"),
)
PRE_TOKENIZERS = (
    *("Split", "ByteLevel", "Metaspace", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"),
    "BertPreTokenizer",
)
ACROSS_TOKENS = re.compile("[A-Za-z][ Ġ▁]")
LOOKS_FAR = re.compile(r"\(\?<|\\[bBAGKzZ1-9]|(?<!\\)[.^$]|\(\?R|\{\d*,?\d{2,}\}")
"""Of a regular expression: looks behind, names a place, or takes anything."""
IN_CLASSES = re.compile(r"\[(?:\\.|[^\]\\])*\]")
PROBE = (
    "It's one Of THE tests, e.g. a (short) text with 12 apples and 3,450.75 pears: naïve cafés, don't they?  Two "
    'spaces\nand a line\n\n  an indented one {"key": "some value", "n": [1, 2]} in JSON\tand a tab at the end. '
    "x = f(a_b) # code in it; https://a.example/path?q=what Is more, 中文 and русский text follow the rest!! "
) * 4


@dataclass(frozen=True, eq=False)
class Encoded:
    """A text with its tokens."""

    text: str
    ids: Ids
    starts: NDArray[np.int64]
    """The character at which each token begins, not descending."""

    def place(self, character: int) -> int:
        """Of the first token that begins at a character or after it."""
        return int(np.searchsorted(self.starts, character))


class SharedText:
    """Ids of texts, by the Rust tokenizer, without special tokens of its post-processor.

    Example::

        shared = SharedText(tokenizer.backend_tokenizer)
        rows = [shared.ids_of(prompt) for prompt in prompts]
    """

    def __init__(self, rust: Any) -> None:
        self.rust = rust
        self.last: Encoded | None = None

    def ids_of(self, text: str) -> Ids:
        """What `rust.encode(text, add_special_tokens=False)` gives."""
        found = self._from_last(text) or self._encoded(text)
        # texts that are not ordered cannot be compared by places
        self.last = found if len(text) >= SHORTEST and bool((np.diff(found.starts) >= 0).all()) else None
        return found.ids

    def _encoded(self, text: str) -> Encoded:
        encoding = self.rust.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        starts = np.fromiter((start for start, _ in encoding.offsets), np.int64, len(ids))
        return Encoded(text, ids, starts)

    def _from_last(self, text: str) -> Encoded | None:
        """The tokens of a text by those of the last; None if they share too little, or known words differ."""
        last = self.last
        if last is None:
            return None
        before = _cuts_before(text, _common_prefix(last.text, text))
        first = before[-1] if before else 0
        after = _cuts_after(text, first, _common_suffix(last.text[first:], text[first:]))
        if not before and not after:
            return None
        start, stop = before[0] if before else 0, after[-1] if after else len(text)
        part = self._encoded(text[start:stop])
        if not bool((np.diff(part.starts) >= 0).all()):
            return None
        shift = len(text) - len(last.text)
        pieces = []
        left, right = 0, len(part.ids)
        if before:
            left = part.place(first - start)
            known = last.place(first)
            if not _ends_alike(last.ids[last.place(before[1]) : known], part.ids[part.place(before[1] - start) : left]):
                return None
            pieces.append((last.ids[:known], last.starts[:known]))
        if after:
            right, known = part.place(after[0] - start), last.place(after[0] - shift)
            ours = part.ids[right : part.place(after[-2] - start)]
            if not _ends_alike(last.ids[known : last.place(after[-2] - shift)], ours):
                return None
        pieces.append((part.ids[left:right], part.starts[left:right] + start))
        if after:
            pieces.append((last.ids[known:], last.starts[known:] + shift))
        ids, starts = zip(*pieces, strict=True)
        return Encoded(text, np.concatenate(ids), np.concatenate(starts))


def can_cut(tokenizer: Any) -> bool:
    """Whether texts may be cut before spaces between letters, by what a tokenizer of the Rust library is made of.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_tokenizer
        >>> can_cut(tiny_tokenizer())
        True
    """
    rust = tokenizer.backend_tokenizer
    if type(rust.model).__name__ not in MODELS or getattr(rust.model, "dropout", None):
        return False
    for part, known in ((rust.normalizer, NORMALIZERS), (rust.pre_tokenizer, PRE_TOKENIZERS)):
        if not all(_is_near_sighted(step, known) for step in _steps(part)):
            return False
    if any(ACROSS_TOKENS.search(token) for token in rust.get_vocab(with_added_tokens=False)):
        return False
    for token in rust.get_added_tokens_decoder().values():
        takes_space = (token.rstrip and token.content[-1:].isalpha()) or (token.lstrip and token.content[:1].isalpha())
        if takes_space or ACROSS_TOKENS.search(token.content):
            return False
    return _knows_letters(rust) and _words_end_at_cuts(rust)


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """What a normalizer or a pre-tokenizer does, step by step."""
    if part is None:
        return
    found = json.loads(part.__getstate__())
    if found["type"] == "Sequence":
        yield from found.get("normalizers") or found.get("pretokenizers") or ()
    else:
        yield found


def _is_near_sighted(step: dict[str, Any], known: tuple[str, ...]) -> bool:
    """Whether a step changes or cuts text by what stands near a place alone."""
    if step["type"] not in known:
        return False
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    return regex is None or not LOOKS_FAR.search(IN_CLASSES.sub("x", regex))


def _knows_letters(rust: Any) -> bool:
    """Whether no letter is unknown: neighbours that are may become one token."""
    unknown = getattr(rust.model, "unk_token", None)
    return unknown is None or unknown not in rust.encode(" ".join(ascii_letters), add_special_tokens=False).tokens


def _words_end_at_cuts(rust: Any) -> bool:
    """Whether words end at all cuts of a text, or it is a single word."""
    if rust.pre_tokenizer is None:
        return True
    text = PROBE if rust.normalizer is None else rust.normalizer.normalize_str(PROBE)
    starts = {start for _, (start, _) in rust.pre_tokenizer.pre_tokenize_str(text)}
    cuts = [match.start() for match in re.finditer("(?<=[A-Za-z])[ ▁](?=[A-Za-z])", text)]
    return len(starts) == 1 or all(cut in starts or cut + 1 in starts for cut in cuts)


def _common_prefix(first: str, second: str) -> int:
    """Characters with which both begin."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _common_suffix(first: str, second: str) -> int:
    """Characters with which both end."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[len(first) - middle : len(first) - low] == second[len(second) - middle : len(second) - low]:
            low = middle
        else:
            high = middle - 1
    return low


def _cuts_before(text: str, stop: int) -> list[int]:
    """The last cuts of a text in its first `stop` characters, with a letter behind each; none if there are few."""
    for reach in REACHES:
        cuts = _cuts(text, stop - reach, stop) if stop >= SHORTEST else []
        if len(cuts) >= KNOWN_WORDS:
            return cuts[-KNOWN_WORDS:]
    return []


def _cuts_after(text: str, first: int, count: int) -> list[int]:
    """Likewise the first cuts in its last `count` characters, which begin after `first`."""
    start = len(text) - count
    for reach in REACHES:
        cuts = _cuts(text, start, start + reach) if count >= SHORTEST else []
        if len(cuts) >= KNOWN_WORDS:
            return cuts[:KNOWN_WORDS]
    return []


def _cuts(text: str, start: int, stop: int) -> list[int]:
    """Cuts between two places, with a character of context on either side."""
    return [match.start() for match in CUT.finditer(text, max(0, start) + 1, min(stop, len(text)) - 1)]


def _ends_alike(known: Ids, found: Ids) -> bool:
    return len(known) > 0 and np.array_equal(known, found)
