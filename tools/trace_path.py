"""What a call of this package crosses: files, functions, pairs of files that call each other, and the deepest stack.

python -m tools.trace_path          `Engine.embed` of two texts, warm, on a CPU
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import radix_mlp

__all__ = ["Trace", "trace"]

ROOT = str(Path(radix_mlp.__file__).parent)


@dataclass
class Trace:
    """Counted over all threads that were started within the call, and the caller's."""

    functions: set[tuple[str, str]] = field(default_factory=set)
    """(file, function) that was entered."""
    arrows: set[tuple[str, str]] = field(default_factory=set)
    """(file, other file) of which a function of the first called one of the second."""
    deepest: int = 0
    """Frames of this package on one stack."""

    @property
    def files(self) -> set[str]:
        """Files of which a function was entered."""
        return {file for file, _ in self.functions}

    @property
    def both_ways(self) -> set[tuple[str, str]]:
        """Pairs of files each of which calls the other."""
        return {(a, b) for a, b in self.arrows if a < b and (b, a) in self.arrows}

    def __str__(self) -> str:
        return (
            f"{len(self.files)} files, {len(self.functions)} functions, {len(self.arrows)} arrows, "
            f"{len(self.both_ways)} pairs both ways, {self.deepest} frames deep"
        )


def trace(call: Callable[[], Any]) -> Trace:
    """Run `call` and count the functions of this package that it enters."""
    found = Trace()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        file = _file_of(frame)
        if event != "call" or file is None:
            return
        found.functions.add((file, frame.f_code.co_qualname))
        ours = [name for name in map(_file_of, _callers(frame)) if name is not None]
        if ours and ours[0] != file:
            found.arrows.add((ours[0], file))
        found.deepest = max(found.deepest, 1 + len(ours))

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return found


def _callers(frame: FrameType) -> list[FrameType]:
    callers: list[FrameType] = []
    above = frame.f_back
    while above is not None:
        callers.append(above)
        above = above.f_back
    return callers


def _file_of(frame: FrameType) -> str | None:
    name = frame.f_code.co_filename
    # module level runs at import
    is_ours = name.startswith(ROOT) and frame.f_code.co_name != "<module>"
    return str(Path(name).relative_to(ROOT)) if is_ours else None


def main() -> None:
    engine = radix_mlp.Engine("tiny")
    texts = ["Query: what is a radix? Text: a root.", "Query: what is a radix? Text: a vegetable."]
    for _ in range(2):
        engine.embed(texts)
    found = trace(lambda: engine.embed(texts))
    lines = [str(found), *sorted(found.files), *(f"both ways: {a} {b}" for a, b in sorted(found.both_ways))]
    sys.stdout.write("\n  ".join(lines) + "\n")


if __name__ == "__main__":
    main()
