"""Log-probabilities of edges against log-softmax over every row, in float64, gradients too."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.attention_cases import plans
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from radix_mlp.errors import InvalidDtypeError, InvalidInputError, UnsupportedCallError
from radix_mlp.ops import Edges, LinearHead, edge_logprobs, label_edges, tree_edges
from radix_mlp.plan import RadixPlan, build_plan

MODULE = importlib.import_module("radix_mlp.ops.head.edge_logprobs")
STATISTICS = MODULE.STATISTICS
VOCABULARY = 300


class Problem:
    """A head on random hidden states, and everything that is wanted of it, written out."""

    def __init__(
        self, plan: RadixPlan, edges: Edges, seed: int, *, softcap: float | None = None, dtype: Any = torch.float64
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes = [(plan.num_rows, 8), (VOCABULARY, 8), (VOCABULARY,)]
        self.leaves = [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]
        self.hidden, weight, bias = self.leaves
        self.head = LinearHead(weight, bias, 1.3, softcap)
        self.edges = edges
        self.temperature = 0.7
        self.weights = torch.randn(2, edges.num_edges, generator=generator, dtype=dtype)
        logits = self.head(self.hidden) / self.temperature
        logprobs = logits.log_softmax(-1)
        rows, targets = torch.from_numpy(edges.parents[edges.parent_at]), torch.from_numpy(edges.targets)
        self.expected = {
            "logprob": logprobs[rows, targets],
            "entropy": -(logprobs.exp() * logprobs).sum(-1)[rows],
            "is_greedy": logprobs.argmax(-1)[rows] == targets,
            "mean_logit": logits.mean(-1)[rows],
            "log_sum_sq_probs": logprobs.exp().square().sum(-1).log()[rows],
            "top_ids": logprobs.topk(5).indices[rows],
            "top_logprobs": logprobs.topk(5).values[rows],
        }

    def loss(self, logprob: Tensor, entropy: Tensor) -> Tensor:
        return (self.weights[0] * logprob).sum() + (self.weights[1] * entropy).sum()

    def gradients(self, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.loss(logprob, entropy), self.leaves, retain_graph=True)

    def check(self, head: Any, **options: Any) -> None:
        result = edge_logprobs(
            self.hidden, head, self.edges, temperature=self.temperature, statistics=STATISTICS, top=5, **options
        )
        for name, expected in self.expected.items():
            torch.testing.assert_close(getattr(result, name), expected)
        assert result.entropy is not None
        found = self.gradients(result.logprob, result.entropy)
        expected_gradients = self.gradients(self.expected["logprob"], self.expected["entropy"])
        for gradient, expected in zip(found, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, expected)


@settings(max_examples=8)
@given(plan=plans(), seed=st.integers(0, 99), budget=st.sampled_from([29, 700, 9_000, 1 << 25]))
def test_values_and_gradients_on_trees(plan: RadixPlan, seed: int, budget: int) -> None:
    edges = tree_edges(plan, np.random.default_rng(seed).random(plan.num_tokens) < 0.7)
    if edges.num_edges == 0:
        return
    problem = Problem(plan, edges, seed, softcap=[None, 3.0][seed % 2])
    problem.check(problem.head, max_logits=budget)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_labels_functions_and_modules(softcap: float | None) -> None:
    plan = build_plan([0, 1, 2, 0, 1, 3, 0, 4], [0, 3, 6, 8])
    problem = Problem(plan, label_edges(plan, [-100, 299, 2, -100, 299, 3, 0, 250]), 0, softcap=softcap)
    problem.check(problem.head)
    problem.check(lambda hidden: problem.head(hidden), max_logits=700)


def test_many_rows_through_a_function_come_in_chunks() -> None:
    plan = build_plan(np.arange(40), [0, 40])
    problem = Problem(plan, tree_edges(plan), 0)
    seen: list[int] = []

    def head(hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return problem.head(hidden)

    problem.check(head, max_logits=3_000)
    assert sorted(seen[: len(seen) // 2]) == [1, 8, 10, 10, 10]


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensors that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = [0]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.sizes += [x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, Tensor)]
        return out


@pytest.mark.parametrize("vocabulary", [2_000, 16_000])
def test_memory_is_flat_in_the_vocabulary(vocabulary: int) -> None:
    """No tensor is larger than a tile, but for the gradient of the weight itself."""
    plan = build_plan(np.arange(600) % vocabulary, [0, 600])
    hidden = torch.randn(600, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    budget = 40_000
    with LargestTensor() as seen:
        out = edge_logprobs(hidden, weight, tree_edges(plan), statistics=STATISTICS, max_logits=budget)
        assert out.entropy is not None
        (out.logprob + out.entropy).sum().backward()
    assert max(seen.sizes) <= max(budget, weight.numel())
    assert budget // 2 < sorted(size for size in seen.sizes if size != weight.numel())[-1] <= budget


def test_gradients_only_where_they_are_wanted() -> None:
    plan = build_plan([0, 1, 2, 0, 1, 3], [0, 3, 6])
    weight = torch.randn(9, 4)
    for hidden_needs, weight_needs in [(True, False), (False, True)]:
        hidden = torch.randn(4, 4, requires_grad=hidden_needs)
        weight = torch.randn(9, 4, requires_grad=weight_needs)
        out = edge_logprobs(hidden, weight, tree_edges(plan), statistics=("entropy", "is_greedy"), top=2)
        assert out.entropy is not None
        assert out.top_logprobs is not None
        assert not out.top_logprobs.requires_grad
        # one of two outputs only
        out.entropy.sum().backward()
        assert (hidden.grad is not None, weight.grad is not None) == (hidden_needs, weight_needs)


def test_bfloat16_sums_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision weights give the gradients of their float32 values, but for one rounding."""
    plan = build_plan(np.arange(500) % 200, [0, 500])
    edges = tree_edges(plan)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).bfloat16().requires_grad_() for n in (500, 200))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = edge_logprobs(exact[0], exact[1], edges).logprob
    expected_gradients = torch.autograd.grad(expected.sum(), exact)
    # many small tiles: rounding at each would add up
    monkeypatch.setattr("radix_mlp.ops.head.chunked_head.MAX_ROWS", 8)
    logprob = edge_logprobs(hidden, weight, edges, max_logits=1000).logprob
    assert logprob.dtype == torch.float32
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-4)
    for found, exact_gradient in zip(
        torch.autograd.grad(logprob.sum(), (hidden, weight)), expected_gradients, strict=True
    ):
        assert found.dtype == torch.bfloat16
        error = (found.double() - exact_gradient).norm() / exact_gradient.norm()
        assert error < 4e-3


