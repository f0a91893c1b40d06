"""The models named `"tiny"`, `"tiny-reranker"`, `"tiny-classifier"` and `"tiny-decider"`, and their tokenizers.

They are built in code from a fixed seed, and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, Qwen3ForSequenceClassification

__all__ = [
    "MAX_LENGTH",
    "SPECIAL_TOKENS",
    "TINY_NAMES",
    "tiny_by_name",
    "tiny_classifier",
    "tiny_decider",
    "tiny_decider_tokenizer",
    "tiny_model",
    "tiny_reranker",
    "tiny_reranker_tokenizer",
    "tiny_tokenizer",
    "tiny_tokenizer_by_name",
]

TINY_NAMES = ("tiny", "tiny-reranker", "tiny-classifier", "tiny-decider")

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")
"""Ids 256, 257 and 258, after the 256 bytes."""
RERANKER_TOKENS = ("<|im_start|>", "<|im_end|>")
"""Ids 259 and 260 of the reranker's tokenizer, before its words."""
RERANKER_WORDS = ("yes", "no")
"""Ids 261 and 262: the answers, one token each where they stand as words of their own."""
DECIDER_WORDS = ("Yes", "No")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's chat format."""
LABELS = ("negative", "neutral", "positive")
MAX_LENGTH = 8192
"""Longest text of the model, in tokens (bytes)."""
WEIGHT_STD = 0.25
"""More than ten times what models start from: attention then moves the output, and a wrong mask shows."""


def tiny_model(
    seed: int = 0,
    dtype: torch.dtype | None = None,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
) -> Qwen3ForCausalLM:
    """A small Qwen3-shaped model with random weights, the same on every run, in evaluation mode on the CPU.

    Four query heads share two key heads; the embedding is also the output head.  Its answers mean nothing;
    that folding leaves them unchanged is what it is good for.

    Args:
        seed: of the weights; the global random state is left as it was.
        dtype: of the weights, float32 unless given; they are drawn in float32 and then cast.
        hidden_size: width, a multiple of 8.
        num_layers: number of layers.

    Examples:
        >>> import torch
        >>> tiny_model()(torch.tensor([[72, 105]])).logits.shape
        torch.Size([1, 2, 259])
    """
    from transformers import Qwen3ForCausalLM

    return _build(Qwen3ForCausalLM, seed, dtype, hidden_size=hidden_size, num_layers=num_layers)


def tiny_reranker(seed: int = 0, dtype: torch.dtype | None = None) -> Qwen3ForCausalLM:
    """The small model with a vocabulary that has "yes" and "no", as Qwen3-Reranker answers.

    Examples:
        >>> import torch
        >>> tiny_reranker()(torch.tensor([[72, 105]])).logits.shape
        torch.Size([1, 2, 263])
    """
    from transformers import Qwen3ForCausalLM

    return _build(Qwen3ForCausalLM, seed, dtype, num_tokens=len(tiny_reranker_tokenizer()))


def tiny_decider(seed: int = 0, dtype: torch.dtype | None = None) -> Qwen3ForCausalLM:
    """The small model with a vocabulary and a chat template by which it can be asked questions.

    Examples:
        >>> import torch
        >>> tiny_decider()(torch.tensor([[72, 105]])).logits.shape
        torch.Size([1, 2, 263])
    """
    from transformers import Qwen3ForCausalLM

    return _build(Qwen3ForCausalLM, seed, dtype, num_tokens=len(tiny_decider_tokenizer()))


def tiny_classifier(
    labels: Sequence[str] = LABELS,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    *,
    problem_type: str | None = None,
) -> Qwen3ForSequenceClassification:
    """The small model with a score for each of `labels` in place of the output head; one label makes a reward model.

    Args:
        labels: names of the scores.
        seed: of the weights.
        dtype: of the weights, float32 unless given.
        problem_type: as in transformers' configurations: "multi_label_classification", "regression", …

    Examples:
        >>> import torch
        >>> tiny_classifier()(torch.tensor([[72, 105]])).logits.shape
        torch.Size([1, 3])
    """
    from transformers import Qwen3ForSequenceClassification

    id2label = dict(enumerate(labels))
    label2id = {label: index for index, label in id2label.items()}
    return _build(
        Qwen3ForSequenceClassification, seed, dtype, id2label=id2label, label2id=label2id, problem_type=problem_type
    )


def tiny_by_name(name: str, dtype: torch.dtype | None = None) -> Any:
    """One of `TINY_NAMES`."""
    if name == "tiny-reranker":
        return tiny_reranker(dtype=dtype)
    if name == "tiny-decider":
        return tiny_decider(dtype=dtype)
    return tiny_classifier(dtype=dtype) if name == "tiny-classifier" else tiny_model(dtype=dtype)


def _build(
    kind: Any,
    seed: int,
    dtype: torch.dtype | None,
    *,
    num_tokens: int = 256 + len(SPECIAL_TOKENS),
    hidden_size: int = 64,
    num_layers: int = 2,
    **options: Any,
) -> Any:
    import torch
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=num_tokens,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
        architectures=[kind.__name__],
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
    generator = torch.Generator().manual_seed(seed)
    # a wider model sums over more terms: the same spread of activations at every width
    std = WEIGHT_STD * (64 / hidden_size) ** 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, std, generator=generator)
    # the stubs of `to` are those of a function
    return torch.nn.Module.to(model, dtype or torch.float32).eval()


def tiny_tokenizer_by_name(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of one of `TINY_NAMES`."""
    if name == "tiny-reranker":
        return tiny_reranker_tokenizer()
    return tiny_decider_tokenizer() if name == "tiny-decider" else tiny_tokenizer()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte of UTF-8: id = byte value; decoding gives every text back.

    Examples:
        >>> tiny_tokenizer()("Hi")["input_ids"]
        [72, 105]
    """
    return _tokenizer()


def tiny_reranker_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer with a token each for "yes", "no" and the marks of Qwen's chat format.

    Examples:
        >>> tiny_reranker_tokenizer()("<|im_start|>yes, yesterday")["input_ids"][:3]
        [259, 261, 44]
    """
    return _tokenizer(RERANKER_TOKENS, RERANKER_WORDS)


def tiny_decider_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer with a token each for "Yes", "No" and the marks of Qwen's chat format, and its chat template.

    Examples:
        >>> tiny_decider_tokenizer()("<|im_start|>No")["input_ids"]
        [259, 262]
    """
    tokenizer = _tokenizer(RERANKER_TOKENS, DECIDER_WORDS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _tokenizer(special: Sequence[str] = (), words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, *special])
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in words])
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> list[str]:
    """The printable character by which byte-level tokenizers write each of the 256 bytes."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters.update({byte: chr(256 + place) for place, byte in enumerate(others)})
    return [characters[byte] for byte in range(256)]
