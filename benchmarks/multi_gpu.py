"""Several GPUs of one host: replicas of the server behind one address, and a model sharded over two GPUs.

Replicas: texts a second by HTTP of one server (no front before it) and of `--replicas 2`, under the same load: requests
of 64 texts, 75 to 200 tokens each, of which 61% are unique (a reranker's prompt, about 8.2 passages a query), closed
loop, from four processes. Random weights, a token a letter. The gate: vectors of the two servers against each other,
and every answer against the first to the same request.

Tensor parallel: milliseconds from token ids to the hidden states of every sequence's last token, rows prefix / suffix /
sequences, on one GPU and on two (`Engine(tensor_parallel_size=2)`: telling the other process included), and what the
sums over both GPUs take alone, one after another. The gate: last hidden states of some sequences within twice the error
that the unmodified bf16 model has against itself in float32.

  python benchmarks/multi_gpu.py                                    both parts, two GPUs, about two minutes
  python benchmarks/multi_gpu.py --parts tensor-parallel --tensor-shape 8b 4b
  python benchmarks/multi_gpu.py --device cpu --shape tiny --tensor-shape small --rows 32/32/4 --seconds 4
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from provenance import provenance
from registry import BENCHMARKS
from report import text_table

HERE = Path(__file__).parent
ROWS = ["2048/256/32", "512/256/32", "128/96/64", "128/96/10"]
TEXTS = 64
CLIENTS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", default="0.6b", help="of the replicas: of shapes.py, or the name of a model")
    parser.add_argument("--in-flight", type=int, default=32, help="requests on their way, all clients together")
    parser.add_argument("--seconds", type=float, default=6, help="of a measurement by HTTP")
    parser.add_argument("--tensor-shape", nargs="+", default=["8b"], help="of the sharded model")
    parser.add_argument("--rows", nargs="+", default=ROWS, help="prefix/suffix/sequences")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=float, default=240, help="seconds of a part, at most")
    parser.add_argument("--json", type=Path, help="also write one JSON object a row")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        from multi_gpu_rank import run_rank

        run_rank(options)
    else:
        run_parts(options)


def run_parts(options: argparse.Namespace) -> None:
    """Both parts; where one fails, the other still runs."""
    import torch

    if options.device == "cuda" and torch.cuda.device_count() < 2:
        sys.exit(f"two GPUs are needed, and {torch.cuda.device_count()} visible; --device cpu is a dry run")
    print(json.dumps(provenance(gpus=torch.cuda.device_count(), cuda=torch.version.cuda)), flush=True)
    if options.json:
        options.json.write_text("")
    failed, rows = [], []
    for name in options.parts:
        began = time.monotonic()
        try:
            for row in PARTS[name](options):
                tell(row, options)
                rows.append(row)
        except Exception as error:
            failed.append(name)
            print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        print(f"# {name}: {time.monotonic() - began:.0f} s", flush=True)
    for name in options.parts:
        found = [row for row in rows if row["part"] == name]
        print(f"\n{text_table(BENCHMARKS['multi_gpu'], found)}" if found else "", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def tell(row: dict[str, Any], options: argparse.Namespace) -> None:
    print(json.dumps(row), flush=True)
    if options.json:
        with options.json.open("a") as file:
            file.write(json.dumps(row) + "\n")


def replicas(options: argparse.Namespace) -> Any:
    """A row a server, and their ratio."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = options.shape
        from shapes import SHAPES

        if options.shape in SHAPES:
            model = str(folder / "model")
            make_checkpoint(model, options)
        # both at once, since most of it is importing and compiling; the one that is not asked does nothing
        with serving(model, 1, folder / "one", options) as one, serving(model, 2, folder / "two", options) as two:
            addresses = {"one": one(), "two": two()}
            check_same(addresses)
            found: dict[str, dict[str, Any]] = {}
            for what, address in addresses.items():
                found[what] = under_load(address, options)
                count = 1 if what == "one" else 2
                yield {"part": "replicas", "model": options.shape, "what": f"{count} by HTTP", **found[what]}
    ratio = found["two"]["texts/s"] / found["one"]["texts/s"]
    yield {"part": "replicas", "model": options.shape, "what": "two / one", "speed_up": round(ratio, 3)}


@contextmanager
def serving(model: str, count: int, log: Path, options: argparse.Namespace) -> Any:
    """A server that starts; the value waits for its address."""
    limits = ["--max-concurrent-requests", str(TEXTS * options.in_flight), "--max-client-batch-size", str(TEXTS)]
    command = [sys.executable, "-m", "radix_mlp.cli", "serve", "--model-id", model, "--port", "0", *limits]
    command += ["--replicas", str(count), "--device", options.device, "--disable-spans", "--log-level", "info"]
    environment = dict(os.environ)
    if options.device == "cuda" and count == 1:
        environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, env=environment)
    ready = " replicas at http" if count > 1 else "Application startup complete"

    def address() -> str:
        end = time.monotonic() + options.limit
        while ready not in (text := log.read_text()):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server of {count} did not start: {text[-3000:]}")
            time.sleep(0.1)
        return re.findall(r"at (http://[\d.]+:\d+)", text)[-1]

    try:
        yield address
    finally:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()


