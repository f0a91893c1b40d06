"""The playground without a browser: its files and their policy, and the one request that it makes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.serve.conftest import Running

from radix_mlp import Engine
from radix_mlp.serve.app import create_app
from radix_mlp.serve.playground.routes import MAX_DOCUMENTS, MEDIA_TYPES, NAMES, STATIC
from radix_mlp.serve.playground.shown_tree import FIRST_SHOWN, LAST_SHOWN, shown_tree
from radix_mlp.serve.settings import ServeSettings

QUERY = "what is a radix tree?"
DOCUMENTS = [
    "Chapter 1. A radix tree keeps common beginnings once.",
    "Chapter 1. A radish is a root vegetable.",
    "Soup of the day: tomatoes, garlic and stock.",
    "Chapter 1. A radish is a root vegetable.",
    "Chapter 1. A rad",
]


def run(client: httpx.Client, task: str, **fields: Any) -> Any:
    response = client.post("/playground/run", json={"task": task, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def path_of(tree: dict[str, Any], row: int) -> list[dict[str, Any]]:
    """Nodes that span a row, from the root."""
    found = [node for node in tree["nodes"] if node["first"] <= row < node["last"]]
    for place, node in enumerate(found):
        parent = tree["nodes"][node["parent"]] if node["parent"] >= 0 else None
        assert parent is (found[place - 1] if place else None)
    return found


def texts_of(tree: dict[str, Any]) -> dict[int, str]:
    """Document -> the text along its path."""
    assert sorted(tree["rows"]) == list(range(len(tree["rows"])))
    return {
        document: "".join("".join(node["text"][0]) for node in path_of(tree, row))
        for row, document in enumerate(tree["rows"])
    }


def distinct_prefixes(sequences: list[list[int]]) -> int:
    return len({tuple(ids[: end + 1]) for ids in sequences for end in range(len(ids))})


# files


class Seen(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.script = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style"):
            self.script += data.strip()


def test_the_page_has_a_strict_policy(client: httpx.Client) -> None:
    response = client.get("/playground")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().partition(" ")[::2] for part in response.headers["content-security-policy"].split(";"))
    assert policy.pop("default-src") == "'none'"
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert set(policy.values()) == {"'self'", "'none'"}
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


def test_nothing_is_inline_and_nothing_comes_from_elsewhere(client: httpx.Client) -> None:
    seen = Seen(client.get("/playground").text)
    assert seen.script == ""
    for tag, attributes in seen.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
    used = [value for _, attributes in seen.tags for name in ("src", "href") if (value := attributes.get(name))]
    assert len(used) >= 4
    for reference in used:
        assert reference.startswith(("playground/", "#")), reference
        if not reference.startswith("#"):
            assert client.get("/" + reference).status_code == 200
    for name in NAMES:
        text = (STATIC / name).read_text()
        if name.endswith(".js"):
            imports = re.findall(r'from "\./([\w.]+)"', text)
            assert set(imports) <= NAMES
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
            assert not re.search(r"localStorage|sessionStorage|document\.cookie|history\.|location\b", text)
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name


def test_files_are_served_by_name_alone(client: httpx.Client) -> None:
    # the folder is package data, and all of it is served
    assert {file.name for file in STATIC.iterdir()} == NAMES
    for name in NAMES:
        response = client.get(f"/playground/{name}")
        assert response.headers["content-type"].split(";")[0] == MEDIA_TYPES["." + name.rpartition(".")[2]]
        assert response.content == (STATIC / name).read_bytes()
        assert "content-security-policy" in response.headers
    for name in ("routes.py", "..%2froutes.py", "%2e%2e%2froutes.py", "static", "nothing.js", "%2fetc%2fpasswd"):
        response = client.get(f"/playground/{name}")
        assert response.status_code == 404, name
        assert "import" not in response.text


def test_decide(decider: httpx.Client) -> None:
    state = "The parcel came late, and the lamp in it was broken."
    lines = [
        "Does the customer complain?",
        "About? | delivery | billing",
        "How urgent? | low < middle < high",
    ]
    found = run(decider, "decide", query=state, documents=lines)
    questions = {
        "a": {"type": "noul", "instructions": "Does the customer complain?"},
        "b": {
            "type": "choice",
            "instructions": "About?",
            "criteria": dict.fromkeys(["delivery", "billing"]),
        },
        "c": {"type": "score", "instructions": "How urgent?", "criteria": ["low", "middle", "high"]},
    }
    alone = [
        decider.post("/v1/systemone", json={"state": state, "questions": {name: question}}).json()["answers"][name]
        for name, question in questions.items()
    ]
    shown = [{option["name"]: option["probability"] for option in row["options"]} for row in found["decisions"]]
    assert shown[0] == pytest.approx({"yes": alone[0]["noul"], "no": 1 - alone[0]["noul"]}, abs=1e-5)
    assert shown[1] == pytest.approx(alone[1]["probabilities"], abs=1e-5)
    assert [*shown[2]] == ["low", "middle", "high"]
    assert [*shown[2].values()] == pytest.approx([*alone[2]["probabilities"].values()], abs=1e-5)
    assert found["decisions"][2]["expected"] == pytest.approx(alone[2]["score"], abs=1e-5)
    # the boxes of the tree are those of the prompts
    texts = texts_of(found["tree"])
    for row, line in zip(found["decisions"], lines, strict=True):
        assert state in texts[row["row"]]
        assert line.partition(" |")[0] in texts[row["row"]]
    assert decider.get("/info").json()["tasks"][-1] == "decide"


@pytest.mark.parametrize("line", ["About? | one", "About? | a | a", "About? | a | "])
def test_questions_that_are_none(decider: httpx.Client, line: str) -> None:
    response = decider.post("/playground/run", json={"task": "decide", "query": "x", "documents": [line]})
    assert response.status_code == 422
    assert "two different options" in response.json()["message"]


def test_info_tells_the_tasks(client: httpx.Client, reranker: httpx.Client, classifier: httpx.Client) -> None:
    assert client.get("/info").json()["tasks"] == ["embed", "score"]
    assert reranker.get("/info").json()["tasks"] == ["rerank", "score"]
    assert classifier.get("/info").json()["tasks"] == ["classify"]


# the request


def test_rerank(reranker: httpx.Client, oracle: Callable[[str], Engine]) -> None:
    answer = run(reranker, "rerank", query=QUERY, documents=DOCUMENTS, instruction="Find definitions")
    expected = oracle("tiny-reranker").rerank(QUERY, DOCUMENTS, instruction="Find definitions")
    assert [place["index"] for place in answer["ranking"]] == [place.index for place in expected]
    scores = [place["score"] for place in answer["ranking"]]
    assert scores == pytest.approx([place.score for place in expected], abs=1e-4)
    assert max(scores) - min(scores) > 0.01

    texts = texts_of(answer["tree"])
    for index, document in enumerate(DOCUMENTS):
        assert f"<Instruct>: Find definitions\n<Query>: {QUERY}\n<Document>: {document}<|im_end|>" in texts[index]


def test_the_tree_is_that_of_the_batch_that_ran(reranker: httpx.Client) -> None:
    response = reranker.post("/playground/run", json={"task": "rerank", "query": QUERY, "documents": DOCUMENTS})
    answer = response.json()
    tree, ran = answer["tree"], answer["ran"]
    assert tree["num_tokens"] == int(response.headers["x-compute-tokens"]) == ran["num_tokens"]
    assert tree["num_compact"] == ran["num_compact"] == sum(node["tokens"] for node in tree["nodes"])
    assert tree["num_compact"] < 0.4 * tree["num_tokens"]
    assert tree["compression"] == pytest.approx(tree["num_compact"] / tree["num_tokens"])
    shared = sum((node["last"] - node["first"] - 1) * node["tokens"] for node in tree["nodes"])
    assert shared == tree["num_tokens"] - tree["num_compact"]
    # copies are one path, computed once
    rows = [tree["rows"].index(index) for index in (1, 3)]
    assert path_of(tree, rows[0]) == path_of(tree, rows[1])
    assert set(answer["seconds"]) == {"tokenization", "queue", "inference"}


def test_embed(client: httpx.Client, oracle: Callable[[str], Engine]) -> None:
    texts = [*DOCUMENTS, "naïve 日本語 🙂", "naïve 日本 and more"]
    answer = run(client, "embed", documents=texts, instruction="Query: ")
    vectors = oracle("tiny").embed(texts, prompt="Query: ")
    similarity = np.array(answer["similarity"])
    assert np.abs(similarity - vectors @ vectors.T).max() < 1e-3
    assert np.ptp(similarity) > 0.1
    assert texts_of(answer["tree"]) == {index: "Query: " + text for index, text in enumerate(texts)}


def test_classify(classifier: httpx.Client, oracle: Callable[[str], Engine]) -> None:
    answer = run(classifier, "classify", documents=DOCUMENTS)
    assert answer["labels"] == ["negative", "neutral", "positive"]
    for found, expected in zip(answer["classes"], oracle("tiny-classifier").classify(DOCUMENTS), strict=True):
        assert found["scores"] == pytest.approx([dict(expected)[label] for label in answer["labels"]], abs=1e-4)


def test_score(client: httpx.Client, oracle: Callable[[str], Engine]) -> None:
    documents = [" four", " forty", " for ever and a day"]
    answer = run(client, "score", query="Two and two are", documents=documents)
    expected = oracle("tiny").score([("Two and two are", document) for document in documents])
    found = answer["continuations"]
    logprobs = [place["logprob"] for place in found]
    assert logprobs == sorted(logprobs, reverse=True)
    for place in found:
        assert place["logprob"] == pytest.approx(expected[place["index"]].logprob, abs=1e-3)
        assert place["num_tokens"] == len(documents[place["index"]])
    assert sum(place["share"] for place in found) == pytest.approx(1)
    assert texts_of(answer["tree"])[1] == "Two and two are forty"


def test_a_batch_that_is_not_folded_says_so() -> None:
    app = create_app(Engine("tiny-reranker", threshold=0), ServeSettings(model_id="tiny-reranker"))

    async def main() -> Any:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://a") as client,
        ):
            body = {"task": "rerank", "query": QUERY, "documents": DOCUMENTS}
            return (await client.post("/playground/run", json=body)).json()

    answer = asyncio.run(main())
    assert answer["ran"]["num_compact"] == answer["ran"]["num_tokens"] == answer["tree"]["num_tokens"]
    assert answer["tree"]["num_compact"] < 0.4 * answer["tree"]["num_tokens"]


def test_long_texts_are_cut_as_the_model_reads_them(reranker: httpx.Client) -> None:
    # the servers of these tests take 512 tokens
    answer = run(reranker, "rerank", query=QUERY, documents=["x" * 200_000, "y" * 10])
    tree = answer["tree"]
    assert tree["num_tokens"] == answer["ran"]["num_tokens"]
    assert tree["num_tokens"] < 2 * 512


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"task": "embed", "documents": ["a"]}, 424, "does not embed; it does rerank, score"),
        ({"task": "nonsense", "documents": ["a"]}, 422, "task"),
        ({"task": "score", "documents": ["a"], "query": "b", "instruction": "c"}, 422, "`instruction`"),
        ({"task": "rerank", "documents": [], "query": "b"}, 400, "`documents` cannot be empty"),
        ({"task": "rerank", "documents": ["a"]}, 400, "`query`"),
        ({"task": "rerank", "documents": "a", "query": "b"}, 422, "documents"),
        ({"task": "rerank", "documents": ["a"], "query": "b", "unknown": 1}, 422, "unknown"),
        ({"task": "rerank", "documents": ["a"] * 33, "query": "b"}, 422, "batch size 33 > maximum"),
        ({"task": "rerank", "documents": ["a"] * (MAX_DOCUMENTS + 1), "query": "b"}, 422, "playground shows 256"),
        ({"task": "score", "documents": ["a", ""], "query": "b"}, 400, "number 1 is"),
        ({"task": "score", "documents": ["a" * 200_000], "query": "b"}, 422, "tokens"),
    ],
)
def test_refusals(reranker: httpx.Client, fields: dict[str, Any], status: int, says: str) -> None:
    response = reranker.post("/playground/run", json=fields)
    assert response.status_code == status, response.text
    assert says in response.json()["message"]


def test_the_page_is_public_and_what_it_asks_is_not(running: Running) -> None:
    async def main() -> None:
        async with running("tiny", api_key="s3cret") as (client, _):
            assert (await client.get("/playground")).status_code == 200
            assert (await client.get("/playground/app.js")).status_code == 200
            body = {"task": "embed", "documents": ["a"]}
            for headers in ({}, {"authorization": "Bearer wrong"}):
                assert (await client.get("/info", headers=headers)).status_code == 401
                assert (await client.post("/playground/run", json=body, headers=headers)).status_code == 401
            with_key = {"authorization": "Bearer s3cret"}
            assert (await client.post("/playground/run", json=body, headers=with_key)).status_code == 200

    asyncio.run(main())


def test_markup_comes_back_as_json_text(reranker: httpx.Client) -> None:
    evil = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
    response = reranker.post("/playground/run", json={"task": "rerank", "query": evil, "documents": [evil, "other"]})
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert evil in texts_of(response.json()["tree"])[0]


# the tree


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=14))
def test_the_tree_has_every_prefix_once(sequences: list[list[int]]) -> None:
    tree = shown_tree([np.array(ids, np.int32) for ids in sequences], lambda ids: "".join(map(str, ids)))
    assert texts_of(tree) == {place: "".join(map(str, ids)) for place, ids in enumerate(sequences)}
    total = sum(node["tokens"] for node in tree["nodes"])
    assert total == tree["num_compact"] == distinct_prefixes(sequences)
    assert tree["num_tokens"] == sum(map(len, sequences))
    for place, node in enumerate(tree["nodes"]):
        assert node["parent"] < place
        assert node["tokens"] == len(node["text"][0]) > 0
        # only where texts part, or one of them ends, does a piece end
        children = [child for child in tree["nodes"] if child["parent"] == place]
        spanned = sum(child["last"] - child["first"] for child in children)
        assert len(children) != 1 or spanned < node["last"] - node["first"]


def test_long_pieces_are_abbreviated() -> None:
    ids = np.arange(5000, dtype=np.int32)
    (node,) = shown_tree([ids], lambda some: f"{some[0]} ")["nodes"]
    assert node["tokens"] == 5000
    assert [len(part) for part in node["text"]] == [FIRST_SHOWN, LAST_SHOWN]
    assert node["left_out"] == 5000 - FIRST_SHOWN - LAST_SHOWN
    assert node["text"][1][-1] == "4999 "


def test_a_deep_tree_is_no_deep_recursion() -> None:
    sequences = [np.zeros(length, np.int32) for length in range(1, 3000)]
    assert len(shown_tree(sequences, str)["nodes"]) == 2999


def test_characters_of_several_tokens_stay_together() -> None:
    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    text = "né🙂 日"
    (node,) = shown_tree([np.frombuffer(text.encode(), np.uint8).astype(np.int32)], decode)["nodes"]
    assert node["text"][0] == list(text)
    # half a character at the end is shown as what it is
    (node,) = shown_tree([np.array([110, 0xC3], np.int32)], decode)["nodes"]
    assert node["text"][0] == ["n", "\ufffd"]
