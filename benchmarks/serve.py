"""The server with folding on and off, and beside the engine alone: closed loop, server and load on one host.

Requests of 64 texts, 75 to 200 tokens each, of which 61% are unique (a reranker's prompt, about 8.2 passages a
query), or 71% with the query last; 16 on their way. With real text: a query of Vaswani with 64 passages to rerank,
questions of GSM8K to embed behind one instruction, questions of BIG-Bench-Hard, 16 behind a task's three examples, to
tell how likely each of four answers follows. A process of its own for each model (`served_model.py`) serves it folded,
with the same kernels and nothing shared (threshold "off"), and as transformers runs it, padded (threshold 0); then the
engine runs the loads of embeddings without HTTP. Rates are taken in the midst of the load, once the server is warm.
The gate, before any load: the answer to some of its texts against that of the unmodified model, one text at a time.

  python benchmarks/serve.py                                a small model, on a CPU
  python benchmarks/serve.py --shape 0.6b 4b 8b --data DATA               on a GPU, about four minutes
  python benchmarks/serve.py --shape 0.6b --loads light                   latency of 10 texts, one request in flight
  python benchmarks/serve.py --shape 0.6b --loads vaswani gsm8k bbh --data DATA
  python benchmarks/serve.py --model nothing --data DATA    no model at all: what the host can do

`--shape` has random weights of Qwen3's shapes; with `--data` (see docs/benchmarks.md) Qwen's tokenizer reads words,
without it a token is a letter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import load
from http_bodies import ROUTES, body_of, items_of, numbers_of
from power import Meter, integrate
from provenance import provenance
from served_model import NOTHING
from shapes import SHAPES
from verify import relative_error, require
from window import run_in_loop

LOADS: dict[str, dict[str, Any]] = {
    "first": {},
    "last": {"swap": True},
    "base64": {"api": "openai-base64"},
    "light": {"texts": 10, "in_flight": 1},
    "vaswani": {"workload": "vaswani", "api": "tei-rerank"},
    "gsm8k": {"workload": "gsm8k"},
    "bbh": {"workload": "bbh", "api": "generative", "texts": 16},
}
"""Name -> what it changes of the options."""
MODES = ("auto", "off", "0")
STARTING_SECONDS = 300.0
SOME = 12
"""Texts that the gate looks at."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=[])
    parser.add_argument("--model", nargs="+", default=[])
    parser.add_argument("--loads", nargs="+", choices=LOADS, help="default: all for 0.6b, first and last for others")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="thresholds, and off: nothing shared")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5, help="in the midst of the load, when warm")
    parser.add_argument("--warm-up", type=float, default=2, help="seconds of load before; two requests each, at least")
    parser.add_argument("--bodies", type=int, default=32, help="requests that differ, at least")
    parser.add_argument("--requests", type=int, default=32, help="that a rate is made of, at least")
    parser.add_argument("--api", choices=["tei", "openai", "openai-base64"], default="tei")
    parser.add_argument("--swap", action="store_true", help="the query after the passage: fewer tokens are shared")
    parser.add_argument("--data", type=Path, help="folder with qwen.tiktoken, vaswani/, gsm8k/ and bbh/")
    options = parser.parse_args()
    for name in options.loads or ():
        if "workload" in LOADS[name] and not options.data:
            parser.error(f"--loads {name} reads real text: --data DATA (docs/benchmarks.md)")
    options.workload = "synthetic"
    names = [*options.shape, *options.model] or ["tiny"]
    # all at once, since most of it is importing and making weights
    served = {name: Served(name, options) for name in names}
    try:
        for each in served.values():
            device = each.wait_for_answer(STARTING_SECONDS)["device"]
            each.is_half = device.startswith("cuda")
        print(json.dumps(provenance(device=device)), flush=True)
        # latencies first, while nothing else asks the GPU's driver
        for each in served.values():
            each.measure([load for load in loads_of(each.name, options) if load.in_flight == 1], None)
        with Meter() as meter:
            for each in served.values():
                each.measure([load for load in loads_of(each.name, options) if load.in_flight > 1], meter)
    finally:
        for each in served.values():
            each.stop()


