"""Which pictures of a call are the same, to the bit."""

from __future__ import annotations

import functools
import hashlib
import itertools
import secrets

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["first_of_equal"]

_CHUNK = 1 << 26
"""Numbers that are hashed at a time, which bounds the memory that takes."""


@torch.no_grad()
def first_of_equal(pixels: Tensor, starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[P]` for each picture the first one with the same size and the same bits.

    Pictures on the host are compared by a cryptographic digest. Those on a device are hashed there, and such as have
    equal hashes are then compared: one synchronization, and one more where some are equal.

    Args:
        pixels: `[R, ...]` the pictures one after the other.
        starts: `[P + 1]` the first row of each picture, and `R`.
        sizes: `[P, k]` what besides must be equal.

    Examples:
        >>> pixels = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
        >>> first_of_equal(pixels, np.array([0, 1, 2, 3]), np.zeros((3, 1))).tolist()
        [0, 1, 0]
    """
    bits = _bits(pixels)
    digests = _digests_on_device(bits, starts) if bits.is_cuda else _digests_on_host(bits, starts)
    first: dict[tuple[object, ...], int] = {}
    found = np.arange(len(digests))
    for picture, digest in enumerate(digests):
        key = (digest, starts[picture + 1] - starts[picture], *sizes[picture].tolist())
        found[picture] = first.setdefault(key, picture)
    if bits.is_cuda:
        _part_unequal(bits, starts, found)
    return found


def _bits(pixels: Tensor) -> Tensor:
    """`[R, C]` integers of the same memory."""
    flat = pixels.detach().contiguous().view(len(pixels), -1)
    width = flat.shape[1] * flat.element_size()
    dtype = next(d for d in (torch.int32, torch.int16, torch.uint8) if width % d.itemsize == 0)
    return flat.view(dtype)


def _digests_on_host(bits: Tensor, starts: NDArray[np.int64]) -> list[bytes]:
    rows = bits.cpu().numpy()
    return [hashlib.sha256(rows[a:b]).digest() for a, b in itertools.pairwise(starts)]


def _digests_on_device(bits: Tensor, starts: NDArray[np.int64]) -> list[int]:
    """A random linear function of each picture's bits, modulo 2**64."""
    device, width = bits.device, bits.shape[1]
    step = max(_CHUNK // max(width, 1), 1)
    weights = _weights(width, device)
    rows = torch.cat([(part * weights).sum(1) for part in bits.split(step)])
    lengths = np.diff(starts)
    place = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    picture = np.repeat(np.arange(len(lengths)), lengths)
    sent = torch.from_numpy(np.stack((place, picture))).to(device, non_blocking=True)
    # halves, so that no factor of two is lost in the product
    halves = rows.view(torch.int32).view(-1, 2)
    mixed = (halves * _weights(2 * int(lengths.max()), device).view(-1, 2)[sent[0]]).sum(1)
    sums = torch.zeros(len(lengths), dtype=torch.int64, device=device).index_add_(0, sent[1], mixed)
    found: list[int] = sums.tolist()
    return found


@functools.lru_cache(maxsize=16)
def _weights(count: int, device: torch.device) -> Tensor:
    """`[count]` random numbers that nobody can know who makes pictures."""
    drawn = np.frombuffer(secrets.token_bytes(8 * count), np.int64)
    # kept for later calls, which may train
    with torch.inference_mode(False):
        return torch.from_numpy(drawn.copy()).to(device)


def _part_unequal(bits: Tensor, starts: NDArray[np.int64], found: NDArray[np.int64]) -> None:
    """Make pictures their own first again whose hash alone is that of another."""
    later = np.flatnonzero(found != np.arange(len(found)))
    if not len(later):
        return
    same = [
        (bits[starts[a] : starts[a + 1]] == bits[starts[b] : starts[b + 1]]).all()
        for a, b in zip(found[later], later, strict=True)
    ]
    equal = np.array(torch.stack(same).tolist())
    found[later[~equal]] = later[~equal]
