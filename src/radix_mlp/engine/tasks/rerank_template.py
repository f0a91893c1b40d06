"""How a reranker reads a query and a document: as which text, and where that is cut when it is too long."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from radix_mlp.engine.batching.scheduler import Ids
from radix_mlp.engine.tokenization.control_tokens import controls_of
from radix_mlp.engine.tokenization.tokenize import encode, shown, too_long, unknown_id
from radix_mlp.errors import InvalidInputError, RejectedItemsError, UnsupportedModelError
from radix_mlp.models.model_kind import kind_of
from radix_mlp.models.sentence_transformers_folder import FolderSettings

__all__ = ["TEMPLATES", "Template", "check_template", "choose_template", "encode_pairs"]

TEMPLATES = ("auto", "qwen3", "chat", "pair")

# the model card of Qwen3-Reranker has these texts; scores without them are near random
QWEN3_HEAD = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
QWEN3_TAIL = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
QWEN3_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

CROSS_ENCODER_KEYS = ("sentence_transformers", "sbert_ce_default_activation_function")

# stands for the document while the rest of a chat template is looked at
_MARK = "§document§"


class Template(Protocol):
    """Turns (query, document) into token ids."""

    name: str

    def encode(self, pairs: Sequence[tuple[str, str]], instruction: str | None) -> list[Ids]:
        """Ids of every pair, whatever their length."""

    def cut(self, pair: tuple[str, str], instruction: str | None, row: Ids, max_length: int) -> Ids | None:
        """`row` with its document cut so that `max_length` ids remain; None if nothing would be left of it."""


def choose_template(
    template: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: FolderSettings
) -> Template:
    """The template by name, or the one that the model asks for.

    Of "auto" this becomes: what sentence-transformers wrote into the files; "chat" where the tokenizer's chat template
    names the roles query and document; "qwen3" for a causal Qwen3; "pair" for a classifier. A Qwen3 classifier without
    such files may be a conversion of Qwen3-Reranker or not, so nothing is chosen for it.

    Raises:
        InvalidInputError: no such template, or a chat template that does not show query and document.
        UnsupportedModelError: "auto", and no way to tell.
    """
    check_template(template)
    name = template if template != "auto" else _choice(model, tokenizer, folder)
    if name == "pair":
        return PairTemplate(tokenizer)
    return ChatTemplate(tokenizer) if name == "chat" else Qwen3Template(tokenizer)


def check_template(template: str) -> None:
    if template not in TEMPLATES:
        raise InvalidInputError(f"template={template!r}: must be one of {', '.join(TEMPLATES)}.")


def encode_pairs(
    template: Template,
    pairs: Sequence[tuple[str, str]],
    *,
    instruction: str | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    what: str = "pairs",
    vocabulary: int | None = None,
) -> list[Ids]:
    """Ids of every (query, document).

    Args:
        max_length: longest allowed, in tokens; None has no limit.
        truncate: cut documents at their end instead of refusing pairs that are too long.
        what: how errors call the items.
        vocabulary: token ids must be below.

    Raises:
        RejectedItemsError: pairs that are too long, or whose query alone is, or with a token not in the vocabulary.
    """
    rows = template.encode(pairs, instruction)
    rejected: list[tuple[int, str]] = []
    for index, row in enumerate(rows):
        if max_length is None or len(row) <= max_length:
            if not len(row):
                rejected.append((index, f"{shown(pairs[index])} has no tokens"))
        elif not truncate:
            rejected.append((index, too_long(pairs[index][1], len(row), max_length, "with its query ")))
        elif (cut := template.cut(pairs[index], instruction, row, max_length)) is not None:
            rows[index] = cut
        else:
            reason = (
                f"the query {shown(pairs[index][0])} with instruction and template leaves no place for the document "
                f"in {max_length:,} tokens; shorten it"
            )
            rejected.append((index, reason))
    unknown = [(index, unknown_id(pairs[index], row, vocabulary)) for index, row in enumerate(rows)]
    rejected = sorted([*rejected, *((index, reason) for index, reason in unknown if reason is not None)])
    if rejected:
        raise RejectedItemsError(what, rejected)
    return rows


class _TextTemplate:
    """A template that makes one text, encoded as it stands, with the document somewhere inside."""

    name = ""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def text(self, query: str, document: str, instruction: str | None) -> str:
        raise NotImplementedError

    def encode(self, pairs: Sequence[tuple[str, str]], instruction: str | None) -> list[Ids]:
        return self._ids([self._written(query, document, instruction) for query, document in pairs])

    def cut(self, pair: tuple[str, str], instruction: str | None, row: Ids, max_length: int) -> Ids | None:
        head, _, tail = self._written(pair[0], _MARK, instruction).rpartition(_MARK)
        head_ids, tail_ids = self._ids([head, tail])
        kept = max_length - len(tail_ids)
        return np.concatenate([row[:kept], tail_ids]) if kept > len(head_ids) else None

    def _written(self, query: str, document: str, instruction: str | None) -> str:
        """The text as `encode` reads it: control tokens of the template and the instruction by their own names."""
        controls = controls_of(self.tokenizer)
        return controls.named(self.text(controls.hidden(query), controls.hidden(document), instruction))

    def _ids(self, texts: list[str]) -> list[Ids]:
        return encode(self.tokenizer, texts, add_special_tokens=False)


class Qwen3Template(_TextTemplate):
    """The prompt of Qwen3-Reranker."""

    name = "qwen3"

    def text(self, query: str, document: str, instruction: str | None) -> str:
        instruction = QWEN3_INSTRUCTION if instruction is None else instruction
        return f"{QWEN3_HEAD}<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}{QWEN3_TAIL}"


class ChatTemplate(_TextTemplate):
    """The tokenizer's own chat template, given messages of the roles query and document; a system one instructs."""

    name = "chat"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        if not tokenizer.chat_template:
            raise InvalidInputError("template='chat': the tokenizer has no chat template. Use 'qwen3' or 'pair'.")
        text = self.text("§query§", _MARK, None)
        if text.count("§query§") != 1 or text.count(_MARK) != 1:
            raise InvalidInputError(
                "template='chat': the tokenizer's chat template does not show the content of messages with the roles "
                "'query' and 'document' once each, so it is not a reranker's. Use 'qwen3' or 'pair'."
            )

    def text(self, query: str, document: str, instruction: str | None) -> str:
        messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        if instruction:
            messages.insert(0, {"role": "system", "content": instruction})
        rendered: Any = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return str(rendered)


