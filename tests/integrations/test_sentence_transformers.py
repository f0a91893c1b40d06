"""Enabled objects of sentence-transformers give what the stock ones give."""

import copy
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentence_transformers as library
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tests.containers import LISTS, NO_LISTS
from tests.integrations.models import PAIRS, TEXTS, embedder, reranker, save

import radix_mlp
from radix_mlp import is_enabled as is_transformer_enabled
from radix_mlp.engine.execution.tokenize_ahead import ChunkSizes
from radix_mlp.errors import InvalidDtypeError, InvalidInputError, UnsupportedCallError, UnsupportedModelError
from radix_mlp.integrations.sentence_transformers import disable, enable, is_enabled, stats, text_order
from radix_mlp.models.tiny import tiny_classifier, tiny_model, tiny_tokenizer

MODES = ["lasttoken", "mean", "cls", "weightedmean", "max", ("mean", "lasttoken")]


def close(found, expected, atol=2e-5):
    assert type(found) is type(expected)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.fixture
def model(tmp_path):
    return embedder(tmp_path / "model")


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("include_prompt", [True, False])
def test_encode(tmp_path, mode, include_prompt):
    model = embedder(tmp_path / "model", mode, include_prompt=include_prompt)
    calls = [{}, {"prompt_name": "say"}, {"prompt": "x "}]
    expected = [model.encode(TEXTS, **options) for options in calls]
    enable(model, threshold=1)
    for options, stock in zip(calls, expected, strict=True):
        close(model.encode(TEXTS, **options), stock)
        assert stats(model).num_compact < 0.6 * stats(model).num_tokens


@pytest.mark.parametrize("kind", LISTS)
def test_inputs_of_other_kinds(model, kind):
    expected = model.encode(TEXTS[:6])
    close(enable(model, threshold=1).encode(LISTS[kind](TEXTS[:6])), expected)


@pytest.mark.parametrize("kind", set(LISTS) - {"array", "pandas index", "polars", "arrow", "arrow, chunked"})
def test_pairs_of_other_kinds(tmp_path, kind):
    model = reranker(tmp_path / "model")
    expected = model.predict(PAIRS[:6])
    close(enable(model, threshold=1).predict(LISTS[kind](PAIRS[:6])), expected)


@pytest.mark.parametrize("kind", ["set", "frozen set", "pandas table", "polars table", "arrow table", "data set"])
def test_what_is_no_list_is_refused_by_name(model, kind):
    with pytest.raises(InvalidDtypeError, match="must be a list"):
        enable(model).encode(NO_LISTS[kind](TEXTS))


def test_order_and_attention_matter(model):
    # the comparisons of this file would notice a shuffled answer and a lost context
    stock = model.encode(TEXTS)
    assert np.abs(stock[1:] - stock[:-1]).max(axis=1).min() > 1e-2
    alone = model.encode([text[-1] for text in TEXTS])
    assert np.abs(stock - alone)[[0, 1, 2, 3]].max(axis=1).min() > 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {"truncate_dim": 8, "normalize_embeddings": True},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"batch_size": 3, "show_progress_bar": True},
        {"precision": "ubinary"},
        {"device": "cpu"},
        {"processing_kwargs": {"text": {"max_length": 7}}},
    ],
    ids=str,
)
def test_arguments_of_encode(model, options):
    expected = model.encode(TEXTS, **options)
    found = enable(model).encode(TEXTS, **options)
    if isinstance(expected, list):
        found, expected = torch.stack(found), torch.stack(expected)
    close(found, expected)


def test_precision(model):
    expected = model.encode(TEXTS, precision="int8")
    found = enable(model).encode(TEXTS, precision="int8")
    assert found.dtype == expected.dtype
    # a value next to the edge of a bucket may fall on its other side
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_queries_documents_and_single_texts(model):
    calls = [
        lambda: model.encode_query(TEXTS),
        lambda: model.encode_document(TEXTS),
        lambda: model.encode(TEXTS[0]),
        lambda: model.encode(np.array(TEXTS)),
        lambda: model.encode(sentences=TEXTS),
        lambda: model.encode([]),
    ]
    expected = [call() for call in calls]
    enable(model, threshold=1)
    for call, stock in zip(calls, expected, strict=True):
        close(call(), stock)


def test_vectors_of_tokens(tmp_path):
    model = embedder(tmp_path / "model", dense=False)
    expected = model.encode(TEXTS, output_value="token_embeddings")
    found = enable(model, threshold=1).encode(TEXTS, output_value="token_embeddings")
    for ours, stock in zip(found, expected, strict=True):
        close(ours, stock)


def test_texts_that_are_cut_and_padding_on_the_left(tmp_path):
    model = embedder(tmp_path / "model", "mean", padding_side="left", truncate_dim=10)
    model.max_seq_length = 9
    expected = model.encode(TEXTS)
    close(enable(model, threshold=1).encode(TEXTS), expected)


