"""Jobs whose texts are tokenized while the first of them run."""

import threading
from functools import partial

import numpy as np
import pytest
from tests.engine.faults import InjectedForward

from radix_mlp import Engine
from radix_mlp.engine.execution.tokenize_ahead import ChunkSizes, cut_by_text
from radix_mlp.errors import InferenceError, InvalidDtypeError, RejectedItemsError

RNG = np.random.default_rng(0)
QUERIES = ["what is a radix?", "who wrote it?", "why?"]
TEXTS = [
    f"Query: {QUERIES[place % 3]} Text: {'so ' * (place % 7)}{place % 31}" for place in RNG.permutation(60).tolist()
]
PAIRS = [(QUERIES[place % 3], TEXTS[place % 20]) for place in range(60)]


SIZES = ChunkSizes(first=5, largest=22, fewest=10)


class Ahead(Engine):
    """Tokenizes in small chunks, each of which goes through `encode(make, some of the texts)`."""

    chunk_sizes = SIZES

    def __init__(self, *given, encode=lambda make, some: make(some), **options):
        super().__init__(*given, **options)
        self.encode = encode

    def _answer(self, make_request, *given, **options):
        def make(loaded, tokenizer, some, **more):
            return self.encode(partial(make_request, loaded, tokenizer, **more), some)

        return super()._answer(make, *given, **options)


@pytest.mark.parametrize("max_batch_tokens", [16384, 600])
@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("tiny", lambda engine: engine.embed(TEXTS)),
        ("tiny", lambda engine: engine.embed_tokens(TEXTS)),
        ("tiny", lambda engine: [score.token_logprobs for score in engine.score(PAIRS)]),
        ("tiny-reranker", lambda engine: engine.rerank_pairs(PAIRS)),
        ("tiny-reranker", lambda engine: [(r.index, r.score) for r in engine.rerank("why?", TEXTS)]),
        ("tiny-classifier", lambda engine: [[label.score for label in found] for found in engine.classify(PAIRS)]),
    ],
)
def test_the_same_answers_in_the_callers_order(name, work, max_batch_tokens):
    one_batch = Engine(name, threshold=1.0, max_batch_tokens=16384)
    expected = work(one_batch)
    whole = one_batch.stats
    assert whole.num_batches == 1
    engine = Ahead(name, threshold=1.0, max_batch_tokens=max_batch_tokens)
    found = work(engine)
    assert type(found) is type(expected)
    for one, other in zip(found, expected, strict=True):
        assert np.allclose(one, other, atol=1e-5)
    assert (engine.stats.num_requests, engine.stats.num_tokens) == (60, whole.num_tokens)
    # one batch of all texts is the least; what windows or batches share is computed again where they meet
    assert whole.num_compact <= engine.stats.num_compact < whole.num_tokens


def test_copies_of_a_pair_tie():
    engine = Ahead("tiny-reranker", threshold=1.0, max_batch_tokens=300)
    scores = engine.rerank_pairs(PAIRS)
    for pair in set(PAIRS):
        assert len({score for score, other in zip(scores, PAIRS, strict=True) if other == pair}) == 1
    assert len(set(scores.tolist())) > 10


def test_windows_hold_every_place_once_and_neighbours_together():
    cut = cut_by_text(TEXTS, SIZES)
    assert [len(window) for window in cut] == [5, 10, 20, 22, 3]
    assert sorted(place for window in cut for place in window) == list(range(60))
    texts = [TEXTS[place] for window in cut for place in window]
    assert texts == sorted(TEXTS)
    # copies are never parted
    copies = cut_by_text(["b"] * 20 + ["a"] * 3 + ["c"] * 20, SIZES)
    assert [len(window) for window in copies] == [23, 20]
    for not_texts in ("x" * 100, [1] * 100, [[1, 2]] * 100, ["a"] * 99 + [("a", "b")], ["a"] * 10):
        assert cut_by_text(not_texts, SIZES) == []


