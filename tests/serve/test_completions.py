"""Echoed completions: the text is the prompt, and every token stands where it is said to."""

from __future__ import annotations

import asyncio
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve.conftest import Running
from tests.tokenizer_kinds import KINDS
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM

from radix_mlp import Engine
from radix_mlp.engine.tokenization.begin_token import encode_once
from radix_mlp.serve.token_texts import _BYTE_LETTERS, PlacedTokens, TokenTexts, placed

parts = st.sampled_from(
    ["to be", " ", "  ", "é", "😀", "e\u0301", "ｶﾞ", "\u202e", "<s>", "</s>", "▁", "\n", "the", "\ufffd", "日本"]
)
prompts = st.lists(parts | st.text(max_size=3).filter(lambda text: text.isprintable()), min_size=1, max_size=6)


@lru_cache
def tokenizer_of(kind: str) -> tuple[Any, TokenTexts]:
    tokenizer = KINDS[kind]()
    return tokenizer, TokenTexts(tokenizer)


def bytes_of(name: str) -> bytes:
    """What a token's name spells."""
    if not re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+", name):
        return name.encode()
    return bytes.fromhex(name.removeprefix("bytes:").replace("\\x", ""))


def check(found: PlacedTokens) -> None:
    """Names make up the text, and offsets point at them, or at the letter of which they are a part."""
    assert b"".join(map(bytes_of, found.names)).decode(errors="replace") == found.text
    assert found.offsets == sorted(found.offsets)
    for name, offset in zip(found.names, found.offsets, strict=True):
        spelled = bytes_of(name)
        if spelled == name.encode():
            assert found.text[offset:].startswith(name)
        elif "\ufffd" not in found.text:
            # the bytes of a letter, or its end with what follows
            there = found.text[offset:].encode()
            assert any(there[skip:].startswith(spelled) for skip in range(4))


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), prompt=prompts.map("".join))
def test_tokens_stand_where_they_are_said_to(kind: str, prompt: str) -> None:
    tokenizer, texts = tokenizer_of(kind)
    for add_special_tokens in (None, True, False):
        found = placed(texts.of_text(prompt, add_special_tokens))
        if add_special_tokens is None:
            ids = encode_once(tokenizer, [prompt])[0].tolist()
        else:
            ids = tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]
        assert len(found.names) == len(ids)
        if ids:
            assert found.text == prompt
            check(found)
    ids = tokenizer(prompt)["input_ids"]
    found = placed(texts.of_ids(ids))
    assert len(found.names) == len(ids)
    assert found.text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    check(found)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), data=st.data())
def test_any_token_ids_have_a_text(kind: str, data: st.DataObject) -> None:
    tokenizer, texts = tokenizer_of(kind)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=8))
    found = placed(texts.of_ids(ids))
    assert len(found.names) == len(found.offsets) == len(ids)
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if "\ufffd" not in decoded:
        assert found.text.strip(" ") == decoded.strip(" ")
    check(found)


def test_bytes_that_make_no_letter() -> None:
    found = placed([b"a", b"\xc3", b"\xc3", b"\xa9", b"\xa9", b" \xf0", b"b"])
    assert found.text == "a�é� �b"
    assert found.offsets == [0, 1, 2, 2, 3, 4, 6]
    assert found.names[0] == "a"
    assert found.names[5] == "bytes:\\x20\\xf0"
    check(found)


def test_the_letters_of_byte_level_tokenizers() -> None:
    assert set(_BYTE_LETTERS) == set(ByteLevel.alphabet())
    assert _BYTE_LETTERS["Ġ"] == 32
    assert _BYTE_LETTERS["Ċ"] == 10


def save(folder: Path, kind: str) -> str:
    tokenizer = KINDS[kind]()
    torch.manual_seed(0)
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 32) | dict.fromkeys(
        ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2
    )
    nothing = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.3, **sizes, **nothing
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


