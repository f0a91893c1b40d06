"""Arguments that do not fit, and implementations that are not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.ops.scan.scan_cases import CASES

from radix_mlp.errors import InvalidDtypeError, InvalidInputError, UnsupportedImplError
from radix_mlp.ops import tree_conv
from radix_mlp.plan import build_plan

PLAN = build_plan([1, 2, 3, 1, 2, 4, 5], [0, 3, 7])


@pytest.mark.parametrize("name", CASES)
def test_every_argument_is_checked(name: str) -> None:
    case = CASES[name]
    inputs: dict[str, Any] = {key: x.detach() for key, x in case.leaves(PLAN).items()}
    for key, x in inputs.items():
        for wrong in (x[:-1], x[None]):
            with pytest.raises(InvalidInputError):
                case({**inputs, key: wrong}, PLAN)
        with pytest.raises(InvalidDtypeError, match=key):
            case({**inputs, key: x.long()}, PLAN)
        with pytest.raises(InvalidDtypeError, match=key):
            case({**inputs, key: x.tolist()}, PLAN)
    with pytest.raises(UnsupportedImplError, match="impl='fast' for"):
        case(inputs, PLAN, "fast")
    with pytest.raises(InvalidDtypeError, match="tree is a list"):
        case(inputs, [])
    other = build_plan([1, 2], [0, 2])
    with pytest.raises(InvalidInputError, match="rows, the plan 2"):
        case(inputs, other)


def test_heads_that_do_not_divide() -> None:
    delta = {key: x.detach() for key, x in CASES["gated_delta_rule"].leaves(PLAN).items()}
    delta |= {"v": delta["v"][:, :3], "g": delta["g"][:, :3], "beta": delta["beta"][:, :3]}
    with pytest.raises(InvalidInputError, match="3 heads"):
        CASES["gated_delta_rule"](delta, PLAN)
    mamba = {key: x.detach() for key, x in CASES["mamba2"].leaves(PLAN).items()}
    mamba |= {"B": mamba["B"][:, [0, 0, 1]], "C": mamba["C"][:, [0, 0, 1]]}
    with pytest.raises(InvalidInputError, match="3 groups"):
        CASES["mamba2"](mamba, PLAN)


def test_convolutions() -> None:
    x, weight = torch.ones(5, 2), torch.ones(2, 3)
    with pytest.raises(InvalidInputError, match="activation='gelu'"):
        tree_conv(x, weight, None, PLAN, "gelu")
    with pytest.raises(InvalidInputError, match="no taps"):
        tree_conv(x, weight[:, :0], None, PLAN)
    with pytest.raises(InvalidInputError, match="meta"):
        tree_conv(x.to("meta"), weight, None, PLAN.to("cpu"))
