import pytest

from radix_mlp.cli.jobs.read import BadLine, Record
from radix_mlp.cli.jobs.record_windows import cut_windows, whole_groups
from radix_mlp.errors import InvalidInputError


def records(text, groups=True):
    return [Record(line, (letter,), group=letter if groups else None) for line, letter in enumerate(text, 1)]


def texts(windows):
    return ["".join(record.values[0] for record in window.records) for window in windows]


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [("abcdefg", 3, ["abc", "def", "g"]), ("aaaa", 2, ["aaaa"]), ("abbbcc", 2, ["abbb", "cc"]), ("", 2, [])],
)
def test_groups_are_not_cut(text, size, expected):
    assert texts(cut_windows(records(text), size)) == expected


def test_without_groups_equal_texts_are_cut():
    assert texts(cut_windows(records("aaaa", groups=False), 3)) == ["aaa", "a"]


def test_long_texts_end_a_window():
    long = [Record(line, ("x" * 10,)) for line in range(1, 7)]
    assert [len(window.items) for window in cut_windows(long, 100, max_characters=20)] == [2, 2, 2]


def test_bad_lines_count_and_part_groups():
    items = [*records("aa"), BadLine(3, "not JSON"), *records("aa")]
    assert [len(window.items) for window in cut_windows(items, 2)] == [2, 3]


def test_the_digest_tells_any_change_and_where():
    def digests(items, **options):
        return [window.digest for window in cut_windows(items, 2, **options)]

    whole = digests(records("abcdef"))
    assert len(set(whole)) == 3
    assert digests(records("abcdef")) == whole
    assert digests(records("abcdxf"))[:2] == whole[:2]
    assert digests(records("abcdxf"))[2] != whole[2]
    assert digests(records("xbcdef"))[2] != whole[2]
    pair, other = [Record(1, ("ab", "c"))], [Record(1, ("a", "bc"))]
    assert digests(pair) != digests(other)
    assert digests([Record(1, ("a",), id=1)]) != digests([Record(1, ("a",), id=2)])
    assert digests([Record(1, ("a",), "x")]) == digests([Record(1, ("a",), "y")])
    assert digests([Record(1, ("a",), "x")], with_files=True) != digests([Record(1, ("a",), "y")], with_files=True)


def test_groups_that_come_back_are_refused():
    assert texts(whole_groups(cut_windows(records("abcabc"), 6))) == ["abcabc"]
    with pytest.raises(InvalidInputError, match=r":4: this query came before.*--window.*--no-sort"):
        list(whole_groups(cut_windows(records("abcabc"), 3)))
    lists = [Record(line, ("q",), group=("f", line)) for line in range(1, 5)]
    assert len(list(whole_groups(cut_windows(lists, 2)))) == 2
