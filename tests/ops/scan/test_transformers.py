"""Every operation against transformers' own function, fed one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.ops.scan.scan_cases import CASES, error
from tests.ops.scan.test_exact import long_tree
from torch import Tensor
from transformers import MiniMaxConfig
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba import modeling_mamba as mamba1
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

Inputs = dict[str, Tensor]


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = qwen.causal_conv1d_fn(x.T[None], weight, bias, activation="silu")
    return out[0].T


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    # transformers before 5.23 leaves it to the caller to give every value head its key head
    q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], dim=1) for x in (q, k))
    given = (x[None] for x in (q, k, v, g, beta))
    return qwen.torch_chunk_gated_delta_rule(*given, use_qk_l2norm_in_kernel=True)[0][0]


def kimi_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    given = (x[None] for x in (q, k, v, g, beta))
    return kimi.chunk_kimi_delta_attention(*given, use_qk_l2norm_in_kernel=True)[0][0]


def mamba_2(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    x, dt, B, C = (tensor[None] for tensor in (x, dt, B, C))
    options = {"dt_softplus": True, "dt_limit": (0.0, 2.0)}
    return mamba2.mamba2_chunk_scan(x, dt, A, B, C, 64, D=D, dt_bias=dt_bias, **options)[0]


def mamba_1(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    x, dt, B, C, z = (tensor.T[None] for tensor in (x, dt, B, C, z))
    return mamba1.mamba_selective_scan(x, dt, A, B, C, D=D, z=z, delta_bias=dt_bias, delta_softplus=True)[0].T


def lightning(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    """The module itself, made to read the given rows and to return its heads without projection, gate and norm."""
    heads, width = q.shape[1:]
    config = MiniMaxConfig(hidden_size=3 * heads * width, num_attention_heads=heads, head_dim=width, block_size=64)
    config.layer_types = ["linear_attention"]
    module = MiniMaxLightningAttention(config, 0)
    module.slope_rate = slope[:, None, None]
    module.query_decay, module.key_decay, module.diagonal_decay = module.decay_factors(module.slope_rate)
    module.qkv_proj, module.act_fn, module.norm, module.out_proj = (torch.nn.Identity() for _ in range(4))
    module.output_gate = torch.nn.Linear(3 * heads * width, heads * width, dtype=q.dtype)
    torch.nn.init.zeros_(module.output_gate.weight)
    # a gate of 1, and a product with it that is exact
    torch.nn.init.constant_(module.output_gate.bias, 100.0)
    hidden = torch.cat([q, k, v], dim=2).flatten(1)[None]
    return module(hidden, None, None)[0][0].unflatten(1, (heads, width))


ORACLES: dict[str, Callable[..., Tensor]] = {
    "conv": conv,
    "gated_delta_rule": gated_delta_rule,
    "kimi_delta": kimi_delta,
    "mamba2": mamba_2,
    "mamba1": mamba_1,
    "lightning": lightning,
}


def by_sequence(name: str, inputs: Inputs, rows: int, unfold: Tensor, lengths: list[int]) -> Tensor:
    """The oracle's output by token, each sequence by itself."""
    out: list[Tensor] = []
    for tokens in unfold.split(lengths):
        own = {key: x[tokens] if x.shape[0] == rows else x for key, x in inputs.items()}
        out.append(ORACLES[name](**own))
    return torch.cat(out)


# transformers computes lightning attention in the dtype of the values, which is no measure in bfloat16
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CASES), *((name, torch.bfloat16) for name in CASES if name != "lightning")],
)
def test_as_transformers(name: str, dtype: torch.dtype) -> None:
    """Rows in `dtype`; parameters in float32, as models keep those of states."""
    plan = long_tree()
    device_plan = plan.to("cpu")
    inputs = CASES[name].leaves(plan, dtype=torch.float32)
    if name == "lightning":
        # the module has one width for keys and values
        inputs["v"] = CASES["lightning"].leaves(plan, seed=3, dtype=torch.float32)["q"]
    for key, x in inputs.items():
        if x.shape[0] == plan.num_rows:
            inputs[key] = x.detach().to(dtype).requires_grad_()
    lengths = device_plan.cu_seq_lengths.diff().tolist()
    wanted = by_sequence(name, inputs, plan.num_rows, device_plan.unfold_index, lengths)
    out = CASES[name](inputs, plan)
    assert out.dtype == wanted.dtype
    unfolded = out[device_plan.unfold_index]
    low, high = (3e-6, 2e-5) if dtype == torch.float32 else (1e-2, 2e-2)
    assert error(unfolded, wanted) < low
    weight = torch.randn(unfolded.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    grads = torch.autograd.grad(unfolded, list(inputs.values()), weight)
    wanted_grads = torch.autograd.grad(wanted, list(inputs.values()), weight)
    for key, actual, expected in zip(inputs, grads, wanted_grads, strict=True):
        assert actual.dtype == expected.dtype
        assert error(actual, expected) < high, key
