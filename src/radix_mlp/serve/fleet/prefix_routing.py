"""Which of several replicas a request goes to, so that requests with a common prefix meet. No I/O, no torch."""

from __future__ import annotations

import itertools
import zlib
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from hashlib import blake2b
from typing import Any, Generic, NamedTuple, TypeVar

import orjson

from radix_mlp.errors import InvalidInputError

__all__ = ["MAX_KEY_BYTES", "Choice", "PrefixRouter", "routing_key"]

Id = TypeVar("Id", bound=Hashable)

MAX_KEY_BYTES = 4096
"""More of a text is not looked at; long enough to tell few-shot prompts and retrieved contexts apart."""
SHORTEST_BLOCK = 32
"""Bytes; two texts that share fewer share nothing worth waiting for."""
NO_PREFIX = frozenset(("/tokenize", "/decode"))
"""These do not run the model."""
MAX_IDS = MAX_KEY_BYTES // 4


class Choice(NamedTuple, Generic[Id]):
    """Where a request goes."""

    replica: Id
    shared: int
    """Leading bytes of its key that requests sent there lately share: work that is not done again if they meet."""


class PrefixRouter(Generic[Id]):
    """Sends requests with a common prefix to the same replica while that is not overloaded.

    Sharing happens among requests that wait at one replica together, so what counts is what was sent there lately:
    the router remembers the prefixes of the last `window` requests. Among the replicas that are not overloaded it
    takes the one that knows most of the key; of equals the least loaded, and of those one by a hash of key and replica,
    so that several routers that know nothing of each other agree while there is no load.

    A replica is overloaded for a request if its load is above the least load by more than `slack` times the least load
    and more than `affinity` times the prefix that it shares. So an idle replica is preferred as soon as waiting costs
    clearly more than the prefix saves, and under load the imbalance stays a fraction of the queue. What all requests
    share (an instruction, a template) soon is known at all replicas and makes none of them better.

    Replicas come and go with the loads that are passed in: a replica without a load is never chosen.
    Not for several threads at a time.

    Args:
        window: requests to remember. Memory is bounded by it: at most about 4 KB for each.
        slack: accepted imbalance, as a part of the least load.
        affinity: accepted imbalance, in units of load a byte of shared prefix: 4 if loads are in bytes of text, 1 if
            they are in tokens.

    Raises:
        InvalidInputError: a number below its least.

    Examples:
        >>> router = PrefixRouter()
        >>> prompt = b"Answer with yes or no. Is this true: "
        >>> first = router.choose(prompt + b"the sky is blue", {"a": 0, "b": 0})
        >>> router.choose(prompt + b"the sky is green", {"a": 0, "b": 0}) == (first.replica, 32)
        True
        >>> router.choose(prompt + b"grass is green", {"a": 9000, "b": 70, first.replica: 9000}).shared
        0
    """

    def __init__(self, *, window: int = 1024, slack: float = 0.25, affinity: float = 4.0) -> None:
        if window < 0:
            raise InvalidInputError(f"window {window}: requests to remember, at least 0.")
        if not slack >= 0:
            raise InvalidInputError(f"slack {slack}: a part of the least load, at least 0.")
        if not affinity >= 0:
            raise InvalidInputError(f"affinity {affinity}: load a shared byte, at least 0.")
        self._window = window
        self._slack = slack
        self._affinity = affinity
        self._sent: deque[tuple[Id, tuple[int, ...]]] = deque()
        # how many of the requests in the window have a prefix, by replica
        self._known: dict[Id, dict[int, int]] = {}

    def choose(self, key: bytes | None, loads: Mapping[Id, float]) -> Choice[Id]:
        """The replica for a request, which counts as sent there from now on.

        Args:
            key: of `routing_key`; None: nothing is shared, the least loaded replica is taken.
            loads: what waits at every replica that may be chosen, all in one unit. Best is the work to do: bytes of the
                bodies sent there and not answered yet, less the `shared` bytes of each choice.

        Raises:
            InvalidInputError: there is no replica.
        """
        if not loads:
            raise InvalidInputError("loads is empty: there is no replica to choose from.")
        key = (key or b"")[:MAX_KEY_BYTES]
        blocks = tuple(_blocks(key))
        least = min(loads.values())
        choices = [Choice(replica, self._shared(replica, blocks)) for replica in loads]
        allowed = [
            choice
            for choice in choices
            if loads[choice.replica] - least <= max(self._slack * least, self._affinity * choice.shared)
        ]
        best = max((choice.shared, -loads[choice.replica]) for choice in allowed)
        equals = [choice for choice in allowed if (choice.shared, -loads[choice.replica]) == best]
        chosen = equals[0] if len(equals) == 1 else max(equals, key=lambda choice: _rank(key, choice.replica))
        self._remember(chosen.replica, blocks)
        return chosen

    @property
    def num_prefixes(self) -> int:
        """Prefixes in memory."""
        return sum(map(len, self._known.values()))

    def _shared(self, replica: Id, blocks: tuple[int, ...]) -> int:
        """Length of the longest prefix that is known there; all shorter ones of the key are known with it."""
        known = self._known.get(replica)
        if not known:
            return 0
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if blocks[middle - 1] in known else (low, middle - 1)
        return blocks[low - 1] >> 32 if low else 0

    def _remember(self, replica: Id, blocks: tuple[int, ...]) -> None:
        for block in blocks:
            known = self._known.setdefault(replica, {})
            known[block] = known.get(block, 0) + 1
        self._sent.append((replica, blocks))
        while len(self._sent) > self._window:
            self._forget(*self._sent.popleft())

    def _forget(self, replica: Id, blocks: tuple[int, ...]) -> None:
        for block in blocks:
            known = self._known[replica]
            known[block] -= 1
            if not known[block]:
                del known[block]
            if not known:
                del self._known[replica]


