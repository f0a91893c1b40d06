"""A launch cache: finds the compiled Triton kernel by key and skips Triton's per-argument specialization.

Triton's own launch inspects every argument to find the compiled kernel, which takes most of the time of a launch.
`launch` uses a key instead, in which the caller puts everything that the compiler specializes on.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

__all__ = ["evenly_laid", "launch"]

_COMPILED: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}
_INT32 = 2**31


def launch(kernel: Any, programs: int, arguments: Sequence[Any], options: dict[str, Any], key: Hashable) -> None:
    """Run `kernel` like `kernel[(programs,)](*arguments, **options)`.

    Args:
        kernel: what `triton.jit` made.
        programs: size of the grid.
        arguments: those that are not `tl.constexpr`, all of them, in order.
        options: those that are, and Triton's own.
        key: equal only for calls that Triton would run with one compiled kernel, on one device; None if unknown.
    """
    found = None if key is None else _COMPILED.get(key)
    if found is not None:
        compiled, constants = found
        compiled[(programs, 1, 1)](*arguments, *constants)
        return
    compiled = kernel[(programs,)](*arguments, **options)
    # the interpreter compiles nothing
    if key is not None and compiled is not None:
        _COMPILED[key] = compiled, tuple(options[name] for name in kernel.arg_names[len(arguments) :])


def evenly_laid(*tensors: Tensor) -> bool:
    """Whether all addresses and strides of `[M, H, D]` tensors are multiples of 16 to Triton, above 0, in 32 bits."""
    for x in tensors:
        row, head, _ = x.stride()
        if (x.data_ptr() | row | head) & 15 or not (0 < row < _INT32 and 0 < head < _INT32):
            return False
    return True
