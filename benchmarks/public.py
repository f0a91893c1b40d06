"""What users call, through public names alone, so that `--base REF` compares any two commits however files have moved.

  plan        `build_plan` of a batch
  attention   `tree_attention`, one layer; on CUDA also its backward
  call        `enable(model)(input_ids, attention_mask)`, padded in and out
  step        a training step: forward with labels, and backward
  job         `Engine.embed` of many texts behind one instruction, from strings to vectors
  request     `Engine.embed` of ten texts

The gate compares the enabled call and the job with the unmodified model, one sequence at a time.

  python benchmarks/public.py                     small, on a CPU
  python benchmarks/public.py --device cuda       Qwen3-0.6B's shape in bf16
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3ForCausalLM

import radix_mlp
from provenance import provenance
from radix_mlp.testing.tiny import tiny_tokenizer
from shapes import qwen3_config
from timing import in_turn
from verify import relative_error, require

CASES = {"cpu": [(256, 32, 16), (64, 48, 32)], "cuda": [(2048, 256, 32), (512, 32, 32), (128, 96, 64), (128, 96, 10)]}
"""(prefix, suffix, sequences)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9, help="timings of each row (default 9)")
    parser.add_argument("--texts", type=int, help="texts of the job (default 400 on a CPU, 4,000 on a GPU)")
    parser.add_argument("--json", type=Path, help="also write one JSON object a row")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    print(json.dumps(provenance(threads=torch.get_num_threads(), device=options.device)), flush=True)
    model = _model(options.device)
    texts = options.texts or (4000 if on_gpu else 400)
    rows = []
    # an engine enables the model in its own way, so it is made after the calls have been timed
    for make in (
        lambda: _of_operations(options.device),
        lambda: _of_model(model, options.device),
        lambda: _of_engine(model, texts),
    ):
        for name, run in make().items():
            timing = in_turn({name: run}, options.rounds, warm_up=3, device=options.device)[name]
            rows.append({"name": name, "ms": timing.median, "spread": timing.spread})
            print(f"{name:36}{timing.median:12.3f} ms  +-{timing.spread:.1%}", flush=True)
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _model(device: str) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    shape, dtype = ("0.6b", torch.bfloat16) if device == "cuda" else ("small", torch.float32)
    sizes = {} if device == "cuda" else {"vocab_size": 10_240}
    config = qwen3_config(shape, initializer_range=0.05, max_position_embeddings=8192, **sizes)
    return Qwen3ForCausalLM(config).to(device, dtype).eval()


def _batch(prefix: int, suffix: int, count: int) -> np.ndarray:
    """`[count, prefix + suffix]` token ids."""
    rng = np.random.default_rng(0)
    stem = np.tile(rng.integers(300, 9000, prefix), (count, 1))
    ids = np.concatenate([stem, rng.integers(300, 9000, (count, suffix))], axis=1)
    ids[:, prefix] = 9000 + np.arange(count)
    return ids


def _of_operations(device: str) -> dict[str, Callable[[], object]]:
    runs: dict[str, Callable[[], object]] = {}
    for case in CASES[device]:
        ids, name = _batch(*case), "/".join(map(str, case))
        cu = np.arange(len(ids) + 1) * ids.shape[1]
        flat = ids.reshape(-1)
        runs[f"plan {name}"] = lambda flat=flat, cu=cu: radix_mlp.build_plan(flat, cu)
        plan = radix_mlp.build_plan(flat, cu)
        on_gpu = device == "cuda"
        heads, width, dtype = ((32, 8), 128, torch.bfloat16) if on_gpu else ((4, 2), 32, torch.float32)
        q, k, v = (
            torch.randn(plan.num_compact, count, width, device=device, dtype=dtype, requires_grad=on_gpu)
            for count in (heads[0], heads[1], heads[1])
        )

        def forward(q=q, k=k, v=v, plan=plan) -> torch.Tensor:
            with torch.no_grad():
                return radix_mlp.tree_attention(q, k, v, plan)

        def backward(q=q, k=k, v=v, plan=plan) -> object:
            return torch.autograd.grad(radix_mlp.tree_attention(q, k, v, plan).sum(), (q, k, v))

        runs[f"attention {name}"] = forward
        if on_gpu:
            runs[f"attention with backward {name}"] = backward
    return runs


def _of_model(model: Qwen3ForCausalLM, device: str) -> dict[str, Callable[[], object]]:
    runs: dict[str, Callable[[], object]] = {}
    for case in CASES[device]:
        name, ids = "/".join(map(str, case)), torch.from_numpy(_batch(*case)).to(device)
        mask = torch.ones_like(ids)

        def call(ids=ids, mask=mask) -> torch.Tensor:
            with torch.inference_mode():
                return model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state

        def step(ids=ids, mask=mask) -> None:
            model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)

        with torch.inference_mode():
            radix_mlp.disable(model)
            alone = model.model(ids[-1:], use_cache=False).last_hidden_state[0]
        radix_mlp.enable(model, threshold=1.0)
        require(f"call {name}", relative_error(call()[-1], alone), 0.05 if device == "cuda" else 1e-4)
        runs[f"call {name}"] = call
    runs[f"step {name}"] = step
    runs["enable"] = lambda: radix_mlp.enable(model, threshold=1.0)
    return runs


def _of_engine(model: Qwen3ForCausalLM, count: int) -> dict[str, Callable[[], object]]:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(2, 9))) for _ in range(500)]
    texts = [
        "Instruct: find what answers the question\nQuery: " + " ".join(rng.choice(words, 12)) for _ in range(count)
    ]
    tokenizer = tiny_tokenizer()
    engine = radix_mlp.Engine(model, tokenizer=tokenizer)
    found = engine.embed(texts[:8], normalize=True)
    radix_mlp.disable(model)
    with torch.inference_mode():
        for vector, text in zip(found, texts, strict=False):
            ids = torch.tensor([tokenizer(text)["input_ids"]], device=model.device)
            alone = model.model(ids, use_cache=False).last_hidden_state[0, -1].float()
            alone = torch.nn.functional.normalize(alone, dim=0).cpu().numpy()
            require("job", relative_error(vector, alone), 0.05 if model.device.type == "cuda" else 1e-4)
    return {
        f"job of {count:,} texts": lambda: engine.embed(texts),
        "request of 10 texts": lambda: engine.embed(texts[:10]),
    }


if __name__ == "__main__":
    main()
