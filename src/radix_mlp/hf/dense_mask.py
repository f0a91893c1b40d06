"""Folded calls of models that compute attention themselves: the tree as a dense mask, biases by depth."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedCallError, UnsupportedModelError
from radix_mlp.hf.attention_function import note_tree_seen_by
from radix_mlp.hf.dense_types import DenseType, dense_type_of
from radix_mlp.hf.rebound import rebound
from radix_mlp.hf.tree_mask import TreeMask

__all__ = ["install_dense", "run_dense", "uninstall_dense"]

_DEPTH: ContextVar[list[Tensor] | None] = ContextVar("radix_depths_of_the_running_call", default=None)


def run_dense(trunk: PreTrainedModel, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a forward on compact rows, given a `TreeMask`, with the mask that `trunk` can read.

    Raises:
        UnsupportedModelError: biases were made from the numbers of rows.
    """
    dense = dense_type_of(trunk)
    return run(*args, **kwargs) if dense is None else _run_dense(dense, trunk, run, args, kwargs)


# masks and biases are made for each batch, and layers look at what they are
@torch.compiler.disable
def _run_dense(
    dense: DenseType, trunk: PreTrainedModel, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    mask = kwargs["attention_mask"]
    if dense.attention:
        return run(*args, **{**kwargs, "attention_mask": _PassedOn.of_mask(mask)})
    kwargs = {**kwargs, "attention_mask": _additive(mask.visible(), trunk.dtype)}
    if dense.alibi_function and getattr(trunk, "use_alibi", True):
        run = _with_alibi_by_depth(trunk, run, dense.alibi_function)
    elif not dense.alibi:
        return run(*args, **kwargs)
    with _alibi_by(mask.depth, type(trunk).__name__):
        return run(*args, **kwargs)


def install_dense(trunk: torch.nn.Module) -> None:
    """Let the parts of a trunk that know rows by their numbers follow the tree of folded calls."""
    dense = dense_type_of(trunk)
    if dense is None:
        return
    if dense.alibi:
        trunk.__dict__[dense.alibi] = AlibiByDepth(trunk, dense.alibi)
    for module in trunk.modules():
        if type(module).__name__ == dense.attention:
            module.__dict__["_attn"] = AttentionOnTree(module)


def uninstall_dense(trunk: torch.nn.Module) -> None:
    """Undo `install_dense`."""
    for module in trunk.modules():
        state = module.__dict__
        for name in [name for name, value in state.items() if isinstance(value, AlibiByDepth | AttentionOnTree)]:
            del state[name]


class AlibiByDepth:
    """In place of a method that makes alibi `[H, 1, M]`: the same of the depths in a folded call."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        self.module = module
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The method's own result, or its result for one sequence, read at the depth of each row."""
        method = functools.partial(getattr(type(self.module), self.name), self.module)
        if _DEPTH.get() is None:
            own: Tensor = method(*args, **kwargs)
            return own
        return _read_at_depths(method, *args, **kwargs)


class AttentionOnTree:
    """In place of `_attn` of an attention that reads a triangular buffer `bias [1, 1, P, P]`."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The class's own `_attn`, with the tree in the place of the buffer if the call brings one."""
        module: Any = self.module
        if not isinstance(attention_mask, TreeMask):
            return type(module)._attn(module, query, key, value, attention_mask, *args, **kwargs)
        note_tree_seen_by(module)
        # what the last row of the buffer shows is the window of a local layer
        window = int(module.bias[0, 0, -1].sum()) if getattr(module, "attention_type", "") == "local" else None
        bias = attention_mask.visible(window)[None, None].to(module.bias.dtype)
        return type(module)._attn(_WithBias(module, bias), query, key, value, None, *args, **kwargs)


class _WithBias:
    """A module whose buffer `bias` is another one."""

    def __init__(self, module: torch.nn.Module, bias: Tensor) -> None:
        self._module = module
        self.bias = bias

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _PassedOn(TreeMask):
    """A tree mask that stays itself when a trunk turns what it takes for a 2-D mask into an additive one."""

    @staticmethod
    def of_mask(mask: TreeMask) -> _PassedOn:
        with torch._C.DisableTorchFunctionSubclass():
            passed = mask.as_subclass(_PassedOn)
        passed.windows, passed.plan, passed.windowed_spans = mask.windows, mask.plan, mask.windowed_spans
        return passed

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """What makes `(1 - mask) * smallest` of a mask gives the mask back."""
        # a copy on another device is an ordinary tree mask
        is_cast = func is torch.Tensor.to and set(kwargs or {}) == {"dtype"}
        if is_cast or func.__name__ in ("unsqueeze", "rsub", "__rsub__", "mul", "__mul__"):
            return next(x for x in args if isinstance(x, _PassedOn))
        return super().__torch_function__(func, types, args, kwargs)


def _read_at_depths(make: Callable[..., Tensor], first: Any, second: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What `make` gives for one sequence, `[H, 1, T]`, at the depth of each row: `[H, 1, M]`."""
    depths = _DEPTH.get()
    assert depths, "only a forward in `_alibi_by` gets here, and makes its biases once"
    depth = depths.pop()
    length = int(depth.max()) + 1
    # (mask, number of heads, ...) or (number of heads, length, ...)
    given = (depth.new_ones(1, length), second) if isinstance(first, Tensor) else (first, length)
    return make(*given, *args, **kwargs).index_select(2, depth)


def _with_alibi_by_depth(trunk: PreTrainedModel, run: Any, name: str) -> Callable[..., Any]:
    """The forward of the class, calling the function `name` of its file with a sequence and reading it at depths."""
    kind: Any = type(trunk)
    if getattr(run, "func", None) is not kind.forward:
        raise UnsupportedCallError(
            f"{kind.__name__} has a forward of its own instead of that of its class, whose biases (alibi) would go by "
            "the numbers of rows. Remove it, or run the model unfolded (radix_mlp.disable(model))."
        )
    by_depth = _at_depths(getattr(sys.modules[kind.__module__], name))
    return functools.partial(rebound(kind.forward, ((name, by_depth),)), trunk)


@functools.cache
def _at_depths(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return functools.partial(_read_at_depths, function)


@contextlib.contextmanager
def _alibi_by(depth: Tensor, kind: str) -> Iterator[None]:
    """Around one forward of a trunk that has to make its alibi once."""
    depths = [depth]
    token = _DEPTH.set(depths)
    try:
        yield
    finally:
        _DEPTH.reset(token)
    if depths:
        raise UnsupportedModelError(
            f"{kind} did not make its biases (alibi) through its own method, so they go by the numbers of rows. Run it "
            "unfolded (radix_mlp.disable(model))."
        )


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """`[M, M]` bool -> `[1, 1, M, M]` of 0 where a row sees another, and else the smallest number, as transformers."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[None, None]
