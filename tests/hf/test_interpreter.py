"""`impl="triton"` on a CPU: with TRITON_INTERPRET=1 the public calls run it, without they refuse it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

PROGRAM = """
import torch
import radix_mlp
from radix_mlp.models.tiny import tiny_model
from radix_mlp.ops import available_impls, tree_attention

plan = radix_mlp.build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6])
q, k, v = (torch.randn(4, heads, 16, requires_grad=True) for heads in (4, 2, 2))
outs = [tree_attention(q, k, v, plan, impl=impl) for impl in ("triton", "reference")]
torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outs]
for found, expected in zip(*grads):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
assert "triton" in available_impls("cpu")

ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
with torch.no_grad():
    expected = torch.cat([tiny_model()(row[None], use_cache=False).logits for row in ids])
    model = radix_mlp.enable(tiny_model(), impl="triton", threshold=1.0)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
assert radix_mlp.last_call(model).folded
"""

REFUSED = """
import torch
import radix_mlp
from radix_mlp.errors import UnsupportedImplError
from radix_mlp.ops import tree_attention

plan = radix_mlp.build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6])
try:
    tree_attention(*(torch.randn(4, 2, 16) for _ in range(3)), plan, impl="triton")
except UnsupportedImplError as error:
    assert "cannot run on cpu" in str(error), error
else:
    raise SystemExit("it ran")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles where there is a GPU")
@pytest.mark.parametrize(("program", "switch"), [(PROGRAM, "1"), (REFUSED, "0")], ids=["interpreted", "refused"])
def test_triton_on_a_cpu(program: str, switch: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": switch, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
