"""The ways to run tree attention that `impl` names, against each other, one layer, milliseconds.

Cases, gate and timing are those of benchmarks/attention.py, but every method goes through `tree_attention` as a model
calls it.  Where a case shares nothing, `packed` is FlashAttention on the packed sequences by itself: what `auto` must
not lose to.

  python benchmarks/impls.py                       forward, the cases of the targets
  python benchmarks/impls.py --backward            forward and backward, both alone
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from attention import CASES, DTYPES, Method, Problem, gate, make_problem, measure, packed, through_autograd
from provenance import provenance
from radix_mlp.ops import tree_attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="as in attention.py (default: %(default)s)")
    parser.add_argument("--impls", default="triton,varlen,expand", help="with commas (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=32, help="query heads (default 32)")
    parser.add_argument("--kv-heads", type=int, default=8, help="key and value heads (default 8)")
    parser.add_argument("--width", type=int, default=128, help="head dimension (default 128)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--layout", choices=("mhd", "hmd"), default="mhd", help="storage; hmd is Hugging Face's")
    parser.add_argument("--backward", action="store_true", help="time the backward too")
    parser.add_argument("--repeats", type=int, default=15, help="samples of each method (default 15)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write one JSON object a row here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    where = provenance()
    print(json.dumps(where))
    print(f"{'case':>14} {'M':>7} {'N':>8} {'pass':>8} {'method':>8} {'ms':>9} {'host us':>8}")
    rows: list[dict[str, Any]] = []
    red = False
    for name in args.cases.split(","):
        problem = make_problem(name, args)
        methods = [impl(problem, which) for which in args.impls.split(",")]
        if problem.plan.num_tokens == problem.plan.num_rows:
            methods.append(packed(problem))
        # the in-tree backward takes less than 2^31 numbers
        backward = args.backward and problem.plan.num_tokens * problem.q[0].numel() < 2**31
        failure = next((error for error in gate(problem, methods, backward).values() if isinstance(error, str)), None)
        if failure:
            red = True
            print(f"{name:>14} WRONG: {failure}: no speed")
            continue
        for kind in ("forward", "backward") if backward else ("forward",):
            times, host = measure(methods, kind, args.repeats)
            for method, milliseconds in times.items():
                print(
                    f"{name:>14} {problem.plan.num_rows:>7} {problem.plan.num_tokens:>8} {kind:>8} {method:>8} "
                    f"{milliseconds:>9.4f} {host[method]:>8.0f}"
                )
                shape = {key: getattr(args, key) for key in ("heads", "kv_heads", "width", "dtype", "layout")}
                rows.append({"case": name, "pass": kind, "method": method, "ms": milliseconds, **shape, **where})
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sys.exit(red)


def impl(p: Problem, which: str) -> Method:
    tree = p.plan.to("cuda").tree_for(which)
    return through_autograd(which, p, lambda q, k, v: tree_attention(q, k, v, tree, impl=which))


if __name__ == "__main__":
    main()
