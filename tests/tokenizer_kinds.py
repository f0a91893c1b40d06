"""Tokenizers of the kinds that models come with, small: what they add to a text, and how they spell it."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["ADDS_AT_THE_END", "KINDS", "byte_level", "metaspace", "words"]

SPECIAL = ["<|endoftext|>", "<s>", "</s>", "<unk>"]
CORPUS = ["the sky is blue and the sea is deep", "a root is a part of a plant", "yes", "no", "yes no ééé 😀😀"] * 50


def _finished(tokenizer: Tokenizer, post: str | None, **names: str) -> PreTrainedTokenizerFast:
    if post:
        tokens = [(token, tokenizer.token_to_id(token)) for token in SPECIAL if token in post]
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=tokens)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(names or {"bos_token": "<s>", "eos_token": "</s>"}))


def byte_level(post: str | None = None, *, trim: bool = False, nfc: bool = False, **names: str):
    """As GPT-2's, Llama 3's and Qwen's: bytes in letters of their own."""
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if trim:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return _finished(tokenizer, post, **names)


def metaspace(post: str | None = None, *, by_normalizer: bool = True, **names: str):
    """As Llama 2's and Gemma's: spaces as a letter, and bytes for letters that are not in the vocabulary."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghijklmnopqrstuvwxyz▁", "▁t", "th", "▁b"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[("▁", "t"), ("t", "h"), ("▁", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    strip = decoders.Strip(" ", 1, 0)
    if by_normalizer:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        first = decoders.Replace("▁", " ")
        tokenizer.decoder = decoders.Sequence([first, decoders.ByteFallback(), decoders.Fuse(), strip])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    tokenizer.add_special_tokens(SPECIAL)
    return _finished(tokenizer, post, **names)


def words(post: str | None = None, **names: str):
    """Words between spaces, in lower case, and one token for all that are not known."""
    known = sorted({word for line in CORPUS for word in line.split()})
    tokenizer = Tokenizer(
        models.WordLevel({token: index for index, token in enumerate([*SPECIAL, *known])}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    return _finished(tokenizer, post, **names)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": byte_level,
    "byte level, adds begin": lambda: byte_level("<s> $A"),
    "byte level, end token alone": lambda: byte_level(eos_token="<|endoftext|>"),
    "byte level, trims offsets": lambda: byte_level(trim=True),
    "byte level, NFC": lambda: byte_level(nfc=True, eos_token="<|endoftext|>"),
    "byte level, adds end": lambda: byte_level("$A <|endoftext|>", eos_token="<|endoftext|>"),
    "metaspace": metaspace,
    "metaspace, adds begin": lambda: metaspace("<s> $A"),
    "metaspace as pre-tokenizer, adds begin": lambda: metaspace("<s> $A", by_normalizer=False),
    "metaspace, adds both": lambda: metaspace("<s> $A </s>"),
    "metaspace, adds two": lambda: metaspace("<s> <unk> $A"),
    "words": words,
    "words, adds begin": lambda: words("<s> $A"),
}
ADDS_AT_THE_END = {"byte level, adds end", "metaspace, adds both"}
