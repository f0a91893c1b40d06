"""Whole Qwen3-shaped models, random weights: folded and not, beside Hugging Face's own forward.

Rows are prefix / suffix / sequences. What is timed, from token ids to the hidden states of every sequence's last
token, planning and the copy of the plan included:

  padded     the unmodified model with SDPA on the rectangular batch (all lengths are equal: nothing in it is padding)
  packed     the model's own modules on N packed rows, FlashAttention for packed sequences (--more)
  off        the same stack with folding off: fused layers (graphs, where small) on N packed rows
  expand     the paper's way on the model's own modules: attention on unfolded q, k and v (--more)
  modules    folding on, the model's own modules
  compiled   folding on, the model's own modules compiled with dynamic shapes (--compile)
  fused      folding on, fused layers
  graphs     folding on, fused layers in a CUDA graph (where launches would take longer than kernels)
  upstream   the PyTorch model of the paper's authors, from a checkout of theirs (--upstream PATH)

Rounds take the sides in turn with a cold cache, each after a rest of 60 ms, since an H200 that was busy before lowers
its clock by up to a fifth; medians, and the spread (half the distance of the quartiles). With --energy each side also
runs alone and without pause, as in a long job: joules and milliseconds a batch ("sustained"). The gate, before anything
is timed (and what warms up): last hidden states of the first, a middle and the last sequence within twice the error
that the unmodified bf16 model has against itself in float32. "possible" is the ratio of floating-point operations, N
rows over M.
The roofline counts 2 FLOP x weights x M at 790 TFLOP/s and attention at 600: an H200's.

  python benchmarks/forward_gpu.py --shape 0.6b 4b 8b --compile
  python benchmarks/forward_gpu.py --shape 0.6b 4b 8b --grid --more    the paper's synthetic grid, 2 seconds a row
  python benchmarks/forward_gpu.py --shape 0.6b --energy 3             also joules, and times without pause
  python benchmarks/forward_gpu.py --shape 0.6b --profile
  python benchmarks/forward_gpu.py --shape small                       on a CPU, float32, without the fused sides
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Model

import radix_mlp
from power import Meter
from provenance import provenance
from radix_mlp.hf.forward import compact_arguments
from radix_mlp.hf.fused import FusedDecoder
from radix_mlp.hf.graphs import GraphedDecoder
from radix_mlp.ops.send import send
from radix_mlp.plan.build import unshared_plan
from shapes import SHAPES, qwen3_config
from timing import in_turn
from upstream import upstream_forward
from verify import relative_error, require
from workloads import prefix_grid

ROWS = ["2048/256/32", "512/256/32", "128/96/64", "128/96/10"]
CPU_ROWS = ["128/32/8", "32/32/8", "0/64/4"]
GRID = [f"{prefix}/{suffix}/32" for suffix in (256, 1024) for prefix in (1, 32, 128, 256, 512, 1024, 2048)]
Sides = dict[str, Callable[[], torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", help="default: 0.6b on CUDA, small on a CPU")
    parser.add_argument("--rows", nargs="+", help="prefix/suffix/sequences")
    parser.add_argument("--grid", action="store_true", help="the rows of the paper's synthetic grid")
    parser.add_argument("--more", action="store_true", help="the sides packed and expand as well")
    parser.add_argument("--compile", action="store_true", help="also time the compiled modules")
    parser.add_argument("--upstream", type=Path, metavar="PATH", help="also time upstream's model, from a checkout")
    parser.add_argument("--sides", nargs="+", metavar="SIDE", help="only these of the sides that can run")
    parser.add_argument("--seconds", type=float, help="of a row, after which 3 rounds are enough; --grid: 2")
    parser.add_argument("--rest", type=float, default=0.06, metavar="SECONDS", help="of nothing before each sample")
    parser.add_argument("--energy", type=float, metavar="SECONDS", help="also run each side so long without pause")
    parser.add_argument("--profile", action="store_true", help="print where the time of the fused layers goes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write one JSON object a row")
    options = parser.parse_args()
    if options.seconds is None:
        options.seconds = 2.0 if options.grid else float("inf")
    cuda = torch.cuda.is_available()
    options.device = "cuda" if cuda else "cpu"
    options.shape = options.shape or (["0.6b"] if cuda else ["small"])
    rows = options.rows or (GRID if options.grid else ROWS if cuda else CPU_ROWS)
    print(json.dumps(provenance(cuda=torch.version.cuda, threads=torch.get_num_threads())))
    if options.json:
        options.json.write_text("")
    for shape in options.shape:
        run_shape(shape, [tuple(int(part) for part in row.split("/")) for row in rows], options)
        gc.collect()
        torch.cuda.empty_cache()


def run_shape(shape: str, rows: list[tuple[int, ...]], options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    cuda = options.device == "cuda"
    with torch.device(options.device):
        model = Qwen3Model(qwen3_config(shape, vocab_size=32_000, initializer_range=0.05)).eval()
    weights = sum(p.numel() for layer in model.layers for p in layer.parameters() if p.ndim == 2)
    batches = {row: prefix_grid(*row) for row in rows}
    truth = {row: last_of_some(model, ids) for row, ids in batches.items()}
    if cuda:
        model.bfloat16()
    usual = {
        row: relative_error(last_of_some(model, ids), truth[row]) if cuda else 1e-4 for row, ids in batches.items()
    }
    models = {"padded": model, "modules": radix_mlp.enable(twin(model), threshold=0)}
    if options.compile:
        models["compiled"] = torch.compile(radix_mlp.enable(twin(model), threshold=0), dynamic=True)
    if options.more:
        models["packed"] = radix_mlp.enable(twin(model), impl="varlen" if cuda else "auto", threshold=0)
        models["expand"] = radix_mlp.enable(twin(model), impl="expand", threshold=0)
    graphs = GraphedDecoder(FusedDecoder(models["modules"])) if cuda else None
    theirs = upstream_forward(options.upstream, model) if options.upstream else None

    for row, ids in batches.items():
        once = plan(ids)
        result: dict[str, Any] = {"shape": shape, "row": "/".join(map(str, row)), "M": once.num_compact}
        sides = make_sides(models, graphs, ids, once)
        if theirs is not None:
            sides["upstream"] = lambda ids=ids: theirs(ids)  # type: ignore[misc]
        if options.sides:
            sides = {name: run for name, run in sides.items() if name in options.sides}
        for name, run in list(sides.items()):
            try:
                with torch.inference_mode():
                    # the third call of a size is the first that replays its graph
                    rows_run = ids.size if name == "off" else once.num_rows
                    graphed = graphs is not None and name in ("off", "graphs") and rows_run <= graphs.max_rows
                    calls = 3 if graphed else 1
                    error = max(relative_error(run()[some(ids)].float(), truth[row]) for _ in range(calls))
            except torch.OutOfMemoryError:
                del sides[name]
                result.setdefault("out_of_memory", []).append(name)
                torch.cuda.empty_cache()
                continue
            require(f"{shape} {row} {name}, beside the unmodified model one sequence at a time", error, 2 * usual[row])
        with torch.inference_mode():
            times = in_turn(
                sides, options.rounds, warm_up=0, device=options.device, seconds=options.seconds, rest=options.rest
            )
        medians = {name: timing.median for name, timing in times.items()}
        result |= {name: round(value, 2) for name, value in medians.items()}
        result |= summed_up(medians, model.config, weights, once, ids) if cuda else {}
        result["possible"] = round(
            operations(model.config, weights, unshared_plan(list(ids))) / operations(model.config, weights, once), 2
        )
        result["spread"] = {name: round(timing.spread, 3) for name, timing in times.items()}
        if options.energy:
            found = {name: sustained(run, options) for name, run in sides.items()}
            result["joules"] = {name: joules for name, (joules, _) in found.items()}
            result["sustained"] = {name: milliseconds for name, (_, milliseconds) in found.items()}
        print(json.dumps(result), flush=True)
        if options.json:
            # row by row, so that a run that is ended keeps those it had
            with options.json.open("a") as file:
                file.write(json.dumps(result) + "\n")
        if options.profile and cuda:
            profile(sides["graphs" if "graphs" in sides else "fused"])


def make_sides(
    models: dict[str, Any], graphs: GraphedDecoder | None, ids: np.ndarray, once: radix_mlp.RadixPlan
) -> Sides:
    """The sides that can run this batch here."""
    device_ids = torch.from_numpy(ids).to(models["padded"].device)

    def on_modules(name: str, *, shared: bool = True) -> Callable[[], torch.Tensor]:
        model = models[name]
        return lambda: last(
            lambda p, _: model(**compact_arguments(models["modules"], p.to(model.device))).last_hidden_state[0],
            plan(ids) if shared else unshared_plan(list(ids)),
        )

    sides: Sides = {"padded": lambda: models["padded"](device_ids, use_cache=False).last_hidden_state[:, -1]}
    if graphs is not None:
        sides["off"] = lambda: last(graphs, unshared_plan(list(ids)))
        sides["fused"] = lambda: last(graphs.decoder, plan(ids))
        if once.num_rows <= graphs.max_rows:
            sides["graphs"] = lambda: last(graphs, plan(ids))
    else:
        sides["off"] = on_modules("modules", shared=False)
    for name in ("modules", "compiled", "expand"):
        if name in models:
            sides[name] = on_modules(name)
    if "packed" in models:
        sides["packed"] = on_modules("packed", shared=False)
    return sides


def twin(model: Qwen3Model) -> Qwen3Model:
    """Another model with the same parameters, not copies of them."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def summed_up(
    times: dict[str, float], config: Any, weights: int, once: radix_mlp.RadixPlan, ids: np.ndarray
) -> dict[str, Any]:
    """How far the fastest folded side is from the roofline, and how much it wins over folding off."""
    limit = roofline(config, weights, once)
    found: dict[str, Any] = {"roofline": round(limit, 2)}
    folded = [times[name] for name in ("fused", "graphs", "compiled") if name in times]
    if folded:
        found["share"] = f"{limit / min(folded):.0%}"
        found |= {"off/best": round(times["off"] / min(folded), 2)} if "off" in times else {}
    return found


