"""Bad input ends in a typed error that names the argument and the value."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from radix_mlp.errors import InvalidDtypeError, InvalidInputError
from radix_mlp.plan import build_plan, compute_fold_and_scatter

IDS, POSITIONS, CU = [1, 2, 3, 1, 2, 4], [0, 1, 2, 0, 1, 2], [0, 3, 6]


def plan(**changes: Any) -> None:
    arguments = {"input_ids": IDS, "cu_seq_lengths": CU, "position_ids": POSITIONS} | changes
    build_plan(**arguments)


def fold(**changes: Any) -> None:
    arguments = {"input_ids": IDS, "position_ids": POSITIONS, "cu_seq_lengths": CU} | changes
    as_given = {"pad_multiple_of", "bound_checks"}
    compute_fold_and_scatter(
        **{k: np.array(v, np.uint32) if isinstance(v, list) and k not in as_given else v for k, v in arguments.items()}
    )


both = pytest.mark.parametrize("call", [plan, fold])
arguments = pytest.mark.parametrize("name", ["input_ids", "position_ids", "cu_seq_lengths"])


def refuses(call: Callable[..., None], kind: type[Exception], *parts: object, **changes: Any) -> None:
    with pytest.raises(kind, match=".*".join(re.escape(str(part)) for part in parts)):
        call(**changes)


@both
@pytest.mark.parametrize(
    ("cu", "parts"),
    [
        ([], ["start with 0"]),
        ([0], ["end with", 6, "got 0"]),
        ([1, 3, 6], ["start with 0", "got 1"]),
        ([0, 3, 5], ["end with", 6, "got 5"]),
        ([0, 3, 7], ["end with", 6, "got 7"]),
        ([0, 4, 3, 6], ["must not decrease", "got 3 after 4 at index 2"]),
        ([0, 9, 6], ["must not decrease", "got 6 after 9 at index 2"]),
        ([6, 0], ["start with 0", "got 6"]),
        ([0, 2**31, 6], ["must not decrease", "got 6 after 2147483648 at index 2"]),
    ],
)
def test_offsets(call: Callable[..., None], cu: list[int], parts: list[object]) -> None:
    refuses(call, InvalidInputError, "cu_seq_lengths", *parts, cu_seq_lengths=cu)
    if call is fold:
        refuses(call, InvalidInputError, "cu_seq_lengths", *parts, cu_seq_lengths=cu, bound_checks=False)


@both
def test_an_empty_batch_still_has_offsets_to_check(call: Callable[..., None]) -> None:
    refuses(call, InvalidInputError, "cu_seq_lengths", "got 3", input_ids=[], position_ids=[], cu_seq_lengths=[0, 3])


@both
@pytest.mark.parametrize("positions", [[], [0, 1, 2], list(range(7))])
def test_lengths(call: Callable[..., None], positions: list[int]) -> None:
    refuses(call, InvalidInputError, "position_ids", f"6 ids and {len(positions)} positions", position_ids=positions)


@both
@arguments
def test_shapes(call: Callable[..., None], name: str) -> None:
    for value, shape in ((np.zeros((2, 3), np.uint32), "(2, 3)"), (np.array(3, np.uint32), "()")):
        refuses(call, InvalidInputError, name, "1-dimensional", shape, **{name: value})


@arguments
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint64, np.float32, bool, object, ">u4"])
def test_fold_takes_only_uint32(name: str, dtype: Any) -> None:
    value = np.zeros(6).astype(dtype)
    refuses(fold, InvalidDtypeError, name, "uint32", value.dtype, **{name: value})
    refuses(fold, TypeError, name, **{name: value})


@arguments
def test_fold_takes_no_lists(name: str) -> None:
    refuses(fold, InvalidDtypeError, name, "uint32 array", "tuple (1, 2)", **{name: (1, 2)})
    refuses(fold, InvalidDtypeError, name, "uint32 array", "NoneType", **{name: None})


@arguments
@pytest.mark.parametrize(
    "value", [[0.0, 1.0], [True] * 6, ["a"], [None], np.zeros(0), [2**70], [[1], [2, 3]], "text", {1: 2}, object()]
)
def test_plan_takes_only_integers(name: str, value: Any) -> None:
    refuses(plan, InvalidDtypeError, name, "integers", **{name: value})


@pytest.mark.parametrize("name", ["input_ids", "position_ids"])
@pytest.mark.parametrize("bad", [-1, -(2**63), 2**31, 2**40, 2**63, 2**64 - 1])
def test_plan_values(name: str, bad: int) -> None:
    # a token of the shared part, of a tail, and the first
    for index in (0, 2, 5):
        value = list({"input_ids": IDS, "position_ids": POSITIONS}[name])
        value[index] = bad
        given = np.array(value, np.uint64 if bad >= 2**63 else np.int64)
        refuses(plan, InvalidInputError, name, "[0, 2**31)", f"got {bad} at index {index}", **{name: given})


def test_plan_offsets_past_int64() -> None:
    refuses(
        plan, InvalidInputError, "cu_seq_lengths", "got 6 after", cu_seq_lengths=np.array([0, 2**64 - 3, 6], np.uint64)
    )


@both
@pytest.mark.parametrize("pad", [0, -1, 2**31, 10**30])
def test_pad_values(call: Callable[..., None], pad: int) -> None:
    refuses(call, InvalidInputError, "pad_multiple_of", f"got {pad}", pad_multiple_of=pad)


@both
@pytest.mark.parametrize("pad", [True, 8.0, "8", [8]])
def test_pad_types(call: Callable[..., None], pad: Any) -> None:
    refuses(call, InvalidDtypeError, "pad_multiple_of", "integer", str(pad), pad_multiple_of=pad)


def test_more_tokens_than_int32_can_number() -> None:
    from radix_mlp.plan.validate import check_size

    with pytest.raises(InvalidInputError, match="input_ids must have fewer than 2\\*\\*31 tokens, got 2147483648"):
        check_size(2**31)


def test_upstreams_own_expectations() -> None:
    # `tests` of the paper's repository look for this wording and this refusal
    none = np.empty(0, np.uint32)
    with pytest.raises(ValueError, match="must have same length"):
        compute_fold_and_scatter(np.zeros(3, np.uint32), np.zeros(2, np.uint32), np.array([0, 3], np.uint32))
    with pytest.raises(ValueError, match="cu_seq_lengths must start with 0"):
        compute_fold_and_scatter(none, none, none, bound_checks=True)
    for bound_checks in (None, False):
        assert [len(part) for part in compute_fold_and_scatter(none, none, none, bound_checks=bound_checks)] == [0] * 4
