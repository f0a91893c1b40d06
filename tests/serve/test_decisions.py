"""`/v1/systemone` and `/v1/decisions`: against the unmodified model, with real clients, and what is refused."""

from __future__ import annotations

import pytest
from tests.engine.decisions import QUESTIONS, STATES, largest_difference, needs_decisions, stock_answers

from radix_mlp.models.tiny import tiny_decider, tiny_decider_tokenizer

pytestmark = needs_decisions

MESSAGES = [
    {"role": "user", "content": "Where is my parcel?"},
    {"type": "function_call", "call_id": "1", "name": "track", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "1", "output": "lost"},
]
ASKED = [
    {"type": "predicate", "instructions": "Is a refund requested?", "name": "refund"},
    {
        "type": "choice",
        "instructions": [{"type": "input_text", "text": "Answered?"}],
        "choices": [{"value": True, "description": "It is"}, {"value": False}, {"value": "maybe"}],
    },
    {"type": "score", "instructions": "Urgent?", "levels": [{"label": "no"}, {"label": "yes", "description": "now"}]},
]
SAME = {
    "0": {"type": "noul", "instructions": "Is a refund requested?"},
    "1": {"type": "choice", "instructions": "Answered?", "criteria": {"true": "It is", "false": None, "maybe": None}},
    "2": {"type": "score", "instructions": "Urgent?", "criteria": ["no", "yes: now"]},
}


def stock(state, questions):
    return stock_answers(tiny_decider(), tiny_decider_tokenizer(), [(state, questions)])[0]


@pytest.mark.parametrize("state", STATES[:4], ids=range(4))
def test_system_one_answers_as_transformers_does(decider, state):
    found = decider.post("/v1/systemone", json={"model": "any", "state": state, "questions": QUESTIONS})
    assert found.status_code == 200, found.text
    body = found.json()
    assert largest_difference(body["answers"], stock(state, QUESTIONS)) < 1e-5
    assert body["model"] == "any"
    assert body["usage"]["input_tokens"] == int(found.headers["x-compute-tokens"])
    assert int(found.headers["x-batch-compact-tokens"]) < body["usage"]["input_tokens"]


def test_the_client_of_openai(addresses):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=addresses["tiny-decider"] + "/v1", api_key="none", max_retries=0)
    if not hasattr(client, "decisions"):
        pytest.skip("this version of openai has no decisions")
    for given in ("a text", MESSAGES):
        found = client.decisions.create(model="any", input=given, questions=ASKED)
        expected = stock(given, SAME)
        refund, answered, urgent = found.answers
        assert (refund.name, answered.name) == ("refund", None)
        assert refund.probability == pytest.approx(expected["0"]["noul"], abs=1e-5)
        assert [row.value for row in answered.probabilities] == [True, False, "maybe"]
        assert str(answered.choice).lower() == expected["1"]["choice"]
        wanted = pytest.approx(list(expected["1"]["probabilities"].values()), abs=1e-5)
        assert [row.probability for row in answered.probabilities] == wanted
        assert [(row.label, row.value) for row in urgent.probabilities] == [("no", 0), ("yes", 1)]
        assert urgent.score == pytest.approx(expected["2"]["score"], abs=1e-5)
        assert 0 < found.usage.input_tokens_details.cached_tokens < found.usage.input_tokens
    with pytest.raises(openai.UnprocessableEntityError, match="same name"):
        client.decisions.create(model="any", input="a", questions=[ASKED[0], ASKED[0]])


def test_the_client_of_typesafe(addresses):
    typesafe = pytest.importorskip("typesafe_sdk")
    with typesafe.TypeSafeClient(api_key="none", base_url=addresses["tiny-decider"], compression=False) as client:
        questions = {"refund": typesafe.Noul(instructions="Is a refund requested?")}
        found = client.system_one(state="a text", questions=questions, model="any")
    expected = stock("a text", {"refund": QUESTIONS["refund"]})
    assert found.answers["refund"].noul == pytest.approx(expected["refund"]["noul"], abs=1e-5)


def test_four_hundred_questions(decider):
    asked = [{"type": "predicate", "instructions": f"Is it {number}?"} for number in range(400)]
    found = decider.post("/v1/decisions", json={"input": "a text", "questions": asked})
    assert found.status_code == 200, found.text
    assert len(found.json()["answers"]) == 400
    last = stock("a text", {"a": {"type": "noul", "instructions": "Is it 399?"}})["a"]["noul"]
    assert found.json()["answers"][399]["probability"] == pytest.approx(last, abs=1e-5)
    assert decider.post("/v1/decisions", json={"input": "a", "questions": [*asked, asked[0]]}).status_code == 422


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": {}}, "questions"),
        ({"questions": {str(number): {"type": "noul"} for number in range(65)}}, "64"),
        ({"questions": {"a": {"type": "guess"}}}, "must be one of noul"),
        ({"questions": {"a": {"type": "choice", "criteria": {}}}}, "needs `criteria`"),
        ({"state": "x" * 600}, "more than the limit of 512"),
        ({"assets": {"a": {"type": "image"}}}, "images are not supported"),
        ({"state": 3}, "state"),
    ],
)
def test_what_system_one_refuses(decider, change, message):
    found = decider.post("/v1/systemone", json={"state": "a", "questions": QUESTIONS, **change})
    assert found.status_code == 422
    assert message in found.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": []}, "questions"),
        ({"questions": [{"type": "choice", "instructions": "a"}]}, "needs `choices`"),
        ({"questions": [{**ASKED[1], "type": "predicate"}]}, "takes no `choices`"),
        ({"questions": [{**ASKED[1], "choices": [{"value": "true"}, {"value": True}]}]}, "the same value"),
        ({"questions": [{**ASKED[1], "choices": [{"value": str(n)} for n in range(30)]}]}, "at most 26 options"),
        ({"input": MESSAGES[2:]}, "no function_call before it"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "images are not supported"),
        ({"input": [{"text": "a"}]}, "must be a message"),
    ],
)
def test_what_decisions_refuse(decider, change, message):
    found = decider.post("/v1/decisions", json={"input": "a", "questions": ASKED, **change})
    assert found.status_code == 422
    assert message in found.json()["error"]["message"]


def test_models_without_a_prompt_say_so(client, classifier):
    for server, status in ((client, 422), (classifier, 424)):
        assert server.post("/v1/systemone", json={"state": "a", "questions": QUESTIONS}).status_code == status
