"""The numbers of several servers as one page for Prometheus, each with the label `replica`."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["METRICS_TYPE", "merged"]

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Media type of a page."""


def merged(pages: Mapping[str, str], own: str = "") -> bytes:
    """Pages of `/metrics`, by replica, as one; `own` holds metrics that belong to no replica.

    Each family of metrics is in one place, as the format requires.

    Examples:
        >>> page = "# HELP a Text.\\n# TYPE a gauge\\na{b=\\"1\\"} 2.0\\n"
        >>> print(merged({"0": page, "1": page}).decode().strip())
        # HELP a Text.
        # TYPE a gauge
        a{replica="0",b="1"} 2.0
        a{replica="1",b="1"} 2.0
    """
    # name -> its two lines of description, and its numbers
    heads: dict[str, list[str]] = {}
    numbers: dict[str, list[str]] = {}
    for replica, page in (("", own), *pages.items()):
        name = ""
        for line in page.splitlines():
            if line.startswith("# "):
                name = line.split(" ", 3)[2]
                head = heads.setdefault(name, [])
                if line not in head:
                    head.append(line)
            elif line:
                numbers.setdefault(name, []).append(_labelled(line, replica) if replica else line)
    lines = [line for name, head in heads.items() for line in (*head, *numbers.get(name, ()))]
    return "\n".join([*lines, ""]).encode()


def _labelled(line: str, replica: str) -> str:
    brace, space = line.find("{"), line.find(" ")
    if 0 < brace < space:
        return f'{line[: brace + 1]}replica="{replica}",{line[brace + 1 :]}'
    return f'{line[:space]}{{replica="{replica}"}}{line[space:]}'