async def choices(client: Any, **body: Any) -> list[Any]:
    response = await client.post("/v1/completions", json={"max_tokens": 0, "echo": True, "logprobs": 1, **body})
    assert response.status_code == 200, response.text
    found: list[Any] = response.json()["choices"]
    return found


def test_a_prompt_comes_back_as_it_was_given(running: Running, tmp_path: Path) -> None:
    folder = save(tmp_path, "metaspace, adds begin")

    async def main() -> None:
        async with running(folder) as (client, _):
            [choice] = await choices(client, prompt="to be é")
            assert choice["text"] == "to be é"
            logprobs = choice["logprobs"]
            assert logprobs["tokens"] == ["", "t", "o", " b", "e", " ", "bytes:\\xc3", "bytes:\\xa9"]
            assert logprobs["text_offset"] == [0, 0, 1, 2, 4, 5, 6, 6]
            assert [logprob is None for logprob in logprobs["token_logprobs"]] == [True] + [False] * 7
            prompts = ["to be é", "the sky 日本"]
            for choice, prompt in zip(
                await choices(client, prompt=prompts, max_tokens=1, temperature=0.0), prompts, strict=True
            ):
                names, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
                assert choice["text"].startswith(prompt)
                assert offsets[-1] == len(prompt)
                [alone] = await choices(client, prompt=prompt, max_tokens=1, temperature=0, echo=False)
                assert alone["text"] == choice["text"][len(prompt) :]
                assert alone["logprobs"]["tokens"] == names[-1:]
                assert alone["logprobs"]["text_offset"] == [0]
            assert choice["logprobs"]["top_logprobs"][-1] == {names[-1]: choice["logprobs"]["token_logprobs"][-1]}

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["metaspace, adds begin", "byte level, adds begin"])
def test_special_tokens_of_a_rendered_prompt(kind: str, running: Running, tmp_path: Path) -> None:
    folder = save(tmp_path, kind)
    engine = Engine(folder, threshold=0)
    begin = engine.tokenizer.bos_token_id
    plain = engine.tokenizer("the sky", add_special_tokens=False)["input_ids"]
    rendered = engine.tokenizer("<s>the sky", add_special_tokens=False)["input_ids"]

    async def main() -> None:
        async with running(folder) as (client, _):
            for prompt, option, ids in [
                ("the sky", None, [begin, *plain]),
                ("the sky", True, [begin, *plain]),
                ("the sky", False, plain),
                # never twice by itself, but as vLLM does where it is asked for
                ("<s>the sky", None, rendered),
                ("<s>the sky", False, rendered),
                ("<s>the sky", True, [begin, *rendered]),
            ]:
                [choice] = await choices(client, prompt=prompt, add_special_tokens=option)
                [expected] = engine.token_scores([ids])
                np.testing.assert_allclose(choice["logprobs"]["token_logprobs"][1:], expected.logprobs[1:], atol=1e-4)
                assert choice["text"] == prompt
                assert "".join(choice["logprobs"]["tokens"]) == prompt

    asyncio.run(main())


def test_completions_agree_with_scores(running: Running, tmp_path: Path) -> None:
    folder = save(tmp_path, "metaspace, adds begin")
    engine = Engine(folder, threshold=0)
    pairs = [("the sky is", " blue"), ("<s>the sky", " is é"), (" a root", " is")]

    async def main() -> None:
        async with running(folder) as (client, _):
            found = await choices(client, prompt=[context + tail for context, tail in pairs])
            whole = engine.token_scores([context + tail for context, tail in pairs])
            for choice, score, all_tokens in zip(found, engine.score(pairs), whole, strict=True):
                logprobs = choice["logprobs"]["token_logprobs"]
                np.testing.assert_allclose(logprobs[-len(score.token_logprobs) :], score.token_logprobs, atol=1e-4)
                np.testing.assert_allclose(logprobs[1:], all_tokens.logprobs[1:], atol=1e-4)

    asyncio.run(main())
