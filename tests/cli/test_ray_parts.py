"""What a Ray job is made of, without a cluster: files, items, parts, the plan, and a worker on its own."""

import json
import os
import pickle
import sys
from dataclasses import fields
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cli.commands import jsonl, run

from radix_mlp import Engine
from radix_mlp.cli.embed import Embedding
from radix_mlp.cli.jobs.pairs import pair_records
from radix_mlp.cli.jobs.ray.dataset import assigned, surveyed
from radix_mlp.cli.jobs.ray.files import RaySource, find_files, open_folder
from radix_mlp.cli.jobs.ray.items import items_of, read_files, table_of
from radix_mlp.cli.jobs.ray.parts import Keys, Sample, choose_boundaries, choose_stretches, part_of
from radix_mlp.cli.jobs.ray.worker import PartWorker, WorkerSettings
from radix_mlp.cli.jobs.read import BadLine, Record, text_records
from radix_mlp.cli.jobs.store import JobRecord, Part, Plan, State, Stats
from radix_mlp.cli.sample import rerank_texts
from radix_mlp.cli.settings import make_engine
from radix_mlp.engine.batching.scheduler import lexicographic_order
from radix_mlp.errors import InvalidInputError

TEXTS = rerank_texts()[::4]
KEYS = Keys("tiny", trust_remote_code=False, ranked=False)
READ = partial(text_records, fields=("text",))


@pytest.fixture(params=["", "file://"], ids=["path", "address"])
def place(request, tmp_path):
    """The folder of a test, as a path and as the address of a filesystem of pyarrow's."""
    return f"{request.param}{tmp_path}"


def table_from(files, read=READ):
    batch = pa.table({"file": list(range(len(files)))})
    return pa.concat_tables(read_files(batch, files, None, ".", read))


