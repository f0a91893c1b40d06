"""Servers for the tests, in a process of their own: `python server_process.py NAME=VALUE,... NAME=VALUE,...`.

Each argument starts a server with these settings; each prints its address as the program itself logs it. They end with
the standard input, and so with the process of the tests.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch

from radix_mlp.serve.run import run
from radix_mlp.serve.settings import ServeSettings


def parsed(text: str) -> dict[str, Any]:
    """Settings from `name=value,name=value`; numbers as numbers."""
    settings: dict[str, Any] = {"port": 0, "json_output": True}
    for part in text.split(","):
        name, _, value = part.partition("=")
        settings[name] = int(value) if value.isdigit() else {"true": True, "false": False}.get(value, value)
    return settings


if __name__ == "__main__":
    torch.set_num_threads(1)
    for text in sys.argv[1:]:
        threading.Thread(target=run, args=(ServeSettings(**parsed(text)),), daemon=True).start()
    sys.stdin.read()
