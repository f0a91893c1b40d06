"""Which forward runs the trunk on a folded batch: fused layers, compiled modules, or the modules as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.hf.enabled import enabled_of
from radix_mlp.hf.forward import compact_arguments, forward_compact
from radix_mlp.hf.fused.layers import why_not_fused
from radix_mlp.hf.graphs.decoder import difference
from radix_mlp.hf.layer_compiler import Mode, check_mode
from radix_mlp.hf.pictures.read import Pictures
from radix_mlp.hf.support import decoder_of
from radix_mlp.ops.device_plan import to_device
from radix_mlp.ops.scan.impl.fla import avoid_autotuning
from radix_mlp.plan import RadixPlan, build_plan

if TYPE_CHECKING:
    from radix_mlp.hf.graphs import GraphedDecoder

__all__ = ["COMPILED", "FUSED", "MODULES", "FastForward", "difference_from_modules"]

FUSED = "fused layers"
COMPILED = "compiled modules"
MODULES = "the model's own modules"
"""How `describe` begins."""
PROBE_TOKENS = 48


class FastForward:
    """Runs the trunk of an enabled model on a folded batch, in the fastest way that is known for it.

    Args:
        model: an enabled model.
        impl: the way to run attention.
        mode: the engine's `compile`. `"auto"`: on CUDA, fused layers where the architecture has them, else the model's
            own modules, in CUDA graphs if they can be captured. True: where it has none, the modules compiled by torch
            for batches of any size (a minute or so, once per machine). False: the model's own modules.

    Examples:
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
        self.is_made = False
        """Whether there is a forward already; `make` and calls make one."""
        self._decoder: GraphedDecoder | None = None
        self._compiled: Any = None
        self._reason = ""
        self._has_kernels = False

    def __call__(
        self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None, pictures: Pictures | None = None
    ) -> Tensor:
        """Hidden states `[M, h]` after the final norm; rows outside `needed_rows` `[R]` may hold NaN.

        A batch with pictures runs the model's own modules.
        """
        self.make()
        if pictures is not None:
            return forward_compact(self.model, plan, pictures)
        if self._decoder is not None and (self.is_fused or not torch.is_autocast_enabled(self.model.device.type)):
            return self._decoder(plan, needed_rows)
        if self._compiled is None:
            return forward_compact(self.model, plan)
        trunk = decoder_of(self.model)
        hidden: Tensor = self._compiled(**compact_arguments(trunk, to_device(plan, trunk.device))).last_hidden_state
        return hidden[0]

    @property
    def is_fused(self) -> bool:
        """Whether the forward that was made last runs fused layers."""
        return self._reason == FUSED

    @property
    def packs(self) -> bool:
        """Whether the forward that was made last is the better one even where nothing is shared.

        Fused layers and CUDA graphs are; and so are the operations of convolutions and states on CUDA, which need no
        padding and whose kernels are compiled already; those of the unmodified model may be autotuned for minutes.
        """
        return self._decoder is not None or self._has_kernels

    def describe(self) -> str:
        """What runs, and why not something faster. Makes the forward."""
        self.make()
        return self._reason

    def make(self) -> None:
        """Make the forward, unless there is one."""
        if not self.is_made:
            self._make()

    def prepare(self, plan: RadixPlan) -> None:
        """Start copying what a forward pass of this batch reads. From any thread."""
        decoder = self._decoder
        if decoder is not None and decoder.takes(plan):
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
        """Forget what was made of the model if the model has changed since; True if it has."""
        if self._is_current():
            return False
        self._forget()
        return True

    def reconsider(self) -> None:
        """As `refresh`, after a change of the model: what prevented fused layers may be gone, as an adapter is."""
        if self._decoder is None or not self._is_current():
            self._forget()

    def _is_current(self) -> bool:
        if self._decoder is not None:
            return self._decoder.is_current()
        return self._compiled is None or self._compiled._orig_mod is decoder_of(self.model)

    def _forget(self) -> None:
        self._decoder = self._compiled = None
        self.is_made = False

    def _why_not_fused(self) -> str | None:
        if self.mode is False:
            return "compile=False"
        trunk = decoder_of(self.model)
        return why_not_fused(trunk) if trunk.device.type == "cuda" else f"the model is on {trunk.device}"

    def _make(self) -> None:
        reason = self._why_not_fused()
        if reason is None:
            from radix_mlp.hf.fused import FusedDecoder
            from radix_mlp.hf.graphs import GraphedDecoder

            decoder = FusedDecoder(self.model, impl=self.impl)
            reason = difference_from_modules(self.model, decoder)
            self._decoder = GraphedDecoder(decoder) if reason is None else None
        if reason is None:
            self._reason = FUSED
        elif self.mode is True:
            self._reason = f"{COMPILED}: {reason}"
            self._compiled = torch.compile(decoder_of(self.model), dynamic=True)
        else:
            why_not_graphed = "compile=False" if self.mode is False else self._graph_modules()
            graphs = "in CUDA graphs" if why_not_graphed is None else f"without CUDA graphs ({why_not_graphed})"
            on_cuda = self.model.device.type == "cuda" and self.mode is not False
            self._reason = f"{MODULES}: {reason}" + (f"; {graphs}" if on_cuda else "")
        enabled = enabled_of(decoder_of(self.model))
        if enabled is not None and enabled.settings.is_dense:
            self._reason += "; dense mask, M x M for M rows"
        mixers = None if enabled is None else enabled.settings.mixers
        if mixers is not None and mixers.any:
            self._reason += f"; {mixers}"
        self._has_kernels = mixers is not None and bool(mixers.on_tree) and self.model.device.type == "cuda"
        if self._has_kernels:
            avoid_autotuning()
            # compiles kernels now: up to 20 s on a fresh machine
            with torch.inference_mode():
                forward_compact(self.model, _probe_plan(self.model))
        self.is_made = True

    def _graph_modules(self) -> str | None:
        """Make CUDA graphs of the model's own modules, or return why there are none."""
        from radix_mlp.hf.graphs import GraphedDecoder, ModulesDecoder, why_not_graphed

        reason = why_not_graphed(self.model)
        if reason is not None:
            return reason
        decoder = ModulesDecoder(self.model)
        with torch.inference_mode():
            reason = decoder.why_not_captured(_probe_plan(self.model))
        if reason is None:
            self._decoder = GraphedDecoder(decoder)
        return reason


def difference_from_modules(model: PreTrainedModel, fused: Any) -> str | None:
    """Why fused layers must not stand in for the model's own modules, or None if a small batch comes out the same."""
    plan = _probe_plan(model)
    with torch.inference_mode():
        own, ours = forward_compact(model, plan).float(), fused(plan, None).float()
    reason = difference(ours, own)
    return None if reason is None else f"fused layers give something else ({reason})"


def _probe_plan(model: PreTrainedModel) -> RadixPlan:
    """Two sequences with the first half shared."""
    ids = np.arange(2 * PROBE_TOKENS) % decoder_of(model).config.vocab_size
    ids[PROBE_TOKENS : PROBE_TOKENS + PROBE_TOKENS // 2] = ids[: PROBE_TOKENS // 2]
    return build_plan(ids, [0, PROBE_TOKENS, 2 * PROBE_TOKENS])