def test_files_are_found(tmp_path, place):
    for name in ("in/b.jsonl", "in/a.jsonl", "in/deep/c.csv", "in/_job/x.jsonl", "in/.hidden.jsonl", "in/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "naïve"}\n')

    def names(*patterns):
        return [name.removeprefix(f"{place}/in/") for name in find_files([f"{place}/{name}" for name in patterns])]

    assert names("in") == ["a.jsonl", "b.jsonl", "deep/c.csv"]
    assert names("in/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("in/b.jsonl", "in/a.jsonl") == ["b.jsonl", "a.jsonl"]
    source = RaySource(f"{place}/in/a.jsonl")
    assert list(source.rows(["text"])) == [(1, {"text": "naïve"}, 1)]
    shown, size, changed = source.facts()
    assert (shown, size, bool(changed)) == (f"{place}/in/a.jsonl", 19, True)
    for pattern, message in (("in/none.jsonl", "no such file"), ("in/*.txt", "fits it"), ("in/deep/d", "no such file")):
        with pytest.raises(InvalidInputError, match=message):
            names(pattern)
    with pytest.raises(InvalidInputError, match="more than once"):
        names("in", "in/a.jsonl")
    with pytest.raises(InvalidInputError, match="nowhere://x/y: not an address"):
        find_files(["nowhere://x/y"])


def test_relative_paths_are_those_of_the_command(tmp_path, monkeypatch):
    jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    monkeypatch.chdir(tmp_path)
    assert find_files(["a.jsonl"]) == ["a.jsonl"]
    folder = open_folder("out.jsonl")
    monkeypatch.chdir("/")
    assert RaySource("a.jsonl", folder=str(tmp_path)).shown == "a.jsonl"
    assert str(tmp_path) in pickle.loads(pickle.dumps(folder)).path


def test_folders_hold_whole_files(tmp_path, place):
    folder = open_folder(f"{place}/out.jsonl")
    assert (folder.names(), folder.read("a")) == ([], None)
    folder.write("a", b"one")
    folder.write("a", b"two")
    folder.write("_job/b", b"three")
    (tmp_path / "out.jsonl" / "_job" / "new-1").write_bytes(b"torn")
    assert (folder.names(), folder.names("_job"), folder.read("a")) == (["_job", "a"], ["b"], b"two")
    folder.remove_unfinished()
    assert sorted(os.listdir(tmp_path / "out.jsonl" / "_job")) == ["b"]
    folder.remove()
    assert not (tmp_path / "out.jsonl").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidInputError, match="with --ray it is a folder"):
        open_folder(f"{place}/file")


def test_items_travel_whole():
    items = [
        Record(1, ("naïve", ""), "a", "name", None),
        Record(2, ("q", "d"), "b", 7, "q"),
        Record(3, ("q", "d"), "a", None, ("a", 3), 2),
        BadLine(4, "is empty", "b"),
    ]
    places = [(0, 0), (1, 1), (0, 2), (1, 3)]
    assert items_of(table_of(items, places), ["a", "b"]) == items


def test_keys_sort_as_token_ids():
    records = [Record(line, (text,)) for line, text in enumerate(["ab", "b", "a", "abc", "é", "ab"])]
    rows = table_of(records, [(0, place) for place in range(6)]).to_pylist()
    keys = KEYS(rows)
    ids = [np.frombuffer(record.values[0].encode(), np.uint8).astype(np.int32) for record in records]
    assert np.argsort(np.array(keys, object), kind="stable").tolist() == lexicographic_order(ids).tolist()
    # the same texts can be parted, unless they must be ranked together
    assert keys[0] != keys[5]
    pairs = [Record(1, ("q", "a"), "f", None, "q"), Record(9, ("q", "b"), "f", None, "q")]
    lists = [Record(5, ("q", text), "f", None, ("f", 5), place) for place, text in enumerate("xy")]
    rows = table_of([*pairs, *lists], [(0, place) for place in range(4)]).to_pylist()
    one, other, first, second = Keys("tiny", trust_remote_code=False, ranked=True)(rows)
    assert (one == other, first == second, one == first) == (True, True, False)


def test_boundaries_part_evenly_and_between_queries():
    texts = [f"query {query:02}: document {document:03}" for query in range(20) for document in range(50)]
    rows = table_of(
        [Record(line, (text,)) for line, text in enumerate(texts)], [(0, n) for n in range(1000)]
    ).to_pylist()
    keys = KEYS(rows)
    boundaries = choose_boundaries(keys, 10)
    sizes = np.bincount([part_of(key, boundaries) for key in keys])
    assert sizes.tolist() == [100] * 10
    queries = [
        {texts[place][:8] for place in range(1000) if part_of(keys[place], boundaries) == part} for part in range(10)
    ]
    assert [len(found) for found in queries] == [2] * 10
    # copies of one text do not end up in one part
    rows = table_of([Record(line, ("the same",)) for line in range(1000)], [(0, n) for n in range(1000)]).to_pylist()
    keys = KEYS(rows)
    boundaries = choose_boundaries(keys, 10)
    assert max(np.bincount([part_of(key, boundaries) for key in keys])) < 200
    assert choose_boundaries(keys, 1) == []


def test_samples_do_not_depend_on_the_order():
    items = [(Sample.priority(0, number), f"{number}".encode()) for number in range(5000)]
    forwards, backwards = Sample(2.0, most=100), Sample(2.0, most=100)
    for start in range(0, 5000, 100):
        forwards.add(items[start : start + 100])
        backwards.add(items[::-1][start : start + 100])
    assert sorted(forwards.keys) == sorted(backwards.keys)
    assert 25 <= len(forwards.keys) <= 100


def test_stretches_are_spread():
    assert choose_stretches([3, 0, 4]) == [(0, 0, 3), (2, 0, 4)]
    stretches = choose_stretches([100_000, 50_000])
    assert sum(last - first for _, first, last in stretches) == 4 * 4096
    assert stretches[0] == (0, 0, 4096)
    assert stretches[-1] == (1, 50_000 - 4096, 50_000)


def test_records_are_kept_and_compared(tmp_path):
    options = {"model": "tiny", "window": 3}
    plan = Plan([["a", 10, "1"]], [7], [b"\0\0\0a", b"\0\0\0b"], [(0, 0, 7)])
    record = JobRecord(options, plan)
    content = record.dump()
    assert JobRecord.resume(content, "job.json", options, plan.files) == record
    assert (plan.num_parts, plan.num_items) == (3, 7)
    for other, files, message in (
        ({"model": "other", "window": 3}, plan.files, 'had --model "tiny", and this one has --model "other"'),
        (options, [["a", 11, "2"]], "a: changed since the job was started"),
        (options, [["b", 10, "1"]], "started on other files"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            JobRecord.resume(content, "job.json", other, files)
    for damaged, message in (
        (b"{}", "job.json: not the progress of a job"),
        (content.replace(b'"boundaries": "e', b'"boundaries": "x'), "not the progress of a job"),
        (JobRecord(options).dump(), "not the progress of a job"),
        (content.replace(b'"version": 2', b'"version": 1'), "another version"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            JobRecord.resume(damaged, "job.json", options, plan.files)


JSON = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5)


@settings(max_examples=30, deadline=None)
@given(
    options=st.dictionaries(st.sampled_from(["model", "prompt", "window", "id_field"]), JSON),
    boundaries=st.lists(st.binary(max_size=9), max_size=4),
    stretches=st.lists(st.tuples(*[st.integers(0, 9)] * 3), max_size=3),
    counts=st.lists(st.integers(0, 2**40), max_size=3),
    numbers=st.lists(st.integers(0, 2**40), min_size=len(fields(Stats)), max_size=len(fields(Stats))),
    changed=st.sampled_from(["model", "prompt", "window", "id_field"]),
)
def test_records_survive_the_file(options, boundaries, stretches, counts, numbers, changed):
    plan = Plan([[f"{place}.jsonl", count, "1"] for place, count in enumerate(counts)], counts, boundaries, stretches)
    ray = JobRecord(options, plan)
    assert JobRecord.resume(ray.dump(), "job.json", options, plan.files) == ray
    local = JobRecord(options, state=State(*numbers, digest="ab", finished=True))
    assert JobRecord.resume(local.dump(), "progress.json", options) == local
    with pytest.raises(InvalidInputError, match=f"--{changed.replace('_', '-')} "):
        JobRecord.resume(local.dump(), "progress.json", {**options, changed: "something else"})


def test_records_of_parts(tmp_path, place):
    folder = open_folder(f"{place}/out.jsonl")
    parts = [Part(part=part, num_rows=part, process=3) for part in (5, 0)]
    for part in parts:
        folder.save_part(part)
    assert folder.parts() == parts[::-1]
    assert (folder.part(5), folder.part(4)) == (parts[0], None)
    folder.write("_job/done-000004.json", b'{"part')
    with pytest.raises(InvalidInputError, match=r"done-000004.json: not the record of a part.*--restart"):
        folder.parts()


def test_every_item_gets_one_part(tmp_path):
    lines = [{"text": text} for text in TEXTS]
    lines[3:3] = [{"text": ""}, {"txt": 1}]
    files = [jsonl(tmp_path / "a.jsonl", lines[:20]), jsonl(tmp_path / "b.jsonl", lines[20:])]
    table = table_from(files)
    survey = surveyed(table, KEYS, 1.0).to_pylist()
    assert [(row["count"], row["num_bad"], row["bad_line"]) for row in survey] == [(20, 2, 4), (len(lines) - 20, 0, 0)]
    boundaries = choose_boundaries([key for row in survey for key in row["keys"]], 5)
    assert len(boundaries) == 4
    groups = {part: part // 2 for part in range(6)}
    found = assigned(table, KEYS, boundaries, [(0, 4, 10)], groups)
    rows = [(row["file"], row["line"]) for row in found.to_pylist() if row["part"] < 5]
    assert sorted(rows) == [
        (file, line) for file, count in ((0, 20), (1, len(lines) - 20)) for line in range(1, count + 1)
    ]
    # bad lines are not measured
    measured = [row["number"] for row in found.to_pylist() if row["part"] == 5]
    assert measured == [5, 6, 7, 8, 9]
    assert all(row["group_of_parts"] == row["part"] // 2 for row in found.to_pylist())
    left = assigned(table, KEYS, boundaries, [], {1: 0, 3: 0})
    assert set(left["part"].to_pylist()) == {1, 3}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_worker_writes_a_file_a_part(tmp_path, suffix):
    lines = [{"text": text} for text in TEXTS]
    lines.insert(2, {"text": ""})
    path = jsonl(tmp_path / "a.jsonl", lines)
    table = table_from([path])
    boundaries = choose_boundaries(KEYS([row for row in table.to_pylist() if row["reason"] is None]), 3)
    found = assigned(table, KEYS, boundaries, [(0, 0, len(lines))], dict.fromkeys(range(4), 0))
    folder = open_folder(str(tmp_path / f"out{suffix}"))
    task = Embedding({"normalize": True, "field": "text"})
    settings = WorkerSettings(folder, suffix, [path], 3, skip=True, with_ids=False)
    # what is done already is not done again
    folder.save_part(Part(part=1, num_rows=-1))
    worker = PartWorker(partial(make_engine, "tiny", max_batch_tokens=2000), task, settings)
    stats = {row["part"]: row for row in worker(found).to_pylist()}
    assert sorted(stats) == [0, 2, 3]
    assert stats[0]["num_skipped"] + stats[2]["num_skipped"] == 1
    assert stats[3]["measured"]
    assert stats[3]["num_rows"] == len(TEXTS)
    assert stats[0]["num_compact"] < stats[0]["num_tokens"]
    assert {part.part for part in folder.parts()} == {0, 1, 2, 3}
    assert worker(found).num_rows == 0
    assert [name for name in folder.names() if name != "_job"] == [f"part-00000{part}{suffix}" for part in (0, 2)]
    if suffix == ".parquet":
        parts = [pq.read_table(tmp_path / "out.parquet" / f"part-00000{part}.parquet") for part in (0, 2)]
        rows = [row for part in parts for row in part.to_pylist()]
        expected = Engine("tiny").embed([row["text"] for row in rows])
        assert np.allclose([row["embedding"] for row in rows], expected, atol=1e-5)
        assert len(rows) == stats[0]["num_rows"] + stats[2]["num_rows"]
        errors = b"".join(folder.read(f"_job/{name}") for name in folder.names("_job") if name.startswith("errors"))
        assert [json.loads(line)["line"] for line in errors.splitlines()] == [3]


def test_documents_of_a_query_are_in_one_part(tmp_path):
    rows = [{"query": f"query {n % 7}", "document": f"document {n}"} for n in range(70)]
    rows += [{"query": "query 3", "documents": ["a", "b", "c"]}]
    path = jsonl(tmp_path / "pairs.jsonl", rows)
    table = table_from([path], partial(pair_records, fields=("query", "documents", "document")))
    keys = Keys("tiny", trust_remote_code=False, ranked=True)
    boundaries = choose_boundaries(keys(table.to_pylist()), 7)
    found = assigned(table, keys, boundaries, [], dict.fromkeys(range(8), 0)).to_pylist()
    parts = {}
    for row in found:
        parts.setdefault((row["values"][0], row["group"], row["line"] * (row["group"] == 2)), set()).add(row["part"])
    assert len(parts) == 8
    assert all(len(where) == 1 for where in parts.values())
    assert len(set.union(*parts.values())) > 3


def test_options_that_do_not_fit(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    begin = ["embed", path, "-m", "tiny"]
    for options, message in (
        (["--ray"], "--ray: name a folder with --output"),
        (["--ray", "-o", str(tmp_path / "v.npy")], "with --ray it is a folder whose name ends in"),
        (["--ray", "local", "-o", str(tmp_path / "v.jsonl"), "--compare"], "--compare: not with --ray"),
        (["--ray", "-o", path], "with --ray it is a folder. Give another name"),
        (["--ray-workers", "2"], "no workers without --ray"),
    ):
        result = run(*begin, *options)
        assert result.exit_code == 1
        assert message in result.stderr
    result = run("embed", "-m", "tiny", "-o", str(tmp_path / "v.jsonl"), "--ray", "-")
    assert "standard input cannot be read by the workers" in result.stderr


def test_without_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    result = run("embed", "--ray", path, "-m", "tiny", "-o", str(tmp_path / "v.jsonl"))
    assert result.exit_code == 1
    assert "pip install 'radix-mlp[ray]'" in result.stderr


def test_addresses_are_told_from_files(monkeypatch):
    found = []
    monkeypatch.setattr("radix_mlp.cli.embed.run_job", lambda given, *_: found.append((given["files"], given["ray"])))
    for address in ("10.0.0.1:6379", "local", "auto", "ray://head:10001"):
        run("embed", "--ray", address, "s3://bucket/texts", "-m", "tiny")
        assert found.pop() == (["s3://bucket/texts"], address)
    for files in (["s3://bucket/texts"], ["a.jsonl"], ["local.txt", "b.csv"]):
        run("embed", "-m", "tiny", "--ray", *files)
        assert found.pop() == (files, "auto")
