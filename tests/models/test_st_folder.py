import json

import numpy as np
import pytest
import torch
from tests.engine import oracle
from tests.models.sentence_transformers_folders import (
    dense_config,
    dense_weights,
    write_folder,
    write_reranker,
)
from transformers import BertConfig, BertModel

from radix_mlp import Engine
from radix_mlp.errors import InvalidInputError, RejectedItemsError, UnsupportedModelError
from radix_mlp.models import sentence_transformers_folder as folders
from radix_mlp.models.tiny import tiny_model, tiny_reranker, tiny_reranker_tokenizer, tiny_tokenizer

TEXTS = ["a radix is a root", "a radix", "something else", "a radix is a root"]
PROMPTS = {"prompts": {"query": "query: ", "empty": "", "none": None}, "default_prompt_name": "query"}
LAST = ("Pooling", {"word_embedding_dimension": 64, "pooling_mode": "lasttoken"})


def oracle_vectors(prompt="", pooling="last", texts=TEXTS):
    model = tiny_model()
    return np.stack([oracle.embedding(model, list((prompt + text).encode()), pooling).numpy() for text in texts])


def close(a, b):
    return np.allclose(a, b, rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted_mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "weightedmean"}, "weighted_mean"),
        ({}, "mean"),
    ],
)
def test_the_folder_says_how_to_pool(tmp_path, config, pooling):
    folder = write_folder(tmp_path, [("Pooling", {"word_embedding_dimension": 64, **config})])
    engine = Engine(folder)
    assert close(engine.embed(TEXTS, normalize=False), oracle_vectors(pooling=pooling))
    # said outright, it is another
    assert close(engine.embed(TEXTS, normalize=False, pooling="last"), oracle_vectors())
    assert engine.max_length == 512


def test_several_poolings_are_joined_in_the_librarys_order(tmp_path):
    flags = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True}
    folder = write_folder(tmp_path, [("Pooling", flags)])
    expected = np.concatenate([oracle_vectors(pooling=name) for name in ("mean", "last")], axis=1)
    engine = Engine(folder)
    assert close(engine.embed(TEXTS, normalize=False), expected)
    assert engine.embed([]).shape == (0, 128)


@pytest.mark.parametrize("activation", ["Tanh", "Sigmoid", "Identity"])
@pytest.mark.parametrize("residual", [False, True])
def test_dense_and_normalize(tmp_path, activation, residual):
    rows = 64 if residual else 16
    modules = [LAST, ("Dense", dense_config(rows, 64, activation, use_residual=residual)), ("Normalize", None)]
    engine = Engine(write_folder(tmp_path, modules))
    weights = dense_weights(rows, 64)
    pooled = torch.from_numpy(oracle_vectors())
    dense = pooled @ weights["linear.weight"].T + weights["linear.bias"]
    dense = {"Tanh": torch.tanh, "Sigmoid": torch.sigmoid, "Identity": lambda x: x}[activation](dense)
    dense = dense + pooled if residual else dense
    expected = dense / dense.norm(dim=1, keepdim=True)
    assert close(engine.embed(TEXTS, normalize=False), expected)
    assert engine.embed([]).shape == (0, rows)
    # leading dimensions of the vector of length 1, scaled again only when asked
    assert close(engine.embed(TEXTS, normalize=False, dimensions=5), expected[:, :5])
    cut = expected[:, :5] / expected[:, :5].norm(dim=1, keepdim=True)
    assert close(engine.embed(TEXTS, dimensions=5), cut)
    with pytest.raises(InvalidInputError, match=f"dimensions=99: the model has {rows}"):
        engine.embed(TEXTS, dimensions=99)


def test_prompts_by_name_by_default_and_outright(tmp_path):
    engine = Engine(write_folder(tmp_path, [LAST], settings=PROMPTS))
    for options, prompt in (
        ({}, "query: "),
        ({"prompt_name": "query"}, "query: "),
        ({"prompt_name": "empty"}, ""),
        ({"prompt": "say: "}, "say: "),
        ({"prompt": ""}, ""),
    ):
        assert close(engine.embed(TEXTS, normalize=False, **options), oracle_vectors(prompt)), options
    with pytest.raises(InvalidInputError, match=r"prompt_name='other': the model's prompts are 'query', 'empty'\."):
        engine.embed(TEXTS, prompt_name="other")
    with pytest.raises(InvalidInputError, match="prompt and prompt_name='query' exclude each other"):
        engine.embed(TEXTS, prompt_name="query", prompt="x")
    with pytest.raises(InvalidInputError, match=r"the model's prompts are none\."):
        Engine("tiny").embed(TEXTS, prompt_name="query")


