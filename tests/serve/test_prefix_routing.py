"""Requests with a common prefix meet, no replica is overloaded for it, and memory is bounded."""

import json
import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radix_mlp.errors import InvalidInputError
from radix_mlp.serve.fleet.prefix_routing import MAX_KEY_BYTES, PrefixRouter, routing_key

keys = st.one_of(
    st.none(),
    st.binary(max_size=200),
    # few prefixes, so that they meet
    st.builds(
        lambda letter, count, end: letter * count + end,
        st.sampled_from([b"a", b"b"]),
        st.integers(0, 300),
        st.binary(max_size=40),
    ),
)
load_maps = st.dictionaries(st.integers(0, 6), st.floats(0, 1e6), min_size=1)


@given(st.lists(st.tuples(keys, load_maps), max_size=12), st.integers(0, 10), st.floats(0, 2), st.floats(0, 8))
def test_a_choice_is_among_the_given_and_its_load_bounded(requests, window, slack, affinity):
    router = PrefixRouter(window=window, slack=slack, affinity=affinity)
    sent = []
    for key, loads in requests:
        choice = router.choose(key, loads)
        assert choice.replica in loads
        least = min(loads.values())
        assert loads[choice.replica] - least <= max(slack * least, affinity * choice.shared)
        # what is said to be shared was sent there
        same = [old for old, replica in sent[max(0, len(sent) - window) :] if replica == choice.replica]
        assert choice.shared == 0 or any(old[: choice.shared] == (key or b"")[: choice.shared] for old in same)
        sent.append(((key or b"")[:MAX_KEY_BYTES], choice.replica))


@given(st.lists(st.tuples(keys, load_maps), min_size=1, max_size=8))
def test_the_same_requests_take_the_same_ways(requests):
    def choices():
        router = PrefixRouter()
        return [router.choose(key, loads) for key, loads in requests]

    assert choices() == choices()


