"""Every operation against one token after another, in float64; and what a mistake in the tree would change."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tests.ops.scan.scan_cases import CASES, WITH_STATE, answers, error, plans
from torch import Tensor

from radix_mlp.ops import ScanTree
from radix_mlp.plan import RadixPlan, build_plan

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", CASES)
@settings(deadline=None, max_examples=15)
@given(plan=plans())
def test_matches_the_reference(name: str, plan: RadixPlan) -> None:
    case = CASES[name]
    inputs = case.leaves(plan)
    wanted = answers(case, inputs, plan, "reference")
    for tensor, actual in answers(case, inputs, plan, "torch").items():
        assert error(actual, wanted[tensor]) < 1e-10, tensor


def long_tree() -> RadixPlan:
    """A prefix of 150 tokens, four branches of 70 under it, each with three ends of 1 to 30 and one of none."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, 1000, 150)
    branches = [np.append(prefix, rng.integers(0, 1000, 70)) for _ in range(4)]
    sequences = [np.append(branch, rng.integers(0, 1000, length)) for branch in branches for length in (0, 1, 2, 30)]
    return build_plan(np.concatenate(sequences), np.cumsum([0, *map(len, sequences)]))


def without_states(plan: RadixPlan) -> ScanTree:
    """Every segment is a root: states start from zeros, windows stop at the start of the segment."""
    start, end, _ = plan.segments
    return ScanTree(np.repeat(end, end - start).astype(np.int32), plan.num_compact, CPU)


def first_branch_states(plan: RadixPlan) -> ScanTree:
    """The other branches, and all ends of sequences, hang from the first branch of `long_tree`."""
    start, stop, parent = plan.segments
    first, *others = np.flatnonzero(parent == 0)
    end = plan.end.copy()
    end[start[first] : stop[first]] = plan.num_rows
    for branch in others:
        end[start[branch] : stop[branch]] = stop[branch]
    return ScanTree(end, plan.num_compact, CPU)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("wrong", [without_states, first_branch_states])
def test_a_wrong_tree_is_seen(name: str, wrong: Callable[[RadixPlan], ScanTree]) -> None:
    """With the ranges of these tests, a state of the wrong segment or none changes outputs and gradients."""
    plan = long_tree()
    case = CASES[name]
    inputs = case.leaves(plan)
    right = case(inputs, plan)
    broken = case(inputs, wrong(plan))
    below = torch.from_numpy(plan.depth >= (220 if wrong is first_branch_states else 150))
    assert error(broken[below], right[below]) > 0.02
    grads = [torch.autograd.grad(out[below].sum(), list(inputs.values())) for out in (broken, right)]
    differs = [error(*pair) > 0.02 for pair in zip(*grads, strict=True)]
    # the gate and the residual of Mamba 1 act on the row itself
    assert sum(differs) >= len(differs) - 2


@pytest.mark.parametrize("name", WITH_STATE)
def test_states_matter_for_hundreds_of_tokens(name: str) -> None:
    """The order of the first 50 rows changes the outputs more than 100 tokens later."""
    plan = long_tree()
    case = WITH_STATE[name]
    inputs = case.leaves(plan)
    changed = {tensor: x.detach().clone() for tensor, x in inputs.items()}
    for x in changed.values():
        if x.shape[0] == plan.num_rows:
            x[:50] = x[:50].flip(0)
    late = torch.from_numpy(plan.depth >= 150)
    assert error(case(changed, plan)[late], case(inputs, plan)[late]) > 1e-3


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("name", WITH_STATE)
def test_zeros_leave_a_state_as_it_is(name: str, impl: str) -> None:
    """Empty places of a chunk hold zeros. Mamba's steps are computed before rows are spread, so a zero is a step of 0.

    The decay of lightning attention is spread like an input, so an empty place has none; a row of zeros has.
    """
    plan, longer = (build_plan(range(length), [0, length]) for length in (12, 17))
    case = WITH_STATE[name]
    inputs = {tensor: x.detach() for tensor, x in case.leaves(plan).items()}
    with_zeros = dict(inputs)
    for tensor, x in inputs.items():
        # whose softplus is zero
        filling = torch.full((5, *x.shape[1:]), -1000.0 if tensor == "dt" else 0.0, dtype=x.dtype)
        if x.shape[0] == 12:
            with_zeros[tensor] = torch.cat([x[:7], filling, x[7:]])
    out, wanted = case(with_zeros, longer, impl), case(inputs, plan, impl)
    if name == "lightning":
        assert error(out[12:], wanted[7:]) > 1e-3
        return
    assert error(torch.cat([out[:7], out[12:]]), wanted) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    plan = build_plan([1, 2, 3, 1, 2, 4, 5, 1, 6], [0, 3, 7, 9], pad_multiple_of=8)
    case = CASES[name]
    inputs = case.leaves(plan)

    def run(*tensors: Tensor) -> Tensor:
        return case(dict(zip(inputs, tensors, strict=True)), plan)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_padding_rows_take_no_part(name: str) -> None:
    tokens, offsets = [1, 2, 3, 1, 2, 4, 5, 1, 6], [0, 3, 7, 9]
    plan, padded = (build_plan(tokens, offsets, pad_multiple_of=pad) for pad in (None, 16))
    case = CASES[name]
    with_padding = case.leaves(padded)
    rows = plan.num_rows
    inputs = {key: x[:rows] if x.shape[0] == padded.num_rows else x for key, x in with_padding.items()}
    out = case(with_padding, padded)
    # products of another size are rounded differently by some versions of torch
    torch.testing.assert_close(out[:rows], case(inputs, plan), rtol=1e-12, atol=1e-12)
    assert out.isfinite().all()
    grads = torch.autograd.grad(out[:rows].sum(), list(with_padding.values()))
    assert all(not grad[rows:].any() for grad in grads if grad.shape[0] == padded.num_rows)


@pytest.mark.parametrize("name", CASES)
def test_no_rows(name: str) -> None:
    plan = build_plan([], [0])
    case = CASES[name]
    inputs = case.leaves(plan)
    out = case(inputs, plan)
    assert out.shape[0] == 0
    grads = torch.autograd.grad(out.sum(), list(inputs.values()))
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("name", CASES)
def test_deterministic(name: str) -> None:
    plan = long_tree()
    case = CASES[name]
    inputs = case.leaves(plan, dtype=torch.float32)
    first, second = (answers(case, inputs, plan, "torch") for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    with torch.inference_mode():
        assert torch.equal(case(inputs, plan), case(inputs, plan))
        assert torch.equal(case(inputs, plan), first["out"])


@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_nothing(name: str) -> None:
    """States are kept in float32, whatever the projections around them compute in."""
    plan = long_tree()
    case = CASES[name]
    inputs = case.leaves(plan, dtype=torch.float32)
    out = case(inputs, plan)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = case(inputs, plan)
    assert torch.equal(mixed, out)
    grads = [torch.autograd.grad(x.sum(), list(inputs.values())) for x in (mixed, out)]
    assert all(map(torch.equal, *grads))
