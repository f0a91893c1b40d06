"""`radix-mlp bench` finds the checkout and hands everything on."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from radix_mlp.cli import bench as command
from radix_mlp.cli.main import app
from radix_mlp.errors import InvalidInputError


def test_arguments_and_the_exit_code_are_handed_on(tmp_path: Path) -> None:
    (tmp_path / "registry.py").write_text("")
    (tmp_path / "run.py").write_text(
        "import sys; open(__file__ + '.seen', 'w').write('\\n'.join(sys.argv[1:])); sys.exit(3)"
    )
    options = [
        "--quick",
        "--turns",
        "2",
        "--base",
        "HEAD~1",
        "--limit",
        "9",
        "--arguments",
        "--shape 8b",
        "--folder",
        str(tmp_path),
    ]
    assert CliRunner().invoke(app, ["bench", "planner", *options]).exit_code == 3
    seen = (tmp_path / "run.py.seen").read_text().splitlines()
    assert seen == ["--quick", "--base=HEAD~1", "--turns=2", "--limit=9.0", "--arguments=--shape 8b", "planner"]


def test_a_folder_without_benchmarks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no benchmarks in it"):
        command.find_benchmarks(tmp_path)


def test_the_wheel_alone_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (command.find_benchmarks() / "registry.py").is_file()
    monkeypatch.setattr(command, "__file__", str(tmp_path / "site-packages" / "radix_mlp" / "cli" / "bench.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match="not part of the installed package"):
        command.find_benchmarks()
    assert command.find_benchmarks(Path(sys.modules[__name__].__file__ or "").parents[2] / "benchmarks").is_dir()
