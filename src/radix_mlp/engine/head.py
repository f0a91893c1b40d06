"""The output head of a causal model as a function of hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.engine.scheduler import Ids
from radix_mlp.engine.step import hidden_of_one
from radix_mlp.errors import UnsupportedModelError

__all__ = ["output_head"]

PROBE_TOKENS = 8


def output_head(model: PreTrainedModel, probe: Ids) -> Callable[[Tensor], Tensor]:
    """Hidden states `[R, h]` -> logits `[R, V]`, as the model's own forward makes them.

    Architectures scale or cap their logits in different ways, so the function is held to the model's own logits
    on the first tokens of `probe` before it is used.

    Raises:
        UnsupportedModelError: the model has no output head, or one that does something else besides.
    """
    kind = type(model).__name__
    linear = model.get_output_embeddings()
    if linear is None:
        raise UnsupportedModelError(
            f"{kind} has no language-model head, so it cannot score tokens. Load the checkpoint's ForCausalLM class."
        )
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    factor = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = linear(hidden) * factor / divisor
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    with torch.inference_mode():
        probe = probe[:PROBE_TOKENS]
        ours = head(hidden_of_one(model, probe)).float()
        input_ids = torch.from_numpy(probe.astype("int64"))[None].to(model.device)
        own = model(input_ids, use_cache=False).logits[0].float()
        off = float((ours - own).abs().max() / own.abs().max())
    if not off < (1e-4 if own.dtype == torch.float64 or model.dtype.itemsize >= 4 else 3e-2):
        raise UnsupportedModelError(
            f"{kind} makes its logits in a way that is not known here (off by {off:.1g} of the largest). Score it "
            "through radix_mlp.enable(model) and the model's own forward."
        )
    return head
