"""Images as callers give them: opened, and told apart by what they show."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
from pathlib import Path
from typing import Any

from radix_mlp.engine.tokenization.tokenize import shown
from radix_mlp.errors import InvalidDtypeError, InvalidInputError

__all__ = ["digest_of", "open_image"]

_KEYS = ("image", "path", "base64", "url")


def open_image(value: Any) -> Any:
    """A PIL image in RGB.

    Args:
        value: a PIL image, bytes of an image file, a path, the text of a `data:` URL or of base64, or a dictionary
            with one of these as `"image"`, `"path"`, `"base64"` or `"url"`, as in messages.

    Raises:
        InvalidInputError: it cannot be read as an image; or a URL, which is not fetched.
        InvalidDtypeError: something else.
        ImportError: PIL is not installed.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, dict):
        found = [value[key] for key in _KEYS if value.get(key) is not None]
        if len(found) != 1:
            raise InvalidDtypeError(f"an image must be one of {', '.join(_KEYS)}, not {shown(value)}")
        return open_image(found[0])
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    source = _source(value)
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidInputError(f"{shown(value)} cannot be read as an image: {error}") from error


def digest_of(image: Any) -> bytes:
    """Equal for images of the same size with the same pixels, and for no others."""
    size = f"{image.mode} {image.size}".encode()
    return hashlib.sha256(size + image.tobytes()).digest()


def _source(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return io.BytesIO(bytes(value))
    if isinstance(value, Path):
        return value
    if not isinstance(value, str):
        raise InvalidDtypeError(
            f"an image must be a PIL image, bytes, a path, a data: URL or base64, not {type(value).__name__}"
        )
    if value.startswith(("http://", "https://")):
        raise InvalidInputError(f"{shown(value)} is not fetched: download the image, and give its bytes or path")
    if value.startswith("data:"):
        return io.BytesIO(_decoded(value.partition(",")[2], value))
    path = value.removeprefix("file://")
    # of base64, which is too long for a name, pathlib would raise
    if os.path.isfile(path):
        return Path(path)
    return io.BytesIO(_decoded(value, value))


def _decoded(text: str, value: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInputError(f"{shown(value)} is neither the path of a file nor base64 of an image") from error
