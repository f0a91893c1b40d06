"""What stands in the place of the 4-D attention mask in a folded call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._guards import TracingContext

from radix_mlp.errors import UnsupportedCallError
from radix_mlp.hf.windows import Windows
from radix_mlp.ops import AttentionTree
from radix_mlp.plan import RadixPlan

__all__ = ["TreeMask"]

_KEPT_BY = frozenset(
    {torch.Tensor.to, torch.Tensor.detach, torch.Tensor.clone, torch.Tensor.contiguous, torch.Tensor.cuda}
)
# what only looks at it, or keeps its memory alive; properties are read by `__get__`
_LOOKS = frozenset(
    {
        "__get__",
        "__hash__",
        "__len__",
        "__repr__",
        "data_ptr",
        "dim",
        "element_size",
        "get_device",
        "numel",
        "record_stream",
        "size",
        "storage_offset",
        "stride",
    }
)


_SET_REQUIRES_GRAD: Any = vars(torch._C.TensorBase)["requires_grad"].__set__


class TreeMask(torch.Tensor):
    """The tree and the windows of a folded call: `[1, 1, 2, M]` int32 of `(end, depth)`, with spans also `span_end`.

    transformers hands 4-D masks through untouched, every attention module receives it, and as a tensor it survives
    checkpointing, `detach` and compilation. Attention of any other kind that takes it for a mask gets an error.

    Examples:
        >>> from radix_mlp import build_plan
        >>> plan = build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6]).to("cpu")
        >>> mask = TreeMask.of(plan.tree, windows=None)
        >>> mask.shape
        torch.Size([1, 1, 2, 4])
    """

    windows: Windows
    plan: RadixPlan | None
    """What mixers with a state or a convolution read; None in a model without."""
    windowed_spans: bool
    """Whether rows of a span see one another only in layers with a window."""

    @staticmethod
    def of(
        tree: AttentionTree, windows: Windows, plan: RadixPlan | None = None, *, windowed_spans: bool = False
    ) -> TreeMask:
        """The mask of a tree under the windows that the model's own masks would have."""
        spans = () if tree.span_end is None else (tree.span_end,)
        return _marked(torch.stack((tree.end, tree.depth, *spans))[None, None], windows, plan, windowed_spans)

    def with_windows(self, windows: Windows) -> TreeMask:
        """The same tree under other windows."""
        with torch._C.DisableTorchFunctionSubclass():
            return _marked(self.view_as(self), windows, self.plan, self.windowed_spans)

    def tree(self) -> AttentionTree:
        """The tree, its block lists made once more: for models that drop keywords they do not know."""
        with torch._C.DisableTorchFunctionSubclass():
            return AttentionTree.from_end(*self[0, 0].as_subclass(torch.Tensor))

    def visible(self, window: int | None = None) -> torch.Tensor:
        """`[M, M]` bool: row i sees its ancestor j, among the last `window` tokens up to itself."""
        with torch._C.DisableTorchFunctionSubclass():
            end, depth = self[0, 0, 0].as_subclass(torch.Tensor), self.depth
            row = torch.arange(len(end), device=end.device)
            last = self[0, 0, 2, :, None] - 1 if self.shape[2] == 3 else row[:, None]
            seen = (row <= last) & (row[:, None] < end)
            return seen if window is None else seen & (depth[:, None] - depth < window)

    @property
    def depth(self) -> torch.Tensor:
        """`[M]` int32."""
        with torch._C.DisableTorchFunctionSubclass():
            return self[0, 0, 1].as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Copies stay masks of trees; whatever would compute with one is an UnsupportedCallError."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in _KEPT_BY:
                mask = args[0]
                return _marked(func(*args, **kwargs or {}), mask.windows, mask.plan, mask.windowed_spans)
            # checkpointing with use_reentrant=True sets it on copies of positional arguments
            if func == _SET_REQUIRES_GRAD and not args[1]:
                return None
            if func.__name__ in _LOOKS or func.__name__.startswith(("is_", "_is_")):
                return func(*args, **kwargs or {})
            # Gemma 4 slices its masks for the last `logits_to_keep` rows, and 0 keeps all
            if func is torch.Tensor.__getitem__ and _selects_all(args[1]):
                return args[0]
            # torch.compile describes its inputs to itself before it traces; which functions that takes changes
            if TracingContext.try_get() is not None:
                return func(*args, **kwargs or {})
        raise UnsupportedCallError(
            f"{func.__name__} was given the tree of a folded call as an attention mask: this attention is not (or no "
            "longer) radix-mlp's own, as when another thread calls disable during a call. Run it unfolded "
            "(radix_mlp.disable(model))."
        )


def _selects_all(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(part, slice) and part in (slice(None), slice(0, None)) for part in parts)


def _marked(rows: torch.Tensor, windows: Windows, plan: RadixPlan | None, windowed_spans: bool) -> TreeMask:
    mask = rows.as_subclass(TreeMask)
    mask.windows, mask.plan, mask.windowed_spans = windows, plan, windowed_spans
    return mask