class PairTemplate:
    """Query and document as the tokenizer joins a pair of texts; an instruction stands before the query."""

    name = "pair"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def encode(self, pairs: Sequence[tuple[str, str]], instruction: str | None) -> list[Ids]:
        before = controls_of(self.tokenizer).named(instruction or "")
        queries = [before + query for query, _ in pairs]
        return encode(self.tokenizer, queries, [document for _, document in pairs])

    def cut(self, pair: tuple[str, str], instruction: str | None, row: Ids, max_length: int) -> Ids | None:
        query = controls_of(self.tokenizer).named(instruction or "") + pair[0]
        if len(encode(self.tokenizer, [query], [""])[0]) >= max_length:
            return None
        return encode(self.tokenizer, [query], [pair[1]], truncation="only_second", max_length=max_length)[0]


def _choice(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: FolderSettings) -> str:
    if folder.is_sentence_transformers:
        return "chat" if folder.chat else "pair"
    chat = tokenizer.chat_template
    if isinstance(chat, str) and all(re.search(f"['\"]{role}['\"]", chat) for role in ("query", "document")):
        return "chat"
    is_qwen3 = model.config.model_type == "qwen3"
    if kind_of(model) == "causal":
        if is_qwen3:
            return "qwen3"
    elif not is_qwen3 or _is_cross_encoder(model):
        return "pair"
    name = folder.name or model.config.name_or_path
    raise UnsupportedModelError(
        f"{f'model={name!r}: ' if name else ''}how {type(model).__name__} wants query and document is "
        "not known: it has no sentence-transformers files, and its chat template has no roles query and document. Say "
        "so with template= (--template): 'qwen3' for Qwen3-Reranker and its conversions, 'pair' for one trained on "
        "pairs as the tokenizer joins them, 'chat' for the tokenizer's chat template."
    )


def _is_cross_encoder(model: PreTrainedModel) -> bool:
    """Whether config.json holds what sentence-transformers' CrossEncoder writes there."""
    return any(getattr(model.config, name, None) for name in CROSS_ENCODER_KEYS)
