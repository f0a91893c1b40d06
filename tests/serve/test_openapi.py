"""The OpenAPI document: up to date, and all of it reachable."""

from __future__ import annotations

import json
from pathlib import Path

import httpx

from radix_mlp.serve.app import bare_app

DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_the_committed_document_is_up_to_date() -> None:
    assert json.loads(DOCUMENT.read_text()) == bare_app().openapi(), "run make docs"


def test_the_server_serves_it(client: httpx.Client) -> None:
    assert client.get("/api-doc/openapi.json").json() == json.loads(DOCUMENT.read_text())


def test_every_reference_leads_somewhere() -> None:
    text = DOCUMENT.read_text()
    schemas = json.loads(text)["components"]["schemas"]
    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= set(schemas)
