"""Counts in a folded forward which attention layers saw the tree: one that did not has attended past it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from radix_mlp.errors import UnsupportedModelError

__all__ = ["every_layer_sees_the_tree", "note_tree_seen_by"]

_SEEN: ContextVar[set[int] | None] = ContextVar("radix_layers_that_saw_the_tree", default=None)


def note_tree_seen_by(layer: torch.nn.Module) -> None:
    """Called by the attention function. Does nothing outside of `every_layer_sees_the_tree`."""
    if torch.compiler.is_compiling():
        return
    seen = _SEEN.get()
    if seen is not None:
        seen.add(id(layer))


@contextmanager
def every_layer_sees_the_tree(model: torch.nn.Module, num_layers: int) -> Iterator[None]:
    """Around one folded forward of `model`, which has `num_layers` attention layers.

    Raises:
        UnsupportedModelError: fewer layers called the attention function with the tree.
    """
    seen: set[int] = set()
    token = _SEEN.set(seen)
    try:
        yield
    finally:
        _SEEN.reset(token)
    # a compiled layer cannot be counted
    if len(seen) < num_layers and not _skips_layers(model) and not _is_compiled(model):
        raise UnsupportedModelError(
            f"only {len(seen)} of the {num_layers} attention layers of {type(model).__name__} saw the tree of a folded "
            "call: the others do not call transformers' attention interface. Run the model unfolded "
            "(radix_mlp.disable(model))."
        )


def _skips_layers(model: torch.nn.Module) -> bool:
    return model.training and any(getattr(module, "layerdrop", 0) for module in model.modules())


def _is_compiled(model: torch.nn.Module) -> bool:
    return any(
        module._compiled_call_impl is not None or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )
