"""Which forward runs the trunk on a folded batch: fused layers, compiled modules, or the modules as they are."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.errors import InvalidInputError
from radix_mlp.hf.forward import compact_arguments, forward_compact
from radix_mlp.hf.fused.layers import why_not_fused
from radix_mlp.hf.support import decoder_of
from radix_mlp.ops.device_plan import to_device
from radix_mlp.plan import RadixPlan, build_plan

__all__ = ["COMPILED", "FUSED", "MODULES", "FastForward", "Mode", "TrunkForward", "check_mode"]


FUSED = "fused layers"
COMPILED = "compiled modules"
MODULES = "the model's own modules"
"""How `describe` begins."""
PROBE_TOKENS = 48
Mode = bool | Literal["auto"]


def check_mode(mode: object) -> None:
    """Raise `InvalidInputError` for anything but True, False and `"auto"`."""
    if mode not in (True, False, "auto"):
        raise InvalidInputError(f"compile={mode!r}: must be True, False or 'auto'.")


class TrunkForward(Protocol):
    """One way to run the trunk of an enabled model on a folded batch."""

    def __call__(self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None) -> Tensor:
        """Hidden states `[M, hidden]` after the final norm. Rows outside `needed_rows` `[R]` may hold NaN."""

    def is_current(self) -> bool:
        """Whether the model still has the modules and parameters that this was made from."""

    def takes(self, plan: RadixPlan) -> bool:
        """Whether the batch runs from tensors of this forward's own, so that the plan need not be copied ahead."""


class ModulesForward:
    """The model's own modules."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None) -> Tensor:
        return forward_compact(self.model, plan)

    def is_current(self) -> bool:
        return True

    def takes(self, plan: RadixPlan) -> bool:
        return False


class CompiledForward(ModulesForward):
    """The model's own modules, compiled by torch."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._compiled: Any = torch.compile(decoder_of(model), dynamic=True)

    def __call__(self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None) -> Tensor:
        trunk = decoder_of(self.model)
        hidden: Tensor = self._compiled(**compact_arguments(trunk, to_device(plan, trunk.device))).last_hidden_state
        return hidden[0]


class FastForward:
    """Runs the trunk of an enabled model on a folded batch, in the fastest way that is known for it.

    Args:
        model: an enabled model.
        impl: the way to run attention.
        mode: the engine's `compile`. `"auto"`: on CUDA, fused layers where the architecture has them, else the model's
            own modules. True: where it has none, the modules compiled by torch for batches of any size (a minute or so,
            once per machine). False: the model's own modules.

    Example:
        >>> import radix_mlp
        >>> from radix_mlp.models.tiny import tiny_model
        >>> forward = FastForward(radix_mlp.enable(tiny_model()))
        >>> forward.describe()
        "the model's own modules: the model is on cpu"
        >>> forward(radix_mlp.build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6]), None).shape
        torch.Size([4, 64])
    """

    def __init__(self, model: PreTrainedModel, *, impl: str = "auto", mode: Mode = "auto") -> None:
        check_mode(mode)
        self.model = model
        self.impl = impl
        self.mode = mode
        self._forward: TrunkForward | None = None
        self._made_for: object = None
        self._reason = ""

    def __call__(self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None) -> Tensor:
        """Hidden states `[M, h]` after the final norm; rows that are not needed may hold NaN."""
        return self.make()(plan, needed_rows)

    @property
    def is_made(self) -> bool:
        """Whether there is a forward already; `make` and calls make one."""
        return self._forward is not None

    @property
    def is_fused(self) -> bool:
        """Whether the forward that was made last runs fused layers."""
        return self._reason == FUSED

    def describe(self) -> str:
        """What runs, and why not something faster. Makes the forward."""
        self.make()
        return self._reason

    def make(self) -> TrunkForward:
        """The forward; a new one if the model was moved or its parameters were replaced."""
        trunk = decoder_of(self.model)
        parameters = next(trunk.parameters())
        made_for = parameters.device, parameters.dtype, parameters.data_ptr()
        if self._forward is None or self._made_for != made_for:
            self._forward = self._make(trunk)
            self._made_for = made_for
        return self._forward

    def prepare(self, plan: RadixPlan) -> None:
        """Start copying what a forward pass of this batch reads. From any thread."""
        forward = self._forward
        if forward is not None and forward.takes(plan):
            # a graph has a copy of its own, and what follows it is copied while it runs
            return
        with torch.no_grad():
            to_device(plan, self.model.device)

    @property
    def failure(self) -> str | None:
        """Why no batch can run any more, if so."""
        return None

    def check(self) -> None:
        """Raise an error if another rank was lost, so that the results are invalid."""

    def close(self, *, at_once: bool = False) -> None:
        """End the processes that were started to run the model, `at_once` even if they hang. Here there are none."""

    def refresh(self) -> bool:
        """Check again that the forward is made of the model's parameters; True if it has to be made again."""
        if self._forward is None or self._forward.is_current():
            return False
        self._forward = None
        return True

    def reconsider(self) -> None:
        """As `refresh`, after a change of the model: what prevented fused layers may be gone."""
        # merging an adapter does that
        if self.is_made and not self.is_fused and self._why_not_fused(decoder_of(self.model)) is None:
            self._forward = None
        self.refresh()

    def _why_not_fused(self, trunk: PreTrainedModel) -> str | None:
        if self.mode is False:
            return "compile=False"
        return why_not_fused(trunk) if trunk.device.type == "cuda" else f"the model is on {trunk.device}"

    def _make(self, trunk: PreTrainedModel) -> TrunkForward:
        reason = self._why_not_fused(trunk)
        if reason is None:
            from radix_mlp.hf.fused import FusedDecoder, GraphedDecoder

            decoder = FusedDecoder(self.model, impl=self.impl)
            reason = _difference_from_modules(self.model, decoder)
            if reason is None:
                self._reason = FUSED
                return GraphedDecoder(decoder)
        if self.mode is True:
            self._reason = f"{COMPILED}: {reason}"
            return CompiledForward(self.model)
        self._reason = f"{MODULES}: {reason}"
        return ModulesForward(self.model)


def _difference_from_modules(model: PreTrainedModel, fused: Any) -> str | None:
    """Why fused layers must not stand in for the model's own modules, or None if a small batch comes out the same."""
    ids = np.arange(2 * PROBE_TOKENS) % decoder_of(model).config.vocab_size
    ids[PROBE_TOKENS : PROBE_TOKENS + PROBE_TOKENS // 2] = ids[: PROBE_TOKENS // 2]
    plan = build_plan(ids, [0, PROBE_TOKENS, 2 * PROBE_TOKENS])
    with torch.inference_mode():
        own, ours = forward_compact(model, plan).float(), fused(plan, None).float()
    off = float((ours - own).norm() / own.norm())
    # half precision is a hundredth off after many layers; anything wrong is off by about the whole
    return None if off < 0.1 else f"fused layers give something else (off by {off:.1g})"
