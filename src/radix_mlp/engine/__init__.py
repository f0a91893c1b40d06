"""From texts to results: tokenize, schedule, run batches on compact tokens, answer in the caller's order."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from radix_mlp.engine.engine import Engine, Label, Ranked, Score

__all__ = ["Engine", "Label", "Ranked", "Score"]


def __getattr__(name: str) -> Any:
    # the scheduler is used without torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from radix_mlp.engine import engine

    return getattr(engine, name)
