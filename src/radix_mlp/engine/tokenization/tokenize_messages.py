"""Messages with images -> keys and pictures, through the model's own processor and chat template."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import BatchFeature, PreTrainedModel

from radix_mlp.engine.tokenization.control_tokens import controls_of
from radix_mlp.engine.tokenization.images import digest_of, open_image
from radix_mlp.engine.tokenization.tokenize import shown, too_long, turn_of
from radix_mlp.errors import InvalidDtypeError, InvalidInputError, RejectedItemsError, UnsupportedModelError
from radix_mlp.hf.pictures.picture_types import PICTURE_TYPES
from radix_mlp.hf.pictures.prepared import Picture
from radix_mlp.hf.pictures.read import image_token_of
from radix_mlp.hf.spans import span_rule_of
from radix_mlp.hf.support import decoder_of

__all__ = ["Message", "MessageReader", "PictureKeys", "ReadMessages", "as_content", "is_message", "read_all"]

Message = Mapping[str, Any]
"""`{"role": ..., "content": text or parts}`; a part is `{"type": "text", "text": ...}` or `{"type": "image", ...}`."""
_MAX_KEY = 2**31 - 1


class ReadMessages(NamedTuple):
    """What the model reads for one list of messages."""

    keys: NDArray[np.int32]
    """`[n]`"""
    pictures: tuple[Picture, ...]
    """In the order of their placeholders."""


class PictureKeys:
    """Numbers the tokens of all pictures that a model is shown: equal pictures have equal ones. From any thread."""

    def __init__(self, first: int) -> None:
        self._next = first
        self._known: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def __call__(self, digest: bytes, tokens: int) -> int:
        """The key of the picture's first token.

        Raises:
            InvalidInputError: too many pictures for one engine.
        """
        with self._lock:
            known = self._known.get(digest)
            if known is None:
                if self._next + tokens > _MAX_KEY:
                    raise InvalidInputError("the engine has read too many images to number more: make a new one")
                known = self._known[digest] = self._next
                self._next += tokens
            return known


def is_message(value: Any) -> bool:
    """Whether an input is no text: a dictionary with text and image, or a list of messages or of parts.

    >>> is_message({"text": "a cat", "image": "cat.png"}), is_message([{"role": "user", "content": "hi"}])
    (True, True)
    >>> is_message("a text"), is_message([5, 6, 7])
    (False, False)
    """
    if isinstance(value, Mapping):
        return True
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(part, Mapping) for part in value)


def as_content(value: Any) -> list[dict[str, Any]]:
    """The parts of a message's content: of a text, a dictionary `{"text": ..., "image": ...}`, or a list of parts."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, Mapping) and "type" not in value:
        unknown = value.keys() - {"text", "image"}
        if unknown or not value:
            names = ", ".join(sorted(unknown)) or "nothing"
            raise InvalidDtypeError(f"a dictionary has 'text' and 'image', not {names}")
        lists = [(kind, found if isinstance(found, list) else [found]) for kind, found in value.items()]
        return [{"type": kind, kind: part} for kind, found in lists for part in found]
    parts_given = [value] if isinstance(value, Mapping) else list(value)
    return [dict(part) for part in parts_given]


