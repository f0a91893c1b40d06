"""The parameters of a command -> the settings of its job, its engine, and the options of its task."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from radix_mlp.cli.options import parse_threshold

if TYPE_CHECKING:
    from radix_mlp.engine.engine import Engine

__all__ = ["DECIDING", "Given", "JobSettings", "engine_of", "make_engine", "options_of", "pick", "show_loading"]

Options = TypeVar("Options")

Given = Mapping[str, Any]
"""The values of all options of a command by their names; `options` are those that decide the answers."""

DECIDING = ("model", "dtype", "id_field", "delimiter", "max_length", "truncate", "control_tokens")
"""What decides the answers of every command."""
OF_THE_ENGINE = (
    "device",
    "dtype",
    "max_batch_tokens",
    "max_length",
    "impl",
    "kind",
    "control_tokens",
    "trust_remote_code",
)


@dataclass
class JobSettings:
    """Where a job reads and writes, and how it treats what goes wrong: the options that all jobs have."""

    files: Sequence[str]
    file_format: str | None
    delimiter: str | None
    on_error: str
    window: int
    output: str | None
    restart: bool
    compare: bool
    progress: bool | None
    quiet: bool
    ray: str | None
    ray_workers: int | None
    options: dict[str, Any]
    """What decides the answers: a job can be resumed only while they are the same."""


def options_of(kind: type[Options], given: Given) -> Options:
    """The options of a task, one of the dataclasses of `radix_mlp.engine.tasks`, from the parameters of their names."""
    names = (field.name for field in fields(kind) if field.name in given)  # type: ignore[arg-type]
    return kind(**pick(given, *names))


def engine_of(given: Given) -> partial[Engine]:
    """Makes the engine that a command's options ask for, once it is called."""
    options = pick(given, *(name for name in OF_THE_ENGINE if name in given))
    threshold = parse_threshold(given["threshold"])
    return partial(make_engine, given["model"], threshold=threshold, quiet=given["quiet"], **options)


def make_engine(model: str, *, quiet: bool = False, **options: Any) -> Engine:
    """`Engine(model, ...)`, imported here because that takes seconds: not before there is something to do."""
    from radix_mlp.engine.engine import Engine

    show_loading(quiet=quiet)
    return Engine(model, **options)


def show_loading(*, quiet: bool) -> None:
    """Let transformers show how far it is with the weights on a terminal alone; imports it."""
    from transformers.utils.logging import disable_progress_bar

    if quiet or not sys.stderr.isatty():
        disable_progress_bar()


def pick(given: Given, *names: str) -> dict[str, Any]:
    """The parameters of these names.

    >>> pick({"model": "tiny", "top_n": 3, "sort": True}, "top_n", "sort")
    {'top_n': 3, 'sort': True}
    """
    return {name: given[name] for name in names}
