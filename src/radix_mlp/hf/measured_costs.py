"""What a batch costs on this machine, folded and not: measured once for a kind of model, and kept on disk.

A forward takes as long as its launches or as its rows do, whichever is longer, on a device that computes while the host
launches; on a CPU it takes both. So two numbers describe each way: a fixed time, and one a row. They are taken from a
few calls on 16 rows and on some thousand rows of short sequences that share nothing.

`RADIX_MLP_COSTS` says whether: `measured`, `constant` (never measure, read or write), or `auto`, the default: measured
on CUDA, where small batches are bound by the host. On a CPU rows are all there is, and a constant decides the same
everywhere. `RADIX_MLP_CACHE` names another folder than `radix-mlp` in the user's cache folder.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from radix_mlp.errors import InvalidInputError
from radix_mlp.hf.forward import forward_compact
from radix_mlp.hf.support import decoder_of
from radix_mlp.plan import build_plan

__all__ = ["Costs", "Way", "costs_of", "known_costs", "measure"]

FEW_ROWS, MANY_ROWS = 16, 4096
SEQUENCE_ROWS = 128
SLOW_SECONDS = 0.25
"""Where a call on few rows takes longer, nothing is measured: there, rows are all that counts."""
CPU_SECONDS = 0.05


@dataclass(frozen=True)
class Way:
    """One way to run batches."""

    fixed_ms: float
    """Whatever the batch: launches, planning, copies."""
    row_us: float
    """More for every row."""

    def milliseconds(self, num_rows: int, overlaps: bool) -> float:
        """What a batch of so many rows takes."""
        rows = num_rows * self.row_us / 1e3
        return max(self.fixed_ms, rows) if overlaps else self.fixed_ms + rows


@dataclass(frozen=True)
class Costs:
    """What batches cost folded, on rows of the tree, and unfolded, on padded rows.

    >>> costs = Costs(Way(40.0, 10.0), Way(32.0, 10.0), overlaps=True)
    >>> costs.folded_ms([1088]), costs.unfolded_ms([2240])
    (40.0, 32.0)
    """

    folded: Way
    unfolded: Way
    overlaps: bool
    """Whether the host launches while the device computes."""

    def folded_ms(self, rows: Sequence[int]) -> float:
        """Milliseconds of batches that have so many rows on the tree."""
        return sum(self.folded.milliseconds(count, self.overlaps) for count in rows)

    def unfolded_ms(self, rows: Sequence[int]) -> float:
        """Milliseconds of batches that have so many rows, padding counted."""
        return sum(self.unfolded.milliseconds(count, self.overlaps) for count in rows)


def costs_of(model: PreTrainedModel) -> Costs | None:
    """The costs of an enabled model's own modules: known, or measured now (less than a second) and kept on disk.

    None where nothing is measured, as `RADIX_MLP_COSTS` says, and for a model that takes too long or no memory.
    """
    trunk = decoder_of(model)
    known = known_costs(model)
    if known is not None or not _is_wanted(trunk.device.type):
        return known
    try:
        found = measure(model)
    except torch.OutOfMemoryError:
        return None
    if found is not None:
        _write(_file(trunk), {**asdict(found), **_facts(trunk)})
    return found


def known_costs(model: PreTrainedModel) -> Costs | None:
    """The costs that were measured on this machine before; measures nothing."""
    trunk = decoder_of(model)
    if not _is_wanted(trunk.device.type):
        return None
    try:
        found = json.loads(_file(trunk).read_text())
        return Costs(Way(**found["folded"]), Way(**found["unfolded"]), bool(found["overlaps"]))
    except (OSError, ValueError, KeyError, TypeError):
        # not there, or not one of ours
        return None


def measure(model: PreTrainedModel) -> Costs | None:
    """Time an enabled model's modules both ways; None if that would take long."""
    from radix_mlp.hf.enable import folding_forward_of

    trunk = decoder_of(model)
    forward = folding_forward_of(trunk)
    assert forward is not None
    on_cuda = trunk.device.type == "cuda"
    embeddings: Any = trunk.get_input_embeddings()
    vocabulary = len(embeddings.weight)

    def padded(ids: np.ndarray) -> Any:
        given = torch.from_numpy(ids).to(trunk.device)
        return forward.run_unfolded((given,), {"attention_mask": torch.ones_like(given), "use_cache": False})

    def folded(ids: np.ndarray) -> Any:
        return forward_compact(model, build_plan(ids.reshape(-1), np.arange(len(ids) + 1) * ids.shape[1]))

    ways = []
    for run in (padded, folded):
        # the first call may compile, which is nobody's measure
        few = _seconds(run, _apart(2, FEW_ROWS // 2, vocabulary), trunk.device, repeats=3)
        if few > SLOW_SECONDS:
            return None
        count = MANY_ROWS if on_cuda else int(np.clip(FEW_ROWS * CPU_SECONDS / few, 2 * SEQUENCE_ROWS, MANY_ROWS))
        sequences = count // SEQUENCE_ROWS
        many = _seconds(run, _apart(sequences, SEQUENCE_ROWS, vocabulary), trunk.device, repeats=2)
        rows = sequences * SEQUENCE_ROWS
        row = many / rows if on_cuda else max(many - few, 0.0) / (rows - FEW_ROWS)
        ways.append(Way(round(1e3 * few, 4), round(1e6 * row, 4)))
    return Costs(ways[1], ways[0], on_cuda)


def _seconds(run: Callable[[np.ndarray], Any], ids: np.ndarray, device: torch.device, repeats: int) -> float:
    least = float("inf")
    with torch.inference_mode():
        for index in range(repeats + 1):
            _settle(device)
            began = time.perf_counter()
            run(ids)
            _settle(device)
            if index:
                least = min(least, time.perf_counter() - began)
    return least


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _apart(sequences: int, length: int, vocabulary: int) -> np.ndarray:
    """`[sequences, length]` ids that share no first token."""
    ids = np.arange(sequences * length, dtype=np.int64).reshape(sequences, length) % vocabulary
    ids[:, 0] = np.arange(sequences) % vocabulary
    return ids


def _is_wanted(device_type: str) -> bool:
    wanted = os.environ.get("RADIX_MLP_COSTS", "auto")
    if wanted not in ("auto", "measured", "constant"):
        raise InvalidInputError(f"RADIX_MLP_COSTS={wanted!r}: must be auto, measured or constant.")
    return wanted == "measured" or (wanted == "auto" and device_type == "cuda")


def _facts(trunk: PreTrainedModel) -> dict[str, str]:
    """What costs depend on."""
    from radix_mlp import __version__

    config: Any = trunk.config
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    device = trunk.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads",
        "model": " ".join([type(trunk).__name__, *(str(getattr(config, name, None)) for name in sizes)]),
        "parameters": str(sum(parameter.numel() for parameter in trunk.parameters())),
        "dtype": str(trunk.dtype),
        "attention": str(config._attn_implementation),
        "versions": f"radix-mlp {__version__} torch {torch.__version__} transformers {transformers.__version__}",
    }


def _file(trunk: PreTrainedModel) -> Path:
    digest = blake2b(json.dumps(_facts(trunk)).encode(), digest_size=8).hexdigest()
    return _folder() / f"costs-{digest}.json"


def _folder() -> Path:
    given = os.environ.get("RADIX_MLP_CACHE")
    if given:
        return Path(given)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "radix-mlp"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "radix-mlp"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "radix-mlp"


def _write(path: Path, found: dict[str, Any]) -> None:
    """Whole or not at all; where nothing can be written, the next start measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(found, file, indent=1)
        Path(file.name).replace(path)
    except OSError:
        return
