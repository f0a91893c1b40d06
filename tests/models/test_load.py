import base64
import shutil

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from radix_mlp import Engine
from radix_mlp.errors import InvalidDtypeError, InvalidInputError
from radix_mlp.models.load import load, max_length_of
from radix_mlp.models.load_tokenizer import load_tokenizer
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_saved_folder_is_the_model(folder):
    model, tokenizer = load(folder)
    assert max_length_of(model, tokenizer) == 8192
    texts = ["Query: a", "Query: b"]
    assert np.array_equal(Engine(str(folder)).embed(texts), Engine("tiny").embed(texts))
    assert load(folder, dtype="float64")[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("model.safetensors", lambda old: old[: len(old) // 2]),
        ("model.safetensors", lambda old: b"\0" * 100),
        ("config.json", lambda old: old.replace(b'"hidden_size": 64', b'"hidden_size": 128')),
        ("config.json", lambda old: old.replace(b'"num_attention_heads": ', b'"num_attention_heads": 0, "x": ')),
        ("config.json", lambda old: old.replace(b'"qwen3"', b'["qwen3"]')),
    ],
    ids=["half a download", "no weights", "other sizes", "no heads", "type"],
)
def test_a_broken_folder_is_told_as_such(folder, tmp_path, file, change):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(change(before))
    assert (tmp_path / file).read_bytes() != before
    with pytest.raises(InvalidInputError, match="folder's files could not be read"):
        load(tmp_path)


def test_a_checkpoint_without_a_head_is_loaded_without_one(folder, tmp_path):
    tiny_model().model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    assert model.get_output_embeddings() is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./missing", "no such folder"),
        ("/missing/folder", "no such folder"),
        ("someone/some-model", "Without a network"),
    ],
)
def test_missing_models(name, message):
    with pytest.raises(InvalidInputError, match=message):
        load(name)
    with pytest.raises(InvalidInputError, match=message):
        load_tokenizer(name)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(InvalidInputError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="could not be loaded"):
        load(tmp_path)


def test_wrong_types():
    with pytest.raises(InvalidInputError, match="tokenizer is missing"):
        load(tiny_model())
    with pytest.raises(InvalidDtypeError, match="model must be"):
        load(3)


def test_a_limit_beyond_a_table_of_positions():
    config = GPT2Config(vocab_size=259, n_positions=12, n_embd=32, n_layer=2, n_head=2)
    model, tokenizer = GPT2LMHeadModel(config), tiny_tokenizer()
    for threshold in (0, 1):
        with pytest.raises(
            InvalidInputError, match=r"max_length=13: GPT2LMHeadModel has a table of 12 positions \(wpe"
        ):
            Engine(model, tokenizer=tokenizer, max_length=13, threshold=threshold)
        assert Engine(model, tokenizer=tokenizer, max_length=12, threshold=threshold).embed(["a" * 12]).shape == (1, 32)
    # rotary positions have no end
    assert Engine("tiny", max_length=10_000).max_length == 10_000


def write_ranks(path, tokens):
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_ranks_file(tmp_path):
    tokens = [*(bytes([byte]) for byte in range(256)), b"he", b"ll", b"hell", b"hello", b" w", "é".encode()]
    tokenizer = load_tokenizer(write_ranks(tmp_path / "small.tiktoken", tokens))
    text = "hello wé 12\n\n<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert ids == [259, 260, 261, 32, 49, 50, 10, 10, 264]
    assert tokenizer.decode(ids) == text


def test_bad_ranks_files(tmp_path):
    path = tmp_path / "bad.tiktoken"
    path.write_text("aGk= 0\nnot base64!\n")
    with pytest.raises(InvalidInputError, match=r"bad\.tiktoken:2"):
        load_tokenizer(path)
    with pytest.raises(InvalidInputError, match="byte 0 has no rank"):
        load_tokenizer(write_ranks(path, [b"hi"]))
    with pytest.raises(InvalidInputError, match="No such file"):
        load_tokenizer(tmp_path / "missing.tiktoken")
