"""Two processes of `torch.distributed` on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(*command: str, **environment: str) -> str:
    """What `script arguments` or `-m module arguments` prints in two processes; fails if one of them does."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    found = subprocess.run(
        [*launcher, "--nproc-per-node", "2", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            # all on this host, whose name need not lead anywhere
            "GLOO_SOCKET_IFNAME": "lo",
            **environment,
        },
        timeout=500,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr[-4000:]
    return found.stdout
