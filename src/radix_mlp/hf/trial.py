"""A trial of code that no test knows: sequences with two beginnings through a module, folded and one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from radix_mlp.errors import RadixError
from radix_mlp.hf.fingerprint import fingerprint
from radix_mlp.hf.media import placeholders_of
from radix_mlp.hf.origin import is_stock

__all__ = ["Tried", "cache_trial", "trial"]

# far above rounding, far below what a wrong mask does to trained weights
_MAX_ERROR = 1e-3
# in half precision the unmodified model's own rounding says what is far above: the difference that padding makes
_MIN_HALF, _MAX_HALF, _TIMES_ROUNDING = 1e-2, 6e-2, 4.0
# of two beginnings: (which, its length, own tokens after it); the second is its own first sequence
_SEQUENCES = ((0, 9, 8), (0, 9, 5), (0, 4, 3), (1, 7, 0), (1, 7, 6), (1, 7, 2))
_NOISE = 0.1


class Tried(Protocol):
    """A module's forward in both ways, `[B, T]` ids and mask to outputs in that layout."""

    module: PreTrainedModel

    def run_folded(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Folded, whatever it spares."""

    def run_alone(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """As without radix-mlp."""

    def run_step(self, input_ids: Tensor, attention_mask: Tensor, next_ids: Tensor) -> Any:
        """One more token `[B, 1]` of each sequence, from the cache that a folded call has filled."""


def trial(tried: Tried) -> str | None:
    """Why folding changes what a module makes of its input, as far as some short sequences show; None if it does not.

    In training mode, weights of foreign code that are all zero, as adapters are at their start, are noise meanwhile.
    """
    return _tried(tried, _difference)


def cache_trial(tried: Tried) -> str | None:
    """The same for what follows a folded call that fills a cache."""
    return _tried(tried, _difference_of_steps)


@torch.no_grad()
def _tried(tried: Tried, find: Callable[[Tried, str], str | None]) -> str | None:
    module = tried.module
    kind = f"{type(module).__name__} ({module.config.model_type}), or code in it, is not proven to fold"
    if module.device.type == "meta":
        return f"{kind} and has no weights to try: load it first"
    # autocast rounds as half precision does, which the bound for these weights does not allow for
    with _as_it_may_become(module), torch.autocast(module.device.type, enabled=False):
        try:
            return find(tried, kind)
        except (RadixError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
            return f"{kind}, and a trial fold of it failed ({error}). Run it unfolded"


def _difference(tried: Tried, kind: str) -> str | None:
    sequences = [torch.as_tensor(s, device=tried.module.device) for s in _sequences(tried.module.config)]
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)
    alone = [_rows(tried.run_alone(s[None]))[0] for s in sequences]
    before = fingerprint(tried.module)
    folded = _rows(tried.run_folded(ids, mask))
    if fingerprint(tried.module) != before:
        return f"{kind}, and its state changes whenever it is called. Run it unfolded"
    bound = _MAX_ERROR
    if alone[0].dtype.itemsize < 4:
        rounding = _largest_error(_rows(tried.run_alone(ids, mask)), alone)
        bound = min(max(_TIMES_ROUNDING * rounding, _MIN_HALF), _MAX_HALF)
    error = _largest_error(folded, alone)
    if error <= bound:
        return None
    return (
        f"{kind}, and a trial fold of it is off by {error:.1e} of a token's output, which depends on more than "
        "attention to the token's left context. Run it unfolded"
    )


def _difference_of_steps(tried: Tried, kind: str) -> str | None:
    sequences = [torch.as_tensor(s, device=tried.module.device) for s in _sequences(tried.module.config)]
    following = torch.stack([s[:1] for s in sequences])
    options: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
    ids = nn.utils.rnn.pad_sequence(sequences, **options)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], **options)
    alone = [_rows(tried.run_alone(torch.cat((s, s[:1]))[None]))[0, -1:] for s in sequences]
    error = _largest_error(_rows(tried.run_step(ids, mask, following)), alone)
    if error <= (_MAX_ERROR if alone[0].dtype.itemsize >= 4 else _MAX_HALF):
        return None
    return (
        f"{kind}, and what follows a trial fold of it is off by {error:.1e} of a token's output: it keeps more than a "
        "DynamicCache does"
    )


def _sequences(config: Any) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    vocabulary = config.get_text_config().vocab_size
    # from few ids, so that some come again
    placeholders = [*placeholders_of(config)]
    known = random.integers(0, vocabulary, 12)
    known = known[~np.isin(known, placeholders)]
    beginnings = [random.choice(known, 9) for _ in range(2)]
    others = (np.arange(1, vocabulary) + beginnings[0][0]) % vocabulary
    beginnings[1][0] = others[~np.isin(others, placeholders)][0]
    return [np.concatenate((beginnings[i][:n], random.choice(known, own))).astype(np.int64) for i, n, own in _SEQUENCES]


def _rows(outputs: Any) -> Tensor:
    """Logits or hidden states `[B, T, ...]`."""
    name = "logits" if "logits" in outputs else "last_hidden_state"
    rows: Tensor = outputs[name]
    return rows


def _largest_error(found: Tensor, alone: list[Tensor]) -> float:
    """Of all tokens, relative to the length of each token's row; infinite where shapes differ or numbers are none."""
    errors = [0.0]
    for row, expected in zip(found.double(), alone, strict=True):
        off = (row[: len(expected)] - expected.double()).flatten(1).norm(dim=1)
        errors.append(float((off / expected.double().flatten(1).norm(dim=1).clamp(min=1e-12)).max()))
    return max(errors) if np.isfinite(errors).all() else float("inf")


@contextmanager
def _as_it_may_become(module: nn.Module) -> Iterator[None]:
    foreign = [part for part in module.modules() if not is_stock(type(part))] if module.training else []
    buffers = {id(buffer): buffer for part in foreign for buffer in part.buffers()}.values()
    kept = [(buffer, buffer.clone()) for buffer in buffers]
    weights = {id(weight): weight for part in foreign for weight in part.parameters() if _is_zero(weight)}.values()
    data = [(weight, weight.data) for weight in weights]
    generator = torch.Generator().manual_seed(0)
    try:
        for weight, zeros in data:
            weight.data = (_NOISE * torch.randn(zeros.shape, generator=generator)).to(zeros)
        yield
    finally:
        for weight, zeros in data:
            weight.data = zeros
        for buffer, value in kept:
            buffer.copy_(value)


def _is_zero(weight: nn.Parameter) -> bool:
    return type(weight) is nn.Parameter and weight.is_floating_point() and not bool(weight.any())
