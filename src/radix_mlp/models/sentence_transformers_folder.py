"""What a sentence-transformers folder says about its model, read without that library.

`modules.json` lists the modules that run one after another; `config_sentence_transformers.json` has the prompts.
A plain checkpoint has neither, and its settings are empty.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.file_download import _CACHED_NO_EXIST

from radix_mlp.errors import InvalidDtypeError, InvalidInputError, UnsupportedModelError
from radix_mlp.models.bundled import shipped_folder

__all__ = ["FolderModule", "FolderSettings", "find_file", "read_folder", "read_settings"]

# settings of the Transformer module that change nothing here, or are read below
_KNOWN = {
    "max_seq_length",
    "do_lower_case",
    "transformer_task",
    "modality_config",
    "module_output_name",
    "unpad_inputs",
    "processing_kwargs",
}
# how to load: dtype and device are the engine's own arguments, attention is ours
_LOADING = {
    "torch_dtype",
    "dtype",
    "attn_implementation",
    "device_map",
    "use_cache",
    "padding_side",
    "trust_remote_code",
}
_ARGUMENTS = ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")
_SETTINGS_FILES = tuple(
    f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta")
)
_PROMPTS_FILE = "config_sentence_transformers.json"
_CONFIGURED = ("Pooling", "Dense", "LogitScore")
"""Modules that do not work without their config.json; Normalize does."""


@dataclass(frozen=True)
class FolderModule:
    """One module after the transformer."""

    kind: str
    """Its class: "Pooling", "Dense", "Normalize", "LogitScore", …"""
    path: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class FolderSettings:
    """Settings of a sentence-transformers folder; those of a plain checkpoint are the defaults."""

    name: str = ""
    """Folder or hub id."""
    looked_up: bool = True
    """False: a hub id, no network, and not known whether it has a `modules.json`."""
    modules: tuple[FolderModule, ...] = ()
    transformer: str = ""
    """Where the transformer lies below the folder."""
    transformer_config: Mapping[str, Any] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    activation: str | None = None
    """Of a cross-encoder's scores: a dotted name."""
    dimensions: int | None = None

    @property
    def is_sentence_transformers(self) -> bool:
        return bool(self.transformer_config) or bool(self.modules)

    @property
    def checkpoint(self) -> str:
        """Folder or hub id of the transformer itself."""
        if not self.transformer:
            return self.name
        folder = Path(self.name).expanduser()
        if not folder.is_dir():
            raise InvalidInputError(
                f"model={self.name!r}: its transformer lies in {self.transformer}. Download all, and give the folder."
            )
        return str(folder / self.transformer)

    @property
    def max_length(self) -> int | None:
        """Longest text, in tokens, if the folder says."""
        limit = self.transformer_config.get("max_seq_length")
        return limit if isinstance(limit, int) else None

    @property
    def lower_case(self) -> bool:
        return bool(self.transformer_config.get("do_lower_case"))

    @property
    def chat(self) -> bool:
        """Whether texts go through the tokenizer's chat template."""
        return "message" in self.transformer_config.get("modality_config", {})

    @property
    def processing(self) -> Mapping[str, Any]:
        """How its processor is called."""
        return self.transformer_config.get("processing_kwargs") or {}

    @property
    def template_settings(self) -> Mapping[str, Any]:
        """How its chat template is."""
        return self.processing.get("chat_template") or {}

    @property
    def has_generation_prompt(self) -> bool:
        """Whether messages end with what begins an answer."""
        return bool(self.template_settings.get("add_generation_prompt"))

    def prompt(self, prompt: str | None, prompt_name: str | None, argument: str = "prompt") -> str | None:
        """The text to put first: given outright, by name, or the folder's default.

        Raises:
            InvalidInputError: both are given, there is no such name, or it is not valid Unicode.
            InvalidDtypeError: it is not a string.
        """
        if prompt is not None:
            _check_text(prompt, argument)
        if prompt_name is None:
            return self.prompts.get(self.default_prompt_name or "") if prompt is None else prompt
        if prompt is not None:
            raise InvalidInputError(f"{argument} and prompt_name={prompt_name!r} exclude each other: give one.")
        if prompt_name not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none"
            raise InvalidInputError(f"prompt_name={prompt_name!r}: the model's prompts are {known}.")
        return self.prompts[prompt_name]

    def check_transformer(self, outputs: tuple[str, ...]) -> None:
        """Raise `UnsupportedModelError` if the transformer module does more than is done here.

        Args:
            outputs: names of the model's output that the task can start from.
        """
        config = self.transformer_config
        for modality, settings in config.get("modality_config", {}).items():
            if modality in ("text", "message") and settings.get("method_output_name") not in (None, *outputs):
                raise self.unsupported(f"its transformer hands on {settings['method_output_name']!r}")
        for key in _ARGUMENTS:
            strange = sorted(set(config.get(key) or {}) - _LOADING)
            if strange:
                raise self.unsupported(f"its transformer sets {', '.join(strange)} in {key}")
        settings = self.processing
        if settings.keys() - {"chat_template"} or self.template_settings.keys() - {"add_generation_prompt"}:
            raise self.unsupported(f"its transformer sets processing_kwargs = {dict(settings)!r}")
        for key, value in config.items():
            if value and key not in _KNOWN and key not in _ARGUMENTS:
                raise self.unsupported(f"its transformer sets {key} = {value!r}")

    def unsupported(self, reason: str) -> UnsupportedModelError:
        """The error for a folder that asks for something not done here."""
        return UnsupportedModelError(
            f"{self.name}: {reason}, which is not supported here. Run it with sentence-transformers, and fold its "
            "model with radix_mlp.enable where that is causal."
        )


