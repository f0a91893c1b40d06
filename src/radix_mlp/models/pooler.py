"""Hidden states -> vectors: pooling, then what a sentence-transformers folder does with the vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from radix_mlp.errors import InvalidInputError
from radix_mlp.models.sentence_transformers_folder import FolderModule, FolderSettings, find_file
from radix_mlp.ops.device_plan import DevicePlan
from radix_mlp.ops.pool import POOLINGS
from radix_mlp.ops.send import send
from radix_mlp.plan import RadixPlan

__all__ = ["Pooler", "pooler_of"]

# names in a folder's files -> ours
_FOLDER_MODES = {function.__name__.replace("_", ""): name for name, function in POOLINGS.items()}
# the flags of older folders in the order in which their vectors are joined
_FOLDER_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Pooler:
    """From hidden states to vectors."""

    modes: tuple[str, ...] = ("last",)
    """Names in `POOLINGS`; the vectors of several are joined."""
    include_prompt: bool = True
    """False: the tokens of the prompt are left out of the pooling."""
    layers: tuple[nn.Module, ...] = ()
    """Run on the vectors, one after another."""

    def __call__(self, hidden: Tensor, plan: DevicePlan, skip: NDArray[np.int64]) -> Tensor:
        """`[M, h] -> [S, d]`, float32 or wider.

        Args:
            skip: `[S]`, leave this many tokens at the begin of each sequence out of the pooling.
        """
        parts = [
            _pool_after(mode, hidden, plan.plan, skip) if skip.any() else POOLINGS[mode](hidden, plan)
            for mode in self.modes
        ]
        pooled = torch.cat(parts, dim=-1)
        pooled = pooled if pooled.dtype == torch.float64 else pooled.float()
        for layer in self.layers:
            pooled = layer.to(pooled.device, pooled.dtype)(pooled)
        return pooled

    def needed_rows(self, plan: RadixPlan, skip: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Compact rows whose hidden states the pooling reads, in any order; None for all."""
        if not set(self.modes) <= {"last", "cls"}:
            return None
        first = plan.unfold_index[plan.cu_seq_lengths[:-1] + skip]
        rows = {"last": plan.last_rows, "cls": first}
        return np.concatenate([rows[mode] for mode in self.modes]).astype(np.int64)

    def width(self, model: PreTrainedModel) -> int:
        """`d`, without a run.

        Raises:
            InvalidInputError: a dense layer that takes vectors of another size than it gets.
        """
        width = len(self.modes) * int(model.config.get_text_config().hidden_size)
        for layer in self.layers:
            if isinstance(layer, Dense):
                if layer.linear.in_features != width:
                    raise InvalidInputError(
                        f"{model.config.name_or_path}: its Dense module takes vectors of {layer.linear.in_features} "
                        f"numbers (in_features in its config.json) and gets {width}. The modules belong to "
                        "another transformer."
                    )
                width = layer.linear.out_features
        return width


def pooler_of(folder: FolderSettings, pooling: str | None = None, *, reads_messages: bool = False) -> Pooler:
    """What the folder's modules do, with its pooling replaced by `pooling` if given; a plain checkpoint: last token.

    Args:
        folder: of the model.
        pooling: instead of the folder's.
        reads_messages: whether the caller puts texts through the chat template of a folder that wants it.

    Raises:
        InvalidInputError: no such pooling, or none given and not known whether the model says one.
        UnsupportedModelError: a module that is not supported here.
    """
    if pooling is not None and pooling not in POOLINGS:
        raise InvalidInputError(f"pooling={pooling!r}: must be one of {', '.join(POOLINGS)}.")
    if not folder.looked_up and pooling is None:
        raise InvalidInputError(
            f"model={folder.name!r}: without a network it is not known whether it has a modules.json with its "
            "pooling. Give the downloaded folder, or say pooling=, as 'last'."
        )
    if not folder.is_sentence_transformers:
        return Pooler((pooling or "last",))
    folder.check_transformer(("last_hidden_state",))
    if folder.chat and not reads_messages:
        raise folder.unsupported("its texts go through a chat template before they are embedded")
    if not folder.modules or folder.modules[0].kind != "Pooling":
        kind = folder.modules[0].kind if folder.modules else "nothing"
        raise folder.unsupported(f"what follows its transformer is {kind}, not Pooling")
    modes, include_prompt = _pooling(folder, folder.modules[0].config)
    layers = tuple(_layer(folder, module) for module in folder.modules[1:])
    return Pooler((pooling,) if pooling else modes, include_prompt, layers)


