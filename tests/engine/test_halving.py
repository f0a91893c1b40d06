"""One text's fault is its own: every other text gets the unmodified model's answer, and the culprit is named."""

import asyncio
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.engine.poison import CASES, POISON, poisoned, random_texts

from radix_mlp import AsyncEngine, Engine
from radix_mlp.engine.execution import job
from radix_mlp.engine.execution.batch import fill
from radix_mlp.engine.online import serving_loop
from radix_mlp.errors import InvalidInputError, NonFiniteAnswersError, RejectedItemsError, UnsupportedModelError
from radix_mlp.hf import disable
from radix_mlp.models.tiny import tiny_classifier, tiny_model, tiny_tokenizer

OPTIONS = ({"threshold": 1}, {"threshold": 0}, {"threshold": "auto"}, {"threshold": 1, "max_batch_tokens": 60})


def assert_alone(case, items, answers, bad):
    """All answers but the `bad` ones are those of the unmodified model fed one text at a time."""
    model = poisoned(case.model())
    for place, (item, answer) in enumerate(zip(items, answers, strict=True)):
        found = case.values(answer)
        if place in bad:
            assert not np.isfinite(found).all(), place
        else:
            np.testing.assert_allclose(found, case.alone(model, item).numpy(), atol=3e-4, err_msg=str(place))


def answers_of(engine, call):
    """Those of all items, finite or not."""
    answers = [None] * len(call.items)
    for launched in engine.run([call], len(answers)):
        fill(answers, launched)
    return answers


def check(name, seed):
    """One random batch of one task: the answers, and the error that names the culprits."""
    case, options = CASES[name], OPTIONS[seed % len(OPTIONS)]
    texts, bad = random_texts(seed)
    engine = case.engine(**options)
    call = case.make(engine, texts)
    assert_alone(case, call.items, answers_of(engine, call), bad)
    with pytest.raises(NonFiniteAnswersError) as caught:
        getattr(engine, case.method)(case.arguments(texts))
    assert [place for place, _ in caught.value.rejected] == bad


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CASES)
def test_others_keep_their_answers(name, seed):
    check(name, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 40))
@pytest.mark.parametrize("name", CASES)
def test_others_keep_their_answers_in_many_batches(name, seed):
    check(name, seed)


def test_without_running_again_others_would_lose_their_answers(monkeypatch):
    monkeypatch.setattr(job, "isolated", lambda engine, launched: [launched])
    with pytest.raises(AssertionError):
        check("embed", 0)


@pytest.mark.parametrize("count", [1, 2, 300])
def test_all_texts_poisoned(count):
    case = CASES["embed"]
    with pytest.raises(NonFiniteAnswersError, match=r"texts\[0\].*float32") as caught:
        case.engine(threshold=1).embed([f"{POISON}{number}" for number in range(count)])
    assert [place for place, _ in caught.value.rejected] == list(range(count))


def test_places_are_the_callers_in_a_job_of_many_windows():
    texts = [f"number {number % 7} and {number}" for number in range(400)]
    bad = [3, 17, 255, 399]
    for place in bad:
        texts[place] += POISON + "."
    engine = CASES["embed"].engine(threshold=1)
    with pytest.raises(NonFiniteAnswersError, match=r"texts\[3\].*3 more") as caught:
        engine.embed(texts)
    assert [place for place, _ in caught.value.rejected] == bad


def clients(names, seed, **options):
    """Many clients of one engine at once, each with one text: `(text, task, outcome)` of all."""
    case = CASES[names[0]]
    texts, bad = random_texts(seed, 40)
    kinds = [names[place % len(names)] for place in range(len(texts))]

    async def ask(front, kind, text):
        given = CASES[kind].arguments([text])
        try:
            return (await getattr(front, CASES[kind].method)(given)).value[0]
        except NonFiniteAnswersError as error:
            return error

    async def main():
        async with AsyncEngine(case.engine(**options)) as front:
            return await asyncio.gather(*(ask(front, *given) for given in zip(kinds, texts, strict=True)))

    return texts, bad, kinds, asyncio.run(main())


@pytest.mark.parametrize("threshold", [0, 1])
@pytest.mark.parametrize("names", [["embed", "score", "embed_tokens", "token_scores"], ["rerank"], ["classify"]])
def test_clients_with_good_texts_see_nothing(names, threshold):
    texts, bad, kinds, outcomes = clients(names, 7, threshold=threshold)
    assert [place for place, found in enumerate(outcomes) if isinstance(found, Exception)] == bad
    for kind in names:
        case = CASES[kind]
        places = [place for place in range(len(texts)) if kinds[place] == kind and place not in bad]
        engine = case.engine()
        items = case.make(engine, [texts[place] for place in places]).items
        assert_alone(case, items, [outcomes[place] for place in places], [])


def test_without_running_again_innocent_clients_would_get_errors(monkeypatch):
    monkeypatch.setattr(serving_loop, "isolated", lambda engine, launched, retry: [launched])
    _, bad, _, outcomes = clients(["embed"], 7, threshold=1)
    assert len([found for found in outcomes if isinstance(found, Exception)]) > len(bad)


