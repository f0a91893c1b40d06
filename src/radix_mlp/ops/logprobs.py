"""Log-probabilities of tokens given their left context, one number a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from radix_mlp.plan.device import DevicePlan
from radix_mlp.plan.radix_plan import RadixPlan

__all__ = ["TokenLogprobs", "token_logprobs"]


class TokenLogprobs(NamedTuple):
    """Of the rows asked for; NaN and False elsewhere."""

    logprob: Tensor
    """`[M]` float32, log p(token of the row | its left context)."""
    is_greedy: Tensor
    """`[M]` bool, whether the token is the likeliest one."""


def token_logprobs(
    hidden: Tensor,
    head: Tensor | Callable[[Tensor], Tensor],
    plan: RadixPlan | DevicePlan,
    rows: ArrayLike | None = None,
    *,
    bias: Tensor | None = None,
) -> TokenLogprobs:
    """`[M, h]`, head `[V, h]` or `[R, h] -> [R, V]` -> `[M]` log-probabilities of `rows` (all but roots if None)."""
    raise NotImplementedError
