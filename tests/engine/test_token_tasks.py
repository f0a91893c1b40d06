"""Tasks that answer token by token, token ids in place of texts, and which rows a task reads."""

import numpy as np
import pytest
import torch
from tests.engine import oracle
from tests.engine.faults import InjectedForward
from tests.engine.test_engine import PAIRS, TEXTS, ids_of

from radix_mlp import Engine, disable, forward_compact
from radix_mlp.errors import InvalidDtypeError, InvalidInputError, RejectedItemsError, UnsupportedModelError
from radix_mlp.models.tiny import tiny_classifier, tiny_model, tiny_reranker, tiny_reranker_tokenizer, tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float64)


@pytest.mark.parametrize("threshold", [1.0, 0])
@pytest.mark.parametrize("max_batch_tokens", [16384, 140])
def test_every_tokens_vector_is_the_unmodified_models(model, threshold, max_batch_tokens):
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=threshold, max_batch_tokens=max_batch_tokens)
    found = engine.embed_tokens(TEXTS, prompt="say ")
    disable(model)
    for text, vectors in zip(TEXTS, found, strict=True):
        expected = oracle.hidden_of(model, ids_of("say " + text)).float()
        assert vectors.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(vectors), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("threshold", [1.0, 0])
@pytest.mark.parametrize("max_batch_tokens", [16384, 140])
@pytest.mark.parametrize("top", [0, 1, 5])
def test_every_tokens_logprob_is_the_unmodified_models(model, threshold, max_batch_tokens, top):
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=threshold, max_batch_tokens=max_batch_tokens)
    found = engine.token_scores(TEXTS, top=top)
    disable(model)
    for text, scores in zip(TEXTS, found, strict=True):
        ids = ids_of(text)
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert scores.ids == ids
        assert scores.logprobs[0] is scores.top_ids[0] is scores.top_logprobs[0] is None
        expected = logprobs[:-1][torch.arange(len(ids) - 1), torch.tensor(ids[1:], dtype=torch.int64)]
        assert scores.logprobs[1:] == pytest.approx(expected.tolist(), abs=3e-5)
        best = logprobs[:-1].topk(top)
        assert scores.top_ids[1:] == best.indices.tolist()
        for found_there, expected_there in zip(scores.top_logprobs[1:], best.values.tolist(), strict=True):
            assert found_there == pytest.approx(expected_there, abs=3e-5)
        assert len(scores.top_ids) == len(ids)


def test_likeliest_tokens_asked_for_are_in_the_vocabulary(model):
    with pytest.raises(InvalidInputError, match="top=260: must be from 0 to 259"):
        Engine(model, tokenizer=tiny_tokenizer()).token_scores(["a"], top=260)
    with pytest.raises(UnsupportedModelError, match="no language-model head"):
        Engine("tiny-classifier").token_scores(["a"])


def test_token_ids_are_taken_as_they_are(model):
    engine = Engine(model, tokenizer=tiny_tokenizer())
    as_ids = [ids_of(text) for text in TEXTS]
    mixed = [np.array(ids) if place % 3 else TEXTS[place] for place, ids in enumerate(as_ids)]
    assert np.array_equal(engine.embed(mixed), engine.embed(TEXTS))
    # an id without a text: the begin token
    disable(model)
    expected = oracle.embedding(model, [257, 72]).float()
    found = Engine(model, tokenizer=tiny_tokenizer()).embed([[257, 72]], normalize=False)[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=2e-5)
    pairs = [(ids_of(context.rstrip()), ids_of(context[len(context.rstrip()) :] + rest)) for context, rest in PAIRS]
    assert engine.score(pairs) == engine.score(PAIRS)
    classifier = Engine("tiny-classifier")
    assert classifier.classify(as_ids) == classifier.classify(TEXTS)


def test_token_ids_are_checked(model):
    engine = Engine(model, tokenizer=tiny_tokenizer(), max_length=6)
    with pytest.raises(InvalidInputError, match=r"texts\[1\] holds the token id 259; this model has 0 to 258"):
        engine.embed(["a", [1, 259]])
    with pytest.raises(InvalidInputError, match=r"pairs\[0\]\[1\] holds the token id -1"):
        engine.score([([1], [-1])])
    with pytest.raises(InvalidInputError, match=rf"texts\[0\] holds the token id {2**70}; this model has 0 to 258"):
        engine.embed([[1, 2**70]])
    with pytest.raises(InvalidDtypeError, match=r"texts\[0\] must be a string or a list of token ids, and holds 1.5"):
        engine.embed([[1, 1.5]])
    with pytest.raises(InvalidDtypeError, match=r"not an array float64\[1, 1\]"):
        engine.embed([np.ones((1, 1))])
    with pytest.raises(RejectedItemsError, match=r"texts\[0\].*has no tokens"):
        engine.embed([[]])
    with pytest.raises(RejectedItemsError, match="7 tokens, more than the limit of 6"):
        engine.embed([[1] * 7])
    assert np.array_equal(engine.embed([[1] * 7], truncate=True), engine.embed([[1] * 6]))
    with pytest.raises(InvalidInputError, match=r"texts\[1\] is a list of token ids, before which no prompt"):
        engine.embed(["a", [1]], prompt="p")


def only_needed(engine):
    """Hidden states that are NaN wherever a task says that it does not look."""

    def forward(plan, rows):
        hidden = forward_compact(engine.model, plan)
        assert rows is not None
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()
        assert len(rows) < plan.num_compact
        blank = torch.full_like(hidden, torch.nan)
        blank[torch.from_numpy(rows)] = hidden[torch.from_numpy(rows)]
        return blank

    return forward


TASKS = {
    "embed last": (tiny_model, lambda engine: engine.embed(TEXTS).tolist()),
    "embed cls": (tiny_model, lambda engine: engine.embed(TEXTS, pooling="cls").tolist()),
    "score": (tiny_model, lambda engine: [score.token_logprobs for score in engine.score(PAIRS)]),
    "token scores": (tiny_model, lambda engine: [score.logprobs[1:] for score in engine.token_scores(TEXTS)]),
    "rerank": (tiny_reranker, lambda engine: engine.rerank_pairs(PAIRS).tolist()),
    "classify": (tiny_classifier, lambda engine: [[label.score for label in row] for row in engine.classify(TEXTS)]),
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks_read_the_rows_that_they_name(name):
    build, run = TASKS[name]
    tokenizer = tiny_reranker_tokenizer() if name == "rerank" else tiny_tokenizer()
    engine = Engine(build(), tokenizer=tokenizer, threshold=1.0)
    expected = run(engine)
    engine.loaded.forward = InjectedForward(engine, instead=only_needed(engine))
    assert run(engine) == expected


def test_pooling_over_all_tokens_needs_all_rows():
    engine = Engine("tiny", threshold=1.0)
    seen = []
    engine.loaded.forward = InjectedForward(engine, before=lambda plan, rows: seen.append(rows))
    engine.embed(TEXTS, pooling="mean")
    engine.embed_tokens(TEXTS)
    assert seen == [None, None]
