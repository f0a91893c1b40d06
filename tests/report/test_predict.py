import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from radix_mlp.errors import InvalidInputError
from radix_mlp.models.tiny import tiny_model
from radix_mlp.report.predict import SHAPES, shape_of


def test_weights_and_flop_against_a_real_model(tmp_path):
    model = tiny_model()
    shape = shape_of("tiny")
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    assert shape.weights == sum(p.numel() for p in matrices)
    with FlopCounterMode(display=False) as counter:
        model.model(torch.zeros(1, 10, dtype=torch.int64), use_cache=False)
    linear = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert shape.flop(10, 0) == linear

    model.config.save_pretrained(tmp_path)
    assert shape_of(str(tmp_path)) == shape


def test_known_sizes():
    # billions of weights without embeddings, as the model cards state them
    for name, billions in {"qwen3-0.6b": 0.44, "qwen3-4b": 3.6, "qwen3-8b": 6.95, "qwen3-32b": 31.2}.items():
        assert SHAPES[name].weights / 1e9 == pytest.approx(billions, rel=0.02)


def test_bad_shapes(tmp_path):
    with pytest.raises(InvalidInputError, match=r"shape='gpt-9'.*qwen3-8b"):
        shape_of("gpt-9")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(InvalidInputError, match="no decoder shape"):
        shape_of(str(tmp_path))
