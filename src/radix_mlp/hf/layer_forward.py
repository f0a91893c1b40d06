"""Decoder layers compiled by torch, each by itself, in folded calls.

What belongs to a batch (its tree, the tables of kernels) goes into the compiled function as tensors of any size, so
that another batch needs no other graph. Hooks, gradient checkpointing and sharding stand around the compiled function
as they stand around the forward of the class.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor

from radix_mlp.hf.attention_function import note_tree_seen_by
from radix_mlp.hf.layer_compiler import FAILURES, LayerCompiler
from radix_mlp.hf.text_tower import text_modules
from radix_mlp.hf.tree_mask import TreeMask
from radix_mlp.hf.windows import Chunk, window_of
from radix_mlp.ops.tensors import of_any_size

__all__ = ["LayerForward", "decoder_layers", "install_layers", "uninstall_layers"]

# accelerate keeps the forward of a module with a hook under the second name
_PLACES = ("forward", "_old_forward")
# around the forward of a class from transformers 5.23 on
_CHECKPOINTING = "forward_with_checkpointing"


class LayerForward:
    """Stands in for the forward of one decoder layer; a call that brings no tree runs as before."""

    def __init__(self, module: torch.nn.Module, compiler: LayerCompiler) -> None:
        self.module = module
        self.compiler = compiler
        self._parts = [part for part in module.modules() if _sees_tree(part)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        mask = None if torch.compiler.is_compiling() else _mask_in(kwargs, *args)
        kind: Any = type(self.module)
        if mask is None or not _can_compile(mask, kwargs) or self.compiler.why_not(mask.device, kind) is not None:
            return kind.forward(self.module, *args, **kwargs)
        args, kwargs = self._of_any_size(mask, args, kwargs)
        own = kind.forward
        while own.__code__.co_name == _CHECKPOINTING:
            own = _inside(own)
        if own is not kind.forward and self.module.training and getattr(self.module, "gradient_checkpointing", False):
            return _around(kind.forward, functools.partial(self._compiled, own))(self.module, *args, **kwargs)
        return self._compiled(own, self.module, *args, **kwargs)

    def _compiled(self, own: Callable[..., Any], layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        function = self.compiler.function_for(own, layer, len(self._parts))
        try:
            out = function(layer, args, kwargs)
        except FAILURES as error:
            # an error of the layer's own comes up here
            out = own(layer, *args, **kwargs)
            self.compiler.fail(layer, error)
            return out
        for part in self._parts:
            note_tree_seen_by(part)
        return out

    def _of_any_size(
        self, mask: TreeMask, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments without what differs between layers, and with tables whose sizes stand for themselves."""
        windows = mask.windows
        if windows is not None and len(windows) > 1 and self._parts:
            marked = mask.with_windows((window_of(windows, self._parts[0]),))
            args = tuple(_replaced(x, marked) for x in args)
            kwargs = {name: _replaced(x, marked) for name, x in kwargs.items()}
        tree = kwargs.get("radix_tree")
        for tables in () if tree is None else tree.prepared.values():
            for table in tables or ():
                if isinstance(table, Tensor):
                    of_any_size(table)
        return args, kwargs


def install_layers(tower: torch.nn.Module, compiler: LayerCompiler) -> int:
    """Let the decoder layers of a tower run compiled in folded calls; returns how many.

    Layers with a forward of somebody else's stay as they are.
    """
    count = 0
    for _, layer in decoder_layers(tower):
        state = layer.__dict__
        place = "_old_forward" if "_old_forward" in state else "forward"
        kept = state.get(place)
        if kept is None or getattr(kept, "__func__", None) is type(layer).forward:
            state[place] = LayerForward(layer, compiler)
            count += 1
    return count


def uninstall_layers(trunk: torch.nn.Module) -> None:
    """Undo `install_layers`."""
    for module in trunk.modules():
        state = module.__dict__
        for place in _PLACES:
            found = state.get(place)
            if not isinstance(found, LayerForward):
                continue
            if place == "forward":
                del state[place]
            else:
                state[place] = type(module).forward.__get__(module)


def decoder_layers(tower: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The members of the outermost lists of modules in which attention is.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_model
        >>> [name for name, _ in decoder_layers(tiny_model().model)]
        ['layers.0', 'layers.1']
    """
    found: list[tuple[str, torch.nn.Module]] = []
    inside: set[int] = set()
    for name, module in text_modules(tower):
        is_outermost = isinstance(module, torch.nn.ModuleList) and id(module) not in inside
        if is_outermost and any(_sees_tree(part) for part in module.modules()):
            found += [(f"{name}.{place}", layer) for place, layer in module.named_children()]
            inside.update(map(id, module.modules()))
    return found


def _sees_tree(module: torch.nn.Module) -> bool:
    return "is_causal" in vars(module)


def _mask_in(kwargs: dict[str, Any], *args: Any) -> TreeMask | None:
    return next((x for x in (kwargs.get("attention_mask"), *args) if isinstance(x, TreeMask)), None)


def _can_compile(mask: TreeMask, kwargs: dict[str, Any]) -> bool:
    """Not a single row, which would take a graph of its own; not spans and chunks, nor a cache to be filled."""
    in_chunks = any(isinstance(window, Chunk) for window in mask.windows or ())
    caches = kwargs.get("past_key_values"), kwargs.get("past_key_value")
    return mask.shape[2] == 2 and mask.shape[3] > 1 and not in_chunks and caches == (None, None)


def _replaced(x: Any, mask: TreeMask) -> Any:
    if isinstance(x, TreeMask):
        return mask
    if isinstance(x, dict):
        return {name: _replaced(part, mask) for name, part in x.items()}
    return x


def _inside(wrapper: Any) -> Any:
    """The forward that transformers' checkpointing is wrapped around."""
    return wrapper.__closure__[wrapper.__code__.co_freevars.index("forward")].cell_contents


def _around(wrapper: Any, forward: Callable[..., Any]) -> FunctionType:
    """transformers' checkpointing around another forward: compiled code is inside of it, as it is in FSDP2's hooks."""
    cells = [
        CellType(forward) if name == "forward" else cell
        for name, cell in zip(wrapper.__code__.co_freevars, wrapper.__closure__, strict=True)
    ]
    return FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, closure=tuple(cells))
