"""What tokenizer_config.json says about special tokens, against what the tokenizer does."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from radix_mlp.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_special_tokens"]

PROBE = "a"


def check_special_tokens(name: str, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> None:
    """Compare `add_bos_token` and `add_eos_token` with an encoded text.

    transformers 5 leaves the settings aside where tokenizer.json has a post-processor, and the two files of many
    checkpoints disagree. A token that is promised and not added is an error: the vector of a last token would be that
    of another token. A token that is added though the settings say false is a warning: older versions wrote false by
    default, also where tokenizer.json always added the token.

    Args:
        name: the tokenizer's folder or hub id, for the message.
        settings: tokenizer_config.json.

    Raises:
        InvalidInputError: the settings promise a token that the tokenizer does not add.
    """
    said = {side: settings.get(f"add_{side}_token") for side in ("bos", "eos")}
    # whatever they say: a tokenizer whose parts do not fit together fails here, not in the middle of a job
    ids = list(tokenizer(PROBE)["input_ids"])
    for side, place in (("bos", slice(0, 1)), ("eos", slice(-1, None))):
        token = getattr(tokenizer, f"{side}_token_id")
        written = getattr(tokenizer, f"{side}_token")
        added = token is not None and ids[place] == [token]
        if said[side] is True and not added:
            raise _not_added(name, side, written, said)
        if said[side] is False and added:
            warnings.warn(
                f"tokenizer={name!r}: tokenizer_config.json says add_{side}_token false, and the tokenizer adds "
                f"{written!r} to every text, as tokenizer.json says. Correct the file that is wrong.",
                UserWarning,
                stacklevel=2,
            )


def _not_added(name: str, side: str, token: str | None, said: Mapping[str, Any]) -> InvalidInputError:
    both = ", ".join(f"tokenizer.add_{side}_token = {bool(value)}" for side, value in said.items())
    where = "begin" if side == "bos" else "end"
    does = f"encoded texts do not {where} with {token!r}" if token else f"there is no {side}_token"
    return InvalidInputError(
        f"tokenizer={name!r}: tokenizer_config.json says add_{side}_token, but {does}: this version of transformers "
        "takes what tokenizer.json says instead. If the model was trained with the token, write it into the files: "
        f"tokenizer = AutoTokenizer.from_pretrained({name!r}); {both.replace(', ', '; ')}; "
        f"tokenizer.save_pretrained({name!r}). If not, remove add_{side}_token from tokenizer_config.json. Or pass the "
        "tokenizer to use: Engine(model, tokenizer=tokenizer)."
    )
