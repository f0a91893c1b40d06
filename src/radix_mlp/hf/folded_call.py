"""A call on compact rows: what goes in, and the outputs back in the caller's layout."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from radix_mlp.errors import NoCacheError, UnsupportedCallError
from radix_mlp.hf.foldable_call import FoldableCall, selects_logits
from radix_mlp.hf.forward import compact_arguments
from radix_mlp.hf.prefill_cache import CacheRows, PrefillCache
from radix_mlp.hf.tree_mask import TreeMask
from radix_mlp.ops.device_plan import DevicePlan
from radix_mlp.ops.row_copies import copy_rows

__all__ = ["FoldedCache", "FoldedCall"]


class FoldedCache:
    """Stands where a key-value cache would be in the outputs of a folded call; any use of it is an error."""

    def refuse(self) -> NoReturn:
        """Raise the error that any use of this object ends in."""
        raise NoCacheError(
            "the call that returned this was folded, so it kept no key-value cache. Call the model with use_cache=True "
            "to get one."
        )

    def __getattr__(self, name: str) -> NoReturn:
        # copying, pickling and the like look for special methods and must be able to miss them
        if name.startswith("__"):
            raise AttributeError(name)
        self.refuse()

    def __repr__(self) -> str:
        return "FoldedCache(none was kept: call the model with use_cache=True)"


class CallerRows:
    """The way from compact rows back to the caller's `[B, T]`, or to the `[B, K]` that `logits_to_keep` asks for."""

    def __init__(self, call: FoldableCall, plan: DevicePlan) -> None:
        self._device = plan.unfold_index.device
        layout = call.layout
        rows = np.full(layout.shape[0] * layout.shape[1], -1, np.int64)
        rows[layout.token_index] = plan.plan.unfold_index
        self.num_rows = plan.plan.num_rows
        # [B, T], -1 where there is no token
        self._rows = rows.reshape(layout.shape)

    def keep(self, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """Narrow the layout to the columns that transformers keeps; returns the rows the head has to run on."""
        columns: Any = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep.cpu().numpy()
        rows = self._rows[:, np.arange(self._rows.shape[1])[columns]]
        unique, place = np.unique(rows[rows >= 0], return_inverse=True)
        self._rows = np.full(rows.shape, -1, np.int64)
        self._rows[rows >= 0] = place
        # where only padding is asked for, the head gets a row for nothing
        self.num_rows = max(len(unique), 1)
        return torch.from_numpy(unique if len(unique) else np.zeros(1, np.int64)).to(self._device)

    def of_cache(self) -> CacheRows:
        """The rows whose keys and values stand in a cache; at padding, one of the same sequence."""
        is_padding = self._rows < 0
        # a row of another sequence that is not a number would pass a mask, as zero times it is not a number
        own = np.maximum(self._rows.max(axis=1, keepdims=True), 0)
        rows = np.where(is_padding, own, self._rows)
        return CacheRows(torch.from_numpy(rows).to(self._device), torch.from_numpy(is_padding).to(self._device))

    def unfold(self, x: torch.Tensor) -> torch.Tensor:
        """`[1, M, ...]` -> `[B, T, ...]`, zero where there is no token; the gradient is summed in a fixed order."""
        if tuple(x.shape[:2]) != (1, self.num_rows):
            raise UnsupportedCallError(
                f"an output has the shape {tuple(x.shape)} instead of (1, {self.num_rows}, ...), so it cannot be "
                "unfolded. Call radix_mlp.disable(model) for this call."
            )
        index = torch.from_numpy(self._rows).to(x.device)
        out = copy_rows(x[0], index.clamp(min=0).flatten()).view(*index.shape, *x.shape[2:])
        if (self._rows < 0).any():
            out = out.masked_fill((index < 0).view(*index.shape, *[1] * (x.ndim - 2)), 0)
        return out


class FoldedCall:
    """A call while it runs on compact rows: the arguments that go in, and the outputs in the caller's layout.

    With a `cache`, which is empty, it gets the keys and values of every token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        caller_arguments: dict[str, Any],
        call: FoldableCall,
        plan: DevicePlan,
        cache: DynamicCache | None = None,
    ) -> None:
        self.arguments = compact_arguments(model, plan)
        self._pictures = call.pictures
        if call.pictures is not None:
            self.arguments |= call.pictures.compact_arguments(plan)
        self._model = model
        self._caller_arguments = caller_arguments
        self._layout = self._logits_layout = CallerRows(call, plan)
        if "output_hidden_states" in caller_arguments:
            self.arguments["output_hidden_states"] = caller_arguments["output_hidden_states"]
        if selects_logits(caller_arguments):
            self._logits_layout = CallerRows(call, plan)
            self.arguments["logits_to_keep"] = self._logits_layout.keep(caller_arguments["logits_to_keep"])
        self.cache = cache
        self._prefilled = PrefillCache(plan.plan.num_rows)
        if cache is not None:
            name = "past_key_values" if caller_arguments.get("cache_params") is None else "cache_params"
            self.arguments |= {name: self._prefilled, "use_cache": caller_arguments.get("use_cache")}

    @property
    def is_fused(self) -> bool:
        """Whether fused layers ran in place of the model's own modules."""
        return self._prefilled.is_fused

    @torch.compiler.disable
    def unfold(self, outputs: ModelOutput) -> ModelOutput | tuple[Any, ...]:
        """Every per-token field in the caller's layout, with the loss if there are labels."""
        caller, model = self._caller_arguments, self._model
        if self.cache is not None:
            self._prefilled.fill(self.cache, self._layout.of_cache())
        fields: dict[str, Any] = {}
        for name, value in outputs.items():
            if name == "logits":
                fields[name] = self._logits_layout.unfold(value)
            elif name == "last_hidden_state":
                fields[name] = self._layout.unfold(value)
            elif isinstance(value, TreeMask):
                # a class that hands its mask back
                fields[name] = caller["attention_mask"]
            elif value is self._prefilled:
                fields[name] = self.cache
            elif name == "rope_deltas":
                # read off the caller's own layout
                fields[name] = value
            elif name == "image_hidden_states" and self._pictures is not None:
                fields[name] = self._pictures.of_caller(value, self.arguments["pixel_values"].features)
            elif name == "hidden_states":
                fields[name] = tuple(self._layout.unfold(hidden) for hidden in value)
            else:
                raise UnsupportedCallError(
                    f"the output {name!r} of {type(outputs).__name__} has no known layout, so it cannot be unfolded. "
                    "Call radix_mlp.disable(model) for this call."
                )
        if self.cache is None and caller.get("use_cache") is None and getattr(model.config, "use_cache", False):
            name = "past_key_values" if hasattr(outputs, "past_key_values") else "cache_params"
            if hasattr(outputs, name):
                fields[name] = FoldedCache()
        if caller.get("labels") is not None:
            fields["loss"] = model.loss_function(
                logits=fields["logits"],
                labels=caller["labels"],
                vocab_size=fields["logits"].shape[-1],
                **{name: caller[name] for name in ("num_items_in_batch", "shift_labels") if name in caller},
            )
        unfolded = type(outputs)(**fields)
        wants_dict = caller.get("return_dict")
        return unfolded if (model.config.return_dict if wants_dict is None else wants_dict) else unfolded.to_tuple()