def loads_of(name: str, options: argparse.Namespace) -> list[argparse.Namespace]:
    """The loads that a model is measured under."""
    known = [load for load, changes in LOADS.items() if options.data or "workload" not in changes]
    chosen = options.loads or (known if name == "0.6b" else ["first", "last"] if name in SHAPES else ["first"])
    return [argparse.Namespace(**(vars(options) | LOADS[load])) for load in chosen]


def source_of(options: argparse.Namespace) -> list[str]:
    """The texts, as load.py takes them."""
    data = ["--data", str(options.data)] if options.data else []
    units = ["--units", "words" if options.data else "letters"]
    what = ["--texts", str(options.texts), "--workload", options.workload, "--api", options.api]
    return [*what, *["--swap"] * options.swap, *units, *data]


class Served:
    """A model in a process of its own, and what is measured of it."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.options = options
        self.log = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self.serving: dict[str, str] | None = None
        """The mode in which it serves now, if it does, and under what name."""
        self.address = ""
        self.is_half = False
        self.truth: dict[str, np.ndarray] = {}
        """By load."""
        command = [sys.executable, str(Path(__file__).parent / "served_model.py"), name]
        command += ["--data", str(options.data)] if options.data else []
        # the load runs on this host too: threads that spin for a core that it has would wait many times their work
        threads = str(max(1, (os.cpu_count() or 1) - 1))
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={"OMP_NUM_THREADS": threads} | os.environ,
        )

    def measure(self, loads: list[argparse.Namespace], meter: Meter | None) -> None:
        """Print a row for every load in every mode, the engine's own, and their ratios."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        if self.name != NOTHING:
            self.truth = {key_of(each): np.asarray(self.ask({"truth": first_texts(each)})["numbers"]) for each in loads}
        for mode in self.options.modes:
            some = loads if mode == "auto" else [each for each in loads if each.in_flight > 1 and "64" not in each.api]
            # padded as in transformers is measured once
            for each in some[:1] if mode == "0" else some:
                row = self._served(mode, each, meter)
                found[mode, key_of(each)] = row
                what = "server, nothing shared" if mode == "off" else "server"
                self._print(what, each, {"threshold": mode, **row})
            self._stop_serving()
        for each in loads:
            alone = None
            if each.in_flight > 1 and each.api == "tei":
                answer = self.ask({"engine": vars(each) | {"data": str(each.data or "")}, "source": source_of(each)})
                self._print("engine alone", each, {"threshold": "auto", **answer})
                alone = answer["texts/s"]
            self._print_ratios(found, each, alone)

    def _served(self, mode: str, options: argparse.Namespace, meter: Meter | None) -> dict[str, Any]:
        # a server takes what is called so for a reranker
        address = self._address(mode, f"{self.name}-reranker" if "rerank" in options.api else self.name)
        self._gate(mode, options)
        # scores are as large as some units, vectors of length 1
        tolerance = "0.1" if options.api in ("tei", "openai", "openai-base64") else "0.5"
        arguments = ["--in-flight", str(options.in_flight), "--tolerance", tolerance]
        arguments += ["--window", str(options.seconds), "--warm-seconds", str(options.warm_up)]
        arguments += ["--window-requests", str(options.requests)]
        arguments += ["--bodies", str(max(options.bodies, 2 * options.in_flight))]
        asked = load.parser().parse_args([address, *source_of(options), *arguments])
        outcome: dict[str, Any] = run_in_loop(load.run(asked))
        began, ended = outcome.pop("window")
        shares = mode == "off" and outcome.get("compression", 1.0) < 0.999
        if outcome["wrong"] or outcome["unanswered"] or shares:
            sys.exit(f"{self.name}, {mode}: {outcome}\n{self._log()}")
        reading = None if meter is None else integrate(meter._samples, began, ended)
        if reading is not None:
            texts = outcome["texts/s"] * reading.seconds
            outcome["joules_per_1000_texts"] = round(1000 * reading.joules / texts, 1)
            outcome["watts"] = round(reading.watts)
        return outcome

    def _address(self, mode: str, name: str) -> str:
        """Of the server in this mode, which is started unless it runs."""
        serving = {"serve": mode, "name": name}
        if self.serving == serving:
            return self.address
        self._stop_serving()
        said = len(self._log())
        self._tell(serving)
        end = time.monotonic() + STARTING_SECONDS
        while "Application startup complete" not in self._log()[said:]:
            if self.process.poll() is not None or time.monotonic() > end:
                sys.exit(f"{self.name}, {mode}: no server\n{self._log()}")
            time.sleep(0.05)
        self.serving = serving
        self.address = re.findall(r"at (http://[\d.:]+)", self._log()[said:])[0]
        return self.address

    def _gate(self, mode: str, options: argparse.Namespace) -> None:
        """Numbers of texts that share much are those of the unmodified model, fed one at a time."""
        truth = self.truth.get(key_of(options))
        if truth is None:
            return
        asked = first_texts(options)
        path, body = ROUTES[options.api].path, body_of(options.api, asked["query"], asked["items"])
        answer = httpx.post(f"{self.address}{path}", json=body, timeout=120)
        if answer.status_code != 200:
            sys.exit(
                f"{self.name}, {mode}: {path} answers {answer.status_code} {answer.text[:300]}: WRONG, nothing is timed"
            )
        found = numbers_of(options.api, answer.content)
        # what all scores have in common says nothing
        common = truth.mean() if options.api in ("tei-rerank", "generative") else 0.0
        # 16-bit models are off by some percent themselves, a wrong mask by all of it
        error = relative_error(found - common, truth - common)
        what = f"{self.name}, {mode}, {options.workload}: {ROUTES[options.api].path}"
        require(what, error, 0.2 if self.is_half else 1e-3)

    def _stop_serving(self) -> None:
        if self.serving is not None:
            self.serving = None
            self.process.terminate()
            self.wait_for_answer(120)

    def _print(self, what: str, options: argparse.Namespace, row: dict[str, Any]) -> None:
        settings = {name: getattr(options, name) for name in ("workload", "swap", "texts", "in_flight", "api")}
        print(json.dumps({"model": self.name, "what": what, **settings, **row}), flush=True)

    def _print_ratios(
        self, found: dict[tuple[str, str], Any], options: argparse.Namespace, alone: float | None
    ) -> None:
        key = key_of(options)
        rates = {mode: found[mode, key]["texts/s"] for mode in self.options.modes if (mode, key) in found}
        if "auto" not in rates:
            return
        ratios = {"server/engine": round(rates["auto"] / alone, 3)} if alone else {}
        ratios |= {"folding on/off": round(rates["auto"] / rates["off"], 2)} if "off" in rates else {}
        ratios |= {"folding/padded": round(rates["auto"] / rates["0"], 2)} if "0" in rates else {}
        if ratios:
            self._print("ratios", options, ratios)

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """What the process answers to a command."""
        self._tell(command)
        return self.wait_for_answer(STARTING_SECONDS)

    def _tell(self, command: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def wait_for_answer(self, seconds: float) -> dict[str, Any]:
        """The next line that the process writes."""
        assert self.process.stdout is not None
        killer = threading.Timer(seconds, self.process.kill)
        killer.start()
        line = self.process.stdout.readline()
        killer.cancel()
        if not line:
            sys.exit(f"{self.name}: the process ended\n{self._log()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def _log(self) -> str:
        return Path(self.log.name).read_text(errors="replace")

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.log.close()


def first_texts(options: argparse.Namespace) -> dict[str, Any]:
    """The first of a load, as `body_of` takes them."""
    query, items = next(items_of(load.parser().parse_args(["", *source_of(options)])))
    return {"api": options.api, "query": query, "items": list(dict.fromkeys(items[:SOME]))}


def key_of(options: argparse.Namespace) -> str:
    """What distinguishes the loads."""
    return json.dumps([options.workload, options.swap, options.texts, options.in_flight, options.api])


if __name__ == "__main__":
    main()
