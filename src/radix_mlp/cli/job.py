"""What the commands that run a model over a file have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from radix_mlp.cli.read import AnyRecord, OnSkip, skip_rejected

__all__ = ["without_rejected"]

Result = TypeVar("Result")


def without_rejected(
    name: str, records: list[AnyRecord], on_skip: OnSkip | None, job: Callable[[list[AnyRecord]], Result]
) -> tuple[list[AnyRecord], Result]:
    """Run `job`; should it reject records (too long, no tokens), name their lines and run it without them."""
    from radix_mlp.engine.tokenize import RejectedItemsError

    while True:
        try:
            return records, job(records)
        except RejectedItemsError as error:
            records = skip_rejected(name, records, error.rejected, on_skip)