def check_same(addresses: dict[str, str]) -> None:
    """The gate: both servers give the same vectors."""
    import httpx
    import numpy as np

    from verify import relative_error, require

    texts = [f"{'a common beginning ' * 4}{number}" for number in range(16)]
    answers = [
        np.array(httpx.post(f"{address}/embed", json={"inputs": texts}, timeout=120).raise_for_status().json())
        for address in addresses.values()
    ]
    require("vectors of two servers", relative_error(*answers), 2e-2)


def under_load(address: str, options: argparse.Namespace) -> dict[str, Any]:
    """Rates of all clients together, and what the server says of its work."""
    import httpx

    before = tokens_of(httpx.get(f"{address}/metrics").text)
    command = [sys.executable, str(HERE / "load.py"), address, "--texts", str(TEXTS)]
    command += ["--in-flight", str(max(1, options.in_flight // CLIENTS)), "--tolerance", "0.1"]
    command += ["--window", str(options.seconds), "--warm-seconds", "4", "--bodies", "32"]

    def client(seed: int) -> dict[str, Any]:
        done = subprocess.run(
            [*command, "--seed", str(seed)], capture_output=True, text=True, timeout=options.limit, check=False
        )
        if done.returncode:
            raise RuntimeError(f"load failed: {done.stdout[-1000:]}{done.stderr[-2000:]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))

    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(client, range(CLIENTS)))
    after = tokens_of(httpx.get(f"{address}/metrics").text)
    computed, tokens = (sum(after[name].values()) - sum(before[name].values()) for name in ("compact_", ""))
    shares = [after["compact_"][key] - before["compact_"].get(key, 0.0) for key in sorted(after["compact_"])]
    return {
        **{name: round(sum(each[name] for each in found), 1) for name in ("requests/s", "texts/s", "tokens/s")},
        **{name: max(each[name] for each in found) for name in ("p50", "p99")},
        "compression": round(computed / max(1.0, tokens), 3),
        "shares": [round(share / max(1.0, computed), 3) for share in shares],
    }


def tokens_of(page: str) -> dict[str, dict[str, float]]:
    """Counts of tokens of a `/metrics` page, by replica."""
    pattern = r"^radix_mlp_%stokens_total(\{[^}]*\})? (\S+)"
    return {
        name: {key: float(value) for key, value in re.findall(pattern % name, page, re.MULTILINE)}
        for name in ("compact_", "")
    }


def make_checkpoint(folder: str, options: argparse.Namespace) -> None:
    """A folder with random weights of a shape and the tokenizer of letters."""
    import torch
    from transformers import Qwen3Model

    from radix_mlp.models.tiny import tiny_tokenizer
    from shapes import qwen3_config

    torch.manual_seed(0)
    config = qwen3_config(options.shape, vocab_size=32_000, initializer_range=0.05, max_position_embeddings=8192)
    with torch.device(options.device):
        model = Qwen3Model(config).eval()
    (model.bfloat16() if options.device == "cuda" else model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    del model
    if options.device == "cuda":
        torch.cuda.empty_cache()


def tensor_parallel(options: argparse.Namespace) -> Any:
    """The rows that the two processes of torchrun print."""
    # no name of this host has to lead anywhere
    torchrun = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *torchrun, __file__, "--rank", "--device", options.device]
    command += ["--rounds", str(options.rounds)]
    command += ["--tensor-shape", *options.tensor_shape, "--rows", *options.rows]
    environment = {"OMP_NUM_THREADS": "4", "GLOO_SOCKET_IFNAME": "lo"} | os.environ
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        # a collective operation that waits for ever must not hold the rest
        ends = time.monotonic() + options.limit
        with ThreadPoolExecutor(1) as pool:
            pool.submit(_end_after, process, ends)
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
                else:
                    print(line, end="", flush=True)
            code = process.wait()
        if code:
            log.seek(0)
            raise RuntimeError(f"torchrun ended with {code}: {log.read()[-4000:]}")


def _end_after(process: subprocess.Popen[str], ends: float) -> None:
    while process.poll() is None:
        if time.monotonic() > ends:
            process.kill()
            return
        time.sleep(0.5)


PARTS = {"replicas": replicas, "tensor-parallel": tensor_parallel}

if __name__ == "__main__":
    main()
