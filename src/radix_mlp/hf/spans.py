"""Which tokens of a multimodal call see one another, as the tokens of an image do in Gemma 3.

Classes that let them make their masks in their own code, from an argument that gives each token a type.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedCallError
from radix_mlp.hf.text_tower import tower_of
from radix_mlp.hf.windows import windows_of
from radix_mlp.plan import RadixPlan

__all__ = [
    "SpanRule",
    "has_windowed_spans",
    "reason_of_span_lengths",
    "span_rule_of",
    "spans_of_types",
]


class SpanRule(NamedTuple):
    """How a class makes spans: stretches of neighbours with certain types see one another."""

    argument: str
    """The argument that gives each token a type, `[B, T]`. Without it no token sees a later one."""
    types: tuple[int, ...]
    """The types whose stretches are spans, whichever of them their tokens have."""
    windowed_only: bool = False
    """Whether spans matter only in layers with a window."""
    past_window: bool = False
    """Whether a token under a window sees all of its span, however long that is."""
    if_vision: bool = False
    """Whether this is so only if the text configuration's `use_bidirectional_attention` is `"vision"`."""


_RULES = {
    "Gemma3Model": SpanRule("token_type_ids", (1,)),
    "Gemma4Model": SpanRule("mm_token_type_ids", (1, 2), windowed_only=True, if_vision=True),
    "Gemma4UnifiedModel": SpanRule("mm_token_type_ids", (1, 2), past_window=True, if_vision=True),
}


def span_rule_of(trunk: PreTrainedModel) -> SpanRule | None:
    """The rule by which `trunk` makes spans of token types; None for classes that are not known to.

    Where the configuration asks for no spans, no type makes one.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_model
        >>> span_rule_of(tiny_model().model)
    """
    kind = type(trunk)
    rule = _RULES.get(kind.__name__) if kind.__module__.startswith("transformers.models.") else None
    config: Any = trunk.config.get_text_config()
    if rule is not None and rule.if_vision and config.use_bidirectional_attention != "vision":
        return rule._replace(types=())
    return rule


def spans_of_types(rule: SpanRule, types: NDArray[np.int64], cu_seq_lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of each token's span, -1 for none: `[N]`, as `RadixPlan.with_spans` takes it.

    Args:
        rule: of the class.
        types: `[N]` type of each token.
        cu_seq_lengths: `[S + 1]` token offsets.

    Examples:
        >>> rule = SpanRule("token_type_ids", (1,))
        >>> spans_of_types(rule, np.array([0, 1, 1, 0, 1, 1, 0]), np.array([0, 5, 7])).tolist()
        [-1, 0, 0, -1, 1, 2, -1]
    """
    is_marked = np.isin(types, rule.types)
    starts = is_marked.copy()
    starts[1:] &= ~is_marked[:-1]
    firsts = cu_seq_lengths[:-1][cu_seq_lengths[:-1] < len(types)]
    starts[firsts] = is_marked[firsts]
    return np.where(is_marked, np.cumsum(starts) - 1, -1)


def reason_of_span_lengths(trunk: PreTrainedModel, plan: RadixPlan) -> str | None:
    """Why the spans of a plan do not fold under the windows of the layers of `trunk`; None if they do."""
    rule = span_rule_of(trunk)
    if rule is None or not rule.past_window or plan.span_end is None:
        return None
    windows = windows_of(tower_of(trunk)) or ()
    shortest = min((window for window in windows if isinstance(window, int)), default=None)
    longest = int(np.bincount(plan.span_end).max(initial=0))
    if shortest is None or longest <= shortest:
        return None
    return (
        f"{longest} tokens of images side by side see one another, and some layers have a window of {shortest} tokens, "
        "past which attention on the tree does not see"
    )


def has_windowed_spans(trunk: PreTrainedModel, plan: RadixPlan) -> bool:
    """Whether the spans of a plan that has some matter only in layers with a window.

    Raises:
        UnsupportedCallError: `trunk` has no spans, or cannot fold these.
    """
    rule = span_rule_of(trunk)
    if rule is None or not rule.types:
        raise UnsupportedCallError(f"the plan has spans, and no tokens of {type(trunk).__name__} see later ones")
    reason = reason_of_span_lengths(trunk, plan)
    if reason is not None:
        raise UnsupportedCallError(f"{reason}. Run the call unfolded.")
    return rule.windowed_only
