"""A tiny Qwen3 in float64 and sequences that share prefixes."""

from __future__ import annotations

import pytest
import torch
from tools.model_types.sweep import sample_sequences
from tools.model_types.zoo import tiny_model
from transformers import PreTrainedModel


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("qwen3", dtype=torch.float64)


@pytest.fixture
def sequences() -> list[torch.Tensor]:
    """Six, of 23, 17, 18, 21, 5 and 14 tokens, which share 14, 14, 9, 14, 3 and 14 with the first."""
    return sample_sequences()
