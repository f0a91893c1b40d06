"""`radix-mlp serve`: the HTTP server."""

from __future__ import annotations

from typing import Annotated, Any, Literal

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


def _option(
    name: str, panel: str, text: str = "", *, also: tuple[str, ...] = (), own: bool = False, **options: Any
) -> Any:
    """An option with its help text and environment variable, `--max-batch-tokens` and `MAX_BATCH_TOKENS`.

    Args:
        also: more names of the option.
        own: not one of text-embeddings-inference's, so the variable's name begins with RADIX_MLP.
    """
    variable = name.removeprefix("--").replace("-", "_").upper()
    variable = f"RADIX_MLP_{variable}" if own else variable
    return o.option(panel, text, name, *also, envvar=variable, **options)


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
            o.MODEL,
            "A hub id, a folder, or small, tiny, tiny-reranker, tiny-classifier, tiny-decider.",
            metavar="NAME|FOLDER",
        ),
    ],
    *,
    revision: Annotated[str | None, _option("--revision", o.MODEL, "Branch, tag or commit on the hub.")] = None,
    served_model_name: Annotated[
        str | None, _option("--served-model-name", o.MODEL, "The model's name in answers; its id unless given.")
    ] = None,
    dtype: Annotated[
        str, _option("--dtype", o.MODEL, "float32, float16 or bfloat16; auto is the checkpoint's own.", metavar="NAME")
    ] = "auto",
    pooling: Annotated[
        str | None,
        _option(
            "--pooling",
            o.MODEL,
            "last-token, mean, weighted-mean or cls; the model's own unless given.",
            metavar="NAME",
        ),
    ] = None,
    template: Annotated[str, _option("--template", o.MODEL, o.TEMPLATE_HELP, own=True, metavar="NAME")] = "auto",
    radix_mlp_threshold: Annotated[
        str,
        _option(
            "--radix-mlp-threshold",
            o.MODEL,
            "0 never folds, 1 always; in between, batches whose compression is lower are folded; auto folds where it "
            "pays.",
            metavar="NUMBER",
        ),
    ] = "auto",
    default_prompt: Annotated[
        str | None, _option("--default-prompt", o.MODEL, "Put this before every text to embed.")
    ] = None,
    default_prompt_name: Annotated[
        str | None, _option("--default-prompt-name", o.MODEL, "Put the model's prompt of this name there.")
    ] = None,
    kind: Annotated[
        str,
        _option(
            "--kind",
            o.MODEL,
            "causal, classifier, decision or trunk; auto is what the files say.",
            own=True,
            metavar="NAME",
        ),
    ] = "auto",
    device: Annotated[
        str | None, _option("--device", o.MODEL, "cpu, cuda, cuda:1, …; CUDA where there is one.", own=True)
    ] = None,
    impl: Annotated[str, _option("--impl", o.MODEL, o.IMPL_HELP, own=True, metavar="NAME")] = "auto",
    control_tokens: Annotated[
        str, _option("--control-tokens", o.MODEL, o.CONTROL_TOKENS_HELP, own=True, metavar="model|text")
    ] = "model",
    replicas: Annotated[
        str,
        _option(
            "--replicas",
            o.MODEL,
            "Servers of the model behind one address, a GPU each; auto is one for every GPU.",
            own=True,
            metavar="NUMBER",
        ),
    ] = "1",
    tensor_parallel_size: Annotated[
        int,
        _option(
            "--tensor-parallel-size",
            o.MODEL,
            "Shard the model over this many GPUs, one process each, for models that one GPU cannot hold.",
            own=True,
        ),
    ] = 1,
    huggingface_hub_cache: Annotated[
        str | None, _option("--huggingface-hub-cache", o.MODEL, "Where downloads go.", metavar="FOLDER")
    ] = None,
    hf_token: Annotated[
        str | None, _option("--hf-token", o.MODEL, "For gated models; better as HF_TOKEN.", also=("--hf-api-token",))
    ] = None,
    max_concurrent_requests: Annotated[
        int, _option("--max-concurrent-requests", BATCHING, "Texts on their way; one more is refused with 429.")
    ] = 512,
    max_batch_tokens: Annotated[
        int, _option("--max-batch-tokens", BATCHING, "Compact tokens of a batch, at most.")
    ] = 16384,
    max_client_batch_size: Annotated[
        int, _option("--max-client-batch-size", BATCHING, "Texts of a request, at most.")
    ] = 32,
    split_client_batches: Annotated[
        bool,
        _option("--split-client-batches", BATCHING, "Run larger requests in parts instead of refusing them.", own=True),
    ] = False,
    max_input_length: Annotated[
        int | None,
        _option(
            "--max-input-length", BATCHING, "Longest text, in tokens; what the model allows unless given.", own=True
        ),
    ] = None,
    auto_truncate: Annotated[
        str,
        _option(
            "--auto-truncate",
            BATCHING,
            "Cut texts that are too long, unless a request says otherwise.",
            metavar="BOOLEAN",
        ),
    ] = "true",
    tokenization_workers: Annotated[
        int | None, _option("--tokenization-workers", BATCHING, "Threads that turn texts into tokens.")
    ] = None,
    max_wait: Annotated[
        float,
        _option(
            "--max-wait", BATCHING, "Seconds that an idle device waits for texts that are being tokenized.", own=True
        ),
    ] = 0.002,
    payload_limit: Annotated[int, _option("--payload-limit", BATCHING, "Bytes of a request, at most.")] = 2_000_000,
    request_timeout: Annotated[
        float, _option("--request-timeout", BATCHING, "Seconds until a request is given up with 504.", own=True)
    ] = 60.0,
    body_timeout: Annotated[
        float, _option("--body-timeout", BATCHING, "Seconds for a request's body to arrive.", own=True)
    ] = 30.0,
    hang_timeout: Annotated[
        float,
        _option(
            "--hang-timeout", BATCHING, "Seconds without a finished batch until the engine is restarted.", own=True
        ),
    ] = 120.0,
    shutdown_timeout: Annotated[
        float,
        _option(
            "--shutdown-timeout", BATCHING, "Seconds to answer accepted requests after a signal to stop.", own=True
        ),
    ] = 30.0,
    hostname: Annotated[
        str, _option("--hostname", ADDRESS, "Address to listen at; 0.0.0.0 for all.", own=True)
    ] = "127.0.0.1",
    port: Annotated[int, _option("--port", ADDRESS, "Port to listen at.", also=("-p",))] = 3000,
    uds_path: Annotated[
        str | None, _option("--uds-path", ADDRESS, "Listen at a Unix socket instead.", metavar="FILE")
    ] = None,
    api_key: Annotated[
        str | None, _option("--api-key", SECURITY, "Ask for `authorization: Bearer KEY`; better as API_KEY.")
    ] = None,
    cors_allow_origin: Annotated[
        list[str] | None,
        _option("--cors-allow-origin", SECURITY, "Let pages from there ask; may be repeated.", metavar="ORIGIN"),
    ] = None,
    trust_remote_code: Annotated[
        bool, _option("--trust-remote-code", SECURITY, "Run code that comes with the model.")
    ] = False,
    allow_pickle: Annotated[
        bool, _option("--allow-pickle", SECURITY, "Load weights that are not safetensors.", own=True)
    ] = False,
    json_output: Annotated[bool, _option("--json-output", LOGS, "Log lines as JSON.")] = False,
    disable_spans: Annotated[
        bool, _option("--disable-spans", LOGS, "Leave timings and token counts out of the log.")
    ] = False,
    log_level: Annotated[
        str, _option("--log-level", LOGS, "debug, info, warning or error.", own=True, metavar="NAME")
    ] = "info",
    prometheus_port: Annotated[
        int | None, _option("--prometheus-port", LOGS, "Serve /metrics at this port too.")
    ] = None,
    otlp_endpoint: Annotated[
        str | None,
        _option("--otlp-endpoint", LOGS, "Send traces there; needs OpenTelemetry's packages.", metavar="URL"),
    ] = None,
    max_batch_requests: Annotated[int | None, _option("--max-batch-requests", BATCHING, hidden=True)] = None,
    dense_path: Annotated[str | None, _option("--dense-path", o.MODEL, hidden=True)] = None,
    otlp_service_name: Annotated[str, _option("--otlp-service-name", LOGS, "The name in traces.")] = "radix-mlp.server",
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
        "radix_mlp_threshold": o.parse_threshold(radix_mlp_threshold, "--radix-mlp-threshold"),
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
