"""A server that answers wrongly has no rate: the process with the model is a stand-in, and no load may begin."""

import json
import sys
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

httpx = pytest.importorskip("httpx")

import load  # noqa: E402
import serve  # noqa: E402


def vectors_of(texts: list[str]) -> np.ndarray:
    return np.stack([np.random.default_rng(zlib.crc32(text.encode())).standard_normal(16) for text in texts])


class Served(serve.Served):
    """One whose process would answer at once and serve at once."""

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert "engine" not in command, "timed"
        return {"vectors": vectors_of(command["truth"]).tolist()}

    def wait_for_answer(self, seconds: float) -> dict[str, Any]:
        return {"device": "cpu"}

    def _tell(self, command: dict[str, Any]) -> None:
        self.log.write(b"at http://127.0.0.1:9\nApplication startup complete\n")
        self.log.flush()


class Process:
    """What `subprocess.Popen` gives."""

    def __init__(self, *given: Any, **more: Any) -> None: ...

    def poll(self) -> None: ...

    def wait(self) -> None: ...

    terminate = kill = wait


class LoadError(Exception):
    """A load has begun."""


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The benchmark on a server that answers so."""

    def begin(change: Callable[[np.ndarray], np.ndarray], status: int = 200) -> None:
        def post(url: str, json: dict[str, Any], **more: Any) -> Any:
            found = change(vectors_of(json["inputs"])).tolist()
            return httpx.Response(status, json=found, request=httpx.Request("POST", url))

        monkeypatch.setattr(httpx, "post", post)
        serve.main()

    async def run(options: Any) -> Any:
        raise LoadError

    monkeypatch.setattr(serve, "subprocess", SimpleNamespace(Popen=Process, PIPE=None))
    monkeypatch.setattr(serve, "Served", Served)
    monkeypatch.setattr(load, "run", run)
    monkeypatch.setattr(sys, "argv", ["serve.py", "--modes", "auto"])
    return begin


@pytest.mark.parametrize(
    "change",
    [
        lambda vectors: np.roll(vectors, 1, axis=0),
        np.zeros_like,
        lambda vectors: vectors[:-1],
        # one token of one text, say
        lambda vectors: vectors + 0.1 * (np.arange(len(vectors)) == 3)[:, None],
    ],
    ids=["other texts' vectors", "zeros", "one is missing", "one is a little off"],
)
def test_wrong_vectors_stop_it_before_any_load(
    change: Callable[[np.ndarray], np.ndarray], begin: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"tiny, auto: vectors.*WRONG, nothing is timed"):
        begin(change)
    assert "texts/s" not in capsys.readouterr().out


def test_a_refusal_stops_it_and_right_vectors_do_not(begin: Callable[..., None]) -> None:
    with pytest.raises(SystemExit, match="WRONG"):
        begin(lambda vectors: vectors, status=500)
    with pytest.raises(LoadError):
        begin(lambda vectors: vectors)


@pytest.mark.parametrize(
    ("mode", "more"), [("auto", {"wrong": 1}), ("auto", {"unanswered": 1}), ("off", {"compression": 0.9})]
)
def test_rows_of_a_load_that_went_wrong_are_not_printed(
    mode: str,
    more: dict[str, Any],
    begin: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def run(options: Any) -> Any:
        return {"window": (0.0, 1.0), "wrong": 0, "unanswered": 0, "texts/s": 1.0, "compression": 1.0} | more

    monkeypatch.setattr(load, "run", run)
    monkeypatch.setattr(sys, "argv", ["serve.py", "--modes", mode])
    with pytest.raises(SystemExit, match=f"tiny, {mode}"):
        begin(lambda vectors: vectors)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert not any("texts/s" in row for row in printed)
