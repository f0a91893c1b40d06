"""The options that all job commands have, and how a command gets them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from radix_mlp.cli import options as o
from radix_mlp.cli.jobs.record_windows import DEFAULT_WINDOW
from radix_mlp.cli.settings import DECIDING, pick

__all__ = ["job_command"]

PANELS = (o.INPUT, o.MODEL, o.OUTPUT, o.RAY)


def job_command(command: Callable[..., None]) -> Callable[..., None]:
    """A command of the command line with the options of all jobs besides its own.

    The command gets the values of all options by name (a `Given`), and those of its own as keywords. An option of its
    own may replace one of all jobs; any other is taken to decide the answers, so a job resumes only with the same one.
    """
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    files, *shared = inspect.signature(_options_of_all_jobs, eval_str=True).parameters.values()
    names = [parameter.name for parameter in own]
    deciding = [name for name in names if name not in {parameter.name for parameter in shared}]
    options = sorted([*own, *(other for other in shared if other.name not in names)], key=_panel)

    @wraps(command)
    def run(**given: Any) -> None:
        decides = {"command": command.__name__, **pick(given, *DECIDING, *deciding)}
        command({**given, "options": decides}, **pick(given, *names))

    run.__signature__ = inspect.Signature([files, *options])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (files, *options)}
    return run


def _options_of_all_jobs(
    files: o.FilesArgument,
    *,
    id_field: o.IdFieldOption = None,
    file_format: o.FormatOption = None,
    delimiter: o.DelimiterOption = None,
    on_error: o.OnErrorOption = "fail",
    window: o.WindowOption = DEFAULT_WINDOW,
    max_length: o.MaxLengthOption = None,
    truncate: o.TruncateOption = False,
    model: o.ModelOption,
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = "auto",
    max_batch_tokens: o.BudgetOption = 16384,
    threshold: o.ThresholdOption = "auto",
    impl: o.ImplOption = "auto",
    control_tokens: o.ControlTokensOption = "model",
    trust_remote_code: o.TrustOption = False,
    output: o.OutputOption = None,
    restart: o.RestartOption = False,
    compare: o.CompareOption = False,
    progress: o.ProgressOption = None,
    quiet: o.QuietOption = False,
    ray: o.RayOption = None,
    ray_workers: o.RayWorkersOption = None,
) -> None: ...


def _panel(parameter: inspect.Parameter) -> int:
    """The place of an option's panel in the help."""
    (info,) = parameter.annotation.__metadata__
    return PANELS.index(info.rich_help_panel)
