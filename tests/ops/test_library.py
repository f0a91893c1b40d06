"""The custom op: its schema, its fake, and whole models that compile around it."""

from __future__ import annotations

import pytest
import torch
from tests.ops.attention_cases import Options, error, inputs
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from radix_mlp.errors import UnsupportedCallError
from radix_mlp.ops import AttentionTree, DevicePlan, fold, tree_attention, unfold
from radix_mlp.ops.attention.custom_op import flat_tree
from radix_mlp.plan import RadixPlan, build_plan

PLAIN = Options(4, 2, 8, 8, None, None, False, False, 0)
FULL = Options(4, 2, 8, 5, 3, 1.5, True, True, 0)


def batch(lengths: list[int]) -> RadixPlan:
    """Sequences that share a prefix of five tokens."""
    ids = [token for i, length in enumerate(lengths) for token in [*range(5), *range(100 * i, 100 * i + length)]]
    cu = [0]
    for length in lengths:
        cu.append(cu[-1] + 5 + length)
    return build_plan(ids, cu)


@pytest.mark.parametrize("options", [PLAIN, FULL], ids=["plain", "full"])
def test_opcheck(options: Options) -> None:
    plan = batch([3, 4])
    tree = plan.to("cpu").tree
    q, k, v, *sinks = inputs(plan, options)
    fields = flat_tree(tree, "dense")
    assert len(fields) == 3
    chosen = (0.3, options.window, options.softcap, "dense")
    sink = sinks[0] if sinks else None
    torch.library.opcheck(torch.ops.radix_mlp.tree_attention.default, (q, k, v, sink, fields, None, None, *chosen))
    with torch.no_grad():
        out, lse = torch.ops.radix_mlp.tree_attention(q, k, v, sink, fields, None, None, *chosen)
        detached = [x if x is None else x.detach() for x in (torch.ones_like(out), q, k, v, sink)]
        torch.library.opcheck(
            torch.ops.radix_mlp.tree_attention_backward.default, (*detached, out, lse, fields, None, *chosen)
        )


def test_modes_and_transformations_see_the_op() -> None:
    """Without gradients, compilers, modes and transformations the implementation is called directly."""
    plan = batch([3, 4])
    q, k, v = (x.detach() for x in inputs(plan, PLAIN))
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        watched = tree_attention(q, k, v, plan)
    assert "radix_mlp.tree_attention.default" in seen
    assert torch.equal(watched, tree_attention(q, k, v, plan))
    with_gradient = tree_attention(q.requires_grad_(), k, v, plan)
    assert with_gradient.grad_fn is not None
    assert torch.equal(watched, with_gradient)
    with torch.no_grad():
        assert torch.equal(watched, tree_attention(q, k, v, plan))
    with forward_ad.dual_level(), pytest.raises(UnsupportedCallError, match="forward mode"):
        tree_attention(forward_ad.make_dual(q.detach(), q.detach()), k, v, plan)
    for transform in (lambda f: torch.func.vmap(lambda x: f(x[0]))(q.detach()[None, None]), torch.func.grad):
        with pytest.raises(UnsupportedCallError, match=r"torch\.func"):
            transform(lambda x: tree_attention(x, k, v, plan).sum())(q.detach())


def layer(x: Tensor, weight: Tensor, tree: AttentionTree) -> Tensor:
    q, k, v = (x @ weight).view(-1, 3, 2, 4).unbind(1)
    return x + tree_attention(q, k, v, tree).flatten(1)


def two_layers(x: Tensor, weight: Tensor, plan: DevicePlan) -> Tensor:
    x = fold(x, plan)
    return unfold(layer(layer(x, weight, plan.tree), weight, plan.tree), plan)


def test_compiles_into_one_graph_for_all_lengths() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(two_layers, fullgraph=True, dynamic=True, backend=backend)
    weight = torch.randn(8, 24)
    for lengths in ([3, 4, 9], [11, 2, 5, 8, 1], [1, 1], [70, 80, 3, 90]):
        plan = batch(lengths).to("cpu")
        x = torch.randn(plan.plan.num_tokens, 8)
        assert error(compiled(x, weight, plan), two_layers(x, weight, plan)) < 1e-6
    assert len(graphs) == 1


@pytest.mark.slow
def test_compiled_gradients() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(two_layers, fullgraph=True, dynamic=True)
    weight = torch.randn(8, 24, requires_grad=True)
    for lengths in ([3, 4, 9], [11, 2, 5, 8, 1]):
        plan = batch(lengths).to("cpu")
        x = torch.randn(plan.plan.num_tokens, 8, requires_grad=True)
        grads = [torch.autograd.grad(f(x, weight, plan).square().sum(), (x, weight)) for f in (compiled, two_layers)]
        for actual, wanted in zip(*grads, strict=True):
            assert error(actual, wanted) < 1e-5


def test_compiles_with_a_tree_made_inside() -> None:
    torch._dynamo.reset()

    def attend(x: Tensor, end_and_depth: Tensor) -> Tensor:
        q, k, v = x.view(-1, 3, 2, 4).unbind(1)
        return tree_attention(q, k, v, AttentionTree.from_end(end_and_depth[0], end_and_depth[1]))

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="eager")
    for lengths in ([3, 4], [9, 8, 7]):
        tree = batch(lengths).to("cpu").tree
        x, packed = torch.randn(len(tree.end), 24), torch.stack([tree.end, tree.depth])
        assert error(compiled(x, packed), attend(x, packed)) < 1e-6
