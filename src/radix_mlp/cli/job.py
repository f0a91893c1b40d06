"""What embed, score and verify have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from radix_mlp.cli.read import OnSkip, Record, skip_rejected

__all__ = ["without_rejected"]

Result = TypeVar("Result")


def without_rejected(
    name: str, records: list[Record], on_skip: OnSkip | None, job: Callable[[list[Record]], Result]
) -> tuple[list[Record], Result]:
    """Run `job`; should it reject records (too long, no tokens), name their lines and run it without them."""
    from radix_mlp.engine.tokenize import RejectedItemsError

    while True:
        try:
            return records, job(records)
        except RejectedItemsError as error:
            records = skip_rejected(name, records, error.rejected, on_skip)
