"""The frame: timing, gates, power, the runner."""

import itertools
import json
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

import launch
import power
import registry
import run as runner
import timing
import verify


def test_sides_take_turns_and_medians_are_reported() -> None:
    calls: list[str] = []
    ticks = iter(itertools.count())
    sides = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.in_turn(sides, 20, warm_up=0, clock=lambda: float(next(ticks)))
    rounds = ["".join(calls[start : start + 3]) for start in range(0, 60, 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    # each of the others sometimes follows the first
    assert {each[:2] for each in rounds} == {"ab", "ac", "ba", "bc", "ca", "cb"}
    assert times["a"].samples == (1000.0,) * 20
    found = timing.Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert (found.median, found.spread) == (3.0, pytest.approx(1 / 3))


def test_three_rounds_are_enough_when_time_is_up() -> None:
    assert len(timing.in_turn({"a": lambda: time.sleep(0.01)}, 9, seconds=0.001)["a"].samples) == 3
    assert len(timing.in_turn({"a": lambda: None}, 9, seconds=100)["a"].samples) == 9


@pytest.mark.parametrize("error", [float("nan"), 0.2, float("inf")])
def test_a_red_gate_ends_the_process(error: float) -> None:
    verify.require("right", 0.05, 0.1)
    with pytest.raises(SystemExit, match="WRONG, nothing is timed") as ended:
        verify.require("rows", error, 0.1)
    assert ended.value.code != 0


def test_relative_errors() -> None:
    truth = np.array([3.0, 4.0])
    assert verify.relative_error(truth * 1.1, truth) == pytest.approx(0.1)
    assert verify.relative_error(np.zeros(2), truth) == 1
    assert verify.relative_error(truth[:1], truth) == float("inf")


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nimport time\n{textwrap.dedent(lines)}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_energy_is_power_over_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, "while True: print('300.0, 1980, 3201, 40', flush=True); time.sleep(0.01)")
    with power.Meter() as meter:
        end = time.monotonic() + 60
        while len(meter._samples) < 5 and time.monotonic() < end:
            time.sleep(0.01)
    assert meter.reading is not None
    assert meter.reading.watts == pytest.approx(300)
    assert meter.reading.joules == pytest.approx(300 * meter.reading.seconds)
    assert (meter.reading.sm_mhz, meter.reading.celsius) == (1980, 40)


def test_samples_are_joined_by_lines() -> None:
    samples = [(t, [watts, 1.0, 1.0, 1.0]) for t, watts in ((-1.0, 999.0), (0.0, 100.0), (1.0, 300.0), (2.0, 100.0))]
    found = power.integrate(samples, 0.0, 2.0)
    assert found is not None
    assert (found.joules, found.samples) == (400.0, 3)
    assert power.integrate(samples[:2], 0.0, 2.0) is None


@pytest.mark.parametrize("lines", [None, "print('[N/A], [N/A], [N/A], 40')", "raise SystemExit(9)"])
def test_no_power_where_nothing_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str | None) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if lines is not None:
        fake_nvidia_smi(tmp_path, monkeypatch, lines)
    with power.Meter() as meter:
        pass
    assert meter.reading is None


def test_the_state_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert power.gpu_state() == {}
    fake_nvidia_smi(tmp_path, monkeypatch, "print('580.1, 1980, 3201, 1980, 90.5, 700.0, 31')")
    assert power.gpu_state()["driver"] == "580.1"
    assert power.gpu_state()["power_limit"] == "700.0"


