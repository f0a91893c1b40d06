"""One of several servers behind a gateway: `python -m radix_mlp.serve.replica_main`, started by `replicas.py`.

It reads its settings from one line of JSON on standard input, which keeps keys out of the list of processes. Standard
input stays open while the gateway lives; when it closes, the replica stops. A replica that cannot start prints why, as
a line of JSON on standard output.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from io import FileIO

from radix_mlp.errors import InvalidInputError, RadixError
from radix_mlp.serve.settings import settings_from_line


def main() -> None:
    """Serve until a signal stops it or the gateway ends."""
    # Ctrl-C in a terminal goes to the gateway, which stops its replicas
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # unbuffered: the thread would hold a buffer's lock when the interpreter ends
    gateway = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115
    settings = settings_from_line(gateway.readline())
    threading.Thread(target=_end_with, args=(gateway, settings.shutdown_timeout), daemon=True).start()
    # the gateway reads standard output; everything else that prints goes to standard error
    report, sys.stdout = sys.stdout, sys.stderr
    try:
        from radix_mlp.serve.run import run

        run(settings, on_hang=_leave)
    except RadixError as error:
        kind = "invalid" if isinstance(error, InvalidInputError) else "failed"
        print(json.dumps({kind: str(error)}), file=report, flush=True)
        sys.exit(1)


async def _leave() -> None:
    """Exit; the gateway starts another replica. A hanging thread cannot be stopped by itself."""
    # lets answers that are being sent arrive
    await asyncio.sleep(1)
    os._exit(1)


def _end_with(gateway: FileIO, shutdown_timeout: float) -> None:
    while gateway.read(1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(shutdown_timeout + 10)
    os._exit(1)


if __name__ == "__main__":
    main()
