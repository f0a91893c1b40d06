"""The libraries' adapters on multimodal models: text alone folds, other inputs run as the library would."""

from __future__ import annotations

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from PIL import Image
from sentence_transformers import SentenceTransformer
from tests.integrations.test_trainer import rows
from tests.integrations.trainers import arguments, assert_same_training, train
from tests.models.multimodal_folders import model_of, multimodal_folder, tokenizer_of
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from radix_mlp.errors import UnsupportedCallError
from radix_mlp.integrations import sentence_transformers as adapter
from radix_mlp.integrations.lm_eval import RadixLM
from radix_mlp.integrations.trainer import enable

TEXTS = ["one root grows under the tree", "one root grows under the house", "one root", "else"]


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl", "mistral3"])
@pytest.mark.filterwarnings("ignore")
def test_trainer(tmp_path, model_type) -> None:
    def make() -> Trainer:
        collator = DataCollatorForSeq2Seq(tokenizer_of())
        options = TrainingArguments(**arguments(tmp_path))
        return Trainer(model_of(model_type), options, train_dataset=rows(), data_collator=collator)

    assert_same_training(train(make, lambda trainer: enable(trainer, threshold=1)), train(make))


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl"])
def test_lm_eval_by_name(tmp_path, model_type) -> None:
    folder = multimodal_folder(tmp_path, model_type)
    pairs = [(text[:9], text[9:]) for text in TEXTS[:2]]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    stock = HFLM(model_of(model_type), tokenizer=tokenizer_of(), batch_size=2)
    model = RadixLM(folder, device="cpu", batch_size=2, threshold=1)
    expected = stock.loglikelihood(requests, disable_tqdm=True)
    for found, one in zip(model.loglikelihood(requests, disable_tqdm=True), expected, strict=True):
        assert found == (pytest.approx(one[0], rel=1e-5), one[1])
    assert model.stats.num_compact < model.stats.num_tokens


def test_sentence_transformers(tmp_path) -> None:
    model = SentenceTransformer(multimodal_folder(tmp_path, "gemma3", "trunk"), device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), np.uint8))
    expected, of_image = model.encode(TEXTS), model.encode([image])
    assert np.abs(expected[0] - expected[1]).max() > 1e-2
    adapter.enable(model)
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5)
    stats = adapter.stats(model)
    assert stats.num_compact < stats.num_tokens
    with pytest.warns(UserWarning, match="of the modality image"):
        np.testing.assert_array_equal(model.encode([image]), of_image)
    adapter.enable(model, threshold=1)
    with pytest.raises(UnsupportedCallError, match="of the modality image"):
        model.encode([image])
