"""`radix-mlp serve`: the HTTP server."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from radix_mlp.cli import options as o
from radix_mlp.errors import InvalidInputError

__all__ = ["ServeCommand", "serve"]

BATCHING, ADDRESS, SECURITY, LOGS = "Batching and limits", "Address", "Security", "Logs and metrics"


NOT_OFFERED = {
    "max_batch_requests": "batches are bounded by --max-batch-tokens alone",
    "dense_path": "the layers that a model's modules.json lists are run",
}
"""Options of text-embeddings-inference that are refused -> what to do instead."""


def _option(name: str, *more: str, panel: str, own: bool = False, **options: Any) -> Any:
    """An option with its environment variable, `--max-batch-tokens` and `MAX_BATCH_TOKENS`.

    Args:
        own: not one of text-embeddings-inference's, so the variable's name begins with RADIX_MLP.
    """
    variable = name.removeprefix("--").replace("-", "_").upper()
    return typer.Option(
        name, *more, envvar=f"RADIX_MLP_{variable}" if own else variable, rich_help_panel=panel, **options
    )


class ServeCommand(TyperCommand):
    """Lets `--auto-truncate` stand without a value, as text-embeddings-inference does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        name = "--auto-truncate"
        if name in args:
            after = args.index(name) + 1
            if after == len(args) or args[after].startswith("-"):
                args = [*args[:after], "true", *args[after:]]
        return super().parse_args(ctx, args)


