"""Arguments that all operations on the tree share: the tree, rows, devices and dtypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from radix_mlp.errors import InvalidDtypeError, InvalidInputError
from radix_mlp.ops.autocast import without_autocast
from radix_mlp.ops.device_plan import DevicePlan, to_device
from radix_mlp.ops.scan.registry import implementation
from radix_mlp.ops.scan.scan_call import ScanKind
from radix_mlp.ops.scan.scan_tree import ScanTree
from radix_mlp.ops.tensors import check_tensors
from radix_mlp.plan.radix_plan import RadixPlan

__all__ = ["Tree", "check_rows", "check_shape", "run", "tree_of"]

Tree = RadixPlan | DevicePlan | ScanTree


def tree_of(plan: Tree, **rows: Tensor) -> ScanTree:
    """The tree of a plan, which must be on the device of the one tensor given."""
    check_tensors(**rows)
    ((name, x),) = rows.items()
    if isinstance(plan, RadixPlan):
        plan = to_device(plan, x.device, tree=False)
    if isinstance(plan, DevicePlan):
        plan = plan.scan_tree
    if not isinstance(plan, ScanTree):
        raise InvalidDtypeError(f"tree is a {type(plan).__name__}: pass a RadixPlan, a DevicePlan or a ScanTree")
    if plan.device != x.device:
        raise InvalidInputError(f"{name} is on {x.device}, the tree on {plan.device}: use one device")
    return plan


def check_rows(tree: ScanTree, **given: tuple[Any, int]) -> None:
    """Check the tensors' rows, numbers of dimensions, floating dtypes and devices."""
    check_tensors(**{name: x for name, (x, _) in given.items()})
    for name, (x, dimensions) in given.items():
        if x.dim() != dimensions:
            raise InvalidInputError(
                f"{name} has {x.dim()} dimensions, not {dimensions}: rows come first, without a batch dimension"
            )
        if x.shape[0] != tree.num_rows:
            raise InvalidInputError(f"{name} has {x.shape[0]} rows, the plan {tree.num_rows}: pass folded rows")
        _check_kind(name, x, tree)


def check_shape(tree: ScanTree, **given: tuple[Any, tuple[int, ...]]) -> None:
    """Check the shapes, floating dtypes and devices of tensors; None is allowed."""
    check_tensors(**{name: x for name, (x, _) in given.items()})
    for name, (x, shape) in given.items():
        if x is None:
            continue
        if tuple(x.shape) != shape:
            raise InvalidInputError(f"{name} is {tuple(x.shape)}, not {shape}")
        _check_kind(name, x, tree)


def run(impl: str, op: str, call: tuple[Any, ...]) -> Tensor:
    """The result of `op` by the implementation that runs it. The first tensor of `call` decides dtype and device."""
    given = [x for x in call if isinstance(x, Tensor)]
    first = given[0]
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    module = implementation(impl, ScanKind(op, first.device.type, first.dtype, first.shape[-1], gradients))
    # implementations choose their own dtypes
    with without_autocast(first):
        out: Tensor = getattr(module, op)(call)
    return out


def _check_kind(name: str, x: Tensor, tree: ScanTree) -> None:
    if not x.dtype.is_floating_point:
        raise InvalidDtypeError(f"{name} is {x.dtype}: pass a floating dtype")
    if x.device != tree.device:
        raise InvalidInputError(f"{name} is on {x.device}, the tree on {tree.device}: use one device")
