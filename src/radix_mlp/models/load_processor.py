"""A model's processor: what turns messages with images into token ids and pixels."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor, ProcessorMixin

from radix_mlp.errors import InvalidInputError

__all__ = ["load_processor"]


def load_processor(name: str, *, trust_remote_code: bool = False) -> Any:
    """The processor of a folder or hub id.

    Raises:
        InvalidInputError: it has none, or one that cannot be loaded here, as without torchvision.
    """
    try:
        found = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        # files that are missing, packages that are: each class has its own
        reason = " ".join(str(error).split())[:300]
        raise InvalidInputError(
            f"model={name!r}: its processor, which reads images, cannot be loaded: {reason}. Give the model with its "
            "preprocessor_config.json, or a processor as tokenizer=."
        ) from error
    if not isinstance(found, ProcessorMixin):
        raise InvalidInputError(
            f"model={name!r} has no processor for images, but a {type(found).__name__} alone. Give texts, or a "
            "model that reads images."
        )
    return found
