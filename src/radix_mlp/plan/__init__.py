"""Tokens in, a `RadixPlan` out: NumPy and Numba, no torch (only `RadixPlan.to` imports it)."""

from radix_mlp.plan.build import build_plan
from radix_mlp.plan.fold_and_scatter import compute_fold_and_scatter
from radix_mlp.plan.radix_plan import RadixPlan

__all__ = ["RadixPlan", "build_plan", "compute_fold_and_scatter"]
