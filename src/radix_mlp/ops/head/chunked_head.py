"""A linear head and its softmax in tiles of rows and vocabulary, forward and backward; logits are never kept.

For logits z of a row, p = softmax(z), H its entropy and edges e with targets t(e):

    d logprob[e] / dz = onehot(t(e)) - p            dH / dz = -p * (log p + H)

The backward pass recomputes each tile of logits, turns it into its gradient and multiplies that into the gradients of
hidden states and weights.  Logits and sums are float32 or wider, even where weights are bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.errors import UnsupportedCallError
from radix_mlp.ops.head.head_tiles import HeadEdges, HeadResults, RowGradients, RowSums, Tile, TileOptions
from radix_mlp.ops.head.linear_head import LinearHead
from radix_mlp.ops.row_copies import segment_sum

__all__ = ["apply_head"]

MAX_ROWS = 4096
"""Rows of a tile: enough for a matrix multiplication to run at full speed."""
COLUMN_MULTIPLE = 128
"""Tiles cut the vocabulary at multiples of this, which keeps rows of weights aligned."""


def apply_head(
    hidden: Tensor, head: LinearHead, edges: HeadEdges, cuts: NDArray[np.int64], options: TileOptions
) -> HeadResults:
    """Log-probabilities of edges and statistics of rows.

    Args:
        hidden: `[M, h]`
        head: of a vocabulary V that all targets are in.
        edges: on hidden's device.
        cuts: `edges.cuts` on the host.
        options: what to compute.
    """
    return HeadResults(*_ChunkedHead.apply(hidden, head.weight, head.bias, *edges, cuts, options))


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        parents: Tensor,
        parent_at: Tensor,
        targets: Tensor,
        device_cuts: Tensor,
        cuts: NDArray[np.int64],
        options: TileOptions,
    ) -> tuple[Tensor, ...]:
        edges = HeadEdges(parents, parent_at, targets, device_cuts)
        sums = RowSums(edges, weight.shape[0], options)
        add = _kernels().add_tile if options.kernels else RowSums.add
        with torch.autocast(hidden.device.type, enabled=False):
            inputs = hidden.index_select(0, parents).to(options.compute_dtype)
            for tile, part in _tiles(len(inputs), weight, cuts, options):
                products = _product(inputs[tile.rows], part.t(), options.wide_dtype)
                add(sums, tile, products, _bias_of(bias, tile, options))
            results = sums.results()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[2:])
        saved = sums.log_sum_exp(), results.entropy.detach()
        ctx.save_for_backward(hidden, weight, bias, *edges, *saved)
        ctx.cuts, ctx.options = cuts, options
        return results

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise UnsupportedCallError(
                "edge_logprobs has no second derivative: call backward without create_graph, or pass the head as a "
                "function"
            )
        hidden, weight, bias, *edge_tensors, log_sum_exp, entropy = ctx.saved_tensors
        edges, options = HeadEdges(*edge_tensors), ctx.options
        nothing = (None,) * 9
        if grad_logprob is None and grad_entropy is None:
            return nothing
        by_row = _by_row(grad_logprob, grad_entropy if options.entropy else None, edges, log_sum_exp, entropy)
        of_products = _kernels().gradient_of_tile if options.kernels else RowGradients.of_products
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_inputs = log_sum_exp.new_zeros(len(edges.parents), hidden.shape[1]) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = bias.new_zeros(bias.shape, dtype=options.wide_dtype) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            inputs = hidden.index_select(0, edges.parents).to(options.compute_dtype)
            # tiles come column by column, so only one column of weights needs a wide sum at a time
            wide_weight = log_sum_exp.new_empty(0)
            for tile, part in _tiles(len(inputs), weight, ctx.cuts, options):
                columns = slice(tile.low, tile.high)
                products = _product(inputs[tile.rows], part.t(), options.wide_dtype)
                grad = of_products(by_row, tile, products, _bias_of(bias, tile, options), edges, options)
                if grad_inputs is not None:
                    _add_product(grad_inputs[tile.rows], grad, part)
                if grad_weight is not None:
                    if tile.first == 0:
                        wide_weight = log_sum_exp.new_zeros(tile.high - tile.low, weight.shape[1])
                    _add_product(wide_weight, grad.t(), inputs[tile.rows])
                    if tile.last == len(inputs):
                        grad_weight[columns] = wide_weight.to(weight.dtype)
                if grad_bias is not None:
                    grad_bias[columns] += grad.sum(0, dtype=options.wide_dtype)
        grad_hidden = None
        if grad_inputs is not None:
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, edges.parents, grad_inputs.to(hidden.dtype))
        return grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(bias.dtype), *nothing[3:]


def _by_row(
    grad_logprob: Tensor | None, grad_entropy: Tensor | None, edges: HeadEdges, log_sum_exp: Tensor, entropy: Tensor
) -> RowGradients:
    if grad_logprob is None:
        grad_logprob = log_sum_exp.new_zeros(len(edges.targets))
    of_rows = segment_sum(grad_logprob, edges.parent_at, len(edges.parents))
    of_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    return RowGradients(grad_logprob.contiguous(), of_rows, of_entropy, log_sum_exp, entropy)


def _tiles(
    num_rows: int, weight: Tensor, cuts: NDArray[np.int64], options: TileOptions
) -> Iterator[tuple[Tile, Tensor]]:
    """Tiles and the weights `[C, h]` of their columns; columns outside, rows inside."""
    height = max(1, min(num_rows, MAX_ROWS, options.max_logits))
    width = max(1, options.max_logits // height)
    if width >= COLUMN_MULTIPLE:
        width -= width % COLUMN_MULTIPLE
    for low in range(0, weight.shape[0] if num_rows else 0, width):
        high = min(low + width, weight.shape[0])
        part = weight[low:high].to(options.compute_dtype)
        for first in range(0, num_rows, height):
            last = min(first + height, num_rows)
            yield Tile(first, last, low, high, int(cuts[first]), int(cuts[last])), part


def _bias_of(bias: Tensor | None, tile: Tile, options: TileOptions) -> Tensor | None:
    # kernels expect a stride of 1
    return None if bias is None else bias[tile.low : tile.high].to(options.wide_dtype).contiguous()


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """`a @ b` in `wide`, not rounded to half precision on the way."""
    if a.dtype == wide:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """`into += a @ b`, not rounded to half precision on the way."""
    if a.dtype == into.dtype:
        into.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(into, a, b, out_dtype=into.dtype, out=into)
    else:
        into.addmm_(a.to(into.dtype), b.to(into.dtype))


def _kernels() -> Any:
    return import_module("radix_mlp.ops.head.triton_head")
