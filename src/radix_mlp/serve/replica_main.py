"""One of several servers behind a front: `python -m radix_mlp.serve.replica_main`, started by `replicas.py`.

Its settings come as a line of JSON on standard input, so that no key stands in a list of processes. Standard input
stays open for as long as the front lives; when it ends, so does the worker. A worker that cannot start says why in a
line of JSON on standard output.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from io import FileIO
from typing import Any

from radix_mlp.errors import InvalidInputError, RadixError
from radix_mlp.serve.settings import ServeSettings

__all__ = ["settings_from_line", "settings_to_line"]


def settings_to_line(settings: ServeSettings) -> bytes:
    """Settings as a worker reads them.

    >>> settings_from_line(settings_to_line(ServeSettings(model_id="tiny"))) == ServeSettings(model_id="tiny")
    True
    """
    return json.dumps(asdict(settings)).encode() + b"\n"


def settings_from_line(line: bytes) -> ServeSettings:
    """The inverse of `settings_to_line`."""
    fields: dict[str, Any] = json.loads(line)
    return ServeSettings(**fields | {"cors_allow_origin": tuple(fields["cors_allow_origin"])})


def main() -> None:
    """Serve until told to stop, or until the front has ended."""
    # a terminal's Ctrl-C is for the front, which then tells its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # without a buffer, whose lock the thread would hold when the interpreter ends
    front = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115
    settings = settings_from_line(front.readline())
    threading.Thread(target=_end_with, args=(front, settings.shutdown_timeout), daemon=True).start()
    # whatever else is printed does not belong into what the front reads
    told, sys.stdout = sys.stdout, sys.stderr
    try:
        from radix_mlp.serve.run import run

        run(settings, on_hang=_leave)
    except RadixError as error:
        kind = "invalid" if isinstance(error, InvalidInputError) else "failed"
        print(json.dumps({kind: str(error)}), file=told, flush=True)
        sys.exit(1)


async def _leave() -> None:
    """End; the front starts another. A thread that hangs cannot be ended alone."""
    # for the answers that are on their way
    await asyncio.sleep(1)
    os._exit(1)


def _end_with(front: FileIO, shutdown_timeout: float) -> None:
    while front.read(1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(shutdown_timeout + 10)
    os._exit(1)


if __name__ == "__main__":
    main()