SCRIPT = """
    import json, sys, radix_mlp
    print(json.dumps({"commit": "abc", "machine": "m", "load": 3}))
    rows = [{"what": "a", "ms": radix_mlp.MS, "machine": "m", "load": 0.5}]
    open(sys.argv[sys.argv.index("--json") + 1], "w").write("".join(json.dumps(row) + "\\n" for row in rows))
    print("a row", radix_mlp.MS)
    sys.exit(radix_mlp.CODE)
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one benchmark, whose package was slower a commit before and is wrong two commits before."""
    package = tmp_path / "src" / "radix_mlp" / "__init__.py"
    package.parent.mkdir(parents=True)
    script = tmp_path / "benchmarks" / "fake.py"
    script.parent.mkdir()
    script.write_text(textwrap.dedent(SCRIPT))
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for source in ("MS, CODE = 1, 1", "MS, CODE = 8, 0", "MS, CODE = 2, 0"):
        package.write_text(source)
        subprocess.run(["git", "-C", str(tmp_path), "add", "."], check=True)
        subprocess.run(["git", "-C", str(tmp_path), *who, "commit", "-qm", "x"], check=True)
    fake = registry.Benchmark("fake", "a fake", ("cpu",), ("what",), ("ms",))
    for module in (runner, launch):
        monkeypatch.setattr(module, "HERE", script.parent)
    monkeypatch.setattr(runner, "BENCHMARKS", {"fake": fake})
    return tmp_path


