"""Ways to change what a model computes from outside of transformers, each put into a fresh model in place.

All of them give a token's row something of the row before it, which a tree of tokens does not have beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

from radix_mlp.models.tiny import tiny_model

WIDTH = 64
Modify = Callable[[Any, ExitStack], None]


def shifted(rows: Tensor) -> Tensor:
    """Half of the row before is added to every row."""
    return rows + 0.5 * nn.functional.pad(rows, (0, 0, 1, 0))[..., :-1, :]


def first_of(outputs: Any) -> Any:
    return shifted(outputs) if isinstance(outputs, Tensor) else (shifted(outputs[0]), *outputs[1:])


class Shift(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return shifted(rows)


class GRU(nn.GRU):
    """As one would put it into a model: without the last state."""

    def forward(self, rows: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(rows)[0]


class CausalConvolution(nn.Conv1d):
    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(rows.transpose(-1, -2), (2, 0))).transpose(-1, -2)


class SinceTheBeginning(nn.Module):
    """As a control vector: adds something from the last place with position 0 on, once it is set."""

    def __init__(self, inner: nn.Module, vector: Tensor | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.vector = vector

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = self.inner(hidden, *args, **kwargs)
        if self.vector is None:
            return hidden
        positions = kwargs["position_ids"]
        first = (positions == 0).cumsum(1).argmax(1, keepdim=True)
        return hidden + self.vector * (torch.arange(positions.shape[1]) >= first).to(hidden)[..., None]


MODULES: dict[str, Callable[[], nn.Module]] = {
    "own module": Shift,
    "GRU": lambda: GRU(WIDTH, WIDTH, batch_first=True),
    "Conv1d": lambda: CausalConvolution(WIDTH, WIDTH, 3),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(WIDTH, 4, WIDTH, dropout=0.0, batch_first=True),
    "Softmax over tokens": lambda: nn.Softmax(dim=-2),
}


def exchanged(name: str) -> Modify:
    def modify(model: Any, _undo: ExitStack) -> None:
        torch.manual_seed(0)
        model.model.layers[0].mlp = MODULES[name]().double().train(model.training)

    return modify


def instance_forward(path: str) -> Modify:
    def modify(model: Any, _undo: ExitStack) -> None:
        module = model.get_submodule(path)
        own = module.forward
        module.forward = lambda *args, **kwargs: first_of(own(*args, **kwargs))

    return modify


def class_forward(path: str) -> Modify:
    def modify(model: Any, undo: ExitStack) -> None:
        kind: Any = type(model.get_submodule(path))
        own = kind.forward
        replaced = lambda *args, **kwargs: first_of(own(*args, **kwargs))  # noqa: E731
        undo.enter_context(mock.patch.object(kind, "forward", replaced))

    return modify


def hook(kind: str) -> Modify:
    def modify(model: Any, _undo: ExitStack) -> None:
        mlp = model.model.layers[0].mlp
        if kind == "forward":
            mlp.register_forward_hook(lambda module, given, found: shifted(found))
        else:
            mlp.register_forward_pre_hook(lambda module, given: (shifted(given[0]),))

    return modify


def global_hook(kind: str) -> Modify:
    def modify(model: Any, undo: ExitStack) -> None:
        mlp = model.model.layers[0].mlp
        if kind == "forward":
            handle = torch_module.register_module_forward_hook(
                lambda module, given, found: shifted(found) if module is mlp else None
            )
        else:
            handle = torch_module.register_module_forward_pre_hook(
                lambda module, given: (shifted(given[0]),) if module is mlp else None
            )
        undo.callback(handle.remove)

    return modify


def function_of_the_file(model: Any, undo: ExitStack) -> None:
    import transformers.models.qwen3.modeling_qwen3 as file

    own = file.apply_rotary_pos_emb
    replaced = lambda q, k, *args, **kwargs: own(shifted(q), k, *args, **kwargs)  # noqa: E731
    undo.enter_context(mock.patch.object(file, "apply_rotary_pos_emb", replaced))


def control_vector(model: Any, _undo: ExitStack) -> None:
    model.model.layers[0] = SinceTheBeginning(model.model.layers[0], torch.linspace(-2, 2, WIDTH))


def own_class(model: Any, _undo: ExitStack) -> None:
    kind: Any = type(model)

    class OwnForCausalLM(kind):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = shifted(outputs.logits)
            return outputs

    model.__class__ = OwnForCausalLM


def own_head(model: Any, _undo: ExitStack) -> None:
    model.lm_head = nn.Sequential(Shift(), model.lm_head)


MODIFICATIONS: dict[str, Modify] = {
    **{f"{name} for an MLP": exchanged(name) for name in MODULES},
    **{
        f"forward of {path}": instance_forward(path)
        for path in ("model.layers.0", "model.layers.1.self_attn", "model.norm")
    },
    **{f"class forward of {path}": class_forward(path) for path in ("model.layers.0", "model.layers.0.mlp")},
    **{f"{kind} hook": hook(kind) for kind in ("forward", "pre")},
    **{f"global {kind} hook": global_hook(kind) for kind in ("forward", "pre")},
    "function of the file": function_of_the_file,
    "control vector": control_vector,
    "class with another head": own_class,
    "module in the head": own_head,
}


def fresh() -> PreTrainedModel:
    return tiny_model(dtype=torch.float64)
