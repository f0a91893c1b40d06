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
from http_bodies import LABELS, ROUTES  # noqa: E402


def vectors_of(texts: list[str]) -> np.ndarray:
    return np.stack([np.random.default_rng(zlib.crc32(text.encode())).standard_normal(16) for text in texts])


def numbers_for(api: str, texts: list[str]) -> np.ndarray:
    """A vector a text, one number for a reranker, four log-probabilities for scores."""
    if api == "tei":
        return vectors_of(texts)
    found = vectors_of(texts)[:, : len(LABELS)]
    return found[:, 0] if "rerank" in api else found - np.logaddexp.reduce(found, axis=1, keepdims=True)


class Served(serve.Served):
    """One whose process would answer at once and serve at once."""

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert "engine" not in command, "timed"
        asked = command["truth"]
        return {"numbers": numbers_for(asked["api"], [asked["query"] + item for item in asked["items"]]).tolist()}

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

    def begin(change: Callable[[np.ndarray], np.ndarray], status: int = 200, api: str = "tei") -> None:
        def post(url: str, json: dict[str, Any], **more: Any) -> Any:
            assert url.endswith(ROUTES[api].path)
            texts = [json.get("query", "") + item for item in json[ROUTES[api].field]]
            found = answer_of(api, change(numbers_for(api, texts)))
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


def answer_of(api: str, numbers: np.ndarray) -> Any:
    """As a server answers."""
    if api == "tei":
        return numbers.tolist()
    if api == "tei-rerank":
        order = np.argsort(-numbers).tolist()
        return [{"index": index, "score": float(numbers[index])} for index in order]
    rows = [dict(zip(map(str, LABELS), row, strict=True)) for row in np.exp(numbers).tolist()]
    return {"data": [{"index": index, "token_probs": row} for index, row in enumerate(rows)]}


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
    with pytest.raises(SystemExit, match=r"tiny, auto, synthetic: /embed.*WRONG, nothing is timed"):
        begin(change)
    assert "texts/s" not in capsys.readouterr().out


@pytest.mark.parametrize("api", ["tei-rerank", "generative"])
def test_wrong_scores_stop_it_too(
    api: str, begin: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(serve.LOADS, "first", {"api": api})
    for change in (lambda numbers: np.roll(numbers, 1, axis=0), lambda numbers: 0 * numbers + numbers.mean()):
        with pytest.raises(SystemExit, match=r"tiny, auto, synthetic: /\w+.*WRONG, nothing is timed"):
            begin(change, api=api)
    assert "texts/s" not in capsys.readouterr().out
    with pytest.raises(LoadError):
        begin(lambda numbers: numbers, api=api)


def test_real_text_has_to_be_given(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", "--loads", "bbh"])
    with pytest.raises(SystemExit):
        serve.main()
    assert "--loads bbh reads real text: --data DATA" in capsys.readouterr().err


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
