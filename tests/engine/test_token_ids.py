"""Token ids in place of texts: taken as they are where they are ids, and refused where they are not."""

from enum import IntEnum

import numpy as np
import pytest

from radix_mlp.engine.tokenization.token_ids import as_ids
from radix_mlp.errors import InvalidDtypeError, InvalidInputError


class Token(IntEnum):
    BEGIN = 7


@pytest.mark.parametrize(
    "given", [[7, 8], (7, np.int32(8)), [Token.BEGIN, 8], np.array([7, 8], np.uint16), [np.int64(7), np.uint8(8)]]
)
def test_ids(given):
    found = as_ids(given, "texts[0]", 9)
    assert found.tolist() == [7, 8]
    assert found.dtype == np.int32


@pytest.mark.parametrize("wrong", [True, 2.0, "a", None, [1], np.bool_(True), np.float32(2)])
def test_what_is_no_id_is_named(wrong):
    for given in ([7, wrong], (7, 8, wrong)):
        with pytest.raises(InvalidDtypeError, match=r"texts\[0\] must be .* and holds"):
            as_ids(given, "texts[0]", 9)


@pytest.mark.parametrize("wrong", [-1, 9, 2**31, 2**70, -(2**70)])
def test_ids_that_the_model_does_not_have(wrong):
    with pytest.raises(InvalidInputError, match=f"texts.0. holds the token id {wrong}; this model has 0 to 8"):
        as_ids([7, wrong], "texts[0]", 9)


def test_arrays_of_other_kinds():
    for array in (np.array([7.0]), np.array([[7]]), np.array([True])):
        with pytest.raises(InvalidDtypeError, match="not an array"):
            as_ids(array, "texts[0]", 9)
