"""A linear head and its softmax in tiles of rows and vocabulary, forward and backward; logits are never kept.

For logits z of a row, p = softmax(z), H its entropy and edges e with targets t(e):

    d logprob[e] / dz = onehot(t(e)) - p            dH / dz = -p * (log p + H)

The backward pass makes each tile of logits anew, turns it into their gradient and multiplies it away.  Tiles are summed
in float32 or wider, also where weights are bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from radix_mlp.ops.fold import segment_sum
from radix_mlp.ops.linear_head import LinearHead

__all__ = ["HeadResults", "TileOptions", "apply_head"]

MAX_ROWS = 4096
"""Rows of a tile: enough for a matrix multiplication to run at full speed."""
COLUMN_MULTIPLE = 128
"""Tiles cut the vocabulary at multiples of this, which keeps rows of weights aligned."""


class HeadResults(NamedTuple):
    """Of `apply_head`. Only `logprob` and `entropy` are differentiable."""

    logprob: Tensor
    """`[E]`"""
    entropy: Tensor
    """`[P]`, or empty."""
    mean_logit: Tensor
    """`[P]`, or empty."""
    log_sum_sq_probs: Tensor
    """`[P]`, or empty."""
    greedy_ids: Tensor
    """`[P]` int64."""
    top_ids: Tensor
    """`[P, k]` int64."""
    top_logprobs: Tensor
    """`[P, k]`"""


@dataclass(frozen=True)
class TileOptions:
    """What to compute, and in what."""

    scale: float
    softcap: float | None
    temperature: float
    entropy: bool
    mean_logit: bool
    log_sum_sq_probs: bool
    top: int
    compute_dtype: torch.dtype
    """In which hidden states and weights are multiplied."""
    wide_dtype: torch.dtype
    """In which logits and sums are held: float32 or float64."""
    max_logits: int
    """Size of a tile."""


class _Edges(NamedTuple):
    parents: Tensor
    parent_at: Tensor
    targets: Tensor


class _Tile(NamedTuple):
    """Rows `first:last` (places in `parents`), columns `low:high`, edges `begin:end`."""

    first: int
    last: int
    low: int
    high: int
    begin: int
    end: int


def apply_head(
    hidden: Tensor, head: LinearHead, edges: tuple[Tensor, Tensor, Tensor], cuts: np.ndarray, options: TileOptions
) -> HeadResults:
    """Log-probabilities of edges and statistics of rows.

    Args:
        hidden: `[M, h]`
        head: of a vocabulary V that all targets are in.
        edges: `parents [P]`, `parent_at [E]` and `targets [E]` as in `Edges`, int64, on hidden's device.
        cuts: `[P + 1]` the first edge of every parent, on the host.
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
        cuts: np.ndarray,
        options: TileOptions,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            rows = _RowSums(len(parents), len(targets), hidden.device, options)
            inputs = hidden.index_select(0, parents).to(options.compute_dtype)
            for tile, logits in _tiles(inputs, weight, bias, cuts, options):
                rows.add(tile, logits, parent_at, targets)
            results = rows.results(parent_at)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[2:])
        ctx.save_for_backward(
            hidden, weight, bias, parents, parent_at, targets, rows.log_sum_exp(), results.entropy.detach()
        )
        ctx.cuts, ctx.options = cuts, options
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple[Any, ...]:
        hidden, weight, bias, parents, parent_at, targets, log_sum_exp, entropy = ctx.saved_tensors
        options: TileOptions = ctx.options
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        nothing = (None,) * 8
        if grad_logprob is None and grad_entropy is None:
            return nothing
        wide = options.wide_dtype
        if grad_logprob is None:
            grad_logprob = log_sum_exp.new_zeros(len(targets))
        by_row = _RowGradients(
            grad_logprob.to(wide),
            segment_sum(grad_logprob.to(wide), parent_at, len(parents)),
            None if grad_entropy is None or not options.entropy else grad_entropy.to(wide),
            log_sum_exp,
            entropy,
        )
        grad_inputs = log_sum_exp.new_zeros(len(parents), hidden.shape[1]) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            inputs = hidden.index_select(0, parents).to(options.compute_dtype)
            # tiles come column by column, so the gradient of a column's weights is summed in float32 in little space
            wide_weight: Tensor | None = None
            for tile, logits in _tiles(inputs, weight, bias, ctx.cuts, options):
                columns = slice(tile.low, tile.high)
                grad = by_row.of_logits(tile, logits, parent_at, targets, options)
                narrow = grad.to(options.compute_dtype)
                if grad_inputs is not None:
                    part = weight[columns].to(options.compute_dtype)
                    _add_product(grad_inputs[tile.first : tile.last], narrow, part)
                if grad_weight is not None:
                    if wide_weight is None or tile.first == 0:
                        wide_weight = log_sum_exp.new_zeros(tile.high - tile.low, weight.shape[1])
                    _add_product(wide_weight, narrow.t(), inputs[tile.first : tile.last])
                    if tile.last == len(parents):
                        grad_weight[columns] = wide_weight.to(weight.dtype)
                if grad_bias is not None:
                    grad_bias[columns] += grad.sum(0).to(grad_bias.dtype)
        grad_hidden = None
        if grad_inputs is not None:
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, parents, grad_inputs.to(hidden.dtype))
        return grad_hidden, grad_weight, grad_bias, *nothing[3:]


