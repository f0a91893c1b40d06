"""`FusedDecoder`: the trunk of a model on compact rows, faster than its own modules, with the same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf.fingerprint import fingerprint
from radix_mlp.hf.fused.layers import DecoderLayer, join_layers, why_not_fused
from radix_mlp.hf.graphs.decoder import Decoder, HeadShape, spread
from radix_mlp.hf.support import decoder_of
from radix_mlp.ops import AttentionTree, to_device, tree_attention
from radix_mlp.ops.cuda_device import on_device
from radix_mlp.ops.send import send
from radix_mlp.plan import RadixPlan

__all__ = ["Attend", "FusedDecoder"]

Attend: TypeAlias = Callable[[int, DecoderLayer, Tensor, Tensor, Tensor], Tensor]
"""(place of a layer, the layer, `q [R, Hq, D]`, `k [R, Hkv, D]`, `v [R, Hkv, D]`) -> `[R, Hq, D]`."""


class FusedDecoder(Decoder):
    """Runs the layers of a Llama-like decoder with joined projections and fused norms, rotation and gates.

    Args:
        model: a model on CUDA (in tests: on the CPU, through Triton's interpreter); it keeps its class, parameters and
            `state_dict`, and only their storage changes.
        impl: the way to run attention.

    Raises:
        UnsupportedModelError: its layers are not of a kind that is known here; the message says which it is.
    """

    def __init__(self, model: PreTrainedModel, *, impl: str = "auto") -> None:
        trunk: Any = decoder_of(model)
        reason = why_not_fused(trunk)
        if reason is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot run fused: {reason}. Run it as it is (compile=False) or let torch "
                "compile it (compile=True)."
            )
        with on_device(trunk.device):
            self.layers = join_layers(trunk)
        layer = self.layers[0]
        self.head_dim: int = trunk.layers[0].self_attn.head_dim
        heads, kv_heads, _ = (size // self.head_dim for size in layer.qkv.sizes)
        super().__init__(
            trunk,
            impl=impl,
            shape=HeadShape(self.head_dim, heads, kv_heads, layer.input_norm.dtype),
            windows=tuple({layer.window for layer in self.layers}),
            layer_weights=sum(part.weight.numel() for part in (layer.qkv, layer.out, layer.gate_up, layer.down)),
        )
        self._made_of = fingerprint(trunk, addresses=True)
        # a graph reads them where they are now, also once the model was moved and until that is noticed
        self._kept = [x.detach() for x in (trunk.embed_tokens.weight, trunk.norm.weight, trunk.rotary_emb.inv_freq)]
        self.epsilon: float = trunk.config.rms_norm_eps

    def is_current(self) -> bool:
        return fingerprint(self.trunk, addresses=True) == self._made_of

    @torch.inference_mode()
    def __call__(self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None = None) -> Tensor:
        """Hidden states `[M, h]` after the final norm, as `radix_mlp.hf.forward_compact` gives them.

        With `needed_rows` the last layer's MLP runs on these rows only, and all others are NaN.
        """
        device_plan = to_device(plan, self.trunk.device)
        tree = device_plan.tree_for(self.impl)
        rows = None if needed_rows is None else send(needed_rows, self.trunk.device)
        with on_device(self.trunk.device):
            hidden = self.run(device_plan.compact_ids, device_plan.compact_positions, tree, rows, self.impl)
        return hidden if rows is None else spread(hidden, rows, plan.num_rows)

    def run(self, ids: Tensor, positions: Tensor, tree: AttentionTree, rows: Tensor | None, impl: str) -> Tensor:
        def attend(place: int, layer: DecoderLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return tree_attention(q, k, v, tree, scale=layer.scale, window=layer.window, impl=impl)

        return self.run_layers(ids, positions, attend, rows)

    def run_layers(self, ids: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """As `run`, with `attend` for attention."""
        from radix_mlp.hf.fused.kernels import rms_norm, rotary_tables

        # kernels of ours and sums in place know no other dtype than that of the weights
        with torch.autocast(ids.device.type, enabled=False):
            x: Tensor = self.trunk.embed_tokens(ids)
            rotary = self.trunk.rotary_emb
            cos, sin = rotary_tables(positions, rotary.inv_freq, rotary.attention_scaling)
            for place in range(len(self.layers)):
                is_last = place == len(self.layers) - 1
                x = self._layer(place, x, cos, sin, attend, rows if is_last else None)
            return rms_norm(x, self.trunk.norm.weight, self.epsilon)

    def _layer(self, place: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, rows: Tensor | None) -> Tensor:
        """One layer on `x [M, h]`, which it overwrites; with `rows`, what comes after attention is for these alone."""
        from radix_mlp.hf.fused.kernels import gate, rms_norm, rotate_heads_

        layer = self.layers[place]
        heads, kv_heads, _ = (size // self.head_dim for size in layer.qkv.sizes)
        qkv = layer.qkv(rms_norm(x, layer.input_norm, self.epsilon))
        rotate_heads_(qkv, cos, sin, heads, kv_heads, layer.head_norms)
        q, k, v = qkv.view(len(qkv), heads + 2 * kv_heads, self.head_dim).split([heads, kv_heads, kv_heads], dim=1)
        found = attend(place, layer, q, k, v).flatten(1)
        if rows is not None:
            x, found = x.index_select(0, rows), found.index_select(0, rows)
        x = layer.out.add_to_(x, found)
        gate_up = layer.gate_up(rms_norm(x, layer.mlp_norm, self.epsilon))
        return layer.down.add_to_(x, gate(gate_up))
