"""Questions with answers, and messages -> token ids, through the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from radix_mlp.engine.batching.scheduler import Ids
from radix_mlp.engine.tokenization.control_tokens import controls_of
from radix_mlp.engine.tokenization.tokenize import check_strings, shown
from radix_mlp.engine.tokenization.tokenize_inputs import tokenize_inputs
from radix_mlp.errors import InvalidDtypeError, InvalidInputError, RejectedItemsError

__all__ = ["Chat", "tokenize_chats"]

Chat = Sequence[Mapping[str, str]]
"""Messages with role and content."""
TURNS = ("user", "assistant")


def tokenize_chats(
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[Any],
    *,
    max_length: int | None = None,
    truncate: bool = False,
    vocabulary: int | None = None,
) -> list[Ids]:
    """What `tokenizer.apply_chat_template` gives for (question, answer) or messages; token ids as they are.

    Args:
        max_length: longest allowed, in tokens; None has no limit.
        truncate: cut longer ones as the tokenizer does instead of refusing them.

    Raises:
        RejectedItemsError: inputs longer than `max_length`, or that the template refuses.
        InvalidDtypeError: something other than pairs of texts and lists of messages.
        InvalidInputError: the tokenizer has no chat template.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }} {% endfor %}"
        >>> bytes(tokenize_chats(tokenizer, [("Why?", "So.")])[0].tolist())
        b'u:Why? a:So. '
    """
    if not tokenizer.chat_template:
        raise InvalidInputError(
            "template='chat': the tokenizer has no chat template. Set tokenizer.chat_template, or leave template out."
        )
    # a list without messages is no list of ids
    for index, value in enumerate(inputs):
        if isinstance(value, list | tuple) and not value:
            _messages(index, value)
    return tokenize_inputs(
        tokenizer,
        inputs,
        max_length=max_length,
        truncate=truncate,
        vocabulary=vocabulary,
        written=lambda index, value: _written(tokenizer, index, value),
    )


def _written(tokenizer: PreTrainedTokenizerBase, index: int, value: Any) -> str:
    controls = controls_of(tokenizer)
    messages = [{**message, "content": controls.hidden(message["content"])} for message in _messages(index, value)]
    try:
        rendered: Any = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise RejectedItemsError("inputs", [(index, f"the chat template refuses {shown(value)}: {error}")]) from error
    return controls.named(str(rendered))


def _messages(index: int, value: Any) -> list[dict[str, str]]:
    items = value if isinstance(value, tuple | list) else ()
    if len(items) == 2 and all(isinstance(text, str) for text in items):
        items = [{"role": role, "content": text} for role, text in zip(TURNS, items, strict=True)]
    if not items or not all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in items):
        raise InvalidDtypeError(
            f"inputs[{index}] must be (question, answer) or a list of messages {{'role': ..., 'content': ...}}, not "
            f"{shown(value)}."
        )
    for part in ("role", "content"):
        check_strings({place: message[part] for place, message in enumerate(items)}, f"inputs[{index}].{part}")
    return [dict(message) for message in items]