@pytest.mark.parametrize("mode", ["lasttoken", "mean", "cls", "weightedmean"])
def test_tokens_of_the_prompt_can_be_left_out(tmp_path, mode):
    config = {"pooling_mode": mode, "include_prompt": False}
    engine = Engine(write_folder(tmp_path, [("Pooling", config)], settings=PROMPTS))
    model, skip = tiny_model(), len("query: ")
    expected = []
    for text in TEXTS:
        hidden = oracle.hidden_of(model, list(f"query: {text}".encode()))
        weights = torch.arange(skip + 1, len(hidden) + 1)[:, None]
        kept = hidden[skip:]
        pooled = {"lasttoken": kept[-1], "mean": kept.mean(0), "cls": kept[0]}
        expected.append(pooled.get(mode, (kept * weights).sum(0) / weights.sum()).numpy())
    assert close(engine.embed(TEXTS, normalize=False), np.stack(expected))
    if mode != "lasttoken":
        assert not close(engine.embed(TEXTS, normalize=False, prompt="Query: "), oracle_vectors("Query: "))
    with pytest.raises(RejectedItemsError, match=r"texts\[1\]: '' has no tokens besides the prompt's"):
        engine.embed(["a", ""])
    # without a prompt there is nothing to leave out
    plain = {"lasttoken": "last", "weightedmean": "weighted_mean"}.get(mode, mode)
    assert close(engine.embed(TEXTS, normalize=False, prompt=""), oracle_vectors(pooling=plain))


def test_limits_cases_and_subfolders(tmp_path):
    transformer = {"max_seq_length": 8, "do_lower_case": True}
    engine = Engine(write_folder(tmp_path, [LAST], transformer=transformer, below="0_Transformer"))
    assert close(engine.embed(["A Radix"], normalize=False), oracle_vectors(texts=["a radix"]))
    with pytest.raises(RejectedItemsError, match="more than the limit of 8"):
        engine.embed(["a radix is"])
    assert close(engine.embed(["a radix is"], truncate=True), engine.embed(["a radix "]))


def test_a_prompt_that_is_longer_in_lower_case_is_left_out_whole(tmp_path):
    transformer = {"max_seq_length": 32, "do_lower_case": True}
    mean = ("Pooling", {"pooling_mode": "mean", "include_prompt": False})
    engine = Engine(write_folder(tmp_path, [mean], transformer=transformer))
    prompt = "İİİ: "
    skip = len(prompt.lower().encode())
    assert skip > len(prompt.encode())
    hidden = oracle.hidden_of(tiny_model(), list(f"{prompt}a radix".lower().encode()))
    assert close(engine.embed(["A Radix"], prompt=prompt, normalize=False), hidden[skip:].mean(0).numpy()[None])


def test_saved_dimensions_apply_unless_others_are_asked_for(tmp_path):
    engine = Engine(write_folder(tmp_path, [LAST], settings={"truncate_dim": 8}))
    assert close(engine.embed(TEXTS, normalize=False), oracle_vectors()[:, :8])
    assert engine.embed(TEXTS, dimensions=20).shape == (4, 20)
    assert engine.embed([]).shape == (0, 8)


