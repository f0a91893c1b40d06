"""What a call of this package crosses: files, functions, pairs of files that call each other, and the deepest stack.

python -m tools.trace_path          `Engine.embed` of two texts and `POST /embed` of the same, warm, on a CPU
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import radix_mlp

__all__ = ["Trace", "trace", "trace_embed", "trace_post_embed"]

ROOT = str(Path(radix_mlp.__file__).parent)
TEXTS = ["Query: what is a radix? Text: a root.", "Query: what is a radix? Text: a vegetable."]


@dataclass
class Trace:
    """Counted over the caller's thread and all that were started since `trace` began."""

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


def trace(
    call: Callable[[], Any], inside: AbstractContextManager[Any] | None = None, *, num_warm_calls: int = 0
) -> Trace:
    """Run `call` and count the functions of this package that it enters.

    Args:
        call: what to count.
        inside: entered first, such as a running server: what its threads do during the call counts, too.
        num_warm_calls: calls before the one that counts.
    """
    found, is_counting = Trace(), False

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or not is_counting or (file := _file_of(frame)) is None:
            return
        found.functions.add((file, frame.f_code.co_qualname))
        ours = [name for name in map(_file_of, _callers(frame)) if name is not None]
        if ours and ours[0] != file:
            found.arrows.add((ours[0], file))
        found.deepest = max(found.deepest, 1 + len(ours))

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        with inside or nullcontext():
            for _ in range(num_warm_calls):
                call()
            is_counting = True
            call()
            is_counting = False
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


def trace_embed() -> Trace:
    """`Engine.embed` of two texts."""
    engine = radix_mlp.Engine("tiny")
    return trace(lambda: engine.embed(TEXTS), num_warm_calls=2)


def trace_post_embed() -> Trace:
    """`POST /embed` of two texts."""
    from fastapi.testclient import TestClient

    from radix_mlp.serve.app import create_app
    from radix_mlp.serve.settings import ServeSettings

    client = TestClient(create_app(radix_mlp.Engine("tiny"), ServeSettings(model_id="tiny")))
    return trace(
        lambda: client.post("/embed", json={"inputs": TEXTS}).raise_for_status(), inside=client, num_warm_calls=2
    )


def main() -> None:
    for name, found in (("Engine.embed", trace_embed()), ("POST /embed", trace_post_embed())):
        lines = [f"{name}: {found}", *sorted(found.files), *(f"both ways: {a} {b}" for a, b in sorted(found.both_ways))]
        sys.stdout.write("\n  ".join(lines) + "\n")


if __name__ == "__main__":
    main()
