"""What the page sends."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from radix_mlp.serve.api.body import Body, ListOf

__all__ = ["PlaygroundTask", "RunRequest"]

PlaygroundTask = Literal["rerank", "embed", "classify", "score", "decide"]


class RunRequest(Body):
    """One batch of documents; of decide: questions, each `text`, `text | option | option` or `text | low < high`."""

    task: PlaygroundTask
    documents: ListOf[str]
    query: Annotated[str, Field(description="Of rerank: the query; of score: the context; of decide: the state.")] = ""
    instruction: Annotated[
        str | None, Field(description="Of rerank: what relevant means; of embed: put before every document.")
    ] = None