@pytest.mark.parametrize(
    ("modules", "transformer", "message"),
    [
        ([], {}, "what follows its transformer is nothing, not Pooling"),
        ([("Pooling", {"pooling_mode": "max"})], {}, "it pools with 'max'"),
        ([LAST, ("sentence_transformers.models.LSTM", {})], {}, "its module 2_LSTM is LSTM"),
        ([LAST, ("custom_st.Layer", {})], {}, "its module 2_Layer is custom_st.Layer"),
        ([LAST, ("Dense", dense_config(4, 64, activation="Nothing"))], {}, "has the activation .*Nothing"),
        ([LAST, ("Dense", dense_config(4, 64, module_input_name="token_embeddings"))], {}, "works on 'token_emb"),
        ([LAST], {"query_expansion": {"length": 3}}, "its transformer sets query_expansion"),
        ([LAST], {"model_args": {"is_causal": False}}, "its transformer sets is_causal in model_args"),
        ([LAST], {"modality_config": {"message": {}}}, "go through a chat template"),
        ([LAST], {"modality_config": {"text": {"method_output_name": "logits"}}}, "hands on 'logits'"),
        ([("LogitScore", {"true_token_id": 1})], {}, "what follows its transformer is LogitScore"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, modules, transformer, message):
    folder = write_folder(tmp_path, modules, transformer=transformer)
    engine = Engine(folder)
    with pytest.raises(UnsupportedModelError, match=rf"{message}.*not supported here\. Run it with sentence-transf"):
        engine.embed(TEXTS)


def test_other_first_modules_and_bidirectional_backbones(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertModel(BertConfig(vocab_size=259, **sizes))
    folder = write_folder(tmp_path / "bert", [LAST], model=bert)
    with pytest.raises(UnsupportedModelError, match="both directions"):
        Engine(folder)
    assert Engine(folder, threshold=0).embed(TEXTS).shape == (4, 32)
    folder = tmp_path / "static"
    write_folder(folder, [LAST])
    entries = json.loads((folder / "modules.json").read_text())
    entries[0]["type"] = "sentence_transformers.models.StaticEmbedding"
    (folder / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(UnsupportedModelError, match=r"its first module is .*StaticEmbedding, not a Transformer"):
        Engine(str(folder))
    entries[1]["path"] = "../elsewhere"
    entries[0]["type"] = "sentence_transformers.models.Transformer"
    (folder / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(InvalidInputError, match="leads out of the folder"):
        Engine(str(folder))
    (folder / "modules.json").write_text("[")
    with pytest.raises(InvalidInputError, match=r"modules\.json: not JSON"):
        Engine(str(folder))


def test_missing_weights_are_named(tmp_path):
    folder = write_folder(tmp_path, [LAST, ("Dense", dense_config(4, 64))], weights=dense_weights(5, 64))
    with pytest.raises(InvalidInputError, match=r"2_Dense: .*size mismatch"):
        Engine(folder).embed(TEXTS)
    (tmp_path / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(InvalidInputError, match=r"neither a model\.safetensors nor"):
        Engine(folder).embed(TEXTS)
    torch.save(dense_weights(4, 64), tmp_path / "2_Dense" / "pytorch_model.bin")
    assert Engine(folder).embed(TEXTS).shape == (4, 4)


def test_hub_models_that_cannot_be_asked_are_not_taken_for_plain_ones(monkeypatch, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert folders.read_folder("someone/some-model").looked_up is False
    monkeypatch.setattr(
        "radix_mlp.engine.execution.loaded_model.read_folder",
        lambda name: folders.FolderSettings(name, looked_up=False),
    )
    engine = Engine(str(tmp_path))
    with pytest.raises(InvalidInputError, match=r"without a network it is not known.*pooling="):
        engine.embed(TEXTS)
    assert close(engine.embed(TEXTS, pooling="last", normalize=False), oracle_vectors())
    with pytest.raises(InvalidInputError, match=r"without a network it cannot be told.*template="):
        engine.rerank("q", ["d"])


def chat_tokenizer():
    tokenizer = tiny_reranker_tokenizer()
    tokenizer.chat_template = (
        "{% set query = messages | selectattr('role', 'eq', 'query') | first %}"
        "{% set document = messages | selectattr('role', 'eq', 'document') | first %}"
        "{% if messages[0].role == 'system' %}[{{ messages[0].content }}]{% endif %}"
        "{{ query.content }}|{{ document.content }}<|im_end|>"
    )
    return tokenizer


CHAT = {"modality_config": {"message": {"method": "forward", "method_output_name": "logits"}}}
PAIRS = [("what is it?", "a root"), ("what is it?", "a fruit"), ("why?", "because")]


def logits_of(text):
    with torch.no_grad():
        return tiny_reranker()(torch.tensor([tiny_reranker_tokenizer()(text)["input_ids"]])).logits[0, -1]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_cross_encoders_with_a_logit_score(tmp_path, chat, both):
    scores = {"true_token_id": ord("!"), "false_token_id": ord("?") if both else None}
    settings = {**PROMPTS, "activation_fn": "torch.nn.modules.linear.Identity"}
    folder = write_reranker(
        tmp_path, scores, settings=settings, transformer=CHAT if chat else {}, tokenizer=chat_tokenizer()
    )
    engine = Engine(folder)
    for options, prompt in (({}, "query: "), ({"instruction": ""}, ""), ({"instruction": "x "}, "x ")):
        found = engine.rerank_pairs(PAIRS, **options)
        for (query, document), value in zip(PAIRS, found, strict=True):
            system = f"[{prompt}]" if prompt else ""
            logits = logits_of(f"{system}{query}|{document}<|im_end|>" if chat else prompt + query + document)
            expected = logits[ord("!")] - (logits[ord("?")] if both else 0)
            assert value == pytest.approx(float(expected), abs=1e-4)
    ranked = engine.rerank(PAIRS[0][0], [document for _, document in PAIRS], top_n=1)
    assert len(ranked) == 1


def test_the_activation_is_a_sigmoid_unless_the_folder_says_otherwise(tmp_path):
    scores = {"true_token_id": ord("!"), "false_token_id": ord("?")}
    engine = Engine(write_reranker(tmp_path, scores))
    raw = engine.rerank_pairs(PAIRS, raw_scores=True)
    assert engine.rerank_pairs(PAIRS) == pytest.approx(1 / (1 + np.exp(-raw)), abs=1e-6)


def test_folders_of_embedders_do_not_rerank(tmp_path):
    engine = Engine(write_folder(tmp_path, [LAST], model=tiny_reranker(), tokenizer=tiny_reranker_tokenizer()))
    with pytest.raises(UnsupportedModelError, match="is an embedder: it makes vectors"):
        engine.rerank("q", ["d"])
