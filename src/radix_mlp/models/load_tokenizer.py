"""A tokenizer's name -> the tokenizer, or an error that says what to do. No torch."""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import TYPE_CHECKING

from radix_mlp.errors import InvalidInputError, RadixError
from radix_mlp.models.bundled import SHIPPED_NAMES
from radix_mlp.models.own_code import check_own_tokenizer
from radix_mlp.models.sentence_transformers_folder import read_folder, read_settings
from radix_mlp.models.tiny import TINY_NAMES, tiny_tokenizer_by_name
from radix_mlp.models.tokenizer_settings import check_special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ADAPTER", "check_folder", "checkpoint_of", "load_tokenizer", "not_loaded", "tokenizer_of"]

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen 2, 2.5 and 3 cut text into words before byte-pair encoding; a file of ranks does not say."""

SETTINGS = "tokenizer_config.json"
ADAPTER = "adapter_config.json"
"""What PEFT writes beside an adapter's weights."""


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer by hub id, folder, `"small"`, `"tiny"`, or a `.tiktoken` file of ranks (taken as Qwen's).

    Raises:
        InvalidInputError: there is no such tokenizer; its files cannot be read, or contradict each other; or it brings
            code of its own that is not trusted.
    """
    name = str(name)
    if name in SHIPPED_NAMES:
        name = read_folder(name).checkpoint
    if name in TINY_NAMES:
        return tiny_tokenizer_by_name(name)
    if name.endswith(".tiktoken"):
        return tokenizer_from_ranks(Path(name))
    check_folder(name, "tokenizer", "tokenizer*")
    # it imports torch
    from transformers import AutoTokenizer

    settings = read_settings(name, SETTINGS) or {}
    check_own_tokenizer(name, settings, SETTINGS, trusted=trust_remote_code)
    if "auto_map" not in settings:
        # where older checkpoints name it
        model_settings = read_settings(name, "config.json") or {}
        check_own_tokenizer(name, model_settings, "config.json", trusted=trust_remote_code)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        check_special_tokens(name, tokenizer, settings)
    except (RadixError, MemoryError):
        raise
    except BaseException as error:
        # the parts of a tokenizer's files are read by different libraries, each with errors of its own
        if isinstance(error, Exception) or _is_panic(error):
            raise not_loaded("tokenizer", name, error) from error
        raise
    return tokenizer


def tokenizer_of(model: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that `Engine(model)` would use, without the model."""
    return load_tokenizer(checkpoint_of(model), trust_remote_code=trust_remote_code)


def checkpoint_of(model: str | Path) -> str:
    """Folder or hub id of the transformer itself, which may lie in a folder of the model's."""
    name = str(model)
    return name if name in TINY_NAMES else read_folder(name).checkpoint


def tokenizer_from_ranks(path: Path) -> PreTrainedTokenizerBase:
    """A byte-pair tokenizer from a file with a base64 token and its rank a line, cut into words as Qwen does."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    ranks = _read_ranks(path)
    letters = bytes_to_unicode()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(a, b) for a, b in halves if a in ranks and b in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges.extend((written[a], written[b]) for a, b in known)
    vocabulary = {written[token]: rank for token, rank in ranks.items()}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    built.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    built.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    built.decoder = decoders.ByteLevel()
    # the ids that follow the ranks, in this order
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    built.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=built, eos_token=special[2], pad_token=special[0], clean_up_tokenization_spaces=False
    )


def check_folder(name: str, argument: str, needed: str) -> None:
    """Raise `InvalidInputError` if `name` is a folder without a file like `needed`, or can only be a folder."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not any(path.glob(needed)):
            if (path / ADAPTER).is_file():
                raise InvalidInputError(
                    f"{argument}={name!r}: the folder holds an adapter ({ADAPTER}) without its model. Load both with "
                    "PEFT and pass the model, or save both as one: merge_and_unload().save_pretrained(...), and the "
                    "tokenizer beside it."
                )
            raise InvalidInputError(
                f"{argument}={name!r}: the folder has no {needed}. Give the folder that save_pretrained wrote."
            )
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.is_file():
        raise InvalidInputError(
            f"{argument}={name!r}: no such folder. Give an existing folder, a hub id such as Qwen/Qwen3-0.6B, "
            "or 'small'."
        )


def not_loaded(argument: str, name: str, error: BaseException) -> InvalidInputError:
    """The error to raise when transformers could not load `name`."""
    if "trust_remote_code" in str(error):
        advice = "It brings its own code: read it, then allow it with trust_remote_code (--trust-remote-code)."
    elif Path(name).is_dir():
        advice = "The folder's files could not be read as one that save_pretrained wrote."
        broken = _broken_file(Path(name))
        if broken:
            advice += f" {broken} is damaged or incomplete: copy it again."
        elif argument == "tokenizer" and not (Path(name) / "tokenizer.json").is_file():
            advice += " There is no tokenizer.json."
    else:
        advice = (
            "Without a network, give the folder of a downloaded model, or 'small'; for a gated one, log in with "
            "`hf auth login`."
        )
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 200 else reason[:200] + " …"
    return InvalidInputError(f"{argument}={name!r} could not be loaded. {advice} ({type(error).__name__}: {reason})")


def _is_panic(error: BaseException) -> bool:
    """Whether Rust code ended in a panic, which is no Exception: a tokenizer whose parts do not fit together."""
    return type(error).__name__ == "PanicException"


def _broken_file(folder: Path) -> str | None:
    """The first of a folder's files that is no JSON, no safetensors or no tokenizer, by its name."""
    from safetensors import safe_open
    from tokenizers import Tokenizer

    for path in sorted(folder.iterdir()):
        try:
            if path.name == "tokenizer.json":
                Tokenizer.from_file(str(path)).encode("a")
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="np"):
                    pass
        except BaseException as error:
            # each library has errors of its own for a file that it cannot read
            if isinstance(error, Exception) or _is_panic(error):
                return path.name
            raise
    return None


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InvalidInputError(f"tokenizer='{path}': {error.strerror}.") from error
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise InvalidInputError(f"{path}:{number}: {line[:40]!r} is not a base64 token and its rank.") from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise InvalidInputError(f"{path}: not a byte-level vocabulary: byte {missing[0]} has no rank.")
    return ranks