def _tiles(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, cuts: np.ndarray, options: TileOptions
) -> Iterator[tuple[_Tile, Tensor]]:
    """Tiles of scaled and capped logits, divided by the temperature; columns outside, rows inside."""
    num_rows, vocabulary = len(inputs), weight.shape[0]
    height = max(1, min(num_rows, MAX_ROWS, options.max_logits))
    width = max(1, options.max_logits // height)
    if width >= COLUMN_MULTIPLE:
        width -= width % COLUMN_MULTIPLE
    for low in range(0, vocabulary if num_rows else 0, width):
        high = min(low + width, vocabulary)
        part = weight[low:high].to(options.compute_dtype)
        offset = None if bias is None else bias[low:high].to(options.wide_dtype)
        for first in range(0, num_rows, height):
            last = min(first + height, num_rows)
            logits = _product(inputs[first:last], part.t(), options.wide_dtype)
            if offset is not None:
                logits += offset
            if options.scale != 1.0:
                logits *= options.scale
            if options.softcap is not None:
                logits.div_(options.softcap).tanh_().mul_(options.softcap)
            if options.temperature != 1.0:
                logits /= options.temperature
            yield _Tile(first, last, low, high, int(cuts[first]), int(cuts[last])), logits


class _RowSums:
    """What is kept of the tiles seen so far: a few numbers a row."""

    def __init__(self, num_rows: int, num_edges: int, device: torch.device, options: TileOptions) -> None:
        def filled(value: float, wanted: bool = True, *shape: int) -> Tensor:
            size = (num_rows if wanted else 0, *shape)
            return torch.full(size, value, dtype=options.wide_dtype, device=device)

        self.options = options
        self.maximum = filled(-torch.inf)
        self.sum_exp = filled(0.0)
        self.sum_exp_logit = filled(0.0, options.entropy)
        self.sum_exp_squared = filled(0.0, options.log_sum_sq_probs)
        self.sum_logit = filled(0.0, options.mean_logit)
        self.greedy_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.top_logits = filled(-torch.inf, True, options.top)
        self.top_ids = torch.zeros(num_rows, options.top, dtype=torch.int64, device=device)
        self.target_logit = torch.zeros(num_edges, dtype=options.wide_dtype, device=device)
        self.vocabulary = 0

    def add(self, tile: _Tile, logits: Tensor, parent_at: Tensor, targets: Tensor) -> None:
        options, here = self.options, slice(tile.first, tile.last)
        edges = slice(tile.begin, tile.end)
        self.vocabulary = max(self.vocabulary, tile.high)
        inside, column = _columns(targets[edges], tile)
        found = logits[parent_at[edges] - tile.first, column]
        self.target_logit[edges] = torch.where(inside, found, self.target_logit[edges])
        if options.mean_logit:
            self.sum_logit[here] += logits.sum(1)
        if options.top:
            self._add_top(here, tile, logits)
        largest = logits.argmax(1)
        values = logits.gather(1, largest[:, None])[:, 0]
        before = self.maximum[here]
        # the first of equals, as argmax has it
        self.greedy_ids[here] = torch.where(values > before, largest + tile.low, self.greedy_ids[here])
        maximum = torch.maximum(before, values)
        shrink = torch.exp(before - maximum)
        weights = torch.exp(logits - maximum[:, None])
        self.sum_exp[here] = self.sum_exp[here] * shrink + weights.sum(1)
        if options.log_sum_sq_probs:
            self.sum_exp_squared[here] = self.sum_exp_squared[here] * shrink.square() + weights.square().sum(1)
        if options.entropy:
            self.sum_exp_logit[here] = self.sum_exp_logit[here] * shrink + (weights * logits).sum(1)
        self.maximum[here] = maximum

    def _add_top(self, here: slice, tile: _Tile, logits: Tensor) -> None:
        best, column = logits.topk(min(self.options.top, logits.shape[1]), dim=1)
        values = torch.cat([self.top_logits[here], best], 1)
        ids = torch.cat([self.top_ids[here], column + tile.low], 1)
        self.top_logits[here], place = values.topk(self.options.top, dim=1)
        self.top_ids[here] = ids.gather(1, place)

    def log_sum_exp(self) -> Tensor:
        return self.maximum + self.sum_exp.log()

    def results(self, parent_at: Tensor) -> HeadResults:
        total = self.log_sum_exp()
        nothing = total.new_empty(0)
        options = self.options
        return HeadResults(
            self.target_logit - total[parent_at],
            total - self.sum_exp_logit / self.sum_exp if options.entropy else nothing,
            self.sum_logit / self.vocabulary if options.mean_logit else nothing.clone(),
            self.sum_exp_squared.log() - 2 * self.sum_exp.log() if options.log_sum_sq_probs else nothing.clone(),
            self.greedy_ids,
            self.top_ids,
            self.top_logits - total[:, None],
        )


class _RowGradients(NamedTuple):
    of_edges: Tensor
    """`[E]` gradient of the log-probabilities."""
    of_rows: Tensor
    """`[P]` their sum over the edges of a row."""
    of_entropy: Tensor | None
    """`[P]`"""
    log_sum_exp: Tensor
    entropy: Tensor

    def of_logits(
        self, tile: _Tile, logits: Tensor, parent_at: Tensor, targets: Tensor, options: TileOptions
    ) -> Tensor:
        """The gradient `[R, C]` before scale, cap and temperature. Writes over `logits`."""
        here, edges = slice(tile.first, tile.last), slice(tile.begin, tile.end)
        slope = None
        if options.softcap is not None:
            # the derivative of the cap, from its own value
            slope = 1 - (logits * (options.temperature / options.softcap)).square()
        log_p = logits.sub_(self.log_sum_exp[here, None])
        grad = log_p.exp() if self.of_entropy is None else None
        if grad is None:
            assert self.of_entropy is not None
            p = log_p.exp()
            factor = log_p.add_(self.entropy[here, None]).mul_(self.of_entropy[here, None])
            grad = p.mul_(factor.add_(self.of_rows[here, None])).neg_()
        else:
            grad.mul_(-self.of_rows[here, None])
        inside, column = _columns(targets[edges], tile)
        grad.index_put_(
            (parent_at[edges] - tile.first, column), torch.where(inside, self.of_edges[edges], 0), accumulate=True
        )
        if slope is not None:
            grad *= slope
        return grad.mul_(options.scale / options.temperature)


def _columns(targets: Tensor, tile: _Tile) -> tuple[Tensor, Tensor]:
    """Which targets lie in the tile, and a column for all of them: choosing by mask would wait for the device."""
    inside = (targets >= tile.low) & (targets < tile.high)
    return inside, (targets - tile.low).clamp(0, tile.high - tile.low - 1)


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
