"""Folders that lack something, or whose files contradict each other: an error that names it, never another answer."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from tests.models.folders import edit, rewrite, small_model, tokenizer_that_writes, write
from tests.models.sentence_transformers_folders import dense_config, write_folder, write_reranker
from transformers import AutoModel, AutoTokenizer

from radix_mlp import Engine
from radix_mlp.errors import InvalidInputError, RadixError, UnsupportedModelError
from radix_mlp.models.load_tokenizer import load_tokenizer

TEXT = "a radix"
HOLE = "layers.1.mlp.down_proj.weight"
LAST = ("Pooling", {"word_embedding_dimension": 64, "pooling_mode": "lasttoken"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("folders")
    return {kind: write(path / kind, small_model(kind)) for kind in ("trunk", "causal", "classifier")}


def renamed(prefix):
    return lambda weights: {f"{prefix}{key}": value for key, value in weights.items()}


def without(*names):
    return lambda weights: {key: value for key, value in weights.items() if not key.endswith(names)}


def with_more(**tensors):
    return lambda weights: weights | {key.replace("__", "."): value for key, value in tensors.items()}


@pytest.mark.parametrize("kind", ["trunk", "causal", "classifier"])
@pytest.mark.parametrize("loaded_as", ["auto", "trunk", "causal", "classifier"])
def test_a_missing_weight_is_never_made_up(folders, tmp_path, kind, loaded_as):
    folder = rewrite(folders[kind], tmp_path / "x", without(HOLE))
    with pytest.raises(InvalidInputError, match=rf"lacks .*{HOLE}") as caught:
        Engine(folder, kind=loaded_as)
    # which would not help
    assert "kind='trunk'" not in str(caught.value)


@pytest.mark.parametrize("kind", ["trunk", "causal", "classifier"])
def test_weights_under_other_names(folders, tmp_path, kind):
    folder = rewrite(folders[kind], tmp_path / "x", renamed("encoder."))
    with pytest.raises(InvalidInputError, match=r"lacks .*It has encoder\..*rename them"):
        Engine(folder)


@pytest.mark.parametrize(("layers", "says"), [(1, r"holds .*layers\.1\."), (3, r"lacks .*layers\.2\.")])
@pytest.mark.parametrize("kind", ["trunk", "causal", "classifier"])
def test_more_or_fewer_layers_than_the_file(folders, tmp_path, kind, layers, says):
    change = {"num_hidden_layers": layers, "layer_types": None}
    folder = rewrite(folders[kind], tmp_path / "x", lambda weights: None, **change)
    with pytest.raises(InvalidInputError, match=rf"{says}.*num_hidden_layers"):
        Engine(folder)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("classifier", {"score__bias": torch.ones(2)}),
        ("trunk", {"score__bias": torch.ones(2)}),
        ("causal", {"v_head__weight": torch.ones(1, 32)}),
        ("causal", {"score__weight": torch.ones(2, 32)}),
        ("trunk", {"layers__0__self_attn__q_proj__bias": torch.ones(32)}),
        ("trunk", {"linear__weight": torch.ones(8, 32)}),
    ],
)
def test_a_weight_without_a_place_is_refused(folders, tmp_path, kind, more):
    [name] = more
    folder = rewrite(folders[kind], tmp_path / "x", with_more(**more))
    with pytest.raises(InvalidInputError, match=f"holds {name.replace('__', '.')}"):
        Engine(folder)


@pytest.mark.parametrize(
    ("kind", "more", "loaded_as"),
    [
        ("causal", {}, "trunk"),
        ("classifier", {}, "trunk"),
        ("trunk", {"lm_head__weight": torch.ones(263, 32)}, "auto"),
        ("classifier", {"lm_head__weight": torch.ones(263, 32)}, "auto"),
        ("causal", {"score__weight": torch.ones(2, 32)}, "causal"),
        ("trunk", {"layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4)}, "auto"),
        ("causal", {"model__layers__0__self_attn__masked_bias": torch.ones(1)}, "auto"),
    ],
)
def test_heads_that_are_not_used_and_old_buffers_are_left_out(folders, tmp_path, kind, more, loaded_as):
    folder = rewrite(folders[kind], tmp_path / "x", with_more(**more))
    vectors = Engine(folder, kind=loaded_as).embed([TEXT])
    assert np.array_equal(vectors, Engine(folders[kind]).embed([TEXT]))


def test_a_trunk_is_the_same_with_and_without_the_prefix(folders, tmp_path):
    folder = rewrite(folders["trunk"], tmp_path / "x", renamed("model."))
    assert np.array_equal(Engine(folder).embed([TEXT]), Engine(folders["trunk"]).embed([TEXT]))


def test_a_tied_head_needs_no_weight_of_its_own(folders, tmp_path):
    tied = write(tmp_path / "tied", small_model("causal", tie_word_embeddings=True))
    assert Engine(tied).score([("a", "b")])
    with pytest.raises(InvalidInputError, match=r"lacks .*embed_tokens"):
        Engine(rewrite(tied, tmp_path / "x", without("embed_tokens.weight")))
    with pytest.raises(InvalidInputError, match=r"lacks lm_head\.weight.*kind='trunk'"):
        Engine(rewrite(folders["causal"], tmp_path / "y", without("lm_head.weight")))


def test_a_classifier_whose_class_is_not_named_is_not_taken_for_a_language_model(tmp_path):
    folder = write(tmp_path, small_model("classifier", tie_word_embeddings=True))
    edit(folder / "config.json", architectures=None)
    with pytest.raises(InvalidInputError, match=r"holds score\.weight.*kind='classifier'"):
        Engine(folder)
    assert Engine(folder, kind="classifier").classify([TEXT])


def test_other_shapes_are_named(folders, tmp_path):
    folder = rewrite(folders["trunk"], tmp_path / "x", with_more(norm__weight=torch.ones(16)))
    with pytest.raises(InvalidInputError, match=r"norm\.weight is \[16\], and config\.json asks for \[32\]"):
        Engine(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named(folders, tmp_path, file):
    shutil.copytree(folders["trunk"], tmp_path, dirs_exist_ok=True)
    half = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(half[: len(half) // 2])
    with pytest.raises(InvalidInputError, match=file):
        Engine(tmp_path)


@pytest.mark.parametrize("names", [{"1": "a", "2": "b"}, {"0": "a", "2": "b"}, {"0": "a", "1": "b", "5": "c"}])
def test_labels_that_do_not_fit_the_scores(folders, tmp_path, names):
    folder = rewrite(folders["classifier"], tmp_path / "x", lambda weights: None, id2label=names)
    with pytest.raises(RadixError, match=r"config\.json"):
        Engine(folder)


OWN = """
from transformers import Qwen3Model

