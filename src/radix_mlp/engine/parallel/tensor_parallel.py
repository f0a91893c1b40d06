"""Tensor parallelism: an engine's model sharded over several processes, each with its own GPU.

    engine = Engine("Qwen/Qwen3-8B", tensor_parallel_size=2)        # starts the other process, and ends it

Rank 0 has the requests, plans batches, pools and answers. The other ranks (`run_peer`) run their shards of the layers
when rank 0 broadcasts a batch. Under torchrun, which starts the processes itself:

    if tensor_parallel.is_peer():
        tensor_parallel.run_peer()
    else:
        engine = Engine("Qwen/Qwen3-8B", tensor_parallel_size=2)
"""

from __future__ import annotations

import functools
import os
import time
import weakref
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from radix_mlp.engine.parallel.process_group import ProcessGroup
from radix_mlp.engine.parallel.rank_processes import START, RankProcesses
from radix_mlp.errors import InvalidInputError, UnsupportedModelError
from radix_mlp.hf.enable import enable
from radix_mlp.hf.fast_forward import FastForward
from radix_mlp.hf.layer_compiler import Mode
from radix_mlp.hf.pictures.read import Pictures
from radix_mlp.hf.sharding import shard
from radix_mlp.hf.support import decoder_of
from radix_mlp.models.load import load
from radix_mlp.plan import RadixPlan

if TYPE_CHECKING:
    from radix_mlp.hf.graphs import GraphedDecoder

__all__ = ["TensorParallelForward", "is_peer", "lead", "run_peer", "serve_part"]

PLAN_FIELDS = tuple(field.name for field in fields(RadixPlan))


def is_peer() -> bool:
    """Whether this process, started by torchrun, is one of those that `run_peer` is for: all but the first.

    >>> is_peer()
    False
    """
    return int(os.environ.get("RANK", "0")) > 0


class _Part(FastForward):
    """Runs this process' part."""

    def __init__(self, model: PreTrainedModel, *, impl: str, mode: Mode) -> None:
        super().__init__(model, impl=impl, mode=mode)
        self.graphed: list[GraphedDecoder] = []
        """What runs batches, if it has CUDA graphs: these hold the sums over processes that are in them."""

    def refresh(self) -> bool:
        """Does nothing: a sharded model does not change."""
        return False

    def reconsider(self) -> None:
        """Nothing, too."""

    def _graph_modules(self) -> str | None:
        return "it is sharded"

    def _make(self) -> None:
        super()._make()
        self.graphed.clear()
        if self._decoder is not None:
            # a process that alone did without a graph would be out of step
            self._decoder.must_capture = True
            self.graphed.append(self._decoder)


class TensorParallelForward(_Part):
    """As `FastForward`, in all processes of a group at once; for the first of them.

    Raises:
        InvalidInputError: `mode` is True.
    """

    def __init__(
        self, model: PreTrainedModel, group: ProcessGroup, peers: RankProcesses, *, impl: str, mode: Mode
    ) -> None:
        super().__init__(model, impl=impl, mode=mode)
        self.group = group
        self._peers = peers
        # also when nobody holds this any more, and when the interpreter ends
        self._end = weakref.finalize(self, _end, self.graphed, peers)

    @property
    def failure(self) -> str | None:
        """Why nothing can be run any more, if so."""
        return self.group.failure

    def close(self, *, at_once: bool = False) -> None:
        """End the other processes after the batch that runs; whatever is asked later ends with `EngineClosedError`.

        From any thread, and as often as one likes; when nobody holds the engine any more, and when the interpreter
        ends, it is done too. Another engine can be made in this process afterwards.

        Args:
            at_once: kill them even while a batch hangs, in a process that is about to end itself.
        """
        if at_once and self._end.detach() and not self._peers.is_fork:
            self._peers.kill()
        self._end()

    def check(self) -> None:
        """Raise `EngineDeadError` if a process was lost, and what was computed is worth nothing."""
        self.group.check()

    def __call__(
        self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None, pictures: Pictures | None = None
    ) -> Tensor:
        if pictures is not None:
            raise UnsupportedModelError("tensor_parallel_size: batches with images run in one process only.")
        # made first, where it is not yet, in all processes
        self.make()
        with self.group.broadcasting("run", ({name: getattr(plan, name) for name in PLAN_FIELDS}, needed_rows)):
            return super().__call__(plan, needed_rows)

    def _make(self) -> None:
        with self.group.broadcasting("make", None):
            super()._make()


