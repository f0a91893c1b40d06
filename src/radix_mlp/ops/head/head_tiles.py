"""The arithmetic on tiles of a linear head, in plain torch.

`RowSums` accumulates tiles of logits in the forward pass; `RowGradients` turns each tile into its gradient in the
backward pass.  `radix_mlp.ops.head.triton_head` does the same in one kernel each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["HeadEdges", "HeadResults", "RowGradients", "RowSums", "Tile", "TileOptions"]


@dataclass(frozen=True)
class TileOptions:
    """What to compute, and in which dtypes."""

    scale: float
    softcap: float | None
    temperature: float
    entropy: bool
    mean_logit: bool
    log_sum_sq_probs: bool
    top: int
    compute_dtype: torch.dtype
    """The dtype in which hidden states and weights are multiplied."""
    wide_dtype: torch.dtype
    """The dtype of logits and sums: float32 or float64."""
    max_logits: int
    """Largest size of a tile."""
    kernels: bool
    """Whether Triton kernels do the arithmetic of tiles."""


class HeadResults(NamedTuple):
    """Results of `apply_head`. Only `logprob` and `entropy` are differentiable; fields not requested are empty."""

    logprob: Tensor
    """`[E]`"""
    entropy: Tensor
    """`[P]`"""
    mean_logit: Tensor
    """`[P]`"""
    log_sum_sq_probs: Tensor
    """`[P]`"""
    greedy_ids: Tensor
    """`[P]` int64."""
    top_ids: Tensor
    """`[P, k]` int64."""
    top_logprobs: Tensor
    """`[P, k]`"""


class HeadEdges(NamedTuple):
    """Edges on the device of the head, int64."""

    parents: Tensor
    """`[P]` rows of the hidden states."""
    parent_at: Tensor
    """`[E]` ascending indices into `parents`."""
    targets: Tensor
    """`[E]`"""
    cuts: Tensor
    """`[P + 1]` the first edge of every parent."""


class Tile(NamedTuple):
    """Rows `first:last` (indices into `parents`), vocabulary columns `low:high`, and the rows' edges `begin:end`."""

    first: int
    last: int
    low: int
    high: int
    begin: int
    end: int

    @property
    def rows(self) -> slice:
        """The tile's part of arrays with one entry per parent."""
        return slice(self.first, self.last)

    @property
    def edges(self) -> slice:
        """The tile's part of arrays with one entry per edge."""
        return slice(self.begin, self.end)

    def columns_of(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Which targets lie in the tile, and a column for every target: selecting by mask would wait for the device."""
        inside = (targets >= self.low) & (targets < self.high)
        return inside, (targets - self.low).clamp(0, self.high - self.low - 1)


def finish_logits(logits: Tensor, bias: Tensor | None, options: TileOptions) -> Tensor:
    """Bias, scale, soft cap and temperature, in place."""
    if bias is not None:
        logits += bias
    if options.scale != 1.0:
        logits *= options.scale
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)
    if options.temperature != 1.0:
        logits /= options.temperature
    return logits


class RowSums:
    """Running sums over the tiles seen so far: a few numbers per row."""

    def __init__(self, edges: HeadEdges, vocabulary: int, options: TileOptions) -> None:
        device = edges.parents.device

        def filled(value: float, wanted: bool = True, *shape: int) -> Tensor:
            size = (len(edges.parents) if wanted else 0, *shape)
            return torch.full(size, value, dtype=options.wide_dtype, device=device)

        self.edges = edges
        self.options = options
        self.vocabulary = vocabulary
        self.maximum = filled(-torch.inf)
        self.sum_exp = filled(0.0)
        self.sum_exp_logit = filled(0.0, options.entropy)
        self.sum_exp_squared = filled(0.0, options.log_sum_sq_probs)
        self.sum_logit = filled(0.0, options.mean_logit)
        self.greedy_ids = torch.zeros_like(edges.parents)
        self.top_logits = filled(-torch.inf, True, options.top)
        self.top_ids = edges.parents.new_zeros(len(edges.parents), options.top)
        self.target_logit = torch.zeros(len(edges.targets), dtype=options.wide_dtype, device=device)

    def add(self, tile: Tile, logits: Tensor, bias: Tensor | None) -> None:
        """Add a tile of products `[R, C]`, which is overwritten."""
        options, here = self.options, tile.rows
        finish_logits(logits, bias, options)
        inside, column = tile.columns_of(self.edges.targets[tile.edges])
        found = logits[self.edges.parent_at[tile.edges] - tile.first, column]
        self.target_logit[tile.edges] = torch.where(inside, found, self.target_logit[tile.edges])
        if options.mean_logit:
            self.sum_logit[here] += logits.sum(1)
        if options.top:
            self._add_top(tile, logits)
        largest = logits.argmax(1)
        values = logits.gather(1, largest[:, None])[:, 0]
        before = self.maximum[here]
        # of equal values the first, like argmax
        self.greedy_ids[here] = torch.where(values > before, largest + tile.low, self.greedy_ids[here])
        maximum = torch.maximum(before, values)
        # where every logit so far is -inf: -inf - 0 keeps exp at 0, -inf - -inf would be NaN
        base = torch.where(maximum == -torch.inf, 0, maximum)
        shrink = torch.exp(before - base)
        weights = torch.exp(logits - base[:, None])
        self.sum_exp[here] = self.sum_exp[here] * shrink + weights.sum(1)
        if options.log_sum_sq_probs:
            self.sum_exp_squared[here] = self.sum_exp_squared[here] * shrink.square() + weights.square().sum(1)
        if options.entropy:
            self.sum_exp_logit[here] = self.sum_exp_logit[here] * shrink + (weights * logits).sum(1)
        self.maximum[here] = maximum

    def _add_top(self, tile: Tile, logits: Tensor) -> None:
        best, column = logits.topk(min(self.options.top, logits.shape[1]), dim=1)
        values = torch.cat([self.top_logits[tile.rows], best], 1)
        ids = torch.cat([self.top_ids[tile.rows], column + tile.low], 1)
        self.top_logits[tile.rows], place = values.topk(self.options.top, dim=1)
        self.top_ids[tile.rows] = ids.gather(1, place)

    def log_sum_exp(self) -> Tensor:
        """`[P]`"""
        return self.maximum + self.sum_exp.log()

    def results(self) -> HeadResults:
        """The results after the last tile."""
        total = self.log_sum_exp()
        options = self.options
        return HeadResults(
            self.target_logit - total[self.edges.parent_at],
            total - self.sum_exp_logit / self.sum_exp if options.entropy else total.new_empty(0),
            self.sum_logit / self.vocabulary if options.mean_logit else total.new_empty(0),
            self.sum_exp_squared.log() - 2 * self.sum_exp.log() if options.log_sum_sq_probs else total.new_empty(0),
            self.greedy_ids,
            self.top_ids,
            self.top_logits - total[:, None],
        )


class RowGradients(NamedTuple):
    """Gradients of the results, from which the gradient of every tile of logits is computed."""

    of_edges: Tensor
    """`[E]` of the log-probabilities."""
    of_rows: Tensor
    """`[P]` their sum over the edges of a row."""
    of_entropy: Tensor | None
    """`[P]`"""
    log_sum_exp: Tensor
    """`[P]`"""
    entropy: Tensor
    """`[P]`, or empty."""

    def of_products(
        self, tile: Tile, logits: Tensor, bias: Tensor | None, edges: HeadEdges, options: TileOptions
    ) -> Tensor:
        """The gradient `[R, C]` of a tile of products, in the compute dtype. Overwrites `logits`."""
        finish_logits(logits, bias, options)
        slope = None
        if options.softcap is not None:
            # the derivative of the cap, from the capped value
            slope = 1 - (logits * (options.temperature / options.softcap)).square()
        log_p = logits.sub_(self.log_sum_exp[tile.rows, None])
        if self.of_entropy is None:
            grad = log_p.exp_().mul_(-self.of_rows[tile.rows, None])
        else:
            p = log_p.exp()
            factor = log_p.add_(self.entropy[tile.rows, None]).mul_(self.of_entropy[tile.rows, None])
            grad = p.mul_(factor.add_(self.of_rows[tile.rows, None])).neg_()
        inside, column = tile.columns_of(edges.targets[tile.edges])
        place = edges.parent_at[tile.edges] - tile.first, column
        grad.index_put_(place, torch.where(inside, self.of_edges[tile.edges], 0), accumulate=True)
        if slope is not None:
            grad *= slope
        return grad.mul_(options.scale / options.temperature).to(options.compute_dtype)
