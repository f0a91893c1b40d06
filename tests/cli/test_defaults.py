"""Options of the job commands, found from the commands: none is dropped.

A default given explicitly changes nothing, and a value that means nothing is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from radix_mlp.cli import options as o
from radix_mlp.cli.job_command import job_command
from radix_mlp.cli.main import app
from radix_mlp.cli.settings import Given

MODELS = {"embed": "tiny", "rerank": "tiny-reranker", "classify": "tiny-classifier", "score": "tiny", "verify": "tiny"}
GROUP: Any = typer.main.get_command(app)
OPTIONS = [
    pytest.param(command, option, id=f"{command} {option.opts[-1]}")
    for command in (*MODELS, "explain")
    for option in GROUP.commands[command].params
    if option.param_type_name == "option" and option.default is not None
]
# rows with a list of documents do not read it, as its help says
VALUES = [param for param in OPTIONS if not param.values[1].is_flag and param.id != "rerank --document-field"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [{"text": f"the sky is {word}", "query": "sky", "documents": [word, "a root"]} for word in ("blue", "deep")]
    path.write_text("".join(json.dumps(row | {"context": "the", "continuation": " sky"}) + "\n" for row in rows))
    return path


def run(texts: Path, command: str, *options: str) -> Any:
    model = ["-t", "tiny"] if command == "explain" else ["-m", MODELS[command], "--device", "cpu"]
    return CliRunner().invoke(app, [command, str(texts), *model, *options])


@pytest.fixture(scope="module")
def plain(texts: Path) -> dict[str, str]:
    """What every command prints without the option."""
    found = {command: run(texts, command) for command in (*MODELS, "explain")}
    assert {result.exit_code for result in found.values()} == {0}
    return {command: result.stdout for command, result in found.items()}


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_a_default_that_is_given_changes_nothing(texts: Path, plain: dict[str, str], command: str, option: Any) -> None:
    if not option.is_flag:
        given = [option.opts[-1], str(option.default)]
    elif option.secondary_opts:
        given = [(option.opts if option.default else option.secondary_opts)[0]]
    else:
        pytest.skip("a switch that is off has no form to give")
    result = run(texts, command, *given)
    assert result.exit_code == 0, result.output
    assert result.stdout == plain[command]


@pytest.mark.parametrize(("command", "option"), VALUES)
def test_a_value_that_means_nothing_is_refused(texts: Path, command: str, option: Any) -> None:
    result = run(texts, command, option.opts[-1], "-7" if isinstance(option.default, int) else "no-such-value")
    assert result.exit_code != 0
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "no-such-value" in result.output or option.opts[-1] in result.output


def test_own_options_of_a_command_decide_its_answers() -> None:
    """Whatever option a command adds is compared on resuming, unless it replaces one of all jobs."""
    seen: dict[str, Any] = {}

    @job_command
    def shout(given: Given, *, loud: o.RawScoresOption = False, output: o.OutputOption = None) -> None:
        seen.update(given, loud_itself=loud)

    own = typer.Typer()
    own.command()(shout)
    result = CliRunner().invoke(own, ["a.jsonl", "-m", "tiny", "--raw-scores", "-o", "out.jsonl", "--window", "5"])
    assert result.exit_code == 0, result.output
    assert (seen["files"], seen["window"], seen["output"], seen["loud_itself"]) == (["a.jsonl"], 5, "out.jsonl", True)
    decides = seen["options"]
    assert (decides["command"], decides["model"], decides["loud"]) == ("shout", "tiny", True)
    assert {"files", "window", "output", "restart", "quiet", "threshold"}.isdisjoint(decides)
