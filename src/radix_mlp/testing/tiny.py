"""The model named `"tiny"` and its tokenizer: built in code from a fixed seed, nothing downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

__all__ = ["MAX_LENGTH", "SPECIAL_TOKENS", "tiny_model", "tiny_tokenizer"]

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")
"""Ids 256, 257 and 258, after the 256 bytes."""
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

    Example:
        >>> import torch
        >>> tiny_model()(torch.tensor([[72, 105]])).logits.shape
        torch.Size([1, 2, 259])
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=256 + len(SPECIAL_TOKENS),
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
        architectures=["Qwen3ForCausalLM"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    # a wider model sums over more terms: the same spread of activations at every width
    std = WEIGHT_STD * (64 / hidden_size) ** 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, std, generator=generator)
    # the stubs of `to` are those of a function
    return torch.nn.Module.to(model, dtype or torch.float32).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte of UTF-8: id = byte value; decoding gives every text back.

    Example:
        >>> tiny_tokenizer()("Hi")["input_ids"]
        [72, 105]
    """
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
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
