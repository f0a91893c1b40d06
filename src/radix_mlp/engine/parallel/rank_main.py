"""The process of a rank that rank 0 has started: `python -m` with a port, a rank, the number of ranks and a device."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress

import torch
import torch.distributed as dist

from radix_mlp.engine.parallel.process_group import ProcessGroup, own_device
from radix_mlp.engine.parallel.rank_processes import END_SECONDS, HOST, START
from radix_mlp.engine.parallel.tensor_parallel import serve_part
from radix_mlp.errors import RadixError

__all__ = ["main"]

logger = logging.getLogger("radix_mlp.engine")


def main() -> None:
    """Run this rank's shard of a model until rank 0 is done."""
    # a terminal's Ctrl-C is for the first process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    port, rank, size, kind = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    threading.Thread(target=_end_with_first, daemon=True).start()
    store = dist.TCPStore(HOST, port, is_master=False, timeout=START)  # type: ignore[attr-defined]

    if own_device(kind, rank).type == "cuda":
        # a GPU that does not answer shows here, where the first process waits for so long and no longer
        torch.cuda.synchronize()
    store.set(f"started/{rank}", "")
    group = ProcessGroup(kind, store=store, rank=rank, size=size)
    try:
        serve_part(group)
    except Exception as error:
        # what this package says needs no traceback, and the first process says it too where it can
        logger.error("process %d of %d: %s", rank, size, error, exc_info=not isinstance(error, RadixError))
        # a library that waits for other processes at its end would wait forever
        os._exit(1)
    # nothing is left to be done, and the interpreter takes seconds to end
    os._exit(0)


def _end_with_first() -> None:
    with suppress(OSError):
        while os.read(sys.stdin.fileno(), 1):
            pass
    # it may have said that it was done, and this process be about to end
    time.sleep(END_SECONDS / 2)
    os._exit(0)


if __name__ == "__main__":
    main()
