"""Settings -> the engine that is served, its checkpoint downloaded if need be."""

from __future__ import annotations

from pathlib import Path

from radix_mlp.engine.engine import Engine
from radix_mlp.errors import InvalidInputError
from radix_mlp.models.bundled import SHIPPED_NAMES
from radix_mlp.models.load import max_length_of
from radix_mlp.models.load_tokenizer import check_folder, not_loaded
from radix_mlp.models.tiny import TINY_NAMES
from radix_mlp.serve.settings import ServeSettings

__all__ = ["load_engine"]

WEIGHTS = "*.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth")
OTHER_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken")


def load_engine(settings: ServeSettings) -> tuple[Engine, str | None]:
    """The engine, and the commit of its checkpoint if that comes from the hub.

    Raises:
        InvalidInputError: no such model, one whose weights are pickled, or limits that do not fit it.
    """
    model, sha = settings.model_id, None
    if model not in (*TINY_NAMES, *SHIPPED_NAMES):
        check_folder(model, "--model-id", "*.json")
        folder = Path(model).expanduser()
        if not folder.is_dir():
            folder, sha = _download(settings)
        elif settings.revision is not None:
            raise InvalidInputError(f"--revision {settings.revision}: {model} is a folder, which has none.")
        _check_weights(folder, settings)
        model = str(folder)
    engine = Engine(
        model,
        device=settings.device,
        dtype=settings.dtype,
        max_batch_tokens=settings.max_batch_tokens,
        max_length=settings.max_input_length,
        threshold=settings.radix_mlp_threshold,
        impl=settings.impl,
        kind=settings.kind,
        trust_remote_code=settings.trust_remote_code,
        tensor_parallel_size=settings.tensor_parallel_size,
        control_tokens=settings.control_tokens,
    )
    longest = engine.max_length or max_length_of(engine.model, engine.tokenizer) or settings.max_batch_tokens
    if longest > settings.max_batch_tokens:
        if not settings.auto_truncate:
            raise InvalidInputError(
                f"--max-batch-tokens {settings.max_batch_tokens}: the model takes texts of {longest} tokens, which no "
                "batch could hold, and --auto-truncate is off. Raise it, or set --max-input-length."
            )
        longest = settings.max_batch_tokens
    engine.loaded.max_length = longest
    return engine, sha


def _download(settings: ServeSettings) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    patterns = [WEIGHTS, *OTHER_FILES]
    if settings.allow_pickle:
        patterns += PICKLES
    if settings.trust_remote_code:
        patterns.append("*.py")
    try:
        folder = snapshot_download(
            settings.model_id,
            revision=settings.revision,
            cache_dir=settings.huggingface_hub_cache,
            token=settings.hf_token,
            allow_patterns=patterns,
        )
    except (OSError, ValueError) as error:
        raise not_loaded("model", settings.model_id, error) from error
    return Path(folder), Path(folder).name


def _check_weights(folder: Path, settings: ServeSettings) -> None:
    if settings.allow_pickle or any(folder.rglob(WEIGHTS)):
        return
    if any(path for pattern in PICKLES for path in folder.rglob(pattern)):
        raise InvalidInputError(
            f"--model-id {settings.model_id}: its weights are pickled, and a pickle can run code. Save them as "
            "safetensors, or allow this with --allow-pickle."
        )
