"""Classes in a model's own Python files, named by `auto_map`: run or refused, never passed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from radix_mlp.errors import InvalidInputError

__all__ = ["check_own_classes", "check_own_tokenizer"]

_CLASS_OF_KIND = {
    "causal": "AutoModelForCausalLM",
    "classifier": "AutoModelForSequenceClassification",
    "decision": "AutoModelForDecision",
    "trunk": "AutoModel",
}


def check_own_classes(
    name: str, auto_map: Mapping[str, Any] | None, kind: str, *, chosen: bool, trusted: bool, loaded: type | None = None
) -> None:
    """Raise `InvalidInputError` if a checkpoint names a class of its own that is not the one that runs.

    transformers takes its own class for the model type, without a word, where the code is not trusted.

    Args:
        auto_map: of config.json: the name of a transformers class -> the class in the checkpoint's files.
        kind: what the checkpoint is loaded as.
        chosen: whether the caller asked for that kind; if not, the checkpoint's trunk counts as well, since embeddings
            come from it.
        trusted: whether the code may run.
        loaded: the model's class, once it is loaded.
    """
    own = auto_map or {}
    wanted = _CLASS_OF_KIND[kind]
    if not trusted:
        names = ["AutoConfig", wanted] if chosen else ["AutoConfig", wanted, "AutoModel"]
        named = next((key for key in names if key in own), None)
        if named is not None:
            raise _not_run(name, "config.json", named, own[named], f"load transformers' own {kind} class")
    elif wanted not in own and "AutoModel" in own and not chosen:
        raise InvalidInputError(
            f"model={name!r}: auto_map in config.json names {own['AutoModel']!r} for AutoModel and none for {wanted}, "
            f"so transformers' own class would run. Say kind='trunk' for the model's class, or kind={kind!r} for that "
            "of transformers."
        )
    elif wanted in own and loaded is not None and loaded.__module__.startswith("transformers."):
        raise InvalidInputError(
            f"model={name!r}: auto_map in config.json names {own[wanted]!r} for {wanted}, but transformers loaded its "
            f"own {loaded.__name__}. Load the model yourself and pass it, or remove that entry from auto_map."
        )


def check_own_tokenizer(name: str, settings: Mapping[str, Any], file: str, *, trusted: bool) -> None:
    """Raise `InvalidInputError` if a checkpoint names a tokenizer of its own and its code is not trusted."""
    own = settings.get("auto_map") or {}
    # a bare list of two names is an older way to write it
    found = own.get("AutoTokenizer") if isinstance(own, Mapping) else own
    if found and not trusted:
        raise _not_run(name, file, "AutoTokenizer", found, "use transformers' own tokenizer")


def _not_run(name: str, file: str, key: str, found: Any, instead: str) -> InvalidInputError:
    return InvalidInputError(
        f"model={name!r}: auto_map in {file} names {found!r} for {key}, code that comes with the model and is not "
        f"trusted; without it, its answers may be those of another model. Read it and allow it with "
        f"trust_remote_code=True (--trust-remote-code); or, to {instead} instead, remove that entry from auto_map."
    )
