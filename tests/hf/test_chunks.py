"""Attention in chunks by code of others: what cannot be known is refused."""

from __future__ import annotations

import pytest
import torch
from tools.model_types.sweep import gradient_error
from tools.model_types.zoo import tiny_config, tiny_model
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.masking_utils import create_chunked_causal_mask
from transformers.models.llama.modeling_llama import LlamaModel

import radix_mlp
from radix_mlp.errors import UnsupportedModelError


class ChunkedModel(LlamaModel):
    """Attends within chunks of `config.attention_chunk_size` tokens, by a mask of its own."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            row = torch.arange(input_ids.shape[1])
            chunk = row // self.config.attention_chunk_size
            seen = (row <= row[:, None]) & (chunk == chunk[:, None])
            attention_mask = (seen & attention_mask[:, None].bool())[:, None]
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


class ChunkedLM(LlamaForCausalLM):
    def __init__(self, config, trunk_class) -> None:
        super().__init__(config)
        self.model = trunk_class(config)


class KnownChunks(LlamaModel):
    """Makes transformers' mask with chunks for all layers, with no `config.layer_types`."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        mask = create_chunked_causal_mask(
            config=self.config,
            inputs_embeds=self.embed_tokens(input_ids),
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=position_ids,
        )
        return super().forward(input_ids, mask, position_ids, **kwargs)


def chunked(size: int | None, trunk_class: type[LlamaModel] = ChunkedModel) -> PreTrainedModel:
    config = tiny_config("llama")
    config.attention_chunk_size = size
    return ChunkedLM(config, trunk_class).eval()


def test_chunks_longer_than_a_trial_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="does not call create_chunked_causal_mask"):
        radix_mlp.enable(chunked(64))


def test_a_stock_class_that_ignores_the_setting_folds() -> None:
    config = tiny_config("llama")
    config.attention_chunk_size = 64
    assert radix_mlp.is_enabled(radix_mlp.enable(LlamaForCausalLM(config).eval()))


def test_a_layer_of_others_under_the_setting_is_refused() -> None:
    config = tiny_config("llama")
    config.attention_chunk_size = 64
    model = LlamaForCausalLM(config).eval()
    model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp, torch.nn.PReLU())
    assert radix_mlp.is_enabled(radix_mlp.enable(model))
    model.model.layers[0].mlp = torch.nn.Sequential(torch.nn.Flatten(0, 0), model.model.layers[0].mlp)
    with pytest.raises(UnsupportedModelError, match=r"code of its own and config\.attention_chunk_size"):
        radix_mlp.enable(model)


@pytest.mark.parametrize("own_class", [True, False])
def test_chunks_without_layer_types_are_refused_with_the_setting_to_make(own_class) -> None:
    if own_class:
        model = chunked(64, KnownChunks)
        assert not hasattr(model.config, "layer_types")
    else:
        model = tiny_model("llama4_text")
        model.config.layer_types = None
    with pytest.raises(UnsupportedModelError, match=r"\(config.layer_types\)"):
        radix_mlp.enable(model, threshold=1)(torch.arange(8, 20)[None])


def test_gradients_in_chunks_are_those_of_one_sequence_at_a_time() -> None:
    assert gradient_error(tiny_model("llama4_text")) < 1e-5
