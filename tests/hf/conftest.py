"""A tiny Qwen3 with sliding and full layers, and a batch that shares prefixes."""

from __future__ import annotations

import pytest
import torch
from tools.model_types.sweep import one_at_a_time, sample_sequences
from tools.model_types.zoo import tiny_model
from transformers import PreTrainedModel


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("qwen3", dtype=torch.float64)


@pytest.fixture
def sequences() -> list[torch.Tensor]:
    return sample_sequences()


@pytest.fixture
def expected(model: PreTrainedModel, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits `[T, V]` of every sequence alone through the unmodified model."""
    return one_at_a_time(model, sequences)
