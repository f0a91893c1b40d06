import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from radix_mlp.engine.batching.prefix_tree import RadixTree
from radix_mlp.plan import build_plan

rows = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=12)


def unique_tokens(sequences):
    cu = np.cumsum([0, *map(len, sequences)])
    return build_plan(np.concatenate([*sequences, np.zeros(0, np.int64)]).astype(np.int64), cu).num_compact


def shared(a, b):
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def check_nodes(tree):
    waiting = [tree.root]
    while waiting:
        node = waiting.pop()
        assert node.num_entries == len(node.entries) + sum(child.num_entries for child in node.children.values())
        if node is not tree.root:
            assert node.depth == node.parent.depth + len(node.ids)
            # compressed: every node ends something or branches
            assert node.entries or len(node.children) > 1
        for first, child in node.children.items():
            assert child.parent is node
            assert child.ids[0] == first
            waiting.append(child)


@given(rows, st.randoms(use_true_random=False))
def test_counts_are_the_planners_as_entries_come_and_go(rows, random):
    tree = RadixTree()
    inside = {}
    for _ in range(3 * len(rows)):
        entry = random.randrange(len(rows))
        if entry in inside:
            tree.remove(entry)
            del inside[entry]
        else:
            tree.insert(entry, np.array(rows[entry], np.int32))
            inside[entry] = rows[entry]
        assert (len(tree), tree.num_compact) == (len(inside), unique_tokens(list(inside.values())))
        check_nodes(tree)
    for entry in list(inside):
        tree.remove(entry)
    assert tree.num_compact == 0
    assert not tree.root.children


@given(rows, st.integers(0, 5))
def test_neighbours_are_all_that_share_enough_nearest_first(rows, min_shared):
    tree = RadixTree()
    for entry, ids in enumerate(rows):
        tree.insert(entry, np.array(ids, np.int32))
    for entry, ids in enumerate(rows):
        found = list(tree.neighbours(entry, min_shared))
        expected = [other for other in range(len(rows)) if shared(ids, rows[other]) >= min_shared]
        assert sorted(found) == (expected if len(ids) >= min_shared else [])
        lengths = [shared(ids, rows[other]) for other in found]
        assert lengths == sorted(lengths, reverse=True)
