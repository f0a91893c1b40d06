"""The tokenizer with which transformers prepares decisions: a copy that encodes what prompts share once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from radix_mlp.engine.tokenization.control_tokens import controls_of
from radix_mlp.engine.tokenization.shared_text import SharedText, can_cut
from radix_mlp.engine.tokenization.tokenize import turn_of
from radix_mlp.errors import InvalidInputError, UnsupportedModelError

__all__ = ["reader_of", "reading"]

_READERS: WeakKeyDictionary[PreTrainedTokenizerBase, Any] = WeakKeyDictionary()


def reader_of(tokenizer: PreTrainedTokenizerBase, config: Any) -> Any:
    """A copy of `tokenizer` that knows transformers' marks, which would change how it reads other texts.

    Raises:
        InvalidInputError: there is no chat template.
        UnsupportedModelError: control tokens are to be kept as text, and the model's template reads them.
    """
    if config.chat_template is None and not tokenizer.chat_template:
        raise InvalidInputError(
            "the tokenizer has no chat template, and the model no decision_template.jinja, so there is no prompt to "
            "ask questions with. Set tokenizer.chat_template, or pass decision_config=."
        )
    if controls_of(tokenizer).tokens and not config.sanitize_control_tokens:
        raise UnsupportedModelError(
            "control_tokens='text': the model's decision.json has sanitize_control_tokens false, so its template reads "
            "control tokens in states itself. Leave control_tokens 'model'."
        )
    reader = _READERS.get(tokenizer)
    if reader is None:
        reader = _READERS[tokenizer] = _new_reader(tokenizer)
    # it may have been set since
    reader.chat_template = tokenizer.chat_template
    return reader


@contextmanager
def reading(reader: Any) -> Iterator[None]:
    """The turn of a reader, in which each prompt is encoded from the one before."""
    with turn_of(reader):
        if reader.radix_cuts:
            reader.radix_shared = SharedText(reader.backend_tokenizer)
        try:
            yield
        finally:
            reader.radix_shared = None


def _new_reader(tokenizer: PreTrainedTokenizerBase) -> Any:
    reader: Any = copy.deepcopy(tokenizer)
    if controls_of(reader).tokens:
        # transformers keeps control tokens of states as text by itself, and templates need theirs
        reader.split_special_tokens = False
        del reader.radix_controls
    kind: Any = type(reader)
    is_own = kind.__call__ is not PreTrainedTokenizerBase.__call__ or hasattr(kind, "_switch_to_input_mode")
    reader.radix_shared = None
    reader.radix_cuts = isinstance(reader, PreTrainedTokenizerFast) and not is_own and can_cut(reader)
    reader.__class__ = type(kind.__name__, (_Reader, kind), {})
    return reader


class _Reader:
    """Methods of a tokenizer that transformers calls for every prompt, over all of it."""

    radix_shared: SharedText | None
    radix_vocabulary: dict[str, int] | None = None

    def __call__(self: Any, text: Any = None, **options: Any) -> Any:
        """The ids of a rendered chat, as the tokenizer's own class gives them."""
        if self.radix_shared is not None and _is_a_prompt(self, text, options):
            ids = self.radix_shared.ids_of(text)
            return BatchEncoding({"input_ids": torch.from_numpy(ids.astype("int64"))[None]})
        return super().__call__(text, **options)  # type: ignore[misc]

    def get_vocab(self: Any) -> dict[str, int]:
        """Of every request it is asked whether transformers' marks are in it, and it may have 200,000 words."""
        if self.radix_vocabulary is None or len(self.radix_vocabulary) != len(self):
            self.radix_vocabulary = super().get_vocab()  # type: ignore[misc]
        return self.radix_vocabulary


def _is_a_prompt(reader: Any, text: Any, options: dict[str, Any]) -> bool:
    """Whether a call is that of `apply_chat_template` for one chat, in which no control token is marked as text."""
    from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END, _CONTROL_TOKEN_START

    known: dict[str, Any] = {"padding": False, "truncation": False, "max_length": None, "add_special_tokens": False}
    known["return_tensors"] = "pt"
    sanitized = options.get("sanitize_control_tokens")
    return (
        isinstance(text, str)
        and len(text) > 0
        and all(name in options and options[name] == value for name, value in known.items())
        and options.keys() <= {*known, "sanitize_control_tokens"}
        and (sanitized or set(reader.model_input_names) <= {"input_ids", "attention_mask"})
        and not reader.split_special_tokens
        and not reader.backend_tokenizer.encode_special_tokens
        and _CONTROL_TOKEN_START not in text
        and _CONTROL_TOKEN_END not in text
    )
