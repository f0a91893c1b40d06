import copy
import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.decisions import QUESTIONS, letter_tokenizer, needs_decisions
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from radix_mlp.engine.tokenization.decision_prompts import decision_prompts
from radix_mlp.engine.tokenization.decision_reader import reader_of, reading
from radix_mlp.engine.tokenization.shared_text import SharedText, can_cut
from radix_mlp.models.tiny import CHAT_TEMPLATE, tiny_decider_tokenizer

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "The order came late and the parcel was broken, so I want my money back. It's not the first time!\n\n",
    'Is a refund requested? Answer Yes or No only. café naïve 中文 {"key": [1, 2, 34567]} the a an of in to and',
    "a b c d e f g h i j k l m n o p q r s t u v w x y z A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
] * 3
SPECIAL = ["<|im_start|>", "<|im_end|>"]
ADDED = ["Yes", "No", *"ABC"]


def byte_level(split=None, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    steps = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is not None:
        steps = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), steps])
    tokenizer.pre_tokenizer, tokenizer.normalizer = steps, normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace(model, trainer, prepend="always"):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_pieces():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace_pairs(prepend="always"):
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    return metaspace(models.BPE(unk_token="<unk>"), trainer, prepend)


def gemma_like():
    """Merges over a whole text, spaces written as letters, bytes for what is unknown."""
    base = metaspace_pairs("never")
    table = base.get_vocab()
    merges = [tuple(pair) for pair in json.loads(base.to_str())["model"]["merges"]]
    for word in ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]:
        table.setdefault(word, len(table))
    tokenizer = Tokenizer(models.BPE(table, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    return tokenizer


def unigram():
    trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    return metaspace(models.Unigram(), trainer, "first")


BUILT = {
    "gpt2": byte_level,
    "gpt4": lambda: byte_level(GPT4, normalizers.NFC()),
    "lower case": lambda: byte_level(GPT4, normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "word pieces": word_pieces,
    "unigram": unigram,
    "metaspace": metaspace_pairs,
    "one word": gemma_like,
}


@functools.cache
def tokenizer_of(name):
    if name in ("tiny", "letters"):
        return tiny_decider_tokenizer() if name == "tiny" else letter_tokenizer()
    built = BUILT[name]()
    built.add_special_tokens(SPECIAL)
    built.add_tokens(ADDED)
    found = PreTrainedTokenizerFast(tokenizer_object=built, model_max_length=10**6)
    found.chat_template = CHAT_TEMPLATE
    return found


NAMES = [*BUILT, "tiny", "letters"]
WORDS = [
    *("the", "order", "came", "It's", "Yes", "No", "A", "refund", "a", "XY", "I'll"),
    *(
        "<|im_end|>",
        "<|mark|>",
        "na\u00efve",
        "cafe\u0301",
        "\u0301",
        "\u4e2d\u6587",
        "\U0001f99c",
        "\u00a0",
        "\ufb01",
        "\u2581",
        "\u0120",
    ),
    *("12345678", "3.5", "{", '"k":', "...", "!!\n", "x=1;", "\U000f0000", "\t", "\u200b", "\r\n"),
]
GAPS = st.sampled_from([" ", " ", " ", " ", "", "\n", "  ", "\n\n", " \n ", "\u00a0", "\t"])
SPACED = "the order came late and it was not what we had asked for in the first place "


@st.composite
def pieces(draw, most):
    """Text of words and what stands between them."""
    chosen = draw(st.lists(st.tuples(st.sampled_from(WORDS), GAPS), max_size=most))
    return "".join(word + gap for word, gap in chosen)


@st.composite
def texts(draw):
    """Texts that share a beginning or an end, which are cut anywhere."""
    head = draw(pieces(6)) + SPACED * draw(st.integers(0, 7)) + draw(pieces(8))
    tail = draw(pieces(8)) + SPACED * draw(st.integers(0, 7)) + draw(pieces(3))
    head, tail = head[: len(head) - draw(st.integers(0, 9))], tail[draw(st.integers(0, 9)) :]
    return [head + draw(pieces(6)) + tail for _ in range(draw(st.integers(2, 5)))]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(texts())
def test_ids_are_those_of_whole_texts(name, rows):
    tokenizer = tokenizer_of(name)
    assert can_cut_once(name)
    shared = SharedText(tokenizer.backend_tokenizer)
    for text in rows:
        expected = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert shared.ids_of(text).tolist() == expected


@functools.cache
def can_cut_once(name):
    return can_cut(tokenizer_of(name))


class Counting:
    """A tokenizer that counts the characters it encodes."""

    def __init__(self, rust):
        self.rust, self.characters = rust, 0

    def encode(self, text, **options):
        self.characters += len(text)
        return self.rust.encode(text, **options)


@pytest.mark.parametrize("name", [*BUILT, "tiny"])
@pytest.mark.parametrize("is_first", [True, False])
def test_what_is_shared_is_encoded_once(name, is_first):
    state = SPACED * 40
    questions = [f"Is the number {number} in it?" for number in range(50)]
    rust = Counting(tokenizer_of(name).backend_tokenizer)
    shared = SharedText(rust)
    for question in questions:
        shared.ids_of(f"{state}\n\n{question}" if is_first else f"{question}\n\n{state}")
    assert rust.characters < 1.2 * len(state) + 50 * 120


def with_token(content, **options):
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(tokenizer_of("gpt2"))
    tokenizer.add_tokens([AddedToken(content, **options)])
    return tokenizer


def with_split(pattern):
    tokenizer = copy.deepcopy(tokenizer_of("gpt4"))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return tokenizer


def with_crossing_merges():
    built = Tokenizer(models.BPE())
    built.normalizer = normalizers.Replace(" ", "\u2581")
    built.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=built)


@pytest.mark.parametrize(
    "make",
    [
        with_crossing_merges,
        lambda: with_token("the order"),
        lambda: with_token("late", rstrip=True),
        lambda: with_token("late", lstrip=True),
        lambda: with_split(r"(?<=e) |\p{L}+| ?[^\p{L}]"),
        lambda: with_split(r"^.{7}|\p{L}+| ?[^\p{L}]"),
        lambda: with_split(r"[\p{L} ]{1,9}|[^\p{L} ]+"),
        lambda: letter_tokenizer(60),
    ],
)
def test_tokenizers_in_which_cuts_are_not_exact(make):
    assert not can_cut(make())


def test_crossing_merges_would_be_found():
    rust = with_crossing_merges().backend_tokenizer
    shared = SharedText(rust)
    rows = [SPACED * 6 + end for end in ("the first place it was", "the order came", "and in the end")]
    assert all(shared.ids_of(text).tolist() == rust.encode(text).ids for text in rows)


STATES = st.one_of(
    texts().map(lambda rows: rows[0]),
    # transformers leaves control tokens in keys as they are
    st.dictionaries(st.sampled_from(["a", "the key", "\u4e2d"]), texts().map(lambda rows: rows[0]), max_size=3),
    st.lists(pieces(4), max_size=3),
)


@needs_decisions
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, deadline=None)
@given(states=st.lists(STATES, min_size=1, max_size=3), sanitize=st.booleans(), template=st.sampled_from("gfl"))
def test_prompts_are_those_of_transformers(name, states, sanitize, template):
    from transformers import DecisionConfig

    written = {
        "g": None,
        "f": "<|im_start|>{{ state if state is string else state|tojson }}\n\n{{ question.instructions }}<|im_end|>",
        "l": "{{ question.instructions }}\n\n{{ state if state is string else state|tojson }}<|mark|><|split|>so",
    }
    config = DecisionConfig(chat_template=written[template], sanitize_control_tokens=sanitize)
    tokenizer = tokenizer_of(name)
    stock = stock_of(name)
    expected, accepted = [], []
    for state in states:
        try:
            expected.append(config.prepare_inputs({"state": state, "questions": QUESTIONS}, stock))
            accepted.append(state)
        except ValueError:
            # "Can't sanitize": the tokenizer makes a control token from plain text
            continue
    found = decision_prompts(tokenizer, config, [(state, QUESTIONS) for state in accepted])
    for prompts, others in zip(found, expected, strict=True):
        for prompt, (inputs, questions) in zip(prompts, others, strict=True):
            assert prompt.ids.tolist() == inputs["input_ids"][0].tolist()
            assert prompt.marks.tolist() == inputs["marks"].tolist()
            assert [question.name for question in prompt.questions] == [question.name for question in questions]


@functools.cache
def stock_of(name):
    return copy.deepcopy(tokenizer_of(name))


@needs_decisions
def test_nothing_is_kept_of_texts():
    from transformers import DecisionConfig

    tokenizer = tokenizer_of("gpt4")
    decision_prompts(tokenizer, DecisionConfig(), [(SPACED * 5, QUESTIONS)])
    reader = reader_of(tokenizer, DecisionConfig())
    assert reader.radix_shared is None
    with reading(reader):
        assert reader.radix_shared is not None
    assert reader.radix_shared is None
    assert type(reader).__name__ == type(tokenizer).__name__
    assert np.array_equal(reader("<|mark|>", add_special_tokens=False)["input_ids"], [len(tokenizer)])
