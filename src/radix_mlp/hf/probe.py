"""A trial of a model with a type or code that no test knows: fold three short sequences and compare."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf.forward import compact_arguments
from radix_mlp.plan import build_plan

__all__ = ["probe"]

# far above rounding, far below what a wrong mask does to trained weights
_MAX_ERROR = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}


@torch.no_grad()
def probe(trunk: PreTrainedModel) -> None:
    """Compare the last hidden states of an enabled trunk, folded and one sequence at a time.

    Raises:
        UnsupportedModelError: they differ, or the model lies on the meta device and cannot be tried.
    """
    kind = trunk.config.model_type
    if trunk.device.type == "meta":
        raise UnsupportedModelError(
            f"{kind}, or code in it, is not proven to fold and has no weights to try: load it first."
        )
    ids = np.random.default_rng(0).integers(0, trunk.config.vocab_size, 24)
    sequences = [np.concatenate((ids[:9], ids[start : start + 5])) for start in (9, 14, 19)]
    plan = build_plan(np.concatenate(sequences), np.arange(4) * 14).to(trunk.device)
    was_training = trunk.training
    trunk.eval()
    try:
        folded = trunk(**compact_arguments(trunk, plan)).last_hidden_state[0, plan.unfold_index].float()
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise UnsupportedModelError(
            f"{kind}, or code in it, is not proven to fold, and a trial fold of it failed ({error}). Run it unfolded."
        ) from error
    else:
        alone = [trunk(torch.as_tensor(s, device=trunk.device)[None], use_cache=False) for s in sequences]
    finally:
        trunk.train(was_training)
    expected = torch.cat([output.last_hidden_state[0] for output in alone]).float()
    difference = ((folded - expected).abs().max() / expected.abs().max()).item()
    if not difference <= _MAX_ERROR[trunk.dtype]:
        raise UnsupportedModelError(
            f"{kind}, or code in it, is not proven to fold, and a trial fold of it is off by {difference:.1e} of the "
            "largest hidden value: a token's output depends on more than attention to its left context. "
            "Run it unfolded."
        )
