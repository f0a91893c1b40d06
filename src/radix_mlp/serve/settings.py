"""The settings of a server."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from radix_mlp.engine.tasks.rerank_template import TEMPLATES
from radix_mlp.errors import InvalidInputError
from radix_mlp.ops.pool import POOLINGS

__all__ = ["POOLING_NAMES", "ServeSettings", "settings_from_line", "settings_to_line"]

POOLING_NAMES = {function.__name__.replace("_", "-"): name for name, function in POOLINGS.items()}
"""Names on the command line -> the engine's."""
TEXTS = ("model_id", "served_model_name", "default_prompt", "default_prompt_name", "otlp_service_name")
"""Settings that go into texts or answers."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Options of `radix-mlp serve`, with its defaults; `docs/server.md` has the meaning of each.

    Raises:
        InvalidInputError: a value out of range, or two options that exclude each other.

    Examples:
        >>> ServeSettings(model_id="tiny").name
        'tiny'
    """

    model_id: str
    revision: str | None = None
    served_model_name: str | None = None
    hf_token: str | None = field(default=None, repr=False)
    huggingface_hub_cache: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    device: str | None = None
    dtype: str = "auto"
    kind: Literal["auto", "causal", "classifier", "decision", "trunk"] = "auto"
    pooling: str | None = None
    template: str = "auto"
    impl: str = "auto"
    control_tokens: Literal["model", "text"] = "model"
    radix_mlp_threshold: float | Literal["auto"] = "auto"
    replicas: int | Literal["auto"] = 1
    tensor_parallel_size: int = 1
    default_prompt: str | None = None
    default_prompt_name: str | None = None

    max_concurrent_requests: int = 512
    max_batch_tokens: int = 16384
    max_client_batch_size: int = 32
    split_client_batches: bool = False
    max_input_length: int | None = None
    auto_truncate: bool = True
    tokenization_workers: int | None = None
    max_wait: float = 0.002
    payload_limit: int = 2_000_000
    request_timeout: float | None = 60.0
    body_timeout: float = 30.0
    shutdown_timeout: float = 30.0
    hang_timeout: float = 120.0

    hostname: str = "127.0.0.1"
    port: int = 3000
    uds_path: str | None = None
    prometheus_port: int | None = None
    api_key: str | None = field(default=None, repr=False)
    cors_allow_origin: tuple[str, ...] = ()

    json_output: bool = False
    disable_spans: bool = False
    log_level: str = "info"
    otlp_endpoint: str | None = None
    otlp_service_name: str = "radix-mlp.server"

    def __post_init__(self) -> None:
        if not self.model_id:
            raise InvalidInputError("--model-id is empty: give a hub id, a folder, or tiny.")
        if self.default_prompt is not None and self.default_prompt_name is not None:
            raise InvalidInputError(
                "--default-prompt and --default-prompt-name exclude each other: the one is a text, the other the name "
                "of one of the model's prompts."
            )
        for name in TEXTS:
            self._check_text(name)
        if self.pooling == "splade":
            raise InvalidInputError("--pooling splade: models of this kind are not causal and cannot be folded.")
        if self.pooling is not None and self.pooling not in POOLING_NAMES:
            raise InvalidInputError(f"--pooling {self.pooling}: must be one of {', '.join(POOLING_NAMES)}.")
        if self.template not in TEMPLATES:
            raise InvalidInputError(f"--template {self.template}: must be one of {', '.join(TEMPLATES)}.")
        if self.api_key == "":
            raise InvalidInputError("--api-key is empty, which would let everybody in. Give a key, or leave it out.")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            # the end of a line is what a file or a secret of Kubernetes often brings along
            raise InvalidInputError("--api-key: only visible ASCII characters can be sent in a header.")
        if self.api_key is not None and self.api_key != self.api_key.strip():
            raise InvalidInputError("--api-key begins or ends with a blank, which no header keeps.")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise InvalidInputError(f"--log-level {self.log_level}: must be debug, info, warning or error.")
        for name in (
            "max_concurrent_requests",
            "max_batch_tokens",
            "max_client_batch_size",
            "max_input_length",
            "tokenization_workers",
            "payload_limit",
            "tensor_parallel_size",
            *(("replicas",) if self.replicas != "auto" else ()),
        ):
            self._check_at_least(name, 1)
        if not 0 <= self.max_wait <= 10:
            raise InvalidInputError(f"--max-wait {self.max_wait}: must be from 0 to 10 seconds.")
        for name in ("request_timeout", "body_timeout", "shutdown_timeout", "hang_timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidInputError(f"{_option(name)} {value}: must be more than 0 seconds.")
        for name in ("port", "prometheus_port"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 65535:
                raise InvalidInputError(f"{_option(name)} {value}: must be from 0 (any free port) to 65535.")
        if not self.split_client_batches and self.max_client_batch_size > self.max_concurrent_requests:
            raise InvalidInputError(
                f"--max-client-batch-size {self.max_client_batch_size}: more than --max-concurrent-requests "
                f"{self.max_concurrent_requests}, so the largest batches could never be let in. Raise the latter."
            )

    def _check_text(self, name: str) -> None:
        value = getattr(self, name)
        try:
            (value or "").encode()
        except UnicodeEncodeError:
            # bytes of a command line that are not UTF-8 come as halves of surrogate pairs
            raise InvalidInputError(f"{_option(name)} {value!a}: not valid Unicode; write it in UTF-8.") from None

    def _check_at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise InvalidInputError(f"{_option(name)} {value}: must be at least {least}.")

    @property
    def name(self) -> str:
        """The model's name in answers."""
        return self.served_model_name or self.model_id


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def settings_to_line(settings: ServeSettings) -> bytes:
    """Settings as a replica reads them: one line of JSON.

    >>> settings_from_line(settings_to_line(ServeSettings(model_id="tiny"))) == ServeSettings(model_id="tiny")
    True
    """
    return json.dumps(asdict(settings)).encode() + b"\n"


def settings_from_line(line: bytes) -> ServeSettings:
    """The inverse of `settings_to_line`."""
    fields: dict[str, Any] = json.loads(line)
    return ServeSettings(**fields | {"cors_allow_origin": tuple(fields["cors_allow_origin"])})
