"""The model's own tokenizer: byte-level BPE, learnt from the texts."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["INSTRUCTIONS", "QUERY_PROMPT", "pair_text", "train_tokenizer"]

QUERY_PROMPT = "Instruct: Given a question, find the passages that help to answer it.\nQuery:"
"""Stands before every query that is embedded; documents have none."""

INSTRUCTIONS = (
    "",
    "Given a question, find the passages that help to answer it.",
    "You are given a question and a passage. Decide whether the passage helps to answer the question.",
    "Find abstracts on radio and electronics that are about the subject.",
    "Does the passage answer the query?",
    "Judge whether the passage is relevant to the query. It is relevant if a reader who knows nothing else could "
    "answer at least a part of the question from it.",
    "Retrieve papers that an engineer who asks this would want to read.",
    "Given a search query, retrieve relevant passages that answer the query.",
)
"""What may stand before a query that is reranked: the model learns to read past them."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}Instruct: {{ message['content'] }}\n"
    "{% elif message['role'] == 'query' %}Query: {{ message['content'] }}\n"
    "{% elif message['role'] == 'document' %}Passage: {{ message['content'] }}\n"
    "{% endif %}{% endfor %}Relevant:"
)
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")


def pair_text(instruction: str, query: str, document: str) -> str:
    """What the chat template makes of a query and a document."""
    head = f"Instruct: {instruction}\n" if instruction else ""
    return f"{head}Query: {query}\nPassage: {document}\nRelevant:"


def train_tokenizer(texts: Iterable[str], *, size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` tokens that lower-cases texts and gives a word the same tokens wherever it occurs.

    Every word, digit and mark gets one space before it, so that "radio", "(radio" and "Radio" share a token.
    """
    built = Tokenizer(models.BPE())
    built.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    # words, digits one by one as Qwen has them, line ends, marks; other white space goes
    pieces = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|\n|[^\s\p{L}\p{N}]"), behavior="removed", invert=True)
    built.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(True, use_regex=False)])
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    # the answers of a reranker must be one token each
    answers = ["yes no relevant"] * 1000
    prompts = [QUERY_PROMPT, *(pair_text(instruction, "", "") for instruction in INSTRUCTIONS)] * 100
    built.train_from_iterator([*texts, *answers, *prompts], trainer)
    pad, bos, eos = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
