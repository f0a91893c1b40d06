"""The definition, on batches small enough to be folded by hand."""

import pytest

from radix_mlp.plan.reference import reference_fold


@pytest.mark.parametrize("depth_first", [True, False])
def test_small_batches_by_hand(depth_first: bool) -> None:
    """a b c | a b d | a e | d"""
    folded = reference_fold(
        [0, 1, 2, 0, 1, 3, 0, 4, 3], [0, 1, 2, 0, 1, 2, 0, 1, 0], [0, 3, 6, 8, 9], depth_first=depth_first
    )
    assert folded.fold_index == [0, 1, 2, 5, 7, 8]
    assert folded.unfold_index == [0, 1, 2, 0, 1, 3, 0, 4, 5]
    assert folded.end == ([5, 4, 3, 4, 5, 6] if depth_first else None)


def test_the_orders_differ_when_an_earlier_branch_grows_later() -> None:
    """a b | c | a d"""
    batch = ([0, 1, 2, 0, 3], [0, 1, 0, 0, 1], [0, 2, 3, 5])
    assert reference_fold(*batch, depth_first=False).fold_index == [0, 1, 2, 4]
    folded = reference_fold(*batch, depth_first=True)
    assert folded.fold_index == [0, 1, 4, 2]
    assert folded.unfold_index == [0, 1, 3, 0, 2]
    assert folded.end == [3, 2, 3, 4]


def test_equal_ids_at_different_positions_are_two_tokens() -> None:
    assert reference_fold([7, 7], [0, 1], [0, 1, 2], depth_first=True).fold_index == [0, 1]
