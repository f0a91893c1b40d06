"""A poisoned text among good ones, through the adapters: as the library has it, NaN for that text alone, and named."""

import copy

import numpy as np
import pytest
from lm_eval.models.huggingface import HFLM
from tests.engine.poison import poisoned, random_texts
from tests.integrations.models import embedder, reranker
from tests.integrations.test_lm_eval import requests

from radix_mlp.errors import InvalidInputError
from radix_mlp.integrations.lm_eval import RadixLM
from radix_mlp.integrations.sentence_transformers import enable
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer


def _poison(model):
    poisoned(model[0].model)
    return model


def same_where_finite(found, expected, bad):
    found, expected = np.asarray(found), np.asarray(expected)
    finite = np.isfinite(found.reshape(len(found), -1)).all(1)
    assert np.flatnonzero(~finite).tolist() == bad
    np.testing.assert_allclose(found[finite], expected[finite], atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["lasttoken", "mean"])
def test_sentence_transformer(tmp_path, mode, seed):
    stock = _poison(embedder(tmp_path, mode))
    texts, bad = random_texts(seed)
    # one text a batch: padding lets NaN through under some kernels
    expected = stock.encode(texts, batch_size=1)
    ours = enable(copy.deepcopy(stock), threshold=1)
    with pytest.warns(UserWarning, match="is not a number") as caught:
        found = ours.encode(texts)
    same_where_finite(found, expected, bad)
    assert all(any(repr(texts[place]) in str(warning.message) for warning in caught) for place in bad)


@pytest.mark.parametrize("seed", range(2))
def test_cross_encoder(tmp_path, seed):
    stock = _poison(reranker(tmp_path))
    texts, bad = random_texts(seed)
    pairs = [("What", text) for text in texts]
    expected = stock.predict(pairs, batch_size=1)
    with pytest.warns(UserWarning, match="is not a number"):
        found = enable(copy.deepcopy(stock), threshold=1).predict(pairs)
    same_where_finite(found, expected, bad)


@pytest.mark.parametrize("seed", range(3))
def test_lm_eval(seed):
    texts, bad = random_texts(seed)
    pairs = requests("loglikelihood", [(text, " is") for text in texts])
    stock = HFLM(poisoned(tiny_model()), tokenizer=tiny_tokenizer(), batch_size=1)
    expected = [logprob for logprob, _ in stock.loglikelihood(pairs, disable_tqdm=True)]
    ours = RadixLM(poisoned(tiny_model()), tokenizer=tiny_tokenizer(), threshold=1)
    with pytest.warns(UserWarning, match="the log-likelihood of .* is not a number"):
        found = [logprob for logprob, _ in ours.loglikelihood(pairs, disable_tqdm=True)]
    same_where_finite(found, expected, bad)


def test_ids_without_an_embedding(tmp_path):
    model = embedder(tmp_path)
    model.tokenizer.add_tokens(["[NEW]"])
    with pytest.raises(InvalidInputError, match=r"'a \[NEW\]' has the token id 259"):
        enable(model).encode(["a", "a [NEW]"])
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["[NEW]"])
    ours = RadixLM(tiny_model(), tokenizer=tokenizer)
    for pair in [("a [NEW]", " b"), ("a", " b[NEW]")]:
        with pytest.raises(InvalidInputError, match="has the token id 259"):
            ours.loglikelihood(requests("loglikelihood", [pair]), disable_tqdm=True)
