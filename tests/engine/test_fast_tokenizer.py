"""Ids straight from the Rust tokenizer are those that transformers gives; where they might differ, it is asked."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from radix_mlp.engine.tokenization.tokenize import encode, rust_ids
from radix_mlp.models.tiny import tiny_reranker_tokenizer, tiny_tokenizer

TEXTS = [
    "a text",
    "",
    "yes, no <|im_end|> x",
    "naïve 日本語 \U0001f600",
    " " * 9,
    "<s> and </s> as text",
    "long " * 300,
]
OTHERS = [text[::-1] for text in TEXTS]


def bert_like() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer that puts tokens before, between and after texts."""
    rust = Tokenizer(models.BPE(unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel()
    rust.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>", "<pad>"]))
    rust.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize("make", [tiny_tokenizer, tiny_reranker_tokenizer, bert_like])
@pytest.mark.parametrize("others", [None, OTHERS])
@pytest.mark.parametrize("options", [{}, {"add_special_tokens": False}])
def test_ids_are_those_of_transformers(make: Any, others: list[str] | None, options: dict[str, Any]) -> None:
    tokenizer = make()
    pairs = {} if others is None else {"text_pair": others}
    expected = tokenizer(TEXTS, **pairs, **options)["input_ids"]
    found = rust_ids(tokenizer, TEXTS, others, options)
    assert found is not None
    assert [row.tolist() for row in found] == expected
    assert [row.tolist() for row in encode(tokenizer, TEXTS, others, **options)] == expected


def test_what_a_call_before_left_behind_does_not_count() -> None:
    tokenizer = bert_like()
    expected = tokenizer(TEXTS)["input_ids"]
    for options in ({"truncation": True, "max_length": 3}, {"padding": True}, {"split_special_tokens": True}):
        tokenizer(TEXTS, **options)
        assert rust_ids(tokenizer, TEXTS, None, {}) is None
        assert [row.tolist() for row in encode(tokenizer, TEXTS)] == expected
        assert rust_ids(tokenizer, TEXTS, None, {}) is not None


def test_options_and_classes_of_their_own_go_through_transformers() -> None:
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, **options: Any) -> Any:
            return super()._encode_plus([each + "!" for each in text], **options)

    tokenizer = Own(tokenizer_object=bert_like().backend_tokenizer)
    assert rust_ids(tokenizer, TEXTS, None, {}) is None
    assert [row.tolist() for row in encode(tokenizer, TEXTS)] == tokenizer(TEXTS)["input_ids"]
    assert rust_ids(bert_like(), TEXTS, None, {"truncation": True, "max_length": 3}) is None


def test_threads_take_turns_with_one_tokenizer():
    """One thread cuts texts while another must not: the tokenizer keeps between its calls how it cuts."""

    class Slow(PreTrainedTokenizerFast):
        inside = most_inside = 0

        def _encode_plus(self, *args, **options):
            Slow.inside += 1
            Slow.most_inside = max(Slow.most_inside, Slow.inside)
            time.sleep(0.01)
            found = super()._encode_plus(*args, **options)
            Slow.inside -= 1
            return found

    tokenizer = tiny_tokenizer()
    tokenizer.__class__ = Slow
    text = "a" * 20

    def lengths(truncate):
        options = {"truncation": True, "max_length": 5} if truncate else {}
        return {len(encode(tokenizer, [text], **options)[0]) for _ in range(5)}

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lengths, [True, False] * 2))
    assert found == [{5}, {20}] * 2
    assert Slow.most_inside == 1