def _pooling(folder: FolderSettings, config: Any) -> tuple[tuple[str, ...], bool]:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _FOLDER_FLAGS.items() if config.get(flag)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    for mode in modes:
        if mode not in _FOLDER_MODES:
            raise folder.unsupported(f"it pools with {mode!r}")
    return tuple(_FOLDER_MODES[mode] for mode in modes), bool(config.get("include_prompt", True))


def _layer(folder: FolderSettings, module: FolderModule) -> nn.Module:
    for key in ("module_input_name", "module_output_name"):
        if module.config.get(key) not in (None, "sentence_embedding"):
            raise folder.unsupported(f"{module.path} works on {module.config[key]!r}")
    if module.kind == "Normalize":
        return Normalize()
    if module.kind == "Dense":
        return Dense.load(folder, module)
    raise folder.unsupported(f"its module {module.path} is {module.kind}")


class Normalize(nn.Module):
    """Vectors of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


class Dense(nn.Module):
    """`activation(x W + b)`, plus `x` (or `x R`) where there is a residual."""

    def __init__(self, sizes: tuple[int, int], activation: nn.Module, *, bias: bool, residual: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(*sizes, bias=bias)
        self.activation = activation
        self.use_residual = residual
        if residual and sizes[0] != sizes[1]:
            self.residual = nn.Linear(*sizes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.linear(x))
        if not self.use_residual:
            return out
        return out + (self.residual(x) if hasattr(self, "residual") else x)

    @classmethod
    def load(cls, folder: FolderSettings, module: FolderModule) -> Dense:
        config = module.config
        name = config.get("activation_function", "torch.nn.modules.activation.Tanh")
        activation = getattr(nn, name.rsplit(".", 1)[-1], None) if name.startswith("torch.nn.") else None
        if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
            raise folder.unsupported(f"{module.path} has the activation {name}")
        rows, columns = (_size(folder, module, key) for key in ("in_features", "out_features"))
        residual = bool(config.get("use_residual"))
        dense = cls((rows, columns), activation(), bias=config.get("bias", True), residual=residual)
        try:
            dense.load_state_dict(_weights(folder.name, module.path))
        except RuntimeError as error:
            raise InvalidInputError(f"{folder.name}/{module.path}: {' '.join(str(error).split())}") from error
        return dense.eval().requires_grad_(False)


def _size(folder: FolderSettings, module: FolderModule, key: str) -> int:
    size = module.config.get(key)
    if not isinstance(size, int) or size < 1:
        raise InvalidInputError(
            f"{folder.name}/{module.path}/config.json: {key} is {size!r}, and a Dense module needs its size there."
        )
    return size


def _weights(name: str, path: str) -> dict[str, Tensor]:
    found = find_file(name, f"{path}/model.safetensors") or find_file(name, f"{path}/pytorch_model.bin")
    if found is None:
        raise InvalidInputError(f"{name}/{path}: there is neither a model.safetensors nor a pytorch_model.bin.")
    try:
        if found.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(found)
        weights: dict[str, Tensor] = torch.load(found, map_location="cpu", weights_only=True)
    except Exception as error:
        # cut short, or another format: each library has errors of its own
        raise InvalidInputError(f"{found}: cannot be read ({type(error).__name__}: {error}). Copy it again.") from error
    return weights


def _pool_after(mode: str, hidden: Tensor, plan: RadixPlan, skip: NDArray[np.int64]) -> Tensor:
    """Pooling without the first `skip[s]` tokens of sequence s, which has more; weights keep their places."""
    starts, ends = plan.cu_seq_lengths[:-1] + skip, plan.cu_seq_lengths[1:]
    if mode in ("last", "cls"):
        rows = plan.unfold_index[ends - 1 if mode == "last" else starts]
        return hidden.index_select(0, send(rows.astype(np.int64), hidden.device))
    lengths = ends - starts
    places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    rows = plan.unfold_index[places + np.repeat(starts, lengths)].astype(np.int64)
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    weights = {"mean": np.ones(len(rows)), "weighted_mean": places + np.repeat(skip, lengths) + 1}[mode]
    column = send(weights, hidden.device).to(wide.dtype)[:, None]
    offsets = send(np.concatenate([[0], np.cumsum(lengths)]), hidden.device)

    def total(x: Tensor) -> Tensor:
        return torch.segment_reduce(x, "sum", offsets=offsets, axis=0, initial=0)

    picked = wide.index_select(0, send(rows, hidden.device))
    return total(picked * column) / total(column)
