"""`radix-mlp serve` as a process: options, addresses, logs, the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from radix_mlp.cli.main import app
from radix_mlp.errors import InvalidInputError
from radix_mlp.serve.run import _listen, run
from radix_mlp.serve.settings import ServeSettings

from .conftest import wait_for_addresses


@pytest.fixture(autouse=True)
def _logs_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radix_mlp.serve.run.set_up_logs", lambda level, as_json: None)


def settings_of(monkeypatch: pytest.MonkeyPatch, *options: str, **environment: str) -> ServeSettings:
    """What the command would run with."""
    found: list[ServeSettings] = []
    monkeypatch.setattr("radix_mlp.serve.run.run", found.append)
    result = CliRunner().invoke(app, ["serve", *options], env=environment)
    assert result.exit_code == 0, result.output
    return found[0]


def test_defaults_are_those_of_text_embeddings_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings_of(monkeypatch, "--model-id", "tiny")
    assert found == ServeSettings(model_id="tiny")
    assert (found.port, found.max_concurrent_requests, found.max_batch_tokens) == (3000, 512, 16384)
    assert (found.max_client_batch_size, found.auto_truncate, found.payload_limit) == (32, True, 2_000_000)
    # but not this one, which is 0.0.0.0 there
    assert found.hostname == "127.0.0.1"


def test_options_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["-p", "8080", "--auto-truncate", "--cors-allow-origin", "a", "--cors-allow-origin", "b", "--json-output"]
    found = settings_of(
        monkeypatch,
        *options,
        MODEL_ID="./model",
        PORT="1",
        MAX_BATCH_TOKENS="100",
        API_KEY="secret",
        RADIX_MLP_THRESHOLD="0.8",
        # set in every container, and not meant for this
        HOSTNAME="3f2a91c0",
    )
    assert (found.model_id, found.port, found.max_batch_tokens, found.api_key) == ("./model", 8080, 100, "secret")
    assert (found.radix_mlp_threshold, found.hostname, found.json_output) == (0.8, "127.0.0.1", True)
    assert (found.cors_allow_origin, found.auto_truncate) == (("a", "b"), True)
    assert "secret" not in repr(found)
    assert not settings_of(monkeypatch, "--auto-truncate", "false", "--model-id", "tiny").auto_truncate
    assert not settings_of(monkeypatch, "--model-id", "tiny", AUTO_TRUNCATE="false").auto_truncate


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--port", "70000"], "--port 70000"),
        (["--max-client-batch-size", "0"], "must be at least 1"),
        (["--max-client-batch-size", "600"], "--max-concurrent-requests"),
        (["--pooling", "splade"], "splade"),
        (["--default-prompt", "a", "--default-prompt-name", "b"], "exclude"),
        (["--max-batch-requests", "3"], "not offered"),
        (["--radix-mlp-threshold", "maybe"], "auto or a number"),
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key", "secret\n"], "--api-key: only visible ASCII"),
        (["--api-key", "\udcff"], "--api-key: only visible ASCII"),
        (["--api-key", "secret "], "--api-key begins or ends with a blank"),
        (["--request-timeout", "0"], "more than 0"),
        (["--max-wait", "-1"], "--max-wait -1.0: must be from 0 to 10"),
        (["--max-wait", "nan"], "--max-wait nan"),
        # what a byte that is not UTF-8 is on a command line
        (["--default-prompt", "a \udcff"], r"--default-prompt 'a \udcff': not valid Unicode"),
        (["--served-model-name", "\udcff"], "--served-model-name"),
    ],
)
def test_wrong_options_are_told(options: list[str], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radix_mlp.serve.run.run", lambda settings: pytest.fail("started"))
    result = CliRunner().invoke(app, ["serve", "--model-id", "tiny", *options], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert reason in " ".join(result.output.split())


def test_what_does_not_go_with_the_model_is_told_before_it_is_served() -> None:
    for settings, reason in (
        (ServeSettings(model_id="tiny", port=0, default_prompt_name="query"), "prompts are none"),
        (ServeSettings(model_id="tiny-reranker", port=0, pooling="mean"), "--pooling is for embedding"),
        (ServeSettings(model_id="tiny", port=0, max_batch_tokens=100, auto_truncate=False), "--auto-truncate is off"),
        (ServeSettings(model_id="tiny", port=0, otlp_endpoint="http://127.0.0.1:1"), "opentelemetry"),
        (ServeSettings(model_id="./nowhere", port=0), "no such folder"),
        (ServeSettings(model_id="tiny", uds_path="/nowhere/at/all"), "--uds-path"),
        (ServeSettings(model_id="tiny", hostname="a..b"), "--hostname a..b"),
    ):
        with pytest.raises(InvalidInputError, match=reason):
            run(settings)


def test_pickled_weights_are_loaded_only_when_asked_for(tmp_path: Path) -> None:
    from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path)
    tiny_model().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(InvalidInputError, match="--allow-pickle"):
        run(ServeSettings(model_id=str(tmp_path), port=0))


def test_an_address_that_is_taken_is_told_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InvalidInputError, match="another port"):
        run(ServeSettings(model_id="./not/even/looked/for", port=taken.getsockname()[1]))


def test_an_address_is_taken_while_the_model_of_another_is_loaded(tmp_path: Path) -> None:
    with (
        _listen(ServeSettings(model_id="tiny", port=0)) as first,
        pytest.raises(InvalidInputError, match="already in use"),
    ):
        _listen(ServeSettings(model_id="tiny", port=first.getsockname()[1]))
    with _listen(ServeSettings(model_id="tiny", uds_path=str(tmp_path / "socket"))):
        with pytest.raises(InvalidInputError, match="already in use"):
            _listen(ServeSettings(model_id="tiny", uds_path=str(tmp_path / "socket")))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "socket"))


@contextmanager
def process(log: Path, *options: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "radix_mlp.cli", "serve", "--model-id", "tiny", *options]
    with log.open("wb") as file:
        started = subprocess.Popen(command, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
        try:
            yield started
        finally:
            started.kill()
            started.wait()


@pytest.mark.slow
def test_sigterm_drains_and_the_log_keeps_secrets(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process(log, "--port", "0", "--json-output", "--shutdown-timeout", "60", API_KEY="s3cr3t-key") as started:
        address = wait_for_addresses(log, started, 1)["tiny"]
        with httpx.Client(base_url=address, headers={"authorization": "Bearer s3cr3t-key"}, timeout=60) as client:
            client.post("/embed", json={"inputs": "warm"})
            long = "private words " * 500
            with ThreadPoolExecutor(8) as pool:
                answers = [
                    pool.submit(
                        client.post, "/embed", json={"inputs": [f"{number} {long}"]}, headers={"x-request-id": "one"}
                    )
                    for number in range(8)
                ]
                end = time.monotonic() + 30
                while "places_taken 8" not in client.get("/metrics").text.replace(".0", "") and time.monotonic() < end:
                    if all(answer.done() for answer in answers):
                        break
                started.send_signal(signal.SIGTERM)
                assert [answer.result().status_code for answer in answers] == [200] * 8
        assert started.wait(60) == 0
    text = log.read_text()
    assert "s3cr3t-key" not in text
    assert "private words" not in text
    lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    requests = [line for line in lines if line.get("path") == "/embed"]
    assert [line["request_id"] for line in requests].count("one") == 8
    assert {"method", "status", "total_time", "inference_time", "tokens"} <= set(requests[-1])
    assert lines[-1]["message"] == "stopped"


@pytest.mark.slow
def test_a_unix_socket(tmp_path: Path) -> None:
    log, path = tmp_path / "log", tmp_path / "socket"
    # what a server that was killed left behind is no obstacle
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with process(log, "--uds-path", str(path)) as started:
        end = time.monotonic() + 60
        while "Application startup complete" not in log.read_text() and time.monotonic() < end:
            time.sleep(0.1)
        assert path.stat().st_mode & 0o077 == 0
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://server") as client:
            assert client.post("/embed", json={"inputs": "a"}).status_code == 200
        with pytest.raises(InvalidInputError, match="--uds-path"):
            run(ServeSettings(model_id="tiny", uds_path=str(path)))
        started.terminate()
        assert started.wait(30) == 0
    assert not path.exists()


HANGS_ONCE = """
import os, sys, time
from pathlib import Path
import radix_mlp.serve.run as run
from radix_mlp.serve.settings import ServeSettings
load_engine = run.load_engine
def load(settings):
    engine, sha = load_engine(settings)
    mark = Path(sys.argv[1])
    def wait(module, arguments):
        if mark.exists():
            mark.unlink()
            time.sleep(600)
    engine.model.get_input_embeddings().register_forward_pre_hook(wait)
    return engine, sha
