"""Values as messages show them."""

from __future__ import annotations

__all__ = ["shorten"]


def shorten(text: str) -> str:
    r"""A value for a message: valid UTF-8, one line, nothing that a terminal would obey, not long.

    >>> shorten("a\x1b[31m\n")
    'a\\x1b[31m\\n'
    """
    letters = (letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text[:81])
    text = "".join(letters)
    return text if len(text) <= 80 else text[:77] + "..."
