"""`tree_attention` as a torch custom op: schemas, fakes and autograd. Implementations are imported when they run."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from radix_mlp.errors import UnsupportedCallError
from radix_mlp.ops.attention.attention_call import AttentionCall, kind_of
from radix_mlp.ops.attention.attention_tree import AttentionTree
from radix_mlp.ops.attention.registry import IMPLS, reads, resolve_impl
from radix_mlp.ops.autocast import without_autocast

__all__ = ["attention_op"]

_PLAIN = (Tensor, torch.nn.Parameter)

_LIBRARY = torch.library.Library("radix_mlp", "FRAGMENT")
_LIBRARY.define(
    "tree_attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor[] tree, Tensor? query_rows, "
    "Tensor? span_end, float scale, int? window, float? softcap, str impl) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "tree_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor out, Tensor lse, "
    "Tensor[] tree, Tensor? span_end, float scale, int? window, float? softcap, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def attention_op(call: AttentionCall, impl: str) -> Tensor:
    """Run the custom op on arguments that `tree_attention` has checked; shapes as there."""
    q, k, v, sinks, tree, *options = call
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        _refuse_tangents(q, k, v, sinks)
    if _can_skip_dispatcher(q, k, v, sinks):
        with without_autocast(q):
            return IMPLS[impl].forward(call)[0]
    if not torch.compiler.is_compiling():
        _refuse_transformations()
    flat, some = flat_tree(tree, impl), (tree.query_rows, tree.span_end)
    return torch.ops.radix_mlp.tree_attention(q, k, v, sinks, flat, *some, *options, impl)[0]


def flat_tree(tree: AttentionTree, impl: str) -> list[Tensor]:
    """`end`, `depth` and the tables that `impl` reads, as a flat list; empty tensors for missing tables."""
    flat = [tree.end, tree.depth]
    for name in reads(impl):
        tables = tree.prepared.get(name)
        flat.extend([tree.end.new_empty(0)] * _number_of_tables(name) if tables is None else tables)
    return flat


def _tree(flat: list[Tensor], query_rows: Tensor | None, span_end: Tensor | None, impl: str) -> AttentionTree:
    """The inverse of `flat_tree`."""
    end, depth, *rest = flat
    prepared: dict[str, Any] = {}
    for name in reads(impl):
        count = _number_of_tables(name)
        tables, rest = rest[:count], rest[count:]
        if tables[0].shape[0]:
            prepared[name] = IMPLS[name].Tables(*tables)
    return AttentionTree(end, depth, prepared, query_rows, span_end)


def _number_of_tables(name: str) -> int:
    return len(IMPLS[name].Tables._fields)


def _can_skip_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether the kernel may be called directly, without torch's dispatcher (0.1 ms of Python): no autograd, compiler,
    transform, mode or tensor subclass is active."""
    if torch.compiler.is_compiling():
        return False
    for x in tensors:
        if x is not None and (type(x) not in _PLAIN or (x.requires_grad and torch.is_grad_enabled())):
            return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """The op would silently drop tangents."""
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise UnsupportedCallError(
            "tree_attention has no forward mode of differentiation: use backward, or impl='reference'"
        )


def _refuse_transformations() -> None:
    """Transformations fail deep inside torch, or need a batching rule."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    kinds = torch._C._functorch.TransformType
    if interpreter is not None and interpreter.key() in (kinds.Grad, kinds.Jvp, kinds.Vmap):
        raise UnsupportedCallError(
            f"tree_attention does not run inside torch.func ({interpreter.key().name}): use autograd, "
            "or impl='reference' (quadratic memory)"
        )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    tree: list[Tensor],
    query_rows: Tensor | None,
    span_end: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    *settings, impl = options
    call = AttentionCall(q, k, v, sinks, _tree(tree, query_rows, span_end, impl), *settings)
    # compiled code could not check everything
    resolve_impl(impl, kind_of(call))
    with torch.no_grad(), without_autocast(q):
        return IMPLS[impl].forward(call)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, sinks: Any, tree: Any, query_rows: Any, span_end: Any, *options: Any
) -> tuple[Tensor, Tensor]:
    rows, heads, _ = q.shape
    saves_lse = IMPLS[options[-1]].SAVES_LSE
    lse = q.new_empty((heads, rows) if saves_lse else (0,), dtype=torch.float32)
    return q.new_empty((rows, heads, v.shape[2])), lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tree: list[Tensor],
    span_end: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *settings, impl = options
    call = AttentionCall(q, k, v, sinks, _tree(tree, None, span_end, impl), *settings)
    with torch.no_grad(), without_autocast(q):
        grad_q, grad_k, grad_v, grad_sinks = IMPLS[impl].backward(grad_out, call, out, lse)
    return grad_q, grad_k, grad_v, q.new_empty(0) if grad_sinks is None else grad_sinks


def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_sinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_sinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, tree, query_rows, span_end, *ctx.options = inputs
    ctx.some_rows = query_rows is not None
    ctx.save_for_backward(q, k, v, sinks, *output, span_end, *tree)


def _autograd(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    if ctx.some_rows:
        raise UnsupportedCallError(
            "tree_attention has no backward for query_rows: compute all rows, or use impl='reference'"
        )
    q, k, v, sinks, out, lse, span_end, *tree = ctx.saved_tensors
    grad_q, grad_k, grad_v, grad_sinks = torch.ops.radix_mlp.tree_attention_backward(
        grad_out, q, k, v, sinks, out, lse, tree, span_end, *ctx.options
    )
    no_options = [None] * len(ctx.options)
    return grad_q, grad_k, grad_v, None if sinks is None else grad_sinks, [None] * len(tree), None, None, *no_options


def _no_double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise UnsupportedCallError(
        "tree_attention has no second derivative: call backward without create_graph, "
        "or use impl='reference' (quadratic memory)"
    )


_LIBRARY.impl("tree_attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("tree_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("radix_mlp::tree_attention", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("radix_mlp::tree_attention_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("radix_mlp::tree_attention", _autograd, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("radix_mlp::tree_attention_backward", _no_double_backward, lib=_LIBRARY)