def _blocks(key: bytes) -> Iterator[int]:
    """Every prefix that is looked up, as its length and a checksum: closer at the begin, the last is the whole key."""
    start, checksum = 0, 0
    while start < len(key):
        end = min(len(key), start + max(SHORTEST_BLOCK, start // 8))
        checksum = zlib.crc32(key[start:end], checksum)
        yield end << 32 | checksum
        start = end


def _rank(key: bytes, replica: Hashable) -> bytes:
    """Rendezvous hashing; the same in every process."""
    return blake2b(key + b"\0" + str(replica).encode(), digest_size=8).digest()


def routing_key(path: str, body: bytes) -> bytes | None:
    """What the texts of a request begin with, in the order in which the model reads it; None where that is not known.

    - a query with documents (`/rerank`, `/score`, `/generative_scoring`): instruction and query. Documents follow them,
      and every document of the request shares them anyway;
    - texts (`/embed`, `/v1/embeddings`, `/predict`, `/v1/completions`, …): prompt name and the begin of the first text;
    - token ids in place of a text: the first of them;
    - `/similarity`: the sentence that the others are compared with.

    The model's own template, the same for all, is left out. Nothing is checked here: a body that is no JSON, or not
    what the route takes, has no key and is refused by the replica.

    Args:
        path: of the request, as `/rerank`.
        body: the request's, as it came.

    Returns:
        At most `MAX_KEY_BYTES` bytes.

    Examples:
        >>> routing_key("/rerank", b'{"query": "roots", "texts": ["a", "b"], "instruction": "Find."}')
        b'Find.\\x00roots'
        >>> routing_key("/embed", b'{"inputs": ["a text", "a text more"]}')
        b'a text'
        >>> routing_key("/embed", b"no json")
    """
    if path in NO_PREFIX:
        return None
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(value, dict):
        return None
    if value.get("item_first") is True:
        return _joined(value.get("items"))
    for name in ("query", "queries", "text_1", "data_1"):
        if name in value:
            instruction = value.get("instruction", value.get("instruct"))
            return _joined(instruction, value[name])
    for name in ("inputs", "input", "prompt"):
        if name in value:
            texts = value[name]
            if isinstance(texts, dict):
                texts = texts.get("source_sentence")
            return _joined(value.get("prompt_name"), texts)
    return None


def _joined(*parts: Any) -> bytes | None:
    """The begin of the parts that are there; None if the last is not a text."""
    found = [_begin(part) for part in parts]
    if not found[-1]:
        return None
    return b"\0".join(part for part in found if part)[:MAX_KEY_BYTES]


def _begin(value: Any) -> bytes:
    """The begin of a text, of token ids, or of the first of several."""
    # [["a", "b"], …] are pairs of texts
    for _ in range(2):
        if isinstance(value, list) and value and isinstance(value[0], str | list):
            value = value[0]
    if isinstance(value, str):
        return value[:MAX_KEY_BYTES].encode()
    if isinstance(value, list):
        ids = itertools.takewhile(lambda item: isinstance(item, int), value[:MAX_IDS])
        return " ".join(map(str, ids)).encode()
    return b""