@given(st.binary(min_size=64, max_size=3000), st.lists(st.binary(max_size=50), min_size=1), st.integers(1, 8))
def test_a_prefix_stays_where_it_is_while_loads_are_equal(prefix, ends, num_replicas):
    router = PrefixRouter()
    loads = dict.fromkeys(range(num_replicas), 5.0)
    first = router.choose(prefix, loads).replica
    for end in ends:
        choice = router.choose(prefix + end, loads)
        assert choice.replica == first
        # blocks grow with the depth by an eighth
        assert choice.shared >= min(len(prefix), len(prefix) * 7 // 8 - 32)


def test_equal_prefixes_are_found_to_their_end():
    router = PrefixRouter()
    loads = {"a": 0, "b": 0}
    router.choose(b"short", loads)
    assert router.choose(b"short", loads).shared == len(b"short")
    long = bytes(range(256)) * 40
    router.choose(long, loads)
    assert router.choose(long, loads).shared == MAX_KEY_BYTES


def test_an_overloaded_replica_is_left_and_then_both_know_the_prefix():
    router = PrefixRouter(affinity=4, slack=0.25)
    prefix = b"x" * 1000
    first = router.choose(prefix, {"a": 0, "b": 0}).replica
    other = "b" if first == "a" else "a"
    assert router.choose(prefix, {first: 4000, other: 0}).replica == first
    assert router.choose(prefix, {first: 4001, other: 0}) == (other, 0)
    # now both have it, and the load decides
    assert router.choose(prefix, {first: 10, other: 9}) == (other, 1000)
    # under load, a part of it is accepted
    assert router.choose(b"y", {first: 100_000, other: 125_000}).replica == first


def test_memory_is_bounded_and_given_back():
    router = PrefixRouter(window=50)
    generator = random.Random(0)
    for _ in range(500):
        router.choose(generator.randbytes(5000), {"a": 0, "b": 0})
        assert router.num_prefixes <= 50 * 64
    for _ in range(50):
        router.choose(None, {"c": 0})
    assert router.num_prefixes == 0
    assert router._known.get("a") is None


def test_routers_in_other_processes_agree_while_there_is_no_load():
    code = (
        "from radix_mlp.serve.fleet.prefix_routing import PrefixRouter as R;"
        "print([R().choose(b'key %d' % n, dict.fromkeys('abcd', 0)).replica for n in range(40)])"
    )
    found = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(found) == 1
    # and spread what is new
    assert set("abcd") <= set(found.pop().decode())


def test_nonsense_is_refused():
    for options in ({"window": -1}, {"slack": -0.1}, {"affinity": float("nan")}):
        with pytest.raises(InvalidInputError, match=next(iter(options))):
            PrefixRouter(**options)
    with pytest.raises(InvalidInputError, match="no replica"):
        PrefixRouter().choose(b"", {})


KEYS = [
    ("/rerank", {"query": "q", "texts": ["a"]}, b"q"),
    ("/rerank", {"query": "q", "texts": ["a"], "instruction": "i"}, b"i\0q"),
    ("/v1/rerank", {"query": "q", "documents": ["a"], "instruct": "i"}, b"i\0q"),
    ("/v2/rerank", {"query": "q", "documents": ["a"], "instruction": None}, b"q"),
    ("/score", {"queries": ["q", "r"], "documents": ["a", "b"]}, b"q"),
    ("/score", {"text_1": "q", "text_2": ["a", "b"]}, b"q"),
    ("/v1/score", {"data_1": "q", "data_2": ["a", "b"]}, b"q"),
    ("/generative_scoring", {"query": "q", "items": ["a"], "label_token_ids": [1]}, b"q"),
    ("/generative_scoring", {"query": [5, 6], "items": [[1], [2]], "label_token_ids": [1]}, b"5 6"),
    ("/generative_scoring", {"query": "q", "items": ["a"], "item_first": True}, b"a"),
    ("/embed", {"inputs": "text"}, b"text"),
    ("/embed", {"inputs": ["text", "more"], "prompt_name": "query"}, b"query\0text"),
    ("/embed", {"inputs": [1, 2, 3]}, b"1 2 3"),
    ("/embeddings", {"input": [[1, 2], "text"]}, b"1 2"),
    ("/v1/embeddings", {"input": "text", "model": "m"}, b"text"),
    ("/v1/completions", {"prompt": ["text"]}, b"text"),
    ("/predict", {"inputs": [["a", "b"], ["c"]]}, b"a"),
    ("/similarity", {"inputs": {"source_sentence": "s", "sentences": ["t"]}}, b"s"),
    ("/tokenize", {"inputs": "text"}, None),
    ("/decode", {"ids": [1]}, None),
    ("/embed", {"inputs": []}, None),
    ("/embed", {"inputs": ""}, None),
    ("/embed", {"inputs": 7}, None),
    ("/embed", {"inputs": [None]}, None),
    ("/similarity", {"inputs": {"sentences": ["t"]}}, None),
    ("/rerank", {"texts": ["a"]}, None),
    ("/rerank", {"query": {"deep": 1}, "instruction": "i"}, None),
    ("/embed", [1, 2], None),
    ("/embed", "text", None),
]


@pytest.mark.parametrize(("path", "body", "key"), KEYS)
def test_keys_are_what_the_model_reads_first(path, body, key):
    assert routing_key(path, json.dumps(body).encode()) == key


def test_keys_are_cut():
    assert len(routing_key("/embed", json.dumps({"inputs": "ü" * 9000}).encode())) == MAX_KEY_BYTES
    assert len(routing_key("/embed", json.dumps({"inputs": [7] * 90_000}).encode())) <= MAX_KEY_BYTES


@given(st.sampled_from(["/embed", "/rerank", "/", "/nowhere"]), st.binary())
def test_bodies_that_are_no_json_have_no_key(path, body):
    assert routing_key(path, body) is None or json.loads(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
fields = st.sampled_from(["inputs", "input", "query", "queries", "instruction", "items", "item_first", "prompt_name"])


@given(st.dictionaries(fields, json_values))
def test_no_json_breaks_it(body):
    key = routing_key("/embed", json.dumps(body).encode())
    assert key is None or (isinstance(key, bytes) and 0 < len(key) <= MAX_KEY_BYTES)


@pytest.mark.parametrize(
    "body", [b'{"inputs": ' + b"[" * 100_000, b'{"inputs": "\\ud800"}', b'{"inputs": "\xff"}', b""]
)
def test_hostile_bodies_have_no_key(body):
    assert routing_key("/embed", body) is None


class Replica:
    """Every step runs the batch with the oldest request and what shares its prefix, up to a budget of unique bytes."""

    def __init__(self):
        self.queue = []

    def step(self, budget):
        """Unique bytes of a batch, and the requests in it."""
        oldest = self.queue[0][0] if self.queue else None
        self.queue.sort(key=lambda request: request[0] != oldest)
        computed, seen, taken = 0, set(), []
        while self.queue:
            prefix, size, _ = self.queue[0]
            cost = size + (0 if prefix in seen else len(prefix))
            if taken and computed + cost > budget:
                break
            seen.add(prefix)
            computed += cost
            taken.append(self.queue.pop(0))
        return computed, taken


def simulate(choose, *, num_replicas=4, prefixes=40, prefix_bytes=4000, clients=160, requests=4000, seed=0):
    """Clients that wait for their answers and ask again -> unique bytes computed, steps, requests by replica."""
    generator = random.Random(seed)
    texts = [b"What all requests begin with. " * 8 + generator.randbytes(prefix_bytes) for _ in range(prefixes)]
    replicas = [Replica() for _ in range(num_replicas)]
    loads = dict.fromkeys(range(num_replicas), 0)
    by_replica, computed, steps, left = Counter(), 0, 0, requests

    def send():
        prefix, size = generator.choice(texts), generator.randrange(50, 400)
        replica, shared = choose(prefix, loads)
        cost = len(prefix) + size - shared
        loads[replica] += cost
        by_replica[replica] += 1
        replicas[replica].queue.append((prefix, size, cost))

    for _ in range(clients):
        send()
    while any(replica.queue for replica in replicas):
        steps += 1
        done = 0
        for index, replica in enumerate(replicas):
            batch_bytes, taken = replica.step(32_000)
            computed += batch_bytes
            loads[index] -= sum(cost for _, _, cost in taken)
            done += len(taken)
        for _ in range(min(done, left)):
            left -= 1
            send()
    return computed, steps, by_replica


def test_simulated_replicas_compute_less_and_stay_balanced():
    generator = random.Random(1)

    def at_random(key, loads):
        return generator.choice(list(loads)), 0

    def least_loaded(key, loads):
        return min(loads, key=loads.get), 0

    found = {}
    for name, choose in (("random", at_random), ("least", least_loaded), ("prefix", PrefixRouter().choose)):
        computed, steps, by_replica = simulate(choose)
        found[name] = computed, steps
        share = max(by_replica.values()) / (sum(by_replica.values()) / 4)
        # -s shows them
        sys.stdout.write(
            f"{name}: {computed / 1e6:.2f} MB computed in {steps} steps, fullest {share:.2f} of the mean\n"
        )
        if name == "prefix":
            assert share < 1.25
    assert found["prefix"][0] < 0.7 * min(found["random"][0], found["least"][0])
    assert found["prefix"][1] < 0.7 * min(found["random"][1], found["least"][1])


def test_an_instruction_that_all_requests_share_does_not_send_them_to_one_replica():
    _, _, by_replica = simulate(PrefixRouter().choose, prefixes=1, requests=2000)
    assert max(by_replica.values()) < 1.25 * sum(by_replica.values()) / 4
    # also where it is nearly all of the request, and every request differs
    _, _, by_replica = simulate(PrefixRouter().choose, prefixes=4000, prefix_bytes=30, requests=2000)
    assert max(by_replica.values()) < 1.25 * sum(by_replica.values()) / 4
