"""Every public call with every kind of list: the same answer as with a list, or refused by its argument's name."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from tests.containers import LISTS, NO_LISTS, as_values, kept

from radix_mlp import AsyncEngine, Engine, build_plan
from radix_mlp.engine.verify import verify
from radix_mlp.errors import InvalidDtypeError, RadixError
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer
from radix_mlp.report.compression import compression_table
from radix_mlp.report.tree import text_tree
from radix_mlp.train import GroupBatchSampler, TreeBatch, TreeCollator, compact_size, split_batch

TEXTS = ["ccc of a", "ccc and b", "aaa", "bbb of a"]
PAIRS = [("ccc", " of a"), ("ccc", " and b"), ("aaa", " x"), ("bbb", " of a")]
IDS = [[5, 6, 7], [5, 6, 8], [9, 9], [5, 7]]
FEATURES = [{"input_ids": ids} for ids in IDS]


@pytest.fixture(scope="module")
def engines() -> dict[str, Engine]:
    return {name: Engine(name) for name in ("tiny", "tiny-reranker", "tiny-classifier")}


# name of the call -> its engine, its argument's name, what the list holds, and the call
CALLS: dict[str, tuple[str, str, list[Any], Callable[[Any, Any], Any]]] = {
    "embed": ("tiny", "texts", TEXTS, lambda e, v: e.embed(v)),
    "embed_tokens": ("tiny", "texts", TEXTS, lambda e, v: e.embed_tokens(v)),
    "embed of ids": ("tiny", "texts", IDS, lambda e, v: e.embed(v)),
    "token_scores": ("tiny", "texts", TEXTS, lambda e, v: e.token_scores(v)),
    "score": ("tiny", "pairs", PAIRS, lambda e, v: e.score(v)),
    "rerank": ("tiny-reranker", "documents", TEXTS, lambda e, v: e.rerank("ccc", v)),
    "rerank_pairs": ("tiny-reranker", "pairs", PAIRS, lambda e, v: e.rerank_pairs(v)),
    "classify": ("tiny-classifier", "inputs", TEXTS, lambda e, v: e.classify(v)),
    "classify of pairs": ("tiny-classifier", "inputs", PAIRS, lambda e, v: e.classify(v)),
}
BATCH = TreeBatch.from_sequences(IDS)
OTHERS: dict[str, tuple[str, list[Any], Callable[[Any], Any]]] = {
    "build_plan": ("input_ids", [5, 6, 5, 7], lambda v: build_plan(v, [0, 2, 4]).compact_ids.tolist()),
    "build_plan, offsets": ("cu_seq_lengths", [0, 2, 4], lambda v: build_plan([5, 6, 5, 7], v).compact_ids.tolist()),
    "build_plan, positions": (
        "position_ids",
        [0, 1, 0, 1],
        lambda v: build_plan([5, 6, 5, 7], [0, 2, 4], v).end.tolist(),
    ),
    "text_tree": ("sequences", [np.array(ids, np.int32) for ids in IDS], lambda v: text_tree(v).saved),
    "compression_table": ("sequences", [np.array(ids, np.int32) for ids in IDS], lambda v: str(compression_table(v))),
    "verify": (
        "sequences",
        [np.array(ids, np.int32) for ids in IDS],
        lambda v: [text.index for text in verify(Engine("tiny"), v).texts],
    ),
    "from_sequences": ("input_ids", IDS, lambda v: TreeBatch.from_sequences(v).plan.compact_ids.tolist()),
    "from_sequences, labels": ("labels", IDS, lambda v: TreeBatch.from_sequences(IDS, labels=v).edges.targets.tolist()),
    "from_sequences, tokens": (
        "weights",
        IDS,
        lambda v: TreeBatch.from_sequences(IDS, tokens={"weights": v}).tokens["weights"].tolist(),
    ),
    "from_sequences, sequences": (
        "reward",
        [3, 1, 2, 0],
        lambda v: TreeBatch.from_sequences(IDS, sequences={"reward": v}).sequences["reward"].tolist(),
    ),
    "select": ("indices", [2, 0], lambda v: BATCH.select(v).plan.compact_ids.tolist()),
    "split_batch": ("groups", [0, 1, 0, 1], lambda v: [p.num_tokens for p in split_batch(BATCH, 4, groups=v)]),
    "TreeCollator": ("items", FEATURES, lambda v: TreeCollator()(v).plan.compact_ids.tolist()),
    "compact_size": ("sequences", IDS, lambda v: compact_size(v)),
    "GroupBatchSampler": ("sizes", [4, 3, 5, 2], lambda v: list(GroupBatchSampler(v, 8, shuffle=False))),
}


def comparable(answer: Any) -> Any:
    if isinstance(answer, np.ndarray):
        return answer.tolist()
    return [comparable(part) for part in answer] if isinstance(answer, list) else answer


def outcome(function: Callable[[], Any], name: str) -> Any:
    """The answer, or the word "refused" for an error that names the argument; any other error is a failure."""
    try:
        return comparable(function())
    except RadixError as error:
        if not str(error).startswith(name):
            raise
        return "refused"


async def answered(engine: Engine, method: str, *arguments: Any) -> Any:
    async with AsyncEngine(engine, tokenization_workers=1) as front:
        return (await getattr(front, method)(*arguments)).value


@cache
def expected(call: str) -> Any:
    """The answer for a plain list."""
    if call in OTHERS:
        return comparable(OTHERS[call][2](OTHERS[call][1]))
    model, _, values, function = CALLS[call]
    return comparable(function(Engine(model), values))


def made(kind: Callable[[list[Any]], Any], values: list[Any]) -> Any:
    try:
        return kind(values)
    except Exception as error:
        # arrays and columns of other libraries do not hold everything
        pytest.skip(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("kind", LISTS | NO_LISTS)
@pytest.mark.parametrize("call", CALLS)
def test_calls_of_engines(call: str, kind: str, engines: dict[str, Engine]) -> None:
    model, name, values, function = CALLS[call]
    engine = engines[model]
    container = made((LISTS | NO_LISTS)[kind], values)
    before = kept(container)
    found = outcome(lambda: function(engine, container), name)
    if kind in NO_LISTS:
        assert found == "refused"
    elif found == "refused":
        # columns whose items are columns or arrays of their own
        assert values is not TEXTS
    else:
        assert found == expected(call)
    assert before is None or as_values(container) == as_values(before)


@pytest.mark.parametrize("kind", LISTS | NO_LISTS)
@pytest.mark.parametrize("call", [name for name in CALLS if " of " not in name])
def test_calls_of_async_engines(call: str, kind: str, engines: dict[str, Engine]) -> None:
    model, name, values, _ = CALLS[call]
    query = ["ccc"] if call == "rerank" else []
    container = made((LISTS | NO_LISTS)[kind], values)
    found = outcome(lambda: asyncio.run(answered(engines[model], call, *query, container)), name)
    if kind in NO_LISTS:
        assert found == "refused"
    elif found == "refused":
        assert values is not TEXTS
    else:
        wanted = expected(call)
        if call == "rerank":
            # scores alone, in the caller's order
            wanted = [score for _, score, _ in sorted(wanted)]
        assert found == wanted


@pytest.mark.parametrize("kind", LISTS | NO_LISTS)
@pytest.mark.parametrize("call", OTHERS)
def test_calls_of_plans_reports_and_training(call: str, kind: str) -> None:
    name, values, function = OTHERS[call]
    container = made((LISTS | NO_LISTS)[kind], values)
    before = kept(container)
    found = outcome(lambda: function(container), name)
    if kind == "None" and call in ("build_plan, positions", "from_sequences, labels", "split_batch"):
        # the default
        assert found != "refused"
    elif kind in NO_LISTS:
        assert found == "refused"
    elif found != "refused":
        assert found == expected(call)
    else:
        assert kind not in ("list", "tuple"), "plain lists are what is asked for"
    assert before is None or as_values(container) == as_values(before)


def test_documents_belong_to_their_scores(engines: dict[str, Engine]) -> None:
    pd = pytest.importorskip("pandas")
    column = pd.DataFrame({"text": ["aaa", "bbb", "ccc"]}).sort_values("text", ascending=False)["text"]
    engine = engines["tiny-reranker"]
    scores = engine.rerank_pairs([("q", text) for text in column])
    for place in engine.rerank("q", column):
        assert place.document == column.iloc[place.index]
        assert place.score == scores[place.index]


def test_a_list_that_changes_while_the_call_runs(engines: dict[str, Engine]) -> None:
    ids, wanted = [list(row) for row in IDS], engines["tiny"].embed(IDS)

    async def main() -> Any:
        async with AsyncEngine(engines["tiny"], tokenization_workers=1) as front:
            call = asyncio.create_task(front.embed(ids))
            await asyncio.sleep(0)
            ids[0][0] = 99
            ids.reverse()
            return (await call).value

    np.testing.assert_allclose(asyncio.run(main()), wanted, atol=1e-6)


def test_the_tokenizer_is_not_shared_with_its_owner() -> None:
    tokenizer = tiny_tokenizer()
    engine = Engine(tiny_model(), tokenizer=tokenizer)
    texts = [f"{number} the sky is blue" for number in range(40)]
    wanted, stop = engine.embed(texts), threading.Event()

    def count() -> None:
        while not stop.is_set():
            tokenizer(texts, padding=True, truncation=True, max_length=5)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        for _ in range(10):
            np.testing.assert_array_equal(engine.embed(texts), wanted)
    finally:
        stop.set()
        thread.join()
    # nor does the engine leave anything in it
    rust = tokenizer.backend_tokenizer
    assert rust.truncation["max_length"] == 5
    engine.loaded.max_length = 7
    engine.embed(texts, truncate=True)
    assert rust.truncation["max_length"] == 5


@pytest.mark.parametrize("kind", ["list", "array", "polars"])
def test_tensors_are_asked_for_by_name(kind: str) -> None:
    from radix_mlp import fold, tree_attention, unfold
    from radix_mlp.ops import last_token
    from radix_mlp.train import cross_entropy, dpo_loss, grpo_loss, info_nce, kl_distillation, margin_mse

    values = LISTS[kind]([1.0, 2.0])
    plan = build_plan([5, 6], [0, 2])
    calls: dict[str, Callable[[], Any]] = {
        "x": lambda: fold(values, plan),
        "x ": lambda: unfold(values, plan),
        "hidden": lambda: last_token(values, plan),
        "q": lambda: tree_attention(values, values, values, plan),
        "chosen": lambda: dpo_loss(values, values),
        "logprobs": lambda: grpo_loss(values, values, BATCH),
        "logprob": lambda: cross_entropy(values, BATCH),
        "queries": lambda: info_nce(values, values),
        "scores": lambda: kl_distillation(values, values),
        "scores ": lambda: margin_mse(values, values, values, values),
        "input_ids": lambda: TreeBatch.from_padded(values),
    }
    for name, call in calls.items():
        with pytest.raises(InvalidDtypeError, match=rf"^{name.strip()} must be a torch\.Tensor"):
            call()