def test_autocast_multiplies_in_its_dtype() -> None:
    plan = build_plan([0, 1, 2, 0, 1, 3], [0, 3, 6])
    hidden, weight = torch.randn(4, 32, requires_grad=True), torch.randn(9, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        logprob = edge_logprobs(hidden, weight, tree_edges(plan)).logprob
    expected = edge_logprobs(hidden.bfloat16(), weight.bfloat16(), tree_edges(plan)).logprob
    torch.testing.assert_close(logprob, expected, rtol=0, atol=0)
    logprob.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kernels", [False, True])
def test_the_first_of_equal_logits_is_greedy(
    monkeypatch: pytest.MonkeyPatch, small_blocks: None, kernels: bool
) -> None:
    """Within a tile and between tiles."""
    monkeypatch.setattr(MODULE, "_has_kernels", lambda *_: kernels)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = torch.zeros(40, 4, device=device)
    head[[7, 9, 30]] = 1.0
    edges = tree_edges(build_plan([1, 7, 1, 9, 1, 30], [0, 2, 4, 6]))
    result = edge_logprobs(torch.ones(4, 4, device=device), head, edges, statistics=("is_greedy",), max_logits=20)
    assert result.is_greedy is not None
    assert result.is_greedy.tolist() == [True, False, False]


def test_no_second_derivative() -> None:
    plan = build_plan([0, 1], [0, 2])
    hidden = torch.randn(2, 3, requires_grad=True)
    logprob = edge_logprobs(hidden, torch.randn(4, 3), tree_edges(plan)).logprob
    with pytest.raises(UnsupportedCallError, match="no second derivative"):
        logprob.sum().backward(create_graph=True)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    kernels = importlib.import_module("radix_mlp.ops.head.triton_head")
    for name, size in {"FORWARD_BLOCK": 16, "BACKWARD_BLOCK": 16, "EDGE_BLOCK": 2}.items():
        monkeypatch.setattr(kernels, name, size)
    monkeypatch.setattr(MODULE, "_has_kernels", lambda *_: True)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize(("softcap", "bias"), [(None, False), (3.0, True)])
def test_kernels_agree_with_torch(monkeypatch: pytest.MonkeyPatch, softcap: float | None, bias: bool) -> None:
    compare_kernels(monkeypatch, "cpu", torch.float32, softcap, bias, vocabulary=40, tile=90)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_a_tile_with_only_minus_infinity(monkeypatch: pytest.MonkeyPatch, small_blocks: None, kernels: bool) -> None:
    """Heads shut out ids by a bias of -inf; a whole tile of them, before and after those that count."""
    monkeypatch.setattr(MODULE, "_has_kernels", lambda *_: kernels)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 8, generator=generator, requires_grad=True)
    weight, bias = torch.randn(640, 8, generator=generator), torch.zeros(640)
    bias[:256] = bias[384:] = -torch.inf
    out = edge_logprobs(hidden, LinearHead(weight, bias), tree_edges(build_plan([1, 300, 310], [0, 3])), max_logits=256)
    expected = (hidden @ weight.t() + bias).log_softmax(1)[[0, 1], [300, 310]]
    torch.testing.assert_close(out.logprob, expected)
    found, wanted = (torch.autograd.grad(values.sum(), hidden)[0] for values in (out.logprob, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "bias"), [(None, False), (3.0, True)])
