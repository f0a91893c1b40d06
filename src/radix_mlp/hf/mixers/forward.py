"""The forward of a mixer on compact rows: the class's own code over globals in which its kernels follow the tree.

Everything else in that code (projections, gates, norms) is done row by row and stays as it is. Nothing of the module
changes but its instance attribute `forward`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from radix_mlp.errors import UnsupportedCallError
from radix_mlp.hf.attention_function import note_tree_seen_by
from radix_mlp.hf.mixers.discovery import gives_states, is_expanded
from radix_mlp.hf.mixers.expand import run_expanded
from radix_mlp.hf.mixers.kernels import FUSED, KERNELS, follow, not_fused
from radix_mlp.hf.mixers.lightning import is_lightning, run_lightning
from radix_mlp.hf.prefill_cache import PrefillCache
from radix_mlp.hf.rebound import rebound
from radix_mlp.hf.tree_mask import TreeMask
from radix_mlp.ops import AttentionTree
from radix_mlp.plan import RadixPlan

__all__ = ["MixerForward", "MixerLayerForward", "tree_for_mixers"]

_MASK = "mixers"


class MixerForward:
    """Stands in for the forward of one mixer; a call that brings no tree runs as before."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the class, without `self`."""
        signature = inspect.signature(type(self.module).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the mixer on compact rows if the call brings their tree."""
        mask = _tree_mask(kwargs, *args)
        if mask is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        return self._follow(mask, args, kwargs)

    # levels differ from batch to batch, so that a graph would be made for each
    @torch.compiler.disable
    def _follow(self, mask: TreeMask, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.module
        plan = _plan_of(mask, module)
        for name in ("cache_params", "past_key_values"):
            cache = kwargs.get(name)
            if cache is not None and not (isinstance(cache, PrefillCache) and gives_states(type(module))):
                raise UnsupportedCallError(
                    f"{type(module).__name__} was given {name} in a folded call, which does not keep its states. Call "
                    "the model itself with use_cache=True to run it unfolded, or with use_cache=False."
                )
        rows = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        if tuple(rows.shape[:2]) != (1, plan.num_rows):
            raise UnsupportedCallError(
                f"{type(module).__name__} was given {tuple(rows.shape)} instead of (1, {plan.num_rows}, ...) rows of a "
                "folded call. Run the model unfolded (radix_mlp.disable(model))."
            )
        note_tree_seen_by(module)
        # compact rows hold no padding, and the tree is no mask to multiply by
        args = tuple(None if isinstance(x, TreeMask) else x for x in args)
        kwargs = {n: None if isinstance(x, TreeMask) else x for n, x in kwargs.items() if n != "radix_tree"}
        if is_expanded(type(module)):
            return run_expanded(module, plan, args, kwargs)
        if is_lightning(type(module)):
            return run_lightning(module, plan, rows)
        kernels = (*KERNELS.items(), *((name, not_fused) for name in FUSED))
        with follow(plan):
            return rebound(type(module).forward, kernels)(module, *args, **kwargs)


class MixerLayerForward:
    """Stands in for the forward of a layer that hands its mixer the mask alone, and would hand it none."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, with the tree as the mask where a folded call brings one."""
        mask = _tree_mask(kwargs)
        if mask is not None:
            # an argument of the layer, so that checkpointing computes it with the tree as well
            given = kwargs.get("attention_mask")
            if given is None:
                kwargs["attention_mask"] = mask
            elif isinstance(given, dict):
                kwargs["attention_mask"] = {name: mask if part is None else part for name, part in given.items()}
        return type(self.module).forward(self.module, *args, **kwargs)


def tree_for_mixers(tree: AttentionTree, mask: TreeMask) -> AttentionTree:
    """The tree with its mask, which brings the plan, for mixers that are handed keywords and no mask."""
    return tree._replace(prepared={**tree.prepared, _MASK: mask})


def _tree_mask(kwargs: dict[str, Any], *args: Any) -> TreeMask | None:
    for mask in (kwargs.get("attention_mask"), *args):
        if isinstance(mask, TreeMask):
            return mask
    tree = kwargs.get("radix_tree")
    found: TreeMask | None = None if tree is None else tree.prepared[_MASK]
    return found


def _plan_of(mask: TreeMask, module: torch.nn.Module) -> RadixPlan:
    if mask.plan is None:
        raise UnsupportedCallError(
            f"{type(module).__name__} needs the plan of a folded call, and its tree mask brings none: call the model "
            "itself or radix_mlp.hf.forward_compact."
        )
    return mask.plan
