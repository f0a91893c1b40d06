"""The model of the paper's authors as a side: a stand-in with the interface of theirs, since theirs is not here."""

import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Model

import upstream
from shapes import qwen3_config

THEIRS = """
    # what theirs has: its names, its imports, rotation by halves with cosines [N, D / 2], expansion round attention
    import os, sys
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "python_bindings"))
    import torch
    from torch import nn
    from radix_mlp.torch import compute_fold_and_scatter_torch
    from flash_attn import flash_attn_varlen_func

    class RadixMLPQwen3Config:
        def __init__(self, **sizes):
            self.__dict__.update(sizes)

    class Norm(nn.Module):
        def __init__(self, size, eps):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

        def forward(self, x):
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)

    class Rotary(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.register_buffer("inv_freq", torch.ones(c.head_dim // 4), persistent=False)

        def forward(self, position_ids):
            freqs = position_ids.float()[:, None] * self.inv_freq
            emb = torch.cat((freqs, freqs), -1)
            return emb.cos().to(position_ids.dtype), emb.sin().to(position_ids.dtype)

    class Attention(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.c, linear = c, lambda a, b: nn.Linear(a, b, bias=False)
            self.q_proj = linear(c.hidden_size, c.num_attention_heads * c.head_dim)
            self.k_proj, self.v_proj = (linear(c.hidden_size, c.num_key_value_heads * c.head_dim) for _ in range(2))
            self.o_proj = linear(c.num_attention_heads * c.head_dim, c.hidden_size)
            self.q_norm, self.k_norm = Norm(c.head_dim, c.rms_norm_eps), Norm(c.head_dim, c.rms_norm_eps)

        def forward(self, x, cos, sin, cu, longest, scatter, fold):
            def turn(x):
                a, b = x.chunk(2, -1)
                return torch.cat((a * cos[:, None] - b * sin[:, None], a * sin[:, None] + b * cos[:, None]), -1)

            q, k, v = (p(x).unflatten(-1, (-1, self.c.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
            q, k = turn(self.q_norm(q)), turn(self.k_norm(k))
            q, k, v = (each.index_select(0, scatter) for each in (q, k, v))
            out = flash_attn_varlen_func(
                q=q, k=k, v=v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest,
                dropout_p=0.0, softmax_scale=self.c.head_dim ** -0.5, causal=True,
            )
            return self.o_proj(out.flatten(1).index_select(0, fold))

    class MLP(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.gate_proj, self.up_proj = (nn.Linear(c.hidden_size, c.intermediate_size, bias=False) for _ in range(2))
            self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    class Layer(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.self_attn, self.mlp = Attention(c), MLP(c)
            norms = (Norm(c.hidden_size, c.rms_norm_eps) for _ in range(2))
            self.input_layernorm, self.post_attention_layernorm = norms

        def forward(self, x, *rest):
            x = x + self.self_attn(self.input_layernorm(x), *rest)
            return x + self.mlp(self.post_attention_layernorm(x))

    class RadixMLPQwen3Model(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
            self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
            self.norm, self.rotary_emb = Norm(c.hidden_size, c.rms_norm_eps), Rotary(c)

        def forward(self, input_ids, position_ids, cu_seq_lengths, max_seq_len, use_radix_mlp=True):
            _, _, scatter, fold = compute_fold_and_scatter_torch(input_ids, position_ids, cu_seq_lengths)
            x = self.embed_tokens(input_ids.index_select(0, fold))
            cos, sin = self.rotary_emb(position_ids.index_select(0, fold))
            for layer in self.layers:
                x = layer(x, cos, sin, cu_seq_lengths, max_seq_len, scatter, fold)
            return self.norm(x).index_select(0, scatter)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    file = tmp_path / upstream.FILES[0]
    file.parent.mkdir()
    file.write_text(textwrap.dedent(THEIRS))
    return tmp_path


def model() -> Qwen3Model:
    torch.manual_seed(0)
    return Qwen3Model(qwen3_config("small", vocab_size=100, initializer_range=0.2)).eval()


def test_their_model_on_our_weights_is_transformers(checkout: Path) -> None:
    ours, path = model(), list(sys.path)
    forward = upstream.upstream_forward(checkout, ours)
    assert sys.path == path
    assert "flash_attn" not in sys.modules
    ids = np.random.default_rng(0).integers(0, 100, (3, 12), dtype=np.int32)
    ids[:, :7] = ids[0, :7]
    with torch.inference_mode():
        expected = torch.cat([ours(torch.from_numpy(row)[None]).last_hidden_state[:, -1] for row in ids])
        torch.testing.assert_close(forward(ids), expected, rtol=1e-4, atol=1e-4)
        # the rotation is one of the things that this would notice
        ours.rotary_emb.inv_freq.mul_(0.5)
        assert (forward(ids) - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "neither the file nor a checkout that has train/qwen3_radix_torch_varlen.py"),
        ("import no_such_package", "does not import: ModuleNotFoundError: No module named 'no_such_package'"),
        ("x = 1", "has no RadixMLPQwen3Config and no RadixMLPQwen3Model"),
    ],
)
def test_a_checkout_that_is_none_ends_with_a_message(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "radix.py").write_text(text)
    with pytest.raises(SystemExit, match=message):
        upstream.upstream_forward(tmp_path / "radix.py", model())


def test_other_weights_end_with_a_message(checkout: Path) -> None:
    file = checkout / upstream.FILES[0]
    file.write_text(file.read_text().replace("self.down_proj", "self.last_proj"))
    with pytest.raises(SystemExit, match="its weights are not those of transformers' Qwen3"):
        upstream.upstream_forward(checkout, model())
