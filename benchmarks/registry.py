"""Every benchmark: what it shows, how it is run, and which columns of its rows stand in tables."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["BENCHMARKS", "Benchmark"]


@dataclass(frozen=True)
class Benchmark:
    """A script of this folder. It checks its results, times them, and writes one JSON object a row with `--json`."""

    name: str
    shows: str
    devices: tuple[str, ...]
    keys: tuple[str, ...]
    """Columns that name a row."""
    values: tuple[str, ...]
    """Columns with what was measured."""
    full: dict[str, str] = field(default_factory=dict)
    """Device -> its arguments."""
    quick: dict[str, str] = field(default_factory=dict)
    """The same in a minute or less; a device that is missing is left out of quick runs."""
    data: bool = False
    """Takes `--data`."""
    json: bool = True
    """Takes `--json`; without it the JSON objects among the lines that it prints are its rows."""
    settings: tuple[str, ...] = ()
    """More columns that tell rows apart, of things that are seldom changed: shown nowhere, but kept."""
    needs: tuple[str, ...] = ()
    """Modules without which it cannot run."""
    processes: int = 1
    """Started so often, one for each GPU where there are any, by torchrun."""
    limit: float = 3600
    """Seconds after which a run is ended; a quick one has `QUICK_LIMIT`."""
    unit: str = "ms"

    @property
    def script(self) -> str:
        return f"{self.name}.py"


QUICK_LIMIT = {"cpu": 120.0, "cuda": 90.0}
"""Device -> seconds after which a quick benchmark is ended."""


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "workloads",
            "what the named workloads share, by the order of batches",
            ("cpu",),
            ("workload",),
            ("at_once", "arrival", "length", "lexicographic"),
            quick={"cpu": "--scale 0.25"},
            unit="unique tokens / tokens",
        ),
        Benchmark(
            "planner",
            "fold and scatter beside the Rust package of the paper's authors",
            ("cpu",),
            ("kind", "batch"),
            ("ours_us", "theirs_us", "ratio", "ours_mb", "theirs_mb"),
            quick={"cpu": "--rows short,edge --rounds 3 --milliseconds 1"},
            unit="us",
        ),
        Benchmark(
            "scaling",
            "the planner by tokens, sequences, depth of the tree and threads",
            ("cpu",),
            ("what", "size"),
            ("tokens", "ms", "ns_per_token", "spread"),
            quick={"cpu": "--quick"},
        ),
        Benchmark(
            "public",
            "what users call, through public names alone: the benchmark to compare two commits with",
            ("cpu", "cuda"),
            ("name",),
            ("ms", "spread"),
            full={"cpu": "", "cuda": ""},
            quick={"cpu": "--rounds 3 --texts 100", "cuda": "--rounds 3 --texts 500"},
            unit="ms",
        ),
        Benchmark(
            "decisions",
            "one state and many questions: one prompt after another, folding off, folded",
            ("cpu", "cuda"),
            ("shape", "what"),
            (
                "prompts",
                "tokens",
                "computed",
                "stock_ms",
                "off_ms",
                "folded_ms",
                "over_stock",
                "over_off",
                "decisions_per_s",
                "beside_ms",
                "over_beside",
            ),
            full={"cpu": "--state 200 --scale 0.05 --rounds 3", "cuda": "--shape 0.6b 4b 8b"},
            quick={
                "cpu": "--state 100 --scale 0.03 --rounds 3 --seconds 5 --what semif 64q",
                "cuda": "--shape 0.6b --rounds 3 --seconds 10 --what semif 64q",
            },
        ),
        Benchmark(
            "generation",
            "prompts that share their examples and what follows each, in transformers' own loop",
            ("cpu", "cuda"),
            ("shape", "what"),
            ("prompts", "tokens", "computed", "stock_ms", "modules_ms", "folded_ms", "over_stock"),
            full={"cpu": "--head 300 --prompts 16 --new 16", "cuda": "--shape 0.6b 4b"},
            quick={
                "cpu": "--head 100 --prompts 8 --new 4 --rounds 3 --seconds 5",
                "cuda": "--shape 0.6b --rounds 3 --seconds 10",
            },
        ),
        Benchmark(
            "decisions_http",
            "decisions over HTTP: latency of one client, many questions beside one",
            ("cpu", "cuda"),
            ("shape", "state", "questions"),
            ("tokens", "computed", "p50_ms", "p99_ms", "over_one"),
            full={"cpu": "--state 200 --requests 20", "cuda": "--shape 0.6b 8b"},
            quick={"cpu": "--state 100 --questions 8 --requests 5 --warm-up 1", "cuda": "--requests 20"},
            unit="ms",
        ),
        Benchmark(
            "forward_cpu",
            "a whole model, folded, beside transformers' padded SDPA",
            ("cpu",),
            ("name",),
            ("tokens", "compact", "padded_s", "folded_s", "speed_up", "possible", "spread"),
            full={"cpu": "--batch 32"},
            quick={"cpu": "--layers 2 --width 128 --batch 8 --batches 1 --rounds 3"},
            data=True,
            unit="s",
        ),
        Benchmark(
            "forward_gpu",
            "whole Qwen3-shaped models: padded, packed, the paper's way, folded; the roofline",
            ("cpu", "cuda"),
            ("shape", "row"),
            (
                "padded",
                "packed",
                "off",
                "upstream",
                "expand",
                "modules",
                "fused",
                "graphs",
                "roofline",
                "share",
                "possible",
            ),
            full={"cpu": "--more", "cuda": "--shape 0.6b 4b 8b --more --seconds 8"},
            quick={"cpu": "--more --rounds 3", "cuda": "--shape 0.6b --rows 2048/256/32 128/96/10 --more --rounds 5"},
        ),
        Benchmark(
            "attention",
            "one layer's tree attention beside the paper's way, gathered and plain FlashAttention-2",
            ("cuda",),
            ("case", "pass", "method"),
            ("ms", "tflops", "host_us", "error"),
            full={"cuda": "--backward --methods triton,auto,expand,compact,packed"},
            quick={"cuda": "--cases 2048/256/32,128/96/64,0/256/64 --repeats 7"},
            settings=("heads", "kv_heads", "width", "dtype", "layout"),
        ),
        Benchmark(
            "engine",
            "reranking jobs from texts to scores, beside the forward passes alone",
            ("cpu", "cuda"),
            ("shape",),
            ("texts", "tokens", "compression", "texts_per_s", "tokens_per_s", "job_s", "forward_s", "tokenization_s"),
            full={"cpu": "--queries 4 --documents 50", "cuda": "--shape 0.6b 4b --energy 5"},
            quick={"cpu": "--queries 2 --documents 8 --rounds 2", "cuda": "--shape 0.6b --queries 5"},
            data=True,
        ),
        Benchmark(
            "library",
            "sentence-transformers, lm-eval and mteb, stock and with the adapters",
            ("cpu", "cuda"),
            ("shape", "what"),
            ("items", "tokens", "computed", "stock_batch_size", "stock_s", "ours_s", "speed_up"),
            full={"cuda": "--shape 0.6b 4b --device cuda --lm-eval-batch-size 8 32 --rounds 2"},
            quick={
                "cpu": "--what predict --queries 2 --documents 8 --batch-size 32 --rounds 1",
                "cuda": "--shape 0.6b --device cuda --what predict --queries 5 --rounds 2",
            },
            data=True,
            unit="s",
            needs=("sentence_transformers",),
        ),
        Benchmark(
            "hybrid",
            "whole models of Qwen3.5's shapes: transformers, unfolded, folded",
            ("cpu", "cuda"),
            ("shape", "layers", "row"),
            ("N", "M", "possible", "transformers", "unfolded", "folded"),
            full={"cuda": "--shape 3.5-0.8b 3.5-4b 3.5-9b"},
            quick={"cpu": "--shape small --rows 32/8/4 --rounds 2", "cuda": "--rounds 3"},
            unit="ms",
        ),
        Benchmark(
            "families",
            "a 0.6B-sized model of each family: unfolded, its own modules, and what an engine runs",
            ("cpu", "cuda"),
            ("family", "row"),
            ("unfolded", "modules", "graphs"),
            full={"cuda": ""},
            quick={"cpu": "--family olmo2 --layers 2 --width 128 --rows 32/8/4 --rounds 2", "cuda": "--family olmo2"},
            unit="ms",
        ),
        Benchmark(
            "training",
            "a training step beside packed and padded batches and TRL's head: time and memory",
            ("cpu", "cuda"),
            ("shape", "row"),
            ("tokens", "compact", "possible", "milliseconds", "kept_gib", "peak_gib"),
            full={"cuda": "--shape 0.6b 4b --checkpointing 4b"},
            quick={"cpu": "--quick", "cuda": "--shape 0.6b --rows 1024/1024/8 0/2048/8 --rounds 3"},
            settings=("compiled", "checkpointing"),
        ),
        Benchmark(
            "training_distributed",
            "a training step on several processes, DDP and FSDP2: padded and folded",
            ("cpu", "cuda"),
            ("shape", "wrapper", "row", "processes"),
            ("padded_ms", "folded_ms", "speed_up", "loss_off", "peak_gib"),
            full={"cpu": "--shape small --prompt 64 --answer 16", "cuda": "--shape 0.6b"},
            quick={"cpu": "--shape small --prompt 64 --answer 16 --rounds 2"},
            settings=("checkpointing",),
            processes=2,
        ),
        Benchmark(
            "overhead",
            'what `threshold="auto"` costs where nothing is shared',
            ("cpu", "cuda"),
            ("lengths",),
            ("tokens", "off_s", "auto", "forced", "same", "same_low", "same_high", "forming", "folded"),
            full={"cuda": "--device cuda --layers 28 --width 1024 --dtype bfloat16 --sequences 256"},
            quick={"cpu": "--layers 1 --width 128 --sequences 4 --rounds 3"},
            unit="s",
            settings=("shape", "device"),
        ),
        Benchmark(
            "scheduling",
            "online batches by shared prefixes, by arrival, shortest first (virtual clock)",
            ("cpu",),
            ("load", "order"),
            ("tokens_per_s", "compression", "p50_ms", "p99_ms"),
            quick={"cpu": "--calls 200 --loads 0.8"},
            data=True,
        ),
        Benchmark(
            "sharding",
            "what is left to compute when texts are spread over workers, at random, by hash, by range (no model)",
            ("cpu",),
            ("workload", "kind", "method", "shards", "sample"),
            ("compression", "one_tree_each", "largest", "random", "range"),
            quick={"cpu": "--shards 1 16 256 --scale 0.05"},
            data=True,
            unit="unique tokens / tokens",
        ),
        Benchmark(
            "serve",
            "the server with folding on and off, and beside the engine alone, by HTTP",
            ("cpu", "cuda"),
            ("model", "what", "threshold"),
            (
                *("texts/s", "tokens/s", "p50", "p90", "p99", "compression", "joules_per_1000_texts"),
                *("folding on/off", "folding/padded", "server/engine"),
            ),
            full={"cuda": "--shape 0.6b 4b 8b"},
            quick={
                "cpu": "--texts 8 --in-flight 2 --bodies 8 --requests 16 --seconds 1 --warm-up 0.5 --modes auto off",
                "cuda": "--shape 0.6b --loads first --seconds 3 --modes auto off",
            },
            data=True,
            json=False,
            settings=("swap", "texts", "in_flight", "workload", "api"),
            needs=("fastapi", "uvicorn", "orjson", "prometheus_client"),
        ),
        Benchmark(
            "multi_gpu",
            "two replicas by HTTP beside one, and a model sharded over two GPUs beside one GPU",
            ("cuda",),
            ("part", "model", "shape", "what", "row"),
            ("texts/s", "p50", "p99", "one_ms", "two_ms", "sums_ms", "speed_up", "error_one", "error_two"),
            needs=("fastapi", "uvicorn", "orjson", "prometheus_client"),
        ),
    )
}
"""Name -> benchmark, in the order in which they run."""
