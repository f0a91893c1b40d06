"""Every operation against one token after another, in float64."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from tests.ops.scan.scan_cases import CASES, answers, error, plans

from radix_mlp.plan import RadixPlan


@pytest.mark.parametrize("name", CASES)
@settings(deadline=None, max_examples=15)
@given(plan=plans())
def test_matches_the_reference(name: str, plan: RadixPlan) -> None:
    case = CASES[name]
    inputs = case.leaves(plan)
    wanted = answers(case, inputs, plan, "reference")
    for tensor, actual in answers(case, inputs, plan, "torch").items():
        assert error(actual, wanted[tensor]) < 1e-10, tensor
