"""Progress of a job: a small file beside its output, from which the job can be resumed at any time."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from radix_mlp.errors import InvalidInputError

__all__ = ["Journal", "State", "check_options", "replace_file"]

VERSION = 1


@dataclass
class State:
    """What is done, up to the end of a window."""

    num_windows: int = 0
    num_rows: int = 0
    """Records answered."""
    num_skipped: int = 0
    """Bad lines, a row of several lines counted once."""
    num_skipped_lines: int = 0
    digest: str = ""
    """Of the input that is done."""
    output_bytes: int = 0
    errors_bytes: int = 0
    num_tokens: int = 0
    num_compact: int = 0
    num_batches: int = 0
    device_seconds: float = 0.0
    elapsed_seconds: float = 0.0
    finished: bool = False
    """Only the rename of the output remains."""


@dataclass(frozen=True)
class Journal:
    """The file with the state of a job.

    Args:
        path: of the file.
        options: the options that affect the answers; values that survive JSON unchanged.
    """

    path: Path
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> State | None:
        """The last saved state, or None.

        Raises:
            InvalidInputError: it belongs to a job with other options, or is not a journal.
        """
        try:
            saved = json.loads(self.path.read_bytes())
            version, options, state = saved["version"], saved["options"], State(**saved["state"])
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InvalidInputError(f"{self.path}: {error.strerror or error}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInputError(f"{self.path}: not the progress of a job ({error!r}). {START_OVER}") from error
        if version != VERSION:
            raise InvalidInputError(f"{self.path}: started by another version of radix-mlp. {START_OVER}")
        check_options(self.path, options, self.options)
        return state

    def save(self, state: State) -> None:
        """Replace what was saved before, whole or not at all."""
        text = json.dumps({"version": VERSION, "options": self.options, "state": asdict(state)}, indent=1)
        replace_file(self.path, text.encode() + b"\n")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


START_OVER = "Start over with --restart."


def check_options(place: Path | str, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `InvalidInputError` unless the started job has the options of this one."""
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if names:
        had = ", ".join(f"{_option(name)} {_shown(then.get(name))}" for name in names)
        has = ", ".join(f"{_option(name)} {_shown(now.get(name))}" for name in names)
        raise InvalidInputError(
            f"{place}: the job that was started here had {had}, and this one has {has}. Give the same options to "
            f"resume it. {START_OVER}"
        )


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that after a crash it holds the old content or the new, nothing else."""
    written = path.with_name(path.name + ".new")
    with written.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(written, path)


def _option(name: str) -> str:
    return name if name == "command" else "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)