def lead(
    model: Any,
    size: int,
    *,
    tokenizer: Any = None,
    device: torch.device | str | None = None,
    impl: str = "auto",
    mode: Mode = "auto",
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, TensorParallelForward]:
    """Rank 0's shard of a model on `size` processes, which are started unless torchrun started them.

    Args:
        model: as in `Engine`; a loaded one under torchrun only.
        size: number of processes.
        tokenizer: as in `Engine`.
        device: `"cuda"` or `"cpu"`; the first where there is one unless given.
        impl: the way to run attention.
        mode: the engine's `compile`.
        options: `dtype`, `kind` and `trust_remote_code` of the engine.

    Returns:
        The model, with its part of the layers and whole heads; its tokenizer; what runs its trunk in all processes.

    Raises:
        InvalidInputError: a wrong argument, or fewer GPUs than processes.
        UnsupportedModelError: the model cannot be sharded; the message says why.
        EngineError: a process ended while it started, or hung.
    """
    if mode is True:
        raise InvalidInputError(
            "compile=True: modules that are sharded over several processes are not compiled. Use 'auto' or False."
        )
    is_loaded = isinstance(model, torch.nn.Module)
    peers = RankProcesses(size, _kind_of_device(device, size))
    if is_loaded and peers.are_ours:
        raise InvalidInputError(
            "tensor_parallel_size with a loaded model: other processes cannot take it over. Pass its name or folder, "
            "or start all processes with torchrun, load it in each, and call run_peer(model) in all but the first."
        )
    try:
        group = peers.meet()
        spec = {"model": None if is_loaded else str(model), "impl": impl, "mode": mode, "options": options}
        with group.broadcasting("load", spec):
            pass
        part, loaded_tokenizer = _own_part(group, model, tokenizer, options, peers)
        _broadcast_calls(decoder_of(part), group)
    except BaseException:
        peers.give_up()
        raise
    return part, loaded_tokenizer, TensorParallelForward(part, group, peers, impl=impl, mode=mode)


def run_peer(model: PreTrainedModel | None = None, *, device: str | None = None) -> None:
    """Run this process' part of the model until the first process is done; for processes that torchrun has started.

    Args:
        model: the whole model, if the first process passes a loaded one to `Engine`.
        device: `"cuda"` or `"cpu"`; the first where there is one unless given.

    Raises:
        InvalidInputError: this is the first process.
        EngineError: another process could not load its part.
    """
    if not is_peer():
        raise InvalidInputError("run_peer is for the processes with RANK 1 and more; make an Engine in the first.")
    serve_part(ProcessGroup(_kind_of_device(device, int(os.environ["WORLD_SIZE"]))), model)


def serve_part(group: ProcessGroup, model: PreTrainedModel | None = None) -> None:
    """What `run_peer` does, in a group."""
    _, spec = group.receive()
    if (spec["model"] is None) != (model is not None):
        wrong = InvalidInputError("the first process and run_peer must both have a loaded model, or neither of them.")
        group.agree(wrong)
    part, _ = _own_part(group, model or spec["model"], None, spec["options"])
    trunk = decoder_of(part)
    enable(part, impl=spec["impl"], threshold=0)
    forward = _Part(part, impl=spec["impl"], mode=spec["mode"])
    while True:
        kind, payload = group.receive()
        with torch.inference_mode():
            if kind == "stop":
                _release(forward.graphed)
                if group.device.type == "cuda":
                    torch.cuda.synchronize()
                return
            if kind == "make":
                forward.make()
            elif kind == "run":
                arrays, needed_rows = payload
                forward(RadixPlan(**arrays), needed_rows)
            else:
                arguments, keywords = group.unpack(payload)
                type(trunk).forward(trunk, *arguments, **keywords)


def _own_part(
    group: ProcessGroup, model: Any, tokenizer: Any, options: dict[str, Any], peers: RankProcesses | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model on the CPU, keep this process' part, and move that to the device; all processes or none."""
    began = time.monotonic()
    error: Exception | None = None
    part: Any = model
    try:
        if isinstance(model, str | Path):
            part, tokenizer = load(model, tokenizer=tokenizer, device="cpu", **options)
        elif group.rank == 0:
            part, tokenizer = load(model, tokenizer=tokenizer, **options)
        part = torch.nn.Module.to(shard(part), group.device).eval()
    except Exception as caught:
        error = caught
    group.reach("loaded its part")
    # they read the same files, perhaps after this process
    seconds = START.total_seconds() + time.monotonic() - began
    with nullcontext() if peers is None else peers.limit("loaded its part", seconds):
        group.agree(error)
    return part, tokenizer


def _broadcast_calls(trunk: Any, group: ProcessGroup) -> None:
    """Let every call of the trunk's own forward run in all processes: padded batches, and what checks heads."""
    own = type(trunk)

    @functools.wraps(own.forward)
    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        # within a broadcast batch, the other ranks take part already
        payload = None if group.is_broadcasting else group.pack((arguments, keywords))
        with group.broadcasting("call", payload):
            return own.forward(self, *arguments, **keywords)

    # of the same name, since transformers finds files and tables by it
    trunk.__class__ = type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})


def _kind_of_device(device: torch.device | str | None, size: int) -> str:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if str(device) not in ("cuda", "cpu"):
        raise InvalidInputError(
            f"device={str(device)!r} with tensor_parallel_size={size}: must be 'cuda' or 'cpu'. The processes take the "
            "first GPUs that they see; choose others with CUDA_VISIBLE_DEVICES."
        )
    if str(device) == "cuda":
        needed, found = int(os.environ.get("LOCAL_WORLD_SIZE", size)), torch.cuda.device_count()
        if found < needed:
            raise InvalidInputError(
                f"tensor_parallel_size={size}: {found} GPUs are visible, and each of the processes here needs one."
            )
    return str(device)


def _end(graphed: list[GraphedDecoder], peers: RankProcesses) -> None:
    if peers.is_fork:
        return
    # once no batch runs, which would keep its graph
    peers.stop()
    _release(graphed)
    peers.close()


def _release(graphed: list[GraphedDecoder]) -> None:
    for decoder in graphed:
        decoder.release()
