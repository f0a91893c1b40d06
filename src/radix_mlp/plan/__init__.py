"""Tokens in, a `RadixPlan` out: NumPy and Numba, no torch, no kernel's tables."""

from radix_mlp.plan.build import build_plan
from radix_mlp.plan.fold_and_scatter import compute_fold_and_scatter
from radix_mlp.plan.radix_plan import RadixPlan
from radix_mlp.plan.segments import Segments

__all__ = ["RadixPlan", "Segments", "build_plan", "compute_fold_and_scatter"]