def read_folder(name: str) -> FolderSettings:
    """Settings of a folder, hub id or shipped model; those of a plain checkpoint if it has no `modules.json`.

    Raises:
        UnsupportedModelError: the first module is not a transformer.
        InvalidInputError: a file is not what it should be, or a path leads out of the folder.
    """
    name = shipped_folder(name)
    try:
        entries = _read_json(name, "modules.json")
        settings = _read_object(name, _PROMPTS_FILE)
    except _UnknownError:
        return FolderSettings(name, looked_up=False)
    if entries is None:
        _check_plain(name, settings)
        return FolderSettings(name)
    found = _modules(name, entries)
    module_type, transformer = found[0] if found else ("nothing", "")
    if not (module_type.startswith("sentence_transformers.") and module_type.endswith(".Transformer")):
        raise FolderSettings(name).unsupported(f"its first module is {module_type}, not a Transformer")
    settings = settings or {}
    configs = (read_settings(name, _join(transformer, file)) for file in _SETTINGS_FILES)
    return FolderSettings(
        name,
        modules=tuple(_module(name, module_type, path) for module_type, path in found[1:]),
        transformer=transformer,
        transformer_config=next((config for config in configs if config), {"transformer_task": None}),
        # an empty prompt is one, None is a name without a text
        prompts={key: text for key, text in (settings.get("prompts") or {}).items() if text is not None},
        default_prompt_name=settings.get("default_prompt_name"),
        activation=settings.get("activation_fn"),
        dimensions=settings.get("truncate_dim"),
    )


def find_file(name: str, file: str) -> Path | None:
    """A file of a folder or hub id, downloaded if need be; None if it has no such file."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    if folder.is_file():
        # the hub would be asked in vain, for a minute where there is no network
        raise _UnknownError
    try:
        return Path(hf_hub_download(name, file))
    except LocalEntryNotFoundError as error:
        if try_to_load_from_cache(name, file) is _CACHED_NO_EXIST:
            return None
        raise _UnknownError from error
    except EntryNotFoundError:
        return None
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        # not a hub id, or none that can be read: loading the model says which
        raise _UnknownError from error


class _UnknownError(Exception):
    """Without a network, nobody knows whether there is such a file."""


def read_settings(name: str, file: str) -> dict[str, Any] | None:
    """The JSON object in a file of a folder or hub id; None if there is no such file, or no way to look.

    Raises:
        InvalidInputError: the file holds something else.
    """
    try:
        return _read_object(name, file)
    except _UnknownError:
        return None


def _modules(name: str, entries: Any) -> list[tuple[str, str]]:
    """Type and path of every module that modules.json lists."""
    if not isinstance(entries, list):
        raise InvalidInputError(f"{name}/modules.json: a list of modules is needed, not {type(entries).__name__}.")
    found = []
    for place, entry in enumerate(entries):
        for key in ("type", "path"):
            if not (isinstance(entry, dict) and isinstance(entry.get(key), str)):
                raise InvalidInputError(
                    f"{name}/modules.json: module {place} has no {key!r}, or one that is no string."
                )
        path = entry["path"]
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise InvalidInputError(f"{name}/modules.json: the path {path!r} leads out of the folder.")
        found.append((entry["type"], path))
    return found


def _module(name: str, module_type: str, path: str) -> FolderModule:
    # other packages' modules keep their whole name, and so are known to no task
    kind = module_type.rsplit(".", 1)[-1] if module_type.startswith("sentence_transformers.") else module_type
    file = _join(path, "config.json")
    config = read_settings(name, file)
    if config is None and kind in _CONFIGURED:
        raise InvalidInputError(
            f"model={name!r}: {file} is missing, which says how its module {kind} works. Copy or download the folder "
            "with all of its subfolders."
        )
    return FolderModule(kind, path, config or {})


def _check_plain(name: str, settings: Any) -> None:
    """Raise `InvalidInputError` for a sentence-transformers folder that has lost its modules.json."""
    folder = Path(name).expanduser()
    traces = [_PROMPTS_FILE] if settings is not None else []
    if folder.is_dir():
        traces += sorted(f"{path.parent.name}/{path.name}" for path in folder.glob("[0-9]*_*/config.json"))
    if traces:
        raise InvalidInputError(
            f"model={name!r}: modules.json is missing, which says how its vectors or scores are made; the folder has "
            f"{traces[0]}. Copy or download all of it, or remove {traces[0]} to use it as a plain checkpoint."
        )


def _join(path: str, file: str) -> str:
    return f"{path}/{file}" if path else file


def _read_object(name: str, file: str) -> dict[str, Any] | None:
    found = _read_json(name, file)
    if found is not None and not isinstance(found, dict):
        raise InvalidInputError(f"{name}/{file}: a JSON object is needed, not {type(found).__name__}.")
    return found


def _read_json(name: str, file: str) -> Any:
    path = find_file(name, file)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInputError(f"{path}: not JSON ({error}).") from error


def _check_text(text: Any, argument: str) -> None:
    if not isinstance(text, str):
        raise InvalidDtypeError(f"{argument} must be a string, not {text!r:.60}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"{argument}={text[:40]!a} is not valid Unicode: {error.reason}") from None
