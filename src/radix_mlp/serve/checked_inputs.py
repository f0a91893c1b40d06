"""`Inputs`: what a client sent, checked and cut before the engine sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from radix_mlp.engine.engine import Engine
from radix_mlp.engine.tasks.embed import EmbedTokensOptions
from radix_mlp.engine.tokenization.token_ids import TextOrIds
from radix_mlp.errors import InvalidInputError
from radix_mlp.models.pooler import pooler_of
from radix_mlp.serve.http.limits import check_batch_size, check_not_empty, check_unicode, cut_characters
from radix_mlp.serve.model_info import ModelInfo
from radix_mlp.serve.settings import POOLING_NAMES, ServeSettings
from radix_mlp.serve.tokenizer import Tokens

__all__ = ["Inputs"]

Options = TypeVar("Options", bound=EmbedTokensOptions)

CHARACTERS_UNCHECKED = 8
"""For each token of the limit: what is not longer is tokenised together with documents only."""


class Inputs:
    """The limits of one model and server."""

    def __init__(self, engine: Engine, settings: ServeSettings, info: ModelInfo, tokens: Tokens) -> None:
        self.settings = settings
        self.info = info
        self.tokens = tokens
        self.folder = engine.loaded.folder
        pooling: Any = POOLING_NAMES[settings.pooling] if settings.pooling else None
        self.pools_prompt = info.type != "embedding" or pooler_of(engine.loaded.folder, pooling).include_prompt

    def check_size(self, num_items: int, num_texts: int | None = None) -> None:
        """Refuse what could never run: too many items of a client, or more texts of them than there are places.

        Raises:
            BatchTooLargeError: it is too large, and large requests do not run in parts.
        """
        settings = self.settings
        if settings.split_client_batches:
            return
        check_batch_size(num_items, settings.max_client_batch_size)
        check_batch_size(num_texts or num_items, settings.max_concurrent_requests)

    async def texts(
        self,
        texts: Sequence[TextOrIds],
        options: Options,
        truncate: bool | None,
        max_tokens: int | None,
        left: bool,
        name: str,
    ) -> tuple[Sequence[TextOrIds], Options]:
        """Checked texts, and `options` with the prompt that goes before them and whether to cut."""
        check_not_empty(texts, name)
        self.check_ids(texts, name)
        cut, limit = self.cutting(truncate, max_tokens)
        options = replace(options, truncate=cut)
        if options.prompt_name is None:
            settings = self.settings
            options = replace(options, prompt=settings.default_prompt, prompt_name=settings.default_prompt_name)
        found = [self.cut(text, truncate=cut, name=name, left=left) for text in texts]
        if not (cut and left) and limit is None:
            return found, options
        prompt = self.folder.prompt(options.prompt, options.prompt_name)
        if prompt and not self.pools_prompt:
            raise InvalidInputError(
                "`truncation_direction` left and `truncate_prompt_tokens`: not with this model, which leaves the "
                "prompt out of its vectors."
            )
        limit = self.info.max_input_length if limit is None else limit
        rows = await self.tokens.cut(found, limit, prompt, left=left)
        return rows, replace(options, prompt="", prompt_name=None)

    async def texts_or_pairs(
        self,
        inputs: Sequence[TextOrIds | tuple[str, str]],
        truncate: bool | None,
        max_tokens: int | None,
        left: bool,
        name: str,
    ) -> tuple[list[Any], bool]:
        """Checked texts and pairs of texts, and whether to cut."""
        check_not_empty(["".join(item) if isinstance(item, tuple) else item for item in inputs], name)
        cut, limit = self.cutting(truncate, max_tokens)
        items: list[Any] = []
        for item in inputs:
            pair = isinstance(item, tuple)
            if pair and left and cut:
                raise InvalidInputError("`truncation_direction` left: pairs of texts are cut on the right only.")
            parts = [self.cut(part, truncate=cut, name=name, left=left) for part in (item if pair else (item,))]
            items.append(tuple(parts) if pair else parts[0])
        if (left and cut) or limit is not None:
            limit = self.info.max_input_length if limit is None else limit
            items = await self.tokens.cut(items, limit, left=left)
        return items, cut

    def cutting(self, truncate: bool | None, max_tokens: int | None) -> tuple[bool, int | None]:
        """Whether to cut, and at how many tokens if not at the model's limit; -1 of vLLM's is that limit."""
        if max_tokens is None:
            return self.settings.auto_truncate if truncate is None else truncate, None
        if max_tokens != -1 and max_tokens < 1:
            raise InvalidInputError(f"`truncate_prompt_tokens` {max_tokens}: must be -1 or at least 1.")
        return True, None if max_tokens == -1 or max_tokens >= self.info.max_input_length else max_tokens

    async def check_heads(self, queries: Sequence[str], instruction: str | None) -> None:
        """Refuse what stands before documents if it does not fit: it is not cut, and is tokenised with every one."""
        limit = self.info.max_input_length
        check_unicode(instruction or "", "instruction")
        for name, texts in (("instruction", [instruction or ""]), ("query", list(dict.fromkeys(queries)))):
            for text in texts:
                cut_characters(text, limit, truncate=False, name=name)
                if len(text) > CHARACTERS_UNCHECKED * limit:
                    [ids] = await self.tokens.encode([text], add_special_tokens=False)
                    count = len(ids)
                    if count > limit:
                        raise InvalidInputError(f"`{name}` has {count} tokens, and the model takes {limit}.")

    def cutting_pairs(self, truncate: bool | None, max_tokens: int | None) -> bool:
        """The same for pairs of texts, which are cut at the model's limit only."""
        cut, limit = self.cutting(truncate, max_tokens)
        if limit is not None:
            raise InvalidInputError(
                f"`truncate_prompt_tokens` {limit}: a pair is cut at the model's limit only; say -1."
            )
        return cut

    def cut(self, text: Any, *, truncate: bool, name: str, left: bool = False) -> Any:
        """A text without the characters that cannot be within the limit; token ids as they are."""
        if not isinstance(text, str):
            return text
        return cut_characters(text, self.info.max_input_length, truncate=truncate, name=name, left=left)

    def check_ids(self, texts: Sequence[TextOrIds], name: str) -> None:
        """Refuse token ids that the model does not have."""
        size = self.info.vocab_size
        for index, ids in enumerate(texts):
            if isinstance(ids, str):
                continue
            # a list would be copied to an array for this alone
            largest = np.max(ids, initial=0) if isinstance(ids, np.ndarray) else max(ids, default=0)
            if largest >= size:
                raise InvalidInputError(f"`{name}` number {index}: token {largest}, and the model has {size}.")

    def check_dimensions(self, dimensions: int | None) -> None:
        """Refuse more dimensions than the model has, and none."""
        most = self.info.dimensions
        if dimensions is not None and not (most is not None and 1 <= dimensions <= most):
            raise InvalidInputError(f"`dimensions` is {dimensions}: must be from 1 to {most}, the model's own.")