class Own(Qwen3Model):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        out = super().forward(input_ids, attention_mask, position_ids, **kwargs)
        out.last_hidden_state = out.last_hidden_state.flip(-1)
        return out
"""


@pytest.mark.parametrize("threshold", [0, 1])
def test_a_folders_own_class_runs_or_is_refused(folders, tmp_path, threshold):
    folder = rewrite(folders["trunk"], tmp_path / "own", lambda weights: None, auto_map={"AutoModel": "own_model.Own"})
    (folder / "own_model.py").write_text(OWN)
    with pytest.raises(InvalidInputError, match=r"auto_map in config.json names 'own_model\.Own'.*--trust-remote-code"):
        Engine(folder, threshold=threshold)
    found = Engine(folder, threshold=threshold, trust_remote_code=True).embed([TEXT], normalize=False)
    ids = torch.tensor([list(TEXT.encode())])
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state[0, -1].numpy()
    assert np.allclose(found[0], expected, rtol=0, atol=1e-5)
    stock = Engine(folders["trunk"], threshold=threshold).embed([TEXT], normalize=False)
    assert np.allclose(found[0], stock[0][::-1], rtol=0, atol=1e-5)


def test_own_classes_of_another_kind(folders, tmp_path):
    folder = rewrite(folders["causal"], tmp_path / "x", lambda weights: None, auto_map={"AutoModel": "own_model.Own"})
    (folder / "own_model.py").write_text(OWN)
    with pytest.raises(InvalidInputError, match=r"names 'own_model\.Own' for AutoModel"):
        Engine(folder)
    with pytest.raises(InvalidInputError, match=r"for AutoModel and none for AutoModelForCausalLM.*kind='trunk'"):
        Engine(folder, trust_remote_code=True)
    # asked for, it is transformers' own
    assert Engine(folder, kind="causal").score([("a", "b")])
    edit(folder / "config.json", auto_map={"AutoModelForSequenceClassification": "own_model.Own"})
    assert Engine(folder).score([("a", "b")])


@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["own.Slow", None]}, ["own.Slow", "own.Fast"]])
def test_a_folders_own_tokenizer_is_not_passed_over(folders, tmp_path, auto_map):
    shutil.copytree(folders["trunk"], tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "tokenizer_config.json", auto_map=auto_map)
    with pytest.raises(InvalidInputError, match=r"auto_map in tokenizer_config\.json names .*own\.Slow"):
        Engine(tmp_path)
    edit(tmp_path / "tokenizer_config.json", auto_map=None)
    edit(tmp_path / "config.json", auto_map={"AutoTokenizer": ["own.Slow", None]})
    with pytest.raises(InvalidInputError, match=r"auto_map in config\.json names .*AutoTokenizer"):
        Engine(tmp_path)


@pytest.mark.parametrize(
    ("single", "settings", "lacks"),
    [
        ("<|bos|> $A", {"add_eos_token": True, "add_bos_token": True}, "add_eos_token"),
        ("$A <|eos|>", {"add_bos_token": True}, "add_bos_token"),
        ("<|bos|> $A", {"add_eos_token": True, "tokenizer_class": "LlamaTokenizerFast"}, "add_eos_token"),
        ("<|bos|> $A <|eos|>", {"add_eos_token": True, "add_bos_token": True}, None),
        ("<|bos|> $A", {"add_eos_token": False, "add_bos_token": True}, None),
        ("<|bos|> $A", {}, None),
    ],
)
def test_promised_tokens_that_are_not_added(tmp_path, single, settings, lacks):
    write(tmp_path, small_model(), tokenizer_that_writes(single))
    edit(tmp_path / "tokenizer_config.json", **settings)
    if lacks is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Engine(tmp_path)
        return
    with pytest.raises(InvalidInputError, match=f"tokenizer_config.json says {lacks}.*save_pretrained") as caught:
        Engine(tmp_path)
    # passed in, it is used as it is
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert Engine(tmp_path, tokenizer=tokenizer).embed([TEXT]).shape == (1, 32)
    # what the error says to do
    remedy = str(caught.value).partition("write it into the files: ")[2].partition(". If not")[0]
    exec(remedy, {"AutoTokenizer": AutoTokenizer})
    # transformers 5.17 reads spaces in Llama's way where tokenizer_class is Llama's
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    ids = [257] * bool(settings.get("add_bos_token")) + ids + [258] * bool(settings.get("add_eos_token"))
    assert load_tokenizer(tmp_path)(TEXT)["input_ids"] == ids
    with torch.inference_mode():
        expected = small_model()(torch.tensor([ids])).last_hidden_state[0, -1].numpy()
    assert np.allclose(Engine(tmp_path).embed([TEXT], normalize=False)[0], expected, rtol=0, atol=1e-5)


def test_a_token_that_is_added_against_the_settings_is_a_warning(tmp_path):
    write(tmp_path, small_model(), tokenizer_that_writes("<|bos|> $A"))
    edit(tmp_path / "tokenizer_config.json", add_bos_token=False)
    with pytest.warns(UserWarning, match=r"says add_bos_token false, and the tokenizer adds '<\|bos\|>'"):
        Engine(tmp_path)


def test_a_promised_token_that_does_not_exist(tmp_path):
    write(tmp_path, small_model())
    edit(tmp_path / "tokenizer_config.json", add_eos_token=True, eos_token=None)
    with pytest.raises(InvalidInputError, match="says add_eos_token, but there is no eos_token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("module", ["1_Pooling", "2_Dense"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_module_without_its_files(tmp_path, module, whole):
    folder = write_folder(tmp_path, [LAST, ("Dense", dense_config(4, 64)), ("Normalize", None)])
    shutil.rmtree(tmp_path / "3_Normalize")
    assert Engine(folder).embed([TEXT]).shape == (1, 4)
    if whole:
        shutil.rmtree(tmp_path / module)
    else:
        (tmp_path / module / "config.json").unlink()
    with pytest.raises(InvalidInputError, match=rf"{module}/config\.json is missing"):
        Engine(folder).embed([TEXT])


def test_a_cross_encoder_without_its_tokens(tmp_path):
    folder = write_reranker(tmp_path, {"true_token_id": 33})
    (tmp_path / "1_LogitScore" / "config.json").unlink()
    with pytest.raises(InvalidInputError, match=r"1_LogitScore/config\.json is missing"):
        Engine(folder)


@pytest.mark.parametrize("settings", [None, {"prompts": {}}])
def test_a_folder_that_has_lost_its_list_of_modules(tmp_path, settings):
    folder = write_folder(tmp_path, [LAST], settings=settings)
    (tmp_path / "modules.json").unlink()
    with pytest.raises(InvalidInputError, match=r"modules\.json is missing"):
        Engine(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"0": {}}, "a list of modules is needed"),
        ([{"path": ""}], "module 0 has no 'type'"),
        ([{"type": "sentence_transformers.models.Transformer"}], "module 0 has no 'path'"),
        (["x"], "module 0 has no 'type'"),
    ],
)
def test_a_list_of_modules_that_is_none(tmp_path, entries, message):
    folder = write_folder(tmp_path, [LAST])
    (tmp_path / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(InvalidInputError, match=rf"modules\.json: {message}"):
        Engine(folder)


def test_a_dense_module_of_another_transformer(tmp_path):
    folder = write_folder(tmp_path, [LAST, ("Dense", dense_config(4, 32))])
    with pytest.raises(InvalidInputError, match=r"Dense module takes vectors of 32 numbers .*gets 64"):
        Engine(folder).embed([TEXT])


@pytest.mark.parametrize("kind", ["causal", "classifier"])
@pytest.mark.parametrize("name", ["Qwen3-Reranker-seq-cls", "model"])
def test_answers_do_not_depend_on_a_folders_name(tmp_path, kind, name):
    model = small_model(kind, **({"num_labels": 1} if kind == "classifier" else {"model_type": "llama"}))
    engine = Engine(write(tmp_path / name, model))
    with pytest.raises(UnsupportedModelError, match=r"is not known.*template= \(--template\).*'qwen3'.*'pair'"):
        engine.rerank("a?", ["b"])
