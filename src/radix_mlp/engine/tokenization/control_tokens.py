"""Control tokens inside of documents kept as text, while those of templates and prompts stay control tokens.

A tokenizer reads `<|im_end|>` as the same control token wherever it stands, so a document that holds it can end the
user's turn and speak as the assistant. With `keep_as_text`, a tokenizer reads every control token as text, and knows
each under a secret name besides: what writes a template writes the secret names, which no document can.
"""

from __future__ import annotations

import copy
import re
import secrets
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from radix_mlp.engine.batching.scheduler import Ids
from radix_mlp.errors import InvalidInputError, UnsupportedModelError

__all__ = ["CONTROL_TOKENS", "check_control_tokens", "controls_of", "keep_as_text"]

CONTROL_TOKENS = ("model", "text")


@dataclass(frozen=True)
class Controls:
    """The control tokens of a tokenizer, and the secret name of each.

    `hidden` texts go into a template, `named(rendered)` comes out of it.
    """

    tokens: tuple[str, ...] = ()
    """As they are written, the longest first."""
    secret: str = ""
    """A part of all secret names."""
    first_id: int = 0
    """The id of the first secret name; the others follow."""
    ids: tuple[int, ...] = ()
    """The tokens' own ids."""
    reader: Any = None
    """A tokenizer that knows the secret names."""

    def hidden(self, text: str) -> str:
        """A text of somebody else's, in which `named` finds no control token."""
        return self._replaced(text, "text")

    def named(self, text: str) -> str:
        """A text of ours, its control tokens by their secret names, and what was `hidden` in it as it was."""
        if not self.tokens:
            return text
        found = self._replaced(text, "control")
        return re.sub(f"{self.secret}text(\\d+)\ue001", lambda match: self.tokens[int(match[1])], found)

    def own(self, row: Ids) -> Ids:
        """Token ids with those of secret names replaced by the tokens' own."""
        if not self.tokens or not len(row) or row.max() < self.first_id:
            return row
        secret = row >= self.first_id
        row = row.copy()
        row[secret] = np.asarray(self.ids, np.int32)[row[secret] - self.first_id]
        return row

    def name(self, index: int, kind: str = "control") -> str:
        """The secret name of a token."""
        return f"{self.secret}{kind}{index}\ue001"

    def _replaced(self, text: str, kind: str) -> str:
        if not self.tokens:
            return text
        place = {token: index for index, token in enumerate(self.tokens)}
        pattern = "|".join(map(re.escape, self.tokens))
        return re.sub(pattern, lambda match: self.name(place[match[0]], kind), text)


_NONE = Controls()


def check_control_tokens(control_tokens: str) -> None:
    """Raise `InvalidInputError` for anything but `"model"` and `"text"`."""
    if control_tokens not in CONTROL_TOKENS:
        raise InvalidInputError(
            f"control_tokens={control_tokens!r}: must be 'model' (control tokens in texts are read as the model reads "
            "them) or 'text' (as the letters that they are written with)."
        )


def keep_as_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `tokenizer` read control tokens as text, as its option `split_special_tokens` does, but by secret names.

    Raises:
        UnsupportedModelError: a tokenizer that is not of the Rust library.

    Examples:
        >>> from radix_mlp.engine.tokenization.tokenize import encode
        >>> from radix_mlp.models.tiny import tiny_reranker_tokenizer
        >>> tokenizer = tiny_reranker_tokenizer()
        >>> keep_as_text(tokenizer)
        >>> controls = controls_of(tokenizer)
        >>> document = controls.hidden("a<|im_end|>")
        >>> [len(ids) for ids in encode(tokenizer, ["a<|im_end|>", controls.named(document + "<|im_end|>")])]
        [11, 12]
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedModelError(
            f"control_tokens='text': {type(tokenizer).__name__} is not a tokenizer of the Rust library (tokenizers), "
            "in which alone control tokens can be told from text. Leave it 'model', or clean the texts."
        )
    known = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    written = sorted(known, key=len, reverse=True)
    flags = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    # letters for private use around it: no text that stands in files has them, and nobody can guess the rest
    controls = Controls(tuple(written), f"\ue000{secrets.token_hex(8)}", ids=tuple(known[token] for token in written))
    reader = copy.deepcopy(tokenizer)
    rust: Any = reader.backend_tokenizer
    first = max(rust.get_vocab(with_added_tokens=True).values()) + 1
    names = [
        AddedToken(controls.name(index), lstrip=flags[token].lstrip, rstrip=flags[token].rstrip, normalized=False)
        for index, token in enumerate(written)
    ]
    rust.add_tokens(names)
    if [rust.token_to_id(name.content) for name in names] != list(range(first, first + len(names))):
        raise UnsupportedModelError(
            f"control_tokens='text': {type(tokenizer).__name__} has gaps in its vocabulary. Leave it 'model', or clean "
            "the texts."
        )
    # the tokenizer itself decodes, too, and must not give the names away
    tokenizer.split_special_tokens = reader.split_special_tokens = True
    tokenizer.radix_controls = replace(controls, first_id=first, reader=reader)


def controls_of(tokenizer: Any) -> Controls:
    """What `keep_as_text` made of a tokenizer; for others, controls that change nothing."""
    found: Controls = getattr(tokenizer, "radix_controls", _NONE)
    return found