# token ids that the model has no embedding for


def small_engine(case, **options):
    """The model has no embedding for the tokenizer's last tokens."""
    tokenizer = case.tokenizer()
    tokenizer.add_tokens(["[NEW]"])
    return Engine(case.model(), tokenizer=tokenizer, **options)


@pytest.mark.parametrize("threshold", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_ids_beyond_the_embedding_are_rejected_items(name, threshold):
    case = CASES[name]
    engine = small_engine(case, threshold=threshold)
    texts = random_texts(1)[0]
    texts = [text.replace(POISON, "") for text in texts]
    bad = sorted(random.Random(name).sample(range(len(texts)), 3))
    for place in bad:
        texts[place] = "a " + texts[place] + "[NEW]b"
    with pytest.raises(RejectedItemsError, match="the tokenizer has more tokens than the model's embedding") as caught:
        getattr(engine, case.method)(case.arguments(texts))
    assert [place for place, _ in caught.value.rejected] == bad
    good = [text for place, text in enumerate(texts) if place not in bad]
    assert len(getattr(engine, case.method)(case.arguments(good))) == len(good)


def test_a_request_with_such_an_id_is_refused_alone():
    async def main():
        async with AsyncEngine(small_engine(CASES["embed"], threshold=1)) as front:
            calls = [front.embed([f"a{'[NEW]' if number == 2 else 'root'} {number}"]) for number in range(6)]
            return await asyncio.gather(*calls, return_exceptions=True)

    found = asyncio.run(main())
    assert [type(outcome) is RejectedItemsError for outcome in found] == [number == 2 for number in range(6)]


def test_a_continuation_that_has_an_embedding_and_no_logit():
    model = tiny_model()
    model.lm_head = torch.nn.Linear(64, 250, bias=False)
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=1)
    with pytest.raises(InvalidInputError, match="this model has 0 to 249"):
        engine.score([([72, 105], [255])])


# checks of heads


@pytest.mark.parametrize("first", [[""], ["", "a root"], ["a root", ""]])
def test_a_head_is_not_judged_by_a_text_of_padding_alone(first):
    def made():
        model = tiny_classifier()
        model.config.pad_token_id = 256
        with torch.no_grad():
            # as transformers makes a padding row
            model.get_input_embeddings().weight[256] = 0
        return model

    tokenizer = tiny_tokenizer()
    texts = [[256, 256] if text == "" else tokenizer(text)["input_ids"] for text in first]
    engine = Engine(made(), tokenizer=tokenizer, threshold=1)
    found = engine.classify(texts)
    for ids, answer in zip(texts, found, strict=True):
        with torch.no_grad():
            expected = disable(made())(torch.tensor([ids])).logits[0].softmax(-1)
        assert sorted(score for _, score in answer) == pytest.approx(sorted(expected.tolist()), abs=1e-5)


@pytest.mark.parametrize("name", ["score", "rerank", "classify", "token_scores"])
def test_a_head_is_not_judged_by_a_text_that_overflows(name):
    case = CASES[name]
    engine = case.engine(threshold=1)
    with pytest.raises(NonFiniteAnswersError):
        getattr(engine, case.method)(case.arguments([f"{POISON}a", "a root"]))
    assert len(getattr(engine, case.method)(case.arguments(["a root"]))) == 1


def test_a_head_of_zeros_is_taken_and_looked_at_again():
    model = tiny_model()
    weight = model.lm_head.weight.detach().clone()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(weight))
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=1)
    uniform = engine.score([([72], [105])])[0]
    assert uniform.logprob == pytest.approx(-np.log(len(weight)), abs=1e-5)
    with torch.no_grad():
        model.lm_head.weight.copy_(weight)
        own = disable(tiny_model())(torch.tensor([[72]])).logits[0, -1].log_softmax(-1)
    assert engine.score([([72], [105])])[0].logprob == pytest.approx(float(own[105]), abs=1e-5)


def test_a_head_is_compared_again_once_the_models_forward_is_wrapped():
    model = tiny_model()
    engine = Engine(model, tokenizer=tiny_tokenizer())
    pairs = [("Query: a root is", " green")]
    engine.score(pairs)
    old, bias = model.forward, torch.linspace(-3, 3, 259)

    def wrapped(*args, **kwargs):
        output = old(*args, **kwargs)
        output.logits = output.logits + bias
        return output

    model.forward = wrapped
    with pytest.raises(UnsupportedModelError, match="makes its logits in a way that is not known here"):
        engine.score(pairs)
    model.forward = old
    assert len(engine.score(pairs)) == 1


def test_infinite_answers_are_named_too():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=1)
    call = CASES["embed"].make(engine, ["ab"])
    call = replace(call, items=[replace(item, task=replace(item.task, normalize=False)) for item in call.items])
    with pytest.raises(NonFiniteAnswersError):
        engine.answer(call)