def roofline(config: Any, weights: int, once: radix_mlp.RadixPlan) -> float:
    """Milliseconds."""
    dense = 2 * weights * once.num_compact
    return dense / 790e9 + (operations(config, weights, once) - dense) / 600e9


def operations(config: Any, weights: int, once: radix_mlp.RadixPlan) -> float:
    """Floating-point operations of the layers."""
    pairs = int((once.depth.astype(np.int64) + 1).sum())
    return (
        2.0 * weights * once.num_compact
        + 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    )


def plan(ids: np.ndarray) -> radix_mlp.RadixPlan:
    return radix_mlp.build_plan(ids.reshape(-1), np.arange(len(ids) + 1) * ids.shape[1])


def last(forward: Callable[..., torch.Tensor], once: radix_mlp.RadixPlan) -> torch.Tensor:
    """Hidden states `[S, h]` of every sequence's last token."""
    rows = once.last_rows.astype(np.int64)
    hidden = forward(once, np.unique(rows))
    # a plain copy to the device would wait for the forward pass, and only then launch this
    return hidden.index_select(0, send(rows, hidden.device))


def some(ids: np.ndarray) -> list[int]:
    """Sequences that the gate looks at. The first alone has no siblings before it that a wrong mask would show."""
    return [0, len(ids) // 2, len(ids) - 1]


@torch.inference_mode()
def last_of_some(model: Qwen3Model, ids: np.ndarray) -> torch.Tensor:
    """Last hidden states of some sequences, each alone through the unmodified model."""
    alone = [torch.from_numpy(ids[place : place + 1]).to(model.device) for place in some(ids)]
    return torch.stack([model(each, use_cache=False).last_hidden_state[0, -1] for each in alone]).float()


@torch.inference_mode()
def sustained(run: Callable[[], object], options: argparse.Namespace) -> tuple[float | None, float]:
    """Joules of one batch, over as many as fit in the time (None where nothing measures it), and milliseconds."""
    ends = [time.perf_counter()]
    with Meter() as meter:
        while ends[-1] - ends[0] < options.energy:
            run()
            if options.device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
    times = [1e3 * (after - before) for before, after in itertools.pairwise(ends)]
    joules = round(meter.reading.joules / len(times), 3) if meter.reading else None
    # a chip lowers its clock within the first tenths of a second
    return joules, round(statistics.median(times[len(times) // 2 :]), 2)


@torch.inference_mode()
def profile(run: Callable[[], object]) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        run()
        torch.cuda.synchronize()
    kernels = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in kernels[:14]:
        if event.self_device_time_total:
            total = event.self_device_time_total
            print(f"    {total / 1000:8.3f} ms {event.count:5} x {total / event.count:8.1f} us  {event.key[:90]}")


if __name__ == "__main__":
    main()
