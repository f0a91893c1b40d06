"""The page, its files, and the one request that it makes besides `/info`."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from radix_mlp.serve.api.common import ServiceOf, answered
from radix_mlp.serve.http.errors import BatchTooLargeError, NoSuchRouteError
from radix_mlp.serve.playground.body import RunRequest
from radix_mlp.serve.playground.shown_tree import shown_tree
from radix_mlp.serve.playground.tasks import run_task

__all__ = ["MAX_DOCUMENTS", "router"]

# for people, not for programs
router = APIRouter(include_in_schema=False)

STATIC = Path(__file__).parent / "static"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
NAMES = frozenset(file.name for file in STATIC.iterdir() if file.suffix in MEDIA_TYPES)
MAX_DOCUMENTS = 256
"""More could not be read in a picture."""

# nothing inline, nothing from elsewhere, no text that becomes markup
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


@router.get("/playground")
async def page() -> Response:
    """The page itself; it has no secrets and needs no key, but what it asks does."""
    return _file("index.html")


@router.get("/playground/{name}")
async def file(name: str) -> Response:
    """One of its files."""
    if name not in NAMES:
        raise NoSuchRouteError(f"no such file: {name!r:.60}")
    return _file(name)


@router.post("/playground/run")
async def run(request: Request, body: RunRequest, service: ServiceOf) -> Response:
    """The answer to one batch, and its prefix tree."""
    if len(body.documents) > MAX_DOCUMENTS:
        raise BatchTooLargeError(
            f"{len(body.documents)} documents: the playground shows {MAX_DOCUMENTS} at most; other routes take more."
        )
    answer, found, call = await run_task(service, body)

    def make_tree(tokenizer: object) -> dict[str, object]:
        sequences = [item.ids for item in call(tokenizer).items]
        return shown_tree(sequences, tokenizer.decode)  # type: ignore[attr-defined]

    tree = await service.tokens.call(make_tree)
    ran = {
        "num_tokens": answer.num_batch_tokens,
        "num_compact": answer.num_batch_compact,
        "num_batches": answer.num_batches,
    }
    seconds = {
        "tokenization": answer.tokenization_seconds,
        "queue": answer.queue_seconds,
        "inference": answer.inference_seconds,
    }
    response = answered(
        request, service, answer, {"task": body.task, **found, "tree": tree, "ran": ran, "seconds": seconds}
    )
    response.headers["x-content-type-options"] = "nosniff"
    return response


def _file(name: str) -> Response:
    return FileResponse(STATIC / name, headers=HEADERS, media_type=MEDIA_TYPES[Path(name).suffix])