def bench(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        runner.main()
    return int(ended.value.code or 0)


def test_rows_carry_their_provenance(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out, saved = checkout / "rows.jsonl", checkout / "saved"
    assert bench(monkeypatch, "fake", "--output", str(out), "--save", str(saved)) == 0
    [line] = [json.loads(text) for text in out.read_text().splitlines()]
    assert line["row"] == {"what": "a", "ms": 2, "load": 0.5}
    assert (line["side"], line["command"]) == ("this", "python benchmarks/fake.py")
    assert line["provenance"] == {"commit": "abc", "machine": "m", "load": 3}
    assert json.loads((saved / "fake.json").read_text())["rows"] == [line["row"] | {"run": 0}]
    assert "1 of 1 runs green" in capfd.readouterr().out


def test_arguments_of_the_command_line_take_the_place_of_the_registrys(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = registry.Benchmark("fake", "a fake", ("cpu",), ("what",), ("ms",), {"cpu": "--all"}, {"cpu": "--few 2"})
    monkeypatch.setitem(runner.BENCHMARKS, "fake", fake)
    out = checkout / "rows.jsonl"
    for given, expected in ((["--quick"], "--few 2"), ([], "--all"), (["--arguments", f"--up {out}"], "--up PATH")):
        assert bench(monkeypatch, "fake", *given, "--output", str(out)) == 0
        assert json.loads(out.read_text())["command"] == f"python benchmarks/fake.py {expected}"


def test_a_red_benchmark_shows_no_speed(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (checkout / "src" / "radix_mlp" / "__init__.py").write_text("MS, CODE = 1, 1")
    out = checkout / "rows.jsonl"
    assert bench(monkeypatch, "fake", "--output", str(out)) == 1
    shown = capfd.readouterr().out
    assert "no rows" in shown
    assert "RED: fake (this) ended with code 1: no speed is shown" in shown
    assert out.read_text() == ""


def scripts(checkout: Path, monkeypatch: pytest.MonkeyPatch, **sources: str) -> None:
    """Benchmarks of these names, in this order."""
    for name, source in sources.items():
        (checkout / "benchmarks" / f"{name}.py").write_text(textwrap.dedent(source))
    known = {name: registry.Benchmark(name, "a fake", ("cpu",), ("what",), ("ms",)) for name in sources}
    monkeypatch.setattr(runner, "BENCHMARKS", known)


HANGS = """
    import json, subprocess, sys, time
    print(json.dumps({"commit": "abc"}), flush=True)
    with open(sys.argv[sys.argv.index("--json") + 1], "w") as file:
        file.write('{"what": "done", "ms": 5}\\n{"what": "cut o')
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(__file__ + ".child", "w").write(str(child.pid))
    time.sleep(60)
"""


def test_one_that_hangs_or_fails_does_not_take_the_others_along(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fails = "import sys; print('a reason', file=sys.stderr); sys.exit(7)"
    scripts(checkout, monkeypatch, hangs=HANGS, fails=fails, fake=SCRIPT)
    out = checkout / "rows.jsonl"
    pid = checkout / "benchmarks" / "hangs.py.child"
    clock = launch._Clock

    def clock_of(process: subprocess.Popen[str], limit: float) -> launch._Clock:
        if not any(str(word).endswith("hangs.py") for word in process.args):
            return clock(process, 600)
        # its time begins when it hangs, however long it took to get there
        written(pid)
        return clock(process, limit)

    monkeypatch.setattr(launch, "_Clock", clock_of)
    assert bench(monkeypatch, "--limit", "0.5", "--output", str(out)) == 1
    shown = capfd.readouterr().out
    assert re.search(r"RED: hangs \(this\) was ended after \d+ s; 1 rows were done by then", shown)
    assert "RED: fails (this) ended with code 7: no speed is shown" in shown
    assert "1 of 3 runs green" in shown
    # rows that were done before the time was over went through their gate
    assert [json.loads(line)["row"] for line in out.read_text().splitlines()] == [
        {"what": "done", "ms": 5},
        {"what": "a", "ms": 2, "load": 0.5},
    ]
    assert has_ended(int(written(pid)))


def test_what_runs_ends_with_the_command(checkout: Path) -> None:
    folder = checkout / "benchmarks"
    (folder / "planner.py").write_text(textwrap.dedent(HANGS))
    for path in Path(runner.__file__).parent.glob("*.py"):
        if path.name != "planner.py":
            (folder / path.name).write_text(path.read_text())
    command = [sys.executable, str(folder / "run.py"), "planner", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        child = int(written(folder / "planner.py.child"))
        process.terminate()
        assert process.wait(120) == 143
    assert has_ended(child)


def written(path: Path) -> str:
    """What a process writes to a file, once it has."""
    end = time.monotonic() + 240
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} was not written"
        time.sleep(0.05)
    return path.read_text()


def has_ended(pid: int) -> bool:
    """Whether it ends within half a minute: its sleep is twice as long."""
    end = time.monotonic() + 30
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_running(pid)


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    # a process without a waiting parent stays as a zombie
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_what_lacks_a_package_is_left_out_or_refused(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    scripts(checkout, monkeypatch, fake=SCRIPT)
    lacking = registry.Benchmark("lacking", "a fake", ("cpu",), ("what",), ("ms",), needs=("no_such_package",))
    monkeypatch.setitem(runner.BENCHMARKS, "lacking", lacking)
    assert bench(monkeypatch) == 0
    assert "left out: lacking: not installed: no_such_package" in capfd.readouterr().out
    with pytest.raises(SystemExit, match="lacking cannot run here: not installed: no_such_package"):
        runner.choose(["lacking"], "cpu", quick=False)


def test_another_commit_is_run_in_turn(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert bench(monkeypatch, "fake", "--base", "HEAD~1", "--turns", "2") == 0
    shown = capfd.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("a row")] == ["a row 8", "a row 2"] * 2
    assert ["a", "ms", "8", "2", "0.250"] in [line.split() for line in shown.splitlines()]
    trees = subprocess.run(["git", "-C", str(checkout), "worktree", "list"], capture_output=True, text=True, check=True)
    assert len(trees.stdout.splitlines()) == 1
    assert bench(monkeypatch, "fake", "--base", "HEAD~2", "--turns", "1") == 1
    with pytest.raises(SystemExit, match="--base nowhere"), runner.base_checkout("nowhere"):
        pass


def test_what_does_not_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="'nothing' is no benchmark"):
        runner.choose(["nothing"], "cpu", quick=False)
    with pytest.raises(SystemExit, match="attention needs cuda"):
        runner.choose(["attention"], "cpu", quick=False)


def test_every_registered_benchmark_can_be_run() -> None:
    for each in registry.BENCHMARKS.values():
        text = (runner.HERE / each.script).read_text()
        assert ('"--json"' in text) == each.json, each.name
        assert ('"--data"' in text) >= each.data, each.name
        for arguments in (*each.full.values(), *each.quick.values()):
            for word in arguments.split():
                assert not word.startswith("--") or f'"{word}"' in text, f"{each.name}: {word}"
        assert set(each.quick) <= set(each.devices)


def test_a_reader_that_has_enough_is_no_error() -> None:
    script = str(Path(runner.__file__))
    process = subprocess.Popen([sys.executable, script, "--list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait() == 1
    assert process.stderr.read() == b""
    process.stderr.close()
