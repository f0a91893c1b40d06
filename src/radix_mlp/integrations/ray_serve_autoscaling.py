"""How many replicas there should be, by the unique tokens that are left to compute."""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext

__all__ = ["PENDING_TOKENS", "PendingTokensPolicy"]

PENDING_TOKENS = "pending_tokens"
"""The name under which replicas report them."""


class PendingTokensPolicy:
    """As many replicas as have `target_tokens` compact tokens each to wait for and run.

    Serve calls it every now and then with what the replicas reported, averaged over some seconds, and applies bounds
    and delays itself.

    Example:
        >>> from types import SimpleNamespace
        >>> context = SimpleNamespace(
        ...     aggregated_metrics={"pending_tokens": {"a": 30_000.0, "b": 11_000.0}}, target_num_replicas=2
        ... )
        >>> PendingTokensPolicy(target_tokens=16_384)(context)
        (2.50244140625, {})
    """

    def __init__(self, target_tokens: int) -> None:
        self.target_tokens = target_tokens

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """How many replicas are wanted; as many as there are while none has reported."""
        pending = (context.aggregated_metrics or {}).get("pending_tokens")
        if not pending:
            return context.target_num_replicas, {}
        return sum(pending.values()) / self.target_tokens, {}