def test_many_batches_and_parts(tmp_path):
    model = embedder(tmp_path / "model", ("mean", "lasttoken"))
    expected = model.encode(TEXTS)
    enable(model, threshold=1, max_batch_tokens=40)
    model.encode.engine.chunk_sizes = ChunkSizes(first=3, fewest=7)
    model.encode.tail.max_unfolded = 64 * 50
    close(model.encode(TEXTS), expected)
    assert stats(model).num_batches > 3


def test_the_object_stays_what_it_was(model):
    before = model.state_dict()
    kind, signature = type(model), inspect.signature(model.encode)
    expected = model.encode(TEXTS)
    assert enable(model) is model
    assert is_enabled(model)
    assert type(model) is kind
    assert inspect.signature(model.encode) == signature
    assert model.state_dict().keys() == before.keys()
    enable(model, threshold=1)
    disable(model)
    disable(model)
    assert not is_enabled(model)
    assert not is_transformer_enabled(model[0].auto_model)
    assert "encode" not in vars(model)
    np.testing.assert_array_equal(model.encode(TEXTS), expected)
    with pytest.raises(InvalidInputError, match="not enabled"):
        stats(model)


def test_modules_changed_after_enabling(model):
    enable(model, threshold=1)
    model[1].pooling_mode = "mean"
    model[2] = torch.nn.Sequential()
    model[2].forward = lambda features: features | {"sentence_embedding": 3 * features["sentence_embedding"]}
    model.train()
    found = model.encode(TEXTS)
    assert not model.training
    close(found, disable(model).encode(TEXTS))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_own_their_weights(model, copied):
    enable(model, threshold=1)
    twin = copied(model)
    expected = model.encode(TEXTS)
    close(twin.encode(TEXTS), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    close(model.encode(TEXTS), expected, 0)
    close(twin.encode(TEXTS), disable(twin).encode(TEXTS))


def test_saved_and_loaded(model, tmp_path):
    expected = enable(model).encode(TEXTS)
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    loaded = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert not is_enabled(loaded)
    close(loaded.encode(TEXTS), expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_lora_adapters(model):
    model.add_adapter(LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    expected = model.encode(TEXTS)
    model.disable_adapters()
    without = model.encode(TEXTS)
    assert np.abs(without - expected).max() > 1e-2
    model.enable_adapters()
    close(enable(model, threshold=1).encode(TEXTS), expected)
    # also of an enabled object
    model.disable_adapters()
    close(model.encode(TEXTS), without)
    model.add_adapter(LoraConfig(target_modules=["o_proj"], init_lora_weights=False), "second")
    second = model.encode(TEXTS)
    close(second, disable(model).encode(TEXTS))
    assert np.abs(second - without).max() > 1e-2


def test_adapters_in_pefts_class(model):
    model[0].model = get_peft_model(model[0].model, LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    expected = model.encode(TEXTS)
    close(enable(model, threshold=1).encode(TEXTS), expected)
    with model[0].model.disable_adapter():
        assert np.abs(model.encode(TEXTS) - expected).max() > 1e-2
    close(model.encode(TEXTS), expected)
    disable(model)
    prompt = PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2)
    model[0].model = get_peft_model(model[0].model.unload(), prompt)
    with pytest.raises(UnsupportedModelError, match="learnt prompt"):
        enable(model)


@pytest.mark.parametrize("change", [{"target_modules": ["score"]}, {"modules_to_save": ["score"]}], ids=str)
def test_labels_by_a_head_that_was_adapted(tmp_path, change):
    folder = save(tiny_classifier(), tiny_tokenizer(), tmp_path / "model")
    model = library.CrossEncoder(folder, device="cpu")
    before = model.predict(PAIRS)
    model.add_adapter(LoraConfig(**{"target_modules": ["q_proj"], "init_lora_weights": False} | change))
    for name, weight in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(weight)
    expected = model.predict(PAIRS)
    assert np.abs(expected - before).max() > 1e-2
    close(enable(model, threshold=1).predict(PAIRS), expected)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("activation", ["Sigmoid", "Identity"])
def test_predict_by_logits(tmp_path, chat, activation):
    model = reranker(tmp_path / "model", chat=chat, activation_fn=getattr(torch.nn, activation)())
    documents = [document for _, document in PAIRS]
    calls = [
        lambda: model.predict(PAIRS),
        lambda: model.predict(PAIRS, prompt="find", convert_to_tensor=True),
        lambda: model.predict(PAIRS, activation_fn=torch.nn.Tanh(), batch_size=5),
        lambda: np.float32(model.predict(PAIRS[0])),
        lambda: model.predict([]),
        lambda: np.array([place["score"] for place in model.rank("what is it?", documents, top_k=5)]),
    ]
    expected = [call() for call in calls]
    order = [place["corpus_id"] for place in model.rank("what is it?", documents)]
    enable(model, threshold=1)
    for call, stock in zip(calls, expected, strict=True):
        close(call(), stock, 5e-5)
    assert [place["corpus_id"] for place in model.rank("what is it?", documents)] == order
    assert stats(model).num_compact < 0.6 * stats(model).num_tokens


def test_pairs_that_are_cut_keep_the_end_of_their_template(tmp_path):
    model = reranker(tmp_path / "model", chat=True)
    model.max_seq_length = 40
    expected = model.predict(PAIRS)
    close(enable(model, threshold=1).predict(PAIRS), expected)


def test_a_head_of_the_whole_vocabulary(tmp_path):
    class Likeliest(torch.nn.Module):
        def forward(self, features):
            return features | {"scores": features["causal_logits"][:, -1].max(-1, keepdim=True).values}

    model = reranker(tmp_path / "model")
    model[1] = Likeliest()
    expected = model.predict(PAIRS, activation_fn=torch.nn.Identity())
    close(enable(model, threshold=1).predict(PAIRS, activation_fn=torch.nn.Identity()), expected, 5e-5)


@pytest.mark.parametrize("labels", [["relevant"], ["no", "yes"], ["a", "b", "c"]], ids=len)
def test_predict_by_labels(tmp_path, labels):
    folder = save(tiny_classifier(labels), tiny_tokenizer(), tmp_path / "model")
    model = library.CrossEncoder(folder, device="cpu")
    calls = [
        lambda: model.predict(PAIRS),
        lambda: model.predict(PAIRS, apply_softmax=True),
        lambda: model.predict(PAIRS, convert_to_numpy=False)[3],
    ]
    expected = [call() for call in calls]
    enable(model, threshold=1)
    for call, stock in zip(calls, expected, strict=True):
        close(call(), stock)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_value": None}, "output_value=None"),
        ({"device": ["cpu", "cpu"]}, "list of devices"),
        ({"pool": {}}, "a pool"),
    ],
)
def test_calls_that_are_refused(model, options, message):
    with pytest.raises(UnsupportedCallError, match=message):
        enable(model).encode(TEXTS, **options)


def test_arguments_that_are_wrong(model):
    enable(model)
    with pytest.raises(InvalidInputError, match="batch_size=0"):
        model.encode(TEXTS, batch_size=0)
    with pytest.raises(InvalidInputError, match="'' has no tokens"):
        model.encode(["a", ""])
    with pytest.raises(ValueError, match="does not use"):
        model.encode(TEXTS, no_such_argument=1)
    with pytest.raises(InvalidInputError, match="threshold"):
        enable(model, threshold=-1)


def test_order_of_inputs():
    assert text_order(["b", "a", "ab"]).tolist() == [1, 2, 0]
    assert text_order([["b", "x"], ("a", "y"), ["b", "w"]]).tolist() == [1, 2, 0]
    # messages have no text to go by
    assert text_order([{"role": "user"}, "a"]).tolist() == [0, 1]
    assert text_order([[{"role": "user"}], ["a"]]).tolist() == [0, 1]


def test_messages(tmp_path):
    model = reranker(tmp_path / "model", chat=True)
    messages = [
        [{"role": "query", "content": query}, {"role": "document", "content": document}] for query, document in PAIRS
    ]
    expected = model.predict(PAIRS)
    close(model.predict(messages), expected)
    close(enable(model, threshold=1).predict(messages), expected)


@pytest.mark.slow
def test_example(tmp_path):
    example = Path(radix_mlp.__file__).parents[2] / "examples" / "rerank_with_sentence_transformers.py"
    result = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"enabled .* of 27,490 tokens computed\nlargest difference \de-0[5-9]", result.stdout)


def test_models_that_are_refused(model, tmp_path):
    with pytest.raises(UnsupportedModelError, match="is a Linear"):
        enable(torch.nn.Linear(1, 1))
    with pytest.raises(UnsupportedModelError, match="SparseEncoder"):
        enable(library.SparseEncoder(modules=[model[0], model[1]], device="cpu"))
    model[0].auto_model.config.output_hidden_states = True
    with pytest.raises(UnsupportedModelError, match="hidden states of all layers"):
        enable(model)
    both_ways = tiny_model().model
    both_ways.config.is_causal = False
    bidirectional = embedder(tmp_path / "other", model=both_ways)
    with pytest.raises(UnsupportedModelError, match="both directions"):
        enable(bidirectional)
    assert not is_enabled(bidirectional)
    words = library.sentence_transformer.modules.BoW(["a", "b"])
    with pytest.raises(UnsupportedModelError, match="first module is a BoW"):
        enable(library.SentenceTransformer(modules=[words], device="cpu"))
