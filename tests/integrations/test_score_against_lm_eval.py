"""Where a score begins: `Engine.score` and the adapter against lm-evaluation-harness's own Hugging Face model."""

import random

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tests.tokenizer_kinds import ADDS_AT_THE_END, KINDS
from transformers import AutoConfig, AutoModelForCausalLM

from radix_mlp import Engine
from radix_mlp.engine.tokenization.begin_token import added_tokens, begins_with_token
from radix_mlp.integrations.lm_eval import RadixLM

FIXED = [
    ("the sky is", " blue"),
    ("<s>the sky is", " blue"),
    ("</s>the sky is", " blue"),
    ("<|endoftext|>the sky", " is"),
    ("", "the sky"),
    ("", "<s>the sky"),
    ("  the sky", " is blue"),
    ("the sky \n ", "is blue"),
    (" <s>the sky", "is"),
    ("the sky <s> is", " blue"),
    ("a", " root is a part of a plant é😀"),
]
PARTS = ["the sky", " is", " ", "  ", "\n", "blue", "é", "😀", "<s>", "</s>", "<|endoftext|>", "a root", "x", "yes"]


def random_pairs(count, seed):
    rng = random.Random(seed)
    pairs = []
    while len(pairs) < count:
        context, continuation = ("".join(rng.choices(PARTS, k=rng.randint(1, 5))) for _ in range(2))
        pairs.append(("" if rng.random() < 0.1 else context, continuation))
    return pairs


def save(folder, kind):
    tokenizer = KINDS[kind]()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def harness(folder, pairs, **options):
    """The peer's answers, one pair at a time; None where it fails."""
    peer = HFLM(pretrained=folder, device="cpu", dtype="float32", logits_cache=False, **options)
    answers = []
    for pair in pairs:
        request = Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)
        try:
            [(logprob, greedy)] = peer.loglikelihood([request], disable_tqdm=True)
            answers.append((logprob, greedy))
        except (AssertionError, IndexError):
            # a context or a continuation without tokens
            answers.append(None)
    return answers


def compare(found, expected):
    answered = [(ours, theirs) for ours, theirs in zip(found, expected, strict=True) if theirs is not None]
    assert len(answered) > len(expected) / 2
    ours, theirs = zip(*answered, strict=True)
    np.testing.assert_allclose([answer[0] for answer in ours], [answer[0] for answer in theirs], atol=3e-4)
    assert [answer[1] for answer in ours] == [answer[1] for answer in theirs]


def scored(engine, pairs, **options):
    """One pair at a time: those that the peer refuses may be refused here."""
    answers = []
    for pair in pairs:
        try:
            [score] = engine.score([pair], **options)
            answers.append((score.logprob, score.is_greedy))
        except ValueError:
            answers.append((None, None))
    return answers


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ADDS_AT_THE_END])
def test_scores_are_the_harness_s(kind, tmp_path):
    folder = save(tmp_path, kind)
    pairs = FIXED + random_pairs(30, kind)
    expected = harness(folder, pairs)
    compare(scored(Engine(folder), pairs), expected)
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index)
        for index, pair in enumerate(pairs)
        if expected[index] is not None
    ]
    adapter = RadixLM(pretrained=folder, device="cpu", dtype="float32").loglikelihood(requests, disable_tqdm=True)
    compare(adapter, [answer for answer in expected if answer is not None])


@pytest.mark.parametrize(
    ("kind", "add_bos"),
    [
        ("byte level, adds begin", True),
        ("metaspace, adds begin", True),
        ("words, adds begin", True),
        ("byte level", False),
        ("metaspace, adds begin", False),
        ("metaspace, adds both", False),
    ],
)
def test_asked_for_begin_tokens_are_the_harness_s(kind, add_bos, tmp_path):
    folder = save(tmp_path, kind)
    compare(scored(Engine(folder), FIXED, add_bos=add_bos), harness(folder, FIXED, add_bos_token=add_bos))


def test_a_begin_token_that_the_tokenizer_does_not_add(tmp_path):
    folder = save(tmp_path, "byte level")
    pairs = [("the sky is", " blue"), ("a root", " is"), ("<s>yes", " no")]
    written_out = [(context if context.startswith("<s>") else "<s>" + context, tail) for context, tail in pairs]
    compare(scored(Engine(folder), pairs, add_bos=True), harness(folder, written_out))


@pytest.mark.parametrize("kind", sorted(ADDS_AT_THE_END))
def test_tokens_after_a_text_do_not_come_between(kind, tmp_path):
    # the harness takes them for the continuation's, so it is asked with the begin token written out and none added
    folder = save(tmp_path, kind)
    pairs = [("the sky is", " blue"), ("a root is", " a part of a plant")]
    begin = "<s>" if "both" in kind else ""
    expected = harness(folder, [(begin + context, tail) for context, tail in pairs], add_bos_token=False)
    if begin and "metaspace" in kind:
        # a text after a special token starts with a space of its own, as one without does
        assert KINDS[kind]()("the").input_ids[:-1] == KINDS[kind]()("<s>the", add_special_tokens=False).input_ids
    compare(scored(Engine(folder), pairs), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_whole_texts_agree(kind, tmp_path):
    folder = save(tmp_path, kind)
    engine = Engine(folder)
    after = len(added_tokens(engine.tokenizer)[1])
    for context, tail in [*FIXED, *random_pairs(10, kind)]:
        if not context.strip():
            continue
        head, joined = (
            engine.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context.rstrip(), context + tail)
        )
        if joined[: len(head)] != head or len(joined) == len(head):
            # the continuation makes one word with its context, which the harness then scores as another text
            continue
        [score] = engine.score([(context, tail)])
        [whole] = engine.token_scores([context + tail])
        end = len(whole.ids) - (0 if begins_with_token(engine.tokenizer, context) else after)
        there = whole.logprobs[end - len(score.token_logprobs) : end]
        np.testing.assert_allclose(there, score.token_logprobs, atol=1e-4)


def test_token_ids_are_taken_as_they_are(tmp_path):
    engine = Engine(save(tmp_path, "metaspace, adds begin"))
    begin, ids, tail = engine.tokenizer.bos_token_id, [10, 20, 30], [40]
    plain, asked, given = (
        engine.score([(context, tail)], add_bos=add_bos)[0].logprob
        for context, add_bos in ((ids, None), (ids, True), ([begin, *ids], None))
    )
    assert asked == pytest.approx(given, abs=1e-5)
    assert abs(plain - asked) > 2e-3
    assert engine.score([([begin, *ids], tail)], add_bos=True)[0].logprob == pytest.approx(given, abs=1e-5)
