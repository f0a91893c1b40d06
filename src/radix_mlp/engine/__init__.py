"""From texts to results: tokenize, schedule, run batches on compact tokens, answer in the caller's order."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from radix_mlp.engine.async_engine import Answer, AsyncEngine, BatchReport, FrontStats
    from radix_mlp.engine.engine import Decided, Engine, Label, Labels, Ranked, Score, TokenScores

_ONLINE = ("Answer", "AsyncEngine", "BatchReport", "FrontStats")

__all__ = [
    "Answer",
    "AsyncEngine",
    "BatchReport",
    "Decided",
    "Engine",
    "FrontStats",
    "Label",
    "Labels",
    "Ranked",
    "Score",
    "TokenScores",
]


def __getattr__(name: str) -> Any:
    # the scheduler is used without torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _ONLINE:
        from radix_mlp.engine import async_engine

        return getattr(async_engine, name)
    from radix_mlp.engine import engine

    return getattr(engine, name)