def batches_of_a_job(*, tokenizer_is_slow):
    """Token ids of every batch, and the answers."""
    launched, all_made, batches, made = threading.Event(), threading.Event(), [], []

    def encode(make, some):
        if made and tokenizer_is_slow:
            assert launched.wait(30)
        made.append(make(some))
        if len(made) == len(cut_by_text(TEXTS, SIZES)):
            all_made.set()
        return made[-1]

    def before(plan, _):
        launched.set()
        batches.append(plan.compact_ids.tolist())
        assert tokenizer_is_slow or all_made.wait(30)

    engine = Ahead("tiny", threshold=1.0, max_batch_tokens=300, encode=encode)
    engine.loaded.forward = InjectedForward(engine, before=before)
    return batches, engine.embed(TEXTS)


def test_what_shares_a_batch_depends_on_the_texts_alone():
    batches, vectors = batches_of_a_job(tokenizer_is_slow=False)
    others, other_vectors = batches_of_a_job(tokenizer_is_slow=True)
    assert batches == others
    assert len(batches) >= 4
    assert np.array_equal(vectors, other_vectors)


def test_the_first_texts_run_before_the_last_are_tokenized():
    ran, made = threading.Event(), []

    def slowly(make, some):
        if made:
            # the second chunk waits for the first batch
            assert ran.wait(30)
        made.append(threading.current_thread() is threading.main_thread())
        return make(some)

    engine = Ahead("tiny", threshold=1.0, encode=slowly)
    engine.loaded.forward = InjectedForward(engine, before=lambda *_: ran.set())
    seen = []
    assert engine.embed(TEXTS, progress=lambda done, total: seen.append((done, total))).shape == (60, 64)
    assert made == [False] * len(cut_by_text(TEXTS, SIZES))
    assert seen == sorted(seen)
    assert seen[-1] == (60, 60)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({41: "x" * 5000, 3: "y" * 5000}, RejectedItemsError, r"texts\[3\]: 'yyy.* \(1 more like it\)"),
        ({50: ""}, RejectedItemsError, r"texts\[50\]"),
        ({17: 3.5}, InvalidDtypeError, r"texts\[17\]"),
    ],
)
def test_errors_count_the_callers_texts(wrong, error, message):
    engine = Ahead("tiny", threshold=1.0, max_length=4000)
    texts = [wrong.get(place, text) for place, text in enumerate(TEXTS)]
    with pytest.raises(error, match=message) as caught:
        engine.embed(texts)
    if error is RejectedItemsError:
        assert [place for place, _ in caught.value.rejected] == sorted(wrong)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("radix-")]
    assert engine.embed(TEXTS).shape == (60, 64)


def test_an_answer_that_is_no_number_is_told_by_its_place():
    engine = Ahead("tiny", threshold=1.0)
    texts = [text if place != 33 else "~" + text for place, text in enumerate(TEXTS)]

    def poisoned(plan, rows):
        hidden = InjectedForward(engine)(plan, rows)
        if ord("~") in plan.compact_ids:
            first = plan.compact_ids.tolist().index(ord("~"))
            hidden[first : plan.end[first]] = float("nan")
        return hidden

    engine.loaded.forward = InjectedForward(engine, instead=poisoned)
    with pytest.raises(InferenceError, match=r"texts\[33\]"):
        engine.embed(texts)


def test_other_errors_are_raised_as_they_are():
    engine = Ahead("tiny", threshold=1.0)
    seen = []

    def before(plan, rows):
        seen.append(plan)
        raise ZeroDivisionError("injected")

    engine.loaded.forward = InjectedForward(engine, before=before)
    with pytest.raises(ZeroDivisionError):
        engine.embed(TEXTS)
    assert len(seen) == 1


def test_only_engines_that_always_fold_begin_early():
    assert Engine("tiny", threshold=1.0).policy().always_folds
    assert not Engine("tiny").policy().always_folds
    assert not Engine("tiny", threshold=0).policy().always_folds
