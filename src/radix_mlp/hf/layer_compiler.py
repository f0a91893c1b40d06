"""`LayerCompiler`: the forward of a kind of decoder layers as one compiled function, for all layers and all lengths."""

from __future__ import annotations

import builtins
import threading
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any, Literal

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from radix_mlp.errors import InvalidInputError, UnsupportedCallError, UnsupportedModelError
from radix_mlp.hf.compiled_types import COMPILED_TYPES
from radix_mlp.ops.attention.registry import COMPOSITES

__all__ = ["FAILURES", "LayerCompiler", "Mode", "check_mode"]

Mode = bool | Literal["auto"]
BACKEND = "inductor"
"""Of torch.compile; tests take quicker ones."""
FAILURES = (TorchDynamoException, FailOnRecompileLimitHit)
"""What torch raises for code that it cannot compile."""


def check_mode(mode: object) -> None:
    """Raise `InvalidInputError` for anything but True, False and `"auto"`."""
    if mode not in (True, False, "auto"):
        raise InvalidInputError(f"compile={mode!r}: must be True, False or 'auto'.")


class LayerCompiler:
    """What the layers of one enabled model share: compiled functions, and why a kind of layers runs as it is.

    Args:
        mode: True compiles, and what cannot be compiled is an error. `"auto"` compiles in training on CUDA, where a
            test has shown it for the type of model.
        model_type: of the model.
        impl: the way to run attention.
        obstacle: why layers of this model never compile, if so.

    Raises:
        UnsupportedModelError: `mode` is True, and no layer of such a model can be compiled.
    """

    def __init__(self, mode: Mode, model_type: str, impl: str, *, obstacle: str | None = None) -> None:
        self.mode = mode
        self.num_graphs = 0
        """Graphs compiled so far."""
        self._reason = _why_never(mode, model_type, impl, obstacle)
        self._reasons: dict[type, str] = {}
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model compiles by itself."""
        return {**self.__dict__, "num_graphs": 0, "_functions": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def why_not(self, device: torch.device, kind: type | None = None) -> str | None:
        """Why layers of this kind (of any, if None) run as they are in a folded call; None if they are compiled."""
        if self._reason is not None:
            return self._reason
        if kind is not None and kind in self._reasons:
            return self._reasons[kind]
        if kind is None and self._reasons:
            return "; ".join(self._reasons.values())
        if self.mode is True:
            return None
        if device.type != "cuda":
            return f"compile='auto' compiles on CUDA only, not on {device.type}"
        if not torch.is_grad_enabled():
            return "compile='auto' compiles in training only"
        return None

    def function_for(self, forward: Any, layer: torch.nn.Module, num_parts: int) -> Callable[..., Any]:
        """The compiled `forward(layer, ...)` of layers of this kind, in the modes that are on now.

        A graph in which fewer than `num_parts` operations follow the tree is not taken.
        """
        device = next((p.device.type for p in layer.parameters()), "cpu")
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), layer.training, cast
        key = forward, num_parts, *modes
        found = self._functions.get(key)
        if found is None:
            with self._lock:
                found = self._functions.setdefault(key, self._compiled(forward, layer, num_parts))
        return found

    def fail(self, layer: torch.nn.Module, error: BaseException) -> None:
        """Note that layers of this kind run as they are; an error where the caller asked to compile them."""
        kind = type(layer)
        self._reasons[kind] = reason = f"{kind.__name__} cannot be compiled ({_first_lines(error)})"
        if self.mode is True:
            raise UnsupportedCallError(
                f"{reason}. Enable the model with compile='auto' to run such layers as they are, or with compile=False."
            ) from error
        warnings.warn(f"radix-mlp runs layers as they are: {reason}.", UserWarning, stacklevel=2)

    def _compiled(self, forward: Any, layer: torch.nn.Module, num_parts: int) -> Callable[..., Any]:
        # code of its own, by which torch counts graphs and forgets them with the model
        code = _run.__code__.replace(co_name=f"compiled_{type(layer).__name__}")
        function = FunctionType(
            code, {"forward": forward, "__name__": __name__, "__builtins__": builtins}, code.co_name
        )

        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            found = sum("radix_mlp" in str(node.target) for node in graph.graph.nodes)
            if found < num_parts:
                raise UnsupportedModelError(f"{found} of its {num_parts} layers of attention see the tree")
            # else `backward(retain_graph=True)` would be an error
            with torch._functorch.config.patch(donated_buffer=False):
                out = torch._dynamo.lookup_backend(BACKEND)(graph, inputs)
            self.num_graphs += 1
            return out

        return torch.compile(function, backend=backend, fullgraph=True, dynamic=True)


def _run(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward(layer, *args, **kwargs)  # type: ignore[name-defined]  # noqa: F821


def _why_never(mode: Mode, model_type: str, impl: str, obstacle: str | None) -> str | None:
    if mode is False:
        return "compile=False"
    reason = obstacle
    if reason is None and impl in COMPOSITES:
        reason = f"impl={impl!r} computes attention in operations that differ with each batch"
    if reason is not None:
        if mode is True:
            raise UnsupportedModelError(f"layers cannot be compiled: {reason}. Use compile='auto' or False.")
        return reason
    if mode == "auto" and model_type not in COMPILED_TYPES:
        return f"compile='auto' does not compile {model_type}, for which no test has shown it (compile=True does)"
    return None


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return "; ".join(lines[:2]).rstrip(".") or type(error).__name__