class MessageReader:
    """Reads the messages of one request: a picture that comes again is processed once.

    Raises:
        UnsupportedModelError: images of this class of models are not read.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, tokenizer: Any, keys: PictureKeys, vocabulary: int
    ) -> None:
        trunk = decoder_of(model)
        kind = PICTURE_TYPES.get(trunk.config.model_type)
        if kind is None or span_rule_of(trunk) is not None:
            raise UnsupportedModelError(
                f"images of {type(model).__name__} ({trunk.config.model_type}) are not read here. Give texts, or one "
                f"of {', '.join(sorted(PICTURE_TYPES))}."
            )
        if controls_of(tokenizer).tokens:
            raise InvalidInputError("control_tokens='text' is for texts: make the engine without it to read images.")
        self._kind = kind
        self._config = trunk.config
        self._image_token = image_token_of(trunk)
        self._keys = keys
        self._vocabulary = vocabulary
        self._remembered = _RememberedImages(processor.image_processor)
        self._processor = copy.copy(processor)
        self._processor.image_processor = self._remembered

    def read(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> ReadMessages:
        """Keys of what the processor makes of the messages, and their pictures.

        Raises:
            InvalidInputError: an image or the messages cannot be read; the text holds placeholders of its own.
            InvalidDtypeError: something other than messages.
        """
        images: list[Any] = []
        given = [self._message(message, images) for message in messages]
        try:
            text = self._processor.apply_chat_template(given, tokenize=False, add_generation_prompt=generation_prompt)
        except TemplateError as error:
            raise InvalidInputError(f"the chat template refuses the messages: {error}") from error
        token = getattr(self._processor, "image_token", None)
        if isinstance(token, str) and text.count(token) != len(images):
            raise InvalidInputError(
                f"the messages hold {text.count(token)} placeholders {token!r} of {len(images)} images: leave them "
                "out of texts"
            )
        tokenizer = self._processor.tokenizer
        begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        with turn_of(tokenizer):
            self._remembered.shown = []
            found = self._processor(
                text=[text],
                images=images or None,
                return_tensors="pt",
                **({"add_special_tokens": False} if begins else {}),
            )
            results = self._remembered.shown
        ids = found["input_ids"][0].numpy()
        is_shown = ids == self._image_token
        if len(results) != len(images):
            raise InvalidInputError(f"the chat template shows {len(results)} of {len(images)} images")
        pictures = tuple(self._picture(result, results, int(is_shown.sum())) for result in results)
        count = sum(sum(picture.tokens) for picture in pictures)
        if count != is_shown.sum():
            raise InvalidInputError(
                f"the messages hold {is_shown.sum()} placeholders of images, which have {count} tokens: leave out "
                f"{tokenizer.convert_ids_to_tokens(self._image_token)!r} from texts"
            )
        keys = ids.astype(np.int32)
        if pictures:
            keys[is_shown] = np.concatenate([p.key + np.arange(sum(p.tokens)) for p in pictures])
        return ReadMessages(keys, pictures)

    def check_roles(self, *roles: str) -> None:
        """Raise `InvalidInputError` unless the chat template shows a message of each of these roles."""
        marks = [f"§{role}§" for role in roles]
        messages = [
            {"role": role, "content": [{"type": "text", "text": mark}]} for role, mark in zip(roles, marks, strict=True)
        ]
        try:
            text = self._processor.apply_chat_template(messages, tokenize=False)
        except (TemplateError, ValueError) as error:
            text = str(error)
        if any(text.count(mark) != 1 for mark in marks):
            raise InvalidInputError(
                f"the processor's chat template does not show messages of the roles {' and '.join(roles)} once each, "
                "as a reranker's does. Set processor.chat_template, and pass the processor as tokenizer=."
            )

    def _message(self, message: Any, images: list[Any]) -> dict[str, Any]:
        """The message for the template; its images are put into `images`."""
        if not isinstance(message, Mapping) or "content" not in message:
            raise InvalidDtypeError(f"a message must be {{'role': ..., 'content': ...}}, not {shown(message)}")
        content = []
        for part in as_content(message["content"]):
            kind = part.get("type")
            if kind == "text":
                content.append({"type": "text", "text": str(part["text"])})
            elif kind in ("image", "image_url"):
                value = part.get("image_url", part)
                source = {key: value[key] for key in ("image", "path", "base64", "url") if key in value}
                images.append(open_image(source if isinstance(value, Mapping) else value))
                content.append({"type": "image"})
            else:
                raise InvalidDtypeError(f"a part of a message must be a text or an image, not {shown(part)}")
        return {**message, "content": content}

    def _picture(self, result: _Result, results: Sequence[_Result], num_tokens: int) -> Picture:
        """The picture of one image."""
        pixels = result.features["pixel_values"]
        pixels = pixels if isinstance(pixels, torch.Tensor) else torch.stack([*pixels])
        sizes = None
        if self._kind.sizes is not None:
            sizes = torch.as_tensor(np.asarray(result.features[self._kind.sizes]))
            given = sizes.numpy().astype(np.int64).reshape(len(sizes), -1)
        else:
            tiles = sum(len(other.features["pixel_values"]) for other in results)
            given = np.full((len(pixels), 1), num_tokens // tiles)
        tokens = tuple(self._kind.cut(self._config, given).tokens.tolist())
        return Picture(self._keys(result.digest, sum(tokens)), pixels, sizes, tokens)


class _Result(NamedTuple):
    digest: bytes
    features: Mapping[str, Any]


class _RememberedImages:
    """A processor of images that makes each image once, and tells which it was given."""

    def __init__(self, own: Any) -> None:
        self._own = own
        self._known: dict[bytes, _Result] = {}
        self.shown: list[_Result] = []

    def __getattr__(self, name: str) -> Any:
        # copying looks for methods before there is anything
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._own, name)

    def fetch_images(self, images: Any) -> Any:
        """They are here already."""
        return images

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        found = [self._one(image, args, kwargs) for image in _flat(images)]
        self.shown += found
        merged: dict[str, Any] = {}
        for name in found[0].features:
            values = [result.features[name] for result in found]
            joined = len({tuple(np.shape(value)[1:]) for value in values}) == 1
            as_tensors = all(isinstance(value, torch.Tensor) for value in values) and joined
            merged[name] = torch.cat(values) if as_tensors else [part for value in values for part in value]
        return BatchFeature(merged)

    def _one(self, image: Any, args: Any, kwargs: Any) -> _Result:
        digest = digest_of(image)
        if digest not in self._known:
            self._known[digest] = _Result(digest, self._own([image], *args, **kwargs))
        return self._known[digest]


def _flat(images: Any) -> list[Any]:
    return [image for part in images for image in _flat(part)] if isinstance(images, list | tuple) else [images]


def read_all(
    read: Callable[[Any], ReadMessages], given: Sequence[Any], name: str, max_length: int | None
) -> list[ReadMessages]:
    """What `read` makes of every input.

    Raises:
        RejectedItemsError: those that cannot be read, or are longer than `max_length`.
    """
    found: list[ReadMessages] = []
    rejected: list[tuple[int, str]] = []
    for index, value in enumerate(given):
        try:
            row = read(value)
        except (InvalidInputError, OSError, ValueError) as error:
            rejected.append((index, str(error)))
            continue
        if max_length is not None and len(row.keys) > max_length:
            rejected.append((index, too_long(value, len(row.keys), max_length)))
        found.append(row)
    if rejected:
        raise RejectedItemsError(name, rejected)
    return found