def serve(
    model_id: Annotated[
        str,
        _option(
            "--model-id",
            panel=o.MODEL,
            metavar="NAME|FOLDER",
            help="A hub id, a folder, or small, tiny, tiny-reranker, tiny-classifier.",
        ),
    ],
    *,
    revision: Annotated[
        str | None, _option("--revision", panel=o.MODEL, help="Branch, tag or commit on the hub.")
    ] = None,
    served_model_name: Annotated[
        str | None,
        _option("--served-model-name", panel=o.MODEL, help="The model's name in answers; its id unless given."),
    ] = None,
    dtype: Annotated[
        str,
        _option(
            "--dtype", panel=o.MODEL, metavar="NAME", help="float32, float16 or bfloat16; auto is the checkpoint's own."
        ),
    ] = "auto",
    pooling: Annotated[
        str | None,
        _option(
            "--pooling",
            panel=o.MODEL,
            metavar="NAME",
            help="last-token, mean, weighted-mean or cls; the model's own unless given.",
        ),
    ] = None,
    template: Annotated[
        str, _option("--template", panel=o.MODEL, own=True, metavar="NAME", help=o.TEMPLATE_HELP)
    ] = "auto",
    radix_mlp_threshold: Annotated[
        str,
        _option(
            "--radix-mlp-threshold",
            panel=o.MODEL,
            metavar="NUMBER",
            help="0 never folds, 1 always; between, batches whose compression is below it; auto those where it pays.",
        ),
    ] = "auto",
    default_prompt: Annotated[
        str | None, _option("--default-prompt", panel=o.MODEL, help="Put this before every text to embed.")
    ] = None,
    default_prompt_name: Annotated[
        str | None, _option("--default-prompt-name", panel=o.MODEL, help="Put the model's prompt of this name there.")
    ] = None,
    kind: Annotated[
        str,
        _option(
            "--kind",
            panel=o.MODEL,
            own=True,
            metavar="NAME",
            help="causal, classifier or trunk; auto is what the files say.",
        ),
    ] = "auto",
    device: Annotated[
        str | None, _option("--device", panel=o.MODEL, own=True, help="cpu, cuda, cuda:1, …; CUDA where there is one.")
    ] = None,
    impl: Annotated[str, _option("--impl", panel=o.MODEL, own=True, metavar="NAME", help=o.IMPL_HELP)] = "auto",
    control_tokens: Annotated[
        str,
        _option("--control-tokens", panel=o.MODEL, own=True, metavar="model|text", help=o.CONTROL_TOKENS_HELP),
    ] = "model",
    replicas: Annotated[
        str,
        _option(
            "--replicas",
            panel=o.MODEL,
            own=True,
            metavar="NUMBER",
            help="Servers of the model behind one address, a GPU each; auto is one for every GPU.",
        ),
    ] = "1",
    tensor_parallel_size: Annotated[
        int,
        _option(
            "--tensor-parallel-size",
            panel=o.MODEL,
            own=True,
            help="Shard the model over this many GPUs, one process each, for models that one GPU cannot hold.",
        ),
    ] = 1,
    huggingface_hub_cache: Annotated[
        str | None, _option("--huggingface-hub-cache", panel=o.MODEL, metavar="FOLDER", help="Where downloads go.")
    ] = None,
    hf_token: Annotated[
        str | None, _option("--hf-token", "--hf-api-token", panel=o.MODEL, help="For gated models; better as HF_TOKEN.")
    ] = None,
    max_concurrent_requests: Annotated[
        int,
        _option("--max-concurrent-requests", panel=BATCHING, help="Texts on their way; one more is refused with 429."),
    ] = 512,
    max_batch_tokens: Annotated[
        int, _option("--max-batch-tokens", panel=BATCHING, help="Compact tokens of a batch, at most.")
    ] = 16384,
    max_client_batch_size: Annotated[
        int, _option("--max-client-batch-size", panel=BATCHING, help="Texts of a request, at most.")
    ] = 32,
    split_client_batches: Annotated[
        bool,
        _option(
            "--split-client-batches",
            panel=BATCHING,
            own=True,
            help="Run larger requests in parts instead of refusing them.",
        ),
    ] = False,
    max_input_length: Annotated[
        int | None,
        _option(
            "--max-input-length",
            panel=BATCHING,
            own=True,
            help="Longest text, in tokens; what the model allows unless given.",
        ),
    ] = None,
    auto_truncate: Annotated[
        str,
        _option(
            "--auto-truncate",
            panel=BATCHING,
            metavar="BOOLEAN",
            help="Cut texts that are too long, unless a request says otherwise.",
        ),
    ] = "true",
    tokenization_workers: Annotated[
        int | None, _option("--tokenization-workers", panel=BATCHING, help="Threads that turn texts into tokens.")
    ] = None,
    max_wait: Annotated[
        float,
        _option(
            "--max-wait",
            panel=BATCHING,
            own=True,
            help="Seconds that an idle device waits for texts that are being tokenized.",
        ),
    ] = 0.002,
    payload_limit: Annotated[
        int, _option("--payload-limit", panel=BATCHING, help="Bytes of a request, at most.")
    ] = 2_000_000,
    request_timeout: Annotated[
        float,
        _option("--request-timeout", panel=BATCHING, own=True, help="Seconds until a request is given up with 504."),
    ] = 60.0,
    body_timeout: Annotated[
        float, _option("--body-timeout", panel=BATCHING, own=True, help="Seconds for a request's body to arrive.")
    ] = 30.0,
    hang_timeout: Annotated[
        float,
        _option(
            "--hang-timeout",
            panel=BATCHING,
            own=True,
            help="Seconds without a finished batch until the engine is restarted.",
        ),
    ] = 120.0,
    shutdown_timeout: Annotated[
        float,
        _option(
            "--shutdown-timeout",
            panel=BATCHING,
            own=True,
            help="Seconds to answer accepted requests after a signal to stop.",
        ),
    ] = 30.0,
    hostname: Annotated[
        str,
        _option("--hostname", panel=ADDRESS, own=True, help="Address to listen at; 0.0.0.0 for all."),
    ] = "127.0.0.1",
    port: Annotated[int, _option("--port", "-p", panel=ADDRESS, help="Port to listen at.")] = 3000,
    uds_path: Annotated[
        str | None, _option("--uds-path", panel=ADDRESS, metavar="FILE", help="Listen at a Unix socket instead.")
    ] = None,
    api_key: Annotated[
        str | None, _option("--api-key", panel=SECURITY, help="Ask for `authorization: Bearer KEY`; better as API_KEY.")
    ] = None,
    cors_allow_origin: Annotated[
        list[str] | None,
        _option(
            "--cors-allow-origin", panel=SECURITY, metavar="ORIGIN", help="Let pages from there ask; may be repeated."
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, _option("--trust-remote-code", panel=SECURITY, help="Run code that comes with the model.")
    ] = False,
    allow_pickle: Annotated[
        bool, _option("--allow-pickle", panel=SECURITY, own=True, help="Load weights that are not safetensors.")
    ] = False,
    json_output: Annotated[bool, _option("--json-output", panel=LOGS, help="Log lines as JSON.")] = False,
    disable_spans: Annotated[
        bool, _option("--disable-spans", panel=LOGS, help="Leave timings and token counts out of the log.")
    ] = False,
    log_level: Annotated[
        str, _option("--log-level", panel=LOGS, own=True, metavar="NAME", help="debug, info, warning or error.")
    ] = "info",
    prometheus_port: Annotated[
        int | None, _option("--prometheus-port", panel=LOGS, help="Serve /metrics at this port too.")
    ] = None,
    otlp_endpoint: Annotated[
        str | None,
        _option(
            "--otlp-endpoint", panel=LOGS, metavar="URL", help="Send traces there; needs OpenTelemetry's packages."
        ),
    ] = None,
    max_batch_requests: Annotated[int | None, _option("--max-batch-requests", panel=BATCHING, hidden=True)] = None,
    dense_path: Annotated[str | None, _option("--dense-path", panel=o.MODEL, hidden=True)] = None,
    otlp_service_name: Annotated[
        str, _option("--otlp-service-name", panel=LOGS, help="The name in traces.")
    ] = "radix-mlp.server",
) -> None:
    """Serve a model over HTTP, in place of text-embeddings-inference.

    Options and environment variables (MAX_BATCH_TOKENS for --max-batch-tokens)
    are those of text-embeddings-inference; so are the routes. Clients of OpenAI,
    Cohere, Jina and vLLM find theirs. GET /docs shows all of them.

    \b
    Examples:
      radix-mlp serve --model-id tiny                          offline, to try it
      radix-mlp serve --model-id Qwen/Qwen3-Embedding-0.6B --port 8080
      radix-mlp serve --model-id ./reranker --split-client-batches
      API_KEY=… radix-mlp serve --model-id ./model --hostname 0.0.0.0

    \b
    Then:
      curl localhost:3000/embed -H 'content-type: application/json' \\
        -d '{"inputs": ["a text", "a text more"]}'
    """
    given = dict(locals())
    for name, advice in NOT_OFFERED.items():
        if given.pop(name) is not None:
            raise InvalidInputError(f"--{name.replace('_', '-')} is not offered here: {advice}.")
    given |= {
        "radix_mlp_threshold": _threshold(radix_mlp_threshold),
        "auto_truncate": _boolean("--auto-truncate", auto_truncate),
        "replicas": _count("--replicas", replicas),
        "cors_allow_origin": tuple(cors_allow_origin or ()),
    }
    try:
        # the server's packages are an extra, and torch takes seconds to import
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InvalidInputError(f"the server needs {error.name}: pip install 'radix-mlp[serve]'.") from error

    from radix_mlp.serve.run import run
    from radix_mlp.serve.settings import ServeSettings

    run(ServeSettings(**given))


def _threshold(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise InvalidInputError(f"--radix-mlp-threshold {text}: must be auto or a number, as 0, 0.8 or 1.") from None


def _count(option: str, text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise InvalidInputError(f"{option} {text}: must be auto or a whole number.") from None


def _boolean(option: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise InvalidInputError(f"{option} {text}: must be true or false.")
    return text.lower() == "true"
