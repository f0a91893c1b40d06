import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from radix_mlp.engine.batching.scheduler import schedule
from radix_mlp.report.compression import compression_table
from radix_mlp.report.picture import draw
from radix_mlp.report.tree import text_tree
from radix_mlp.report.tree_text import snippet, tree_lines

requests = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12).map(
    lambda rows: [np.array(row, np.int32) for row in rows]
)


@given(requests)
def test_pieces_are_shared_and_save_what_the_planner_saves(sequences):
    tree = text_tree(sequences)
    for root in tree.roots:
        assert root.start == 0
        for piece in root.walk():
            assert piece.num_texts >= 2
            assert piece.num_tokens >= 1
            for text in tree.sequences[piece.first : piece.last]:
                assert text[: piece.end].tolist() == tree.sequences[piece.first][: piece.end].tolist()
            places = [piece.first, *(place for child in piece.children for place in (child.first, child.last))]
            assert places == sorted(places)
            assert all(child.start == piece.end for child in piece.children)
    (batch,) = schedule(sequences, 10**6)
    assert tree.num_tokens - tree.saved == batch.num_compact


@given(requests, st.integers(1, 6), st.integers(1, 3))
def test_lines_account_for_all_savings(sequences, max_lines, max_children):
    tree = text_tree(sequences)
    lines = tree_lines(tree, lambda ids: "".join(map(str, ids)), max_lines=max_lines, max_children=max_children)
    shown = [line for line in lines if line.piece is not None]
    assert len(shown) <= max_lines
    assert sum(line.saved for line in lines) <= tree.saved
    # a parent stands above its children
    assert all(line.piece.start == 0 or index > 0 for index, line in enumerate(shown))
    everything = tree_lines(tree, lambda ids: "x", max_lines=1000, max_children=1000)
    assert sum(line.saved for line in everything) == tree.saved


def test_a_chain_of_a_thousand_prefixes():
    sequences = [np.arange(length, dtype=np.int32) for length in range(1, 1500)]
    tree = text_tree(sequences)
    assert tree.num_tokens - tree.saved == 1499
    assert tree_lines(tree, lambda ids: "x")
    assert draw(tree, lambda ids: "x").boxes


def test_snippet():
    assert snippet("a\nb\tc", 10) == "a⏎b c"
    assert snippet(" a ", 10) == "␣a␣"
    assert snippet("  ", 10) == "␣␣"
    assert snippet("0123456789abcdef", 10) == "012345…def"
    assert all(len(snippet("x" * 50, width)) == width for width in range(1, 50))


def test_sorting_by_length_loses_what_lexicographic_order_keeps():
    rng = np.random.default_rng(0)
    groups = [rng.integers(0, 1000, 40) for _ in range(8)]
    sequences = [
        np.concatenate([groups[index % 8], rng.integers(0, 1000, rng.integers(1, 30))]).astype(np.int32)
        for index in range(64)
    ]
    row = compression_table(sequences, sizes=[8])[0]
    assert row.num_compact["lexicographic"] < 0.7 * row.num_compact["length"]
    assert row.num_batches == {"arrival": 8, "length": 8, "lexicographic": 8}