run.load_engine = load
run.run(ServeSettings(model_id="tiny", port=int(sys.argv[2]), hang_timeout=2.0))
"""


@pytest.mark.slow
def test_a_process_whose_engine_hangs_starts_anew(tmp_path: Path) -> None:
    log, mark = tmp_path / "log", tmp_path / "mark"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with log.open("wb") as file:
        started = subprocess.Popen([sys.executable, "-c", HANGS_ONCE, str(mark), str(port)], stderr=file)
        try:
            address = wait_for_addresses(log, started, 1)["tiny"]
            mark.touch()
            with httpx.Client(base_url=address, timeout=60) as client:
                assert client.post("/embed", json={"inputs": "a"}).status_code == 503
            wait_for_addresses(log, started, 2)
            with httpx.Client(base_url=address, timeout=60) as client:
                assert client.post("/embed", json={"inputs": "a"}).status_code == 200
        finally:
            started.kill()
            started.wait()


@pytest.mark.slow
def test_a_dealt_out_server_starts_anew_without_a_process_and_ends_with_all(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with process(log, "--tensor-parallel-size", "2", "--device", "cpu", "--port", str(port)) as started:
        for number in (1, 2):
            address = wait_for_addresses(log, started, number)["tiny"]
            with httpx.Client(base_url=address, timeout=300) as client:
                assert client.post("/embed", json={"inputs": "a"}).status_code == 200
            (peer,) = peers_of(started.pid)
            if number == 1:
                os.kill(peer, signal.SIGKILL)
        started.terminate()
        assert started.wait(300) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(peer, 0)
    assert "process 1 of 2 has ended with code -9" in log.read_text()


def peers_of(pid: int) -> list[int]:
    told = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(line.split()[0]) for line in told.stdout.splitlines() if "radix_mlp.engine.parallel.rank_main" in line]
