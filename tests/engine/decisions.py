"""The answers of transformers' own pipeline on the unmodified model, one prompt after another."""

import pytest
import transformers
from transformers import PreTrainedTokenizerFast

from radix_mlp.models.decision import has_decisions
from radix_mlp.models.tiny import tiny_decider_tokenizer

needs_decisions = pytest.mark.skipif(not has_decisions(), reason="transformers has no decision models")

QUESTIONS = {
    "refund": {"type": "noul", "instructions": "Is a refund requested?"},
    "spam": {"type": "noul", "criteria": {"true": "Unsolicited ads", "false": "A real conversation"}},
    "tone": {"type": "choice", "instructions": "The tone?", "criteria": {"calm": "Polite", "angry": None, "sad": ""}},
    "topic": {"type": "choice", "criteria": {"money": None, "parcels": {"where": ["lost", "late"]}}},
    "urgency": {"type": "score", "instructions": "How urgent?", "criteria": ["Can wait", "This week", "Today"]},
}
STATES = [
    "I was charged twice for my order and want a refund.",
    "I was charged twice, naïve as I am 🦜",
    {"chat": [{"role": "user", "content": "where is my parcel?"}], "customer": 7, "vip": None},
    ["a", {"b": 1.5}],
    "",
    "I was charged twice for my order and want a refund.",
]


def stock_answers(model, tokenizer, requests, config=None):
    """What an unmodified `pipeline("decision")` says to each (state, questions)."""
    pipe = transformers.pipeline("decision", model=model, tokenizer=tokenizer, decision_config=config)
    return [pipe({"state": state, "questions": questions}) for state, questions in requests]


def largest_difference(found, expected):
    """Between two answers, which must be alike but for their numbers."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        return max((largest_difference(found[key], expected[key]) for key in expected), default=0.0)
    if isinstance(expected, float):
        assert isinstance(found, float)
        return abs(found - expected)
    assert found == expected
    return 0.0


def spread(answers):
    """How far apart the probabilities of an answer to the same question lie over the states."""
    values = [answer["refund"]["noul"] for answer in answers]
    return max(values) - min(values)


def letter_tokenizer(num_ids=104):
    """A tokenizer of a token a letter for models of a small vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"<unused{place}>" for place in range(8)] + ["<unk>", "<|im_start|>", "<|im_end|>", "Yes", "No", "\n"]
    letters = [chr(code) for code in range(32, 127) if chr(code) not in '"#$%&*+;=@[]^`~']
    table = {word: place for place, word in enumerate([*words, *letters][:num_ids])}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["Yes", "No"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=10**6)
    fast.chat_template = tiny_decider_tokenizer().chat_template
    return fast
