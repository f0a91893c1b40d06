"""What `enable` leaves on a model: a forward in place of the module's own, and the settings behind it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, Protocol

import torch
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedCallError, UnsupportedModelError
from radix_mlp.hf.attention_function import register
from radix_mlp.hf.layer_compiler import LayerCompiler
from radix_mlp.hf.mixers.discovery import Mixers

__all__ = ["CallReport", "Enabled", "Settings", "enabled_of"]


@dataclass(frozen=True)
class CallReport:
    """What the last call of an enabled model did."""

    folded: bool
    reason: str
    num_tokens: int = 0
    num_compact: int = 0
    expanded: tuple[str, ...] = ()
    """Classes of layers that ran on all tokens of the sequences, for want of a version for the tree."""
    why_not_compiled: str | None = None
    """Why the layers of a folded call ran as they are, if they did."""


@dataclass
class Settings:
    """What `enable` was asked for, shared by the trunk and the head of a model."""

    threshold: float | Literal["auto"]
    impl: str
    fallback: str
    compiler: LayerCompiler
    """Compiles the layers of folded calls."""
    mixers: Mixers = field(default_factory=Mixers)
    """Layers other than attention that read the tree: convolutions, linear attention, state spaces."""
    is_dense: bool = False
    """Whether the model computes attention itself, on a dense mask of the rows of a folded call."""
    last_call: CallReport | None = None
    warned: set[str] = field(default_factory=set)
    unfolded_threads: set[int] = field(default_factory=set)
    """Threads that are inside a call which runs unfolded, its trunk included."""

    @property
    def must_fold(self) -> bool:
        """Whether a call that cannot be folded is an error."""
        return self.threshold != "auto" and self.threshold >= 1

    def note_unfolded(self, reason: str, *, is_expected: bool = False) -> None:
        """Report why a call runs unfolded; an error where the caller asked to always fold, unless `is_expected`."""
        self.last_call = CallReport(False, reason)
        if is_expected:
            return
        if self.must_fold:
            raise UnsupportedCallError(
                f"this call cannot be folded: {reason}. Change the call, or enable the model with threshold='auto' "
                "to run such calls unfolded."
            )
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(f"radix-mlp runs this call unfolded: {reason}.", UserWarning, stacklevel=_caller_level())

    def note_failed(self, error: UnsupportedCallError | UnsupportedModelError, *, is_error: bool) -> None:
        """The same for a reason that came up only when the call was folded, an error only if `is_error`."""
        if self.must_fold and is_error:
            raise error
        self.note_unfolded(str(error).rstrip("."), is_expected=self.must_fold)

    def refuse_export(self) -> None:
        """An error where the caller asked to always fold; else the call is exported as it runs unfolded."""
        if self.must_fold:
            raise UnsupportedCallError(
                "an exported call cannot be folded: a plan belongs to its token ids. Enable the model with "
                "threshold='auto' to export it unfolded, or call radix_mlp.disable(model)."
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A model loaded in another process needs the attention function there, too."""
        self.__dict__.update(state, unfolded_threads=set())
        register(self.impl, self.fallback)


class Examined(Protocol):
    """Whether calls of a module can be folded as it is now."""

    num_attention_layers: int

    def reason(self) -> str | None:
        """Why not; None if they can."""

    def reason_on_compact_rows(self) -> str | None:
        """Why the module cannot be called on compact rows; None if it can."""


class Enabled:
    """A forward that stands in for that of one module.

    It lives in the module's dictionary, past torch's `__setattr__`, so class, parameters and `state_dict` stay as they
    are, and a copied or pickled model has its own.
    """

    examination: Examined

    def __init__(self, module: PreTrainedModel, settings: Settings) -> None:
        self.module = module
        self.settings = settings
        self.previous: Callable[..., Any] | None = module.__dict__.get("forward")
        self.successor: Enabled | None = None
        """Of a later `enable`, where this one stays inside a wrapper that other code put around it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a call of the module."""
        raise NotImplementedError

    def install(self) -> None:
        """Make this the forward of its module until `remove`."""
        state = self.module.__dict__
        within = state.get("_radix_within")
        if within is not None and "forward" in state:
            # a wrapper from other code stays around us, and sees its caller's layout
            within.successor, self.previous = self, within.previous
        else:
            state["forward"] = self
        state.update(_radix=self, _replicate_for_data_parallel=_refuse_data_parallel)

    def remove(self) -> None:
        """Bring back `previous`."""
        state = self.module.__dict__
        del state["_radix"], state["_replicate_for_data_parallel"]
        if state.get("forward") is not self:
            # a wrapper from other code stays around ours, which then only passes calls on
            state["_radix_within"] = self
        elif self.previous is None:
            del state["forward"]
        else:
            state["forward"] = self.previous
        self.settings.threshold = 0


def enabled_of(module: torch.nn.Module) -> Enabled | None:
    """The forward that is installed on this very module, if any."""
    found: Enabled | None = module.__dict__.get("_radix")
    return found


def _caller_level() -> int:
    """The `stacklevel` of a warning that points at who called the model."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("radix_mlp.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level


def _refuse_data_parallel() -> NoReturn:
    """In place of `_replicate_for_data_parallel`: a replica's forward would run the weights of the original."""
    raise UnsupportedCallError(
        "torch.nn.DataParallel copies an enabled model without its forward. Use DistributedDataParallel (torchrun or "
        "accelerate launch), one GPU (CUDA_VISIBLE_DEVICES), or radix_mlp.disable(model)."
    )