def test_kernels_agree_with_torch_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, bias: bool, dtype: torch.dtype
) -> None:
    compare_kernels(monkeypatch, "cuda", dtype, softcap, bias, vocabulary=5_003, tile=30_000)


def compare_kernels(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    softcap: float | None,
    bias: bool,
    *,
    vocabulary: int,
    tile: int,
) -> None:
    """The kernels against plain torch: a row with three edges among the others, tiles that cut rows and columns."""
    plan = build_plan([1, 2, 3, 1, 2, 4, 1, 2, 39, 5, 6], [0, 3, 6, 9, 11])
    generator = torch.Generator().manual_seed(0)
    shapes = [(plan.num_rows, 16), (vocabulary, 16), (vocabulary,)][: 3 if bias else 2]
    leaves = [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]
    # with a stride
    strided = torch.stack([leaves[2], leaves[2] + 1], 1)[:, 0] if bias else None
    head = LinearHead(leaves[1], strided, 1.3, softcap)
    edges = tree_edges(plan)
    weights = torch.randn(2, edges.num_edges, generator=generator).to(device)
    results = []
    for kernels in (True, False):
        monkeypatch.setattr(MODULE, "_has_kernels", lambda *_, kernels=kernels: kernels)
        out = edge_logprobs(leaves[0], head, edges, temperature=0.8, statistics=STATISTICS, max_logits=tile)
        assert out.entropy is not None
        losses = (weights[0] * out.logprob).sum(), (weights[1] * out.entropy).sum()
        gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in losses]
        results.append((*out[:5], *gradients[0], *gradients[1]))
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **close)


@pytest.mark.gpu
def test_peak_memory_on_a_gpu_is_flat_in_the_vocabulary() -> None:
    """What a step needs beside its weights and their gradients: the same for 20,000 tokens and for 160,000."""
    plan = build_plan(np.arange(8192) % 20_000, [0, 8192])
    peaks = []
    for vocabulary in (20_000, 160_000):
        hidden = torch.randn(8192, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(vocabulary, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        edge_logprobs(hidden, weight, tree_edges(plan), max_logits=1 << 24).logprob.sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before - 2 * weight.numel())
        del hidden, weight
    assert peaks[1] < 1.1 * peaks[0]
    # all logits of 160,000 tokens would take 5 GiB in float32
    assert peaks[1] < 2**29


def wrong(**changes: Any) -> Callable[[], object]:
    plan = build_plan([0, 1, 0, 2], [0, 2, 4])
    arguments: dict[str, Any] = {"hidden": torch.ones(3, 4), "head": torch.ones(9, 4), "edges": tree_edges(plan)}
    return lambda: edge_logprobs(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.ones(4, 4)}, "M = 3"),
        ({"head": torch.ones(9, 5)}, "h = 4"),
        ({"head": torch.ones(2, 4)}, "target 2 is outside of the head's vocabulary of 2"),
        ({"head": lambda x: x[0]}, r"head returned \(4,\)"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"statistics": ("entropi",)}, "entropi"),
        ({"statistics": "entropy"}, "pass a tuple"),
        ({"top": -1}, "top=-1"),
        ({"top": 10}, "top is 10: the head has 9"),
        ({"top": 10, "head": lambda x: x.repeat(1, 2)}, "top is 10: the head has 8"),
        ({"max_logits": 0}, "max_logits=0"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        wrong(**changes)()


def test_refusals_of_heads() -> None:
    with pytest.raises(InvalidDtypeError, match="head is a str"):
        wrong(head="head")()
    with pytest.raises(InvalidInputError, match="softcap=0"):
        LinearHead(torch.ones(2, 2), softcap=0)
    with pytest.raises(InvalidInputError, match=r"bias is \(3,\)"):
        LinearHead(torch.ones(2, 2), torch.ones(3))
    with pytest.raises(InvalidInputError, match=r"weight is torch.int64"):
        LinearHead(torch.ones(2, 2, dtype=torch.int64))


def test_autocast_leaves_float64_alone() -> None:
    """As it does with torch's own linear layers."""
    plan = build_plan([1, 2, 3, 1, 2, 0], [0, 3, 6])
    hidden, weight = torch.randn(4, 8, dtype=torch.float64), torch.randn(9, 8, dtype=torch.float64)
    expected = edge_logprobs(hidden, weight, tree_edges(plan)).logprob
    with torch.autocast("cpu", torch.bfloat16):
        found = edge_logprobs(hidden, weight, tree_edges(plan)).logprob
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("as_function", [False, True])
def test_targets_outside_of_the_vocabulary(as_function) -> None:
    plan = build_plan([1, 2, 3, 1, 2, 9], [0, 3, 6])
    head = LinearHead(torch.randn(9, 8))
    with pytest.raises(InvalidInputError, match="target 9 is outside of the head's vocabulary of 9"):
        edge_logprobs(torch.randn(4, 8), head.__call__ if as_function else head, tree_edges(plan))
