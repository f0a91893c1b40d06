"""The fused row gather and its adjoint: in Triton's interpreter without CUDA, on the GPU with `-m gpu`."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="pip install triton runs these tests in Triton's interpreter")

from tools.model_types.batches import prefix_batch, random_batch  # noqa: E402

from radix_mlp.ops.attention.impl.copies import Copies  # noqa: E402
from radix_mlp.ops.attention.impl.gathered_rows import gather_rows, sum_copies  # noqa: E402
from radix_mlp.ops.attention.impl.leaf_paths import leaf_paths  # noqa: E402
from radix_mlp.ops.attention.impl.triton_gather import SUM, Launch, _vector, triton_gather, triton_sum  # noqa: E402
from radix_mlp.plan import build_plan  # noqa: E402

devices = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(HAS_CUDA, reason="Triton compiles here: run with -m gpu")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def draw(rows: int, shapes: list[tuple[int, int]], dtype: torch.dtype, device: str, layout: str) -> list[Tensor]:
    """`[M, H, D]` each: contiguous, as Hugging Face stores them, as slices of one projection, or off alignment."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for heads, width in shapes:
        if layout == "hmd":
            x = torch.randn(heads, rows, width, generator=generator).transpose(0, 1)
        elif layout == "slice":
            x = torch.randn(rows, 3 * heads, width, generator=generator)[:, heads : 2 * heads]
        elif layout == "odd":
            x = torch.randn(rows, heads, width + 3, generator=generator)[..., 1 : 1 + width]
        elif layout == "last":
            x = torch.randn(rows, heads, width, 2, generator=generator)[..., 0]
        else:
            x = torch.randn(rows, heads, width, generator=generator)
        # as_strided keeps the layout on the device
        store = x.untyped_storage()
        whole = torch.empty(0).set_(store).to(device, dtype)  # type: ignore[call-overload]
        tensors.append(whole.as_strided(x.shape, x.stride(), x.storage_offset()))
    return tensors


@devices
@dtypes
@pytest.mark.parametrize("layout", ["mhd", "hmd", "slice", "odd", "last"])
def test_gather_is_index_select(device: str, dtype: torch.dtype, layout: str) -> None:
    tensors = draw(50, [(5, 24), (2, 24), (2, 16)], dtype, device, layout)
    index = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(1)).to(device)
    for kind in (torch.int64, torch.int32):
        for actual, x in zip(triton_gather(tensors, index.to(kind)), tensors, strict=True):
            assert torch.equal(actual, x.index_select(0, index))
            assert actual.is_contiguous()


@devices
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("rows", "gathered"), [(1, 1), (1, 40), (33, 32), (5, 0)])
def test_sizes_and_number_of_tensors(device: str, count: int, rows: int, gathered: int) -> None:
    tensors = draw(rows, [(3, 8), (1, 8), (1, 40)][:count], torch.float16, device, "mhd")
    index = torch.randint(0, rows, (gathered,), generator=torch.Generator().manual_seed(1)).to(device)
    for actual, x in zip(triton_gather(tensors, index), tensors, strict=True):
        assert torch.equal(actual, x.index_select(0, index))


@devices
def test_negative_indices_are_rows_of_zeros(device: str) -> None:
    (x,) = draw(9, [(2, 16)], torch.float32, device, "mhd")
    index = torch.tensor([3, -1, 0, -1, 8], device=device)
    for (actual,) in (triton_gather([x], index), gather_rows([x], index)):
        assert torch.equal(actual[[0, 2, 4]], x[[3, 0, 8]])
        assert actual[[1, 3]].abs().sum() == 0


def copies_of(seed: int, device: str) -> tuple[Copies, Tensor, int]:
    """Copies of a random tree, the index that made them, and the number of rows."""
    rng = np.random.default_rng(seed)
    if seed % 2:
        ids, cu = random_batch(rng, num_sequences=9, vocab_size=3, max_length=14, branch=0.9)
    else:
        ids, cu = prefix_batch(rng, num_sequences=7, prefix=11, suffix=3)
    plan = build_plan(ids, cu, pad_multiple_of=8)
    paths = leaf_paths(plan.end, plan.depth)
    run = torch.tensor(paths.path_of_row)
    last = run[torch.tensor(plan.end).long() - 1] + 1
    copies = Copies(run, last, torch.tensor(paths.cu_keys), torch.tensor(plan.depth))
    index = torch.tensor(paths.gather).long()
    return Copies(*(x.to(device) for x in copies)), index.to(device), plan.num_rows


@devices
@dtypes
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("launch", [SUM, Launch(32, 4)], ids=str)
def test_sums(device: str, dtype: torch.dtype, seed: int, launch: Launch) -> None:
    copies, index, num_rows = copies_of(seed, device)
    tensors = draw(len(index), [(3, 24), (2, 24), (1, 16)], dtype, device, "mhd")
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-6}[dtype]
    for kind in (lambda: triton_sum(tensors, copies, launch), lambda: sum_copies(tensors, copies)):
        for actual, x in zip(kind(), tensors, strict=True):
            expected = x.new_zeros(num_rows, *x.shape[1:], dtype=torch.float64).index_add_(0, index, x.double())
            size = expected.abs().max()
            torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=float(tolerance * size))
            assert actual.dtype == dtype


@devices
def test_rows_without_copies_get_zeros(device: str) -> None:
    zero = torch.zeros(5, dtype=torch.int32, device=device)
    copies = Copies(zero + 2, zero + 2, zero[:2], zero)
    (x,) = draw(3, [(2, 16)], torch.float16, device, "mhd")
    for (actual,) in (triton_sum([x], copies), sum_copies([x], copies)):
        assert torch.equal(actual, x.new_zeros(5, 2, 16))


@devices
def test_sums_are_deterministic(device: str) -> None:
    copies, index, _ = copies_of(0, device)
    tensors = draw(len(index), [(3, 24)], torch.float16, device, "mhd")
    assert torch.equal(triton_sum(tensors, copies)[0], triton_sum(tensors, copies)[0])


def test_vectors_follow_the_alignment() -> None:
    x = torch.empty(6, 4, 64, dtype=torch.bfloat16)
    assert [_vector(y) for y in (x, x.transpose(0, 1), x[:, :, :60], x[:, :, 1:33])] == [8, 8, 4, 1]
    assert _vector(x.float()) == 4


@pytest.mark.gpu
def test_addresses_beyond_32_bits() -> None:
    """The last rows of a source and of a result with more than 2^31 numbers each."""
    x = torch.zeros(2**19 + 64, 32, 128, dtype=torch.bfloat16, device="cuda")
    x[-64:].normal_()
    index = torch.arange(len(x), device="cuda")
    index[:64] = torch.arange(len(x) - 64, len(x), device="cuda")
    (actual,) = triton_gather([x], index)
    assert torch.equal(actual[:64], x[-64:])
    assert torch.equal(actual[-64:], x[-64:])
    assert not actual[64:-64].any()
