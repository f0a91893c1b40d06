"""What runs folded batches of each model type on this CUDA device: fused layers, CUDA graphs, or neither and why.

python -m tools.model_types.forwards [type ...]      prints a line a type; without types, all causal ones

Each line is checked: the forward that an engine would use gives what the model's own modules give without graphs, on a
small batch three times (a graph is captured at the second) and on one of another tree.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch

import radix_mlp
from radix_mlp.errors import RadixError
from radix_mlp.hf.fast_forward import FastForward
from radix_mlp.hf.forward import forward_compact
from radix_mlp.plan import RadixPlan
from tools.model_types.hybrids import deep_batch
from tools.model_types.sweep import plan_of
from tools.model_types.zoo import causal_lm_types, quiet, tiny_model

__all__ = ["forward_of"]

MAX_ERROR = 5e-2
"""In bfloat16, where products of another size round differently; anything wrong is off by about the whole."""


def forward_of(model_type: str) -> tuple[str, float]:
    """What `FastForward.describe` says of a tiny bfloat16 model, and its largest error on hidden states.

    Raises:
        UnsupportedModelError: the type does not fold.
    """
    tiny: Any = tiny_model(model_type, dtype=torch.bfloat16)
    model = radix_mlp.enable(tiny.to("cuda"))
    forward = FastForward(model)
    worst = 0.0
    with torch.inference_mode():
        for plan in (*[_plan(0)] * 3, _plan(1), _plan(1)):
            expected, found = forward_compact(model, plan), forward(plan, None)
            worst = max(worst, float((found - expected).norm() / expected.norm()))
    return forward.describe(), worst


def _plan(seed: int) -> RadixPlan:
    return plan_of(deep_batch(seed, most=12))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    bad = False
    for model_type in sys.argv[1:] or causal_lm_types():
        try:
            with quiet(), warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                name, error = forward_of(model_type)
            given_up = [str(w.message) for w in found if "without CUDA graphs" in str(w.message)]
            note = f" ({given_up[0]})" if given_up else ""
            bad |= not error < MAX_ERROR
            _say(f"{model_type:28}{error:9.1e}  {name}{note}")
        except RadixError as error:
            _say(f"{model_type:28}  refused  {str(error)[:100]}")
        except Exception as error:
            _say(f"{model_type:28}    fails  {type(error).__name__}: {str(error)[:160]}")
    sys.exit(bad)


if __name__ == "__main__":
    main()
