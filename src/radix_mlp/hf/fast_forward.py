"""Which forward runs the trunk on a folded batch: fused layers, compiled modules, or the modules as they are."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.engine.execution.step import Forward
from radix_mlp.errors import InvalidInputError
from radix_mlp.hf.forward import compact_arguments, forward_compact
from radix_mlp.hf.fused.layers import why_not_fused
from radix_mlp.hf.support import decoder_of
from radix_mlp.plan import RadixPlan, build_plan

__all__ = ["FastForward", "Mode", "check_mode"]


FUSED = "fused layers"
PROBE_TOKENS = 48
Mode = bool | Literal["auto"]


def check_mode(mode: object) -> None:
    """Raise `InvalidInputError` for anything but True, False and `"auto"`."""
    if mode not in (True, False, "auto"):
        raise InvalidInputError(f"compile={mode!r}: must be True, False or 'auto'.")


class FastForward:
    """Runs the trunk of an enabled model on a folded batch, in the fastest way that is known for it.

    Args:
        model: an enabled model.
        impl: the way to run attention.
        mode: the engine's `compile`. `"auto"`: on CUDA, fused layers where the architecture has them, else the model's
            own modules. True: where it has none, the modules compiled by torch for batches of any size (a minute or so,
            once a machine). False: the model's own modules.

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
        self._forward: Forward | None = None
        self._made_for: object = None
        self._reason = ""

    def __call__(self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None) -> Tensor:
        """Hidden states `[M, h]` after the final norm; rows that are not needed may hold NaN."""
        return self._current()(plan, needed_rows)

    @property
    def is_made(self) -> bool:
        """Whether there is a forward already; otherwise the next call of anything here makes one."""
        return self._forward is not None

    @property
    def is_fused(self) -> bool:
        """Whether fused layers run."""
        self._current()
        return self._reason == FUSED

    def describe(self) -> str:
        """What runs, and why not something faster."""
        self._current()
        return self._reason

    def _current(self) -> Forward:
        """The forward, made anew if the model was moved or its parameters were replaced."""
        trunk = decoder_of(self.model)
        parameters = next(trunk.parameters())
        made_for = parameters.device, parameters.dtype, parameters.data_ptr()
        if self._forward is None or self._made_for != made_for:
            self._forward = self._make(trunk)
            self._made_for = made_for
        return self._forward

    def prepare(self, plan: RadixPlan) -> None:
        """Start copying what a forward pass of this batch reads. From any thread."""
        takes = getattr(self._forward, "takes", None)
        if takes is not None and takes(plan):
            # a graph has a copy of its own, and what comes after it is copied while it runs
            return
        with torch.no_grad():
            plan.to(self.model.device)

    @property
    def failure(self) -> str | None:
        """Why nothing can be run any more, if so."""
        return None

    def check(self) -> None:
        """Raise an error if what was computed is worth nothing, since a part of it was lost."""

    def close(self, *, at_once: bool = False) -> None:
        """End the processes that were started to run the model, `at_once` even if they hang: here there are none."""

    def refresh(self) -> bool:
        """Look again whether what was made of the model is still made of its parameters; True if it is made anew."""
        is_current = getattr(self._forward, "is_current", None)
        if is_current is None or is_current():
            return False
        self._forward = None
        return True

    def reconsider(self) -> None:
        """As `refresh`, of a model that has changed: what stood in the way of fused layers may be gone."""
        is_fused = hasattr(self._forward, "is_current")
        # an adapter is, once it is merged
        if self.is_made and not is_fused and self._why_not_fused(decoder_of(self.model)) is None:
            self._forward = None
        self.refresh()

    def _why_not_fused(self, trunk: PreTrainedModel) -> str | None:
        if self.mode is False:
            return "compile=False"
        return why_not_fused(trunk) if trunk.device.type == "cuda" else f"the model is on {trunk.device}"

    def _make(self, trunk: PreTrainedModel) -> Forward:
        reason = self._why_not_fused(trunk)
        if reason is None:
            from radix_mlp.hf.fused import FusedDecoder, GraphedDecoder

            decoder = FusedDecoder(self.model, impl=self.impl)
            reason = _difference_from_modules(self.model, decoder)
            if reason is None:
                self._reason = FUSED
                return GraphedDecoder(decoder)
        if self.mode is True:
            self._reason = f"compiled modules: {reason}"
            return _compiled(trunk)
        self._reason = f"the model's own modules: {reason}"
        return lambda plan, needed_rows: forward_compact(self.model, plan)


def _difference_from_modules(model: PreTrainedModel, forward: Forward) -> str | None:
    """Why `forward` must not stand in for the model's own modules, or None where a small batch comes out the same."""
    ids = np.arange(2 * PROBE_TOKENS) % decoder_of(model).config.vocab_size
    ids[PROBE_TOKENS : PROBE_TOKENS + PROBE_TOKENS // 2] = ids[: PROBE_TOKENS // 2]
    plan = build_plan(ids, [0, PROBE_TOKENS, 2 * PROBE_TOKENS])
    with torch.inference_mode():
        own, ours = forward_compact(model, plan).float(), forward(plan, None).float()
    off = float((ours - own).norm() / own.norm())
    # half precision is a hundredth off after many layers; anything wrong is off by about the whole
    return None if off < 0.1 else f"fused layers give something else (off by {off:.1g})"


def _compiled(trunk: PreTrainedModel) -> Forward:
    runner = torch.compile(trunk, dynamic=True)

    def forward(plan: RadixPlan, needed_rows: NDArray[np.int64] | None) -> Tensor:
        hidden: Tensor = runner(**compact_arguments(trunk, plan.to(trunk.device))).last_hidden_state
        return hidden[0]

    return forward
