"""Memory of what is gone, given back to the system."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

__all__ = ["keep_what_is_there", "release"]


YOUNG = 50_000
"""New objects until the next look: what requests are made of is gone long before, by itself."""


def keep_what_is_there() -> None:
    """Let garbage collection leave alone all that exists: to look through it stops all threads for 0.3 s each time."""
    gc.set_threshold(YOUNG, 10, 10)
    gc.collect()
    gc.freeze()
    # counts what is left, so that the next time is soon
    gc.collect()


def release() -> None:
    """Collect what refers to itself, and give free memory back, which glibc keeps in pieces otherwise."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
