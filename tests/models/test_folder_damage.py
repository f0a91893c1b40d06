"""Finder: whatever is damaged in a good folder, the answer is the same, or stock's, or an error names the damage."""

import logging
import random
from collections import Counter

import numpy as np
import pytest
import torch
from tests.models.folder_damage import damaged, damages
from tests.models.folders import CLASSES, small_model, tokenizer_that_writes, write
from tests.models.sentence_transformers_folders import dense_config, write_folder
from transformers import AutoTokenizer

from radix_mlp import Engine
from radix_mlp.errors import RadixError
from radix_mlp.models.tiny import tiny_reranker, tiny_reranker_tokenizer

TEXTS = ["a radix is a root", "a radix"]
PAIRS = [("what is it?", "a root"), ("what is it?", "a fruit")]
PROMPTS = {"prompts": {"query": "query: "}, "default_prompt_name": "query", "truncate_dim": 3}
LAST = ("Pooling", {"word_embedding_dimension": 64, "pooling_mode": "lasttoken", "include_prompt": True})
logger = logging.getLogger(__name__)
KINDS = ("trunk", "causal", "classifier", "sentence-transformers", "cross-encoder")


def write_good(kind, path):
    if kind == "sentence-transformers":
        modules = [LAST, ("Dense", dense_config(4, 64)), ("Normalize", {})]
        write_folder(path, modules, settings=PROMPTS)
    elif kind == "cross-encoder":
        library = pytest.importorskip("sentence_transformers")
        plain = str(write(path.parent / "plain", tiny_reranker(), tiny_reranker_tokenizer()))
        library.CrossEncoder(plain, device="cpu", activation_fn=torch.nn.Identity()).save_pretrained(str(path))
    else:
        # not the default, so that taking it out changes the answer
        rope = {"rope_type": "default", "rope_theta": 100.0}
        write(path, small_model(kind, rope_parameters=rope), tokenizer_that_writes("<|bos|> $A"))
    return path


def answer(kind, folder):
    """Numbers that every part of the folder goes into."""
    engine = Engine(folder)
    if kind == "cross-encoder":
        return engine.rerank_pairs(PAIRS)
    if kind == "classifier":
        return np.array([[score for _, score in sorted(labels)] for labels in engine.classify(TEXTS, raw_scores=True)])
    if kind == "causal":
        return np.array([score.logprob for score in engine.score([("a radix is", " a root")])])
    return engine.embed(TEXTS, normalize=False)


def stock(kind, folder):
    """The same from the libraries themselves, one text at a time."""
    if kind in ("sentence-transformers", "cross-encoder"):
        library = pytest.importorskip("sentence_transformers")
        if kind == "cross-encoder":
            return library.CrossEncoder(str(folder), device="cpu").predict(PAIRS)
        model = library.SentenceTransformer(str(folder), device="cpu")
        return np.stack([model.encode(text) for text in TEXTS])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = CLASSES[kind].from_pretrained(folder).eval()
    if kind == "causal":
        return stock_score(model, tokenizer)
    found = []
    for text in TEXTS:
        with torch.inference_mode():
            out = model(torch.tensor([tokenizer(text)["input_ids"]]))
        found.append(out.logits[0].numpy() if kind == "classifier" else out.last_hidden_state[0, -1].numpy())
    return np.stack(found)


def stock_score(model, tokenizer):
    context, whole = (tokenizer(text)["input_ids"] for text in ("a radix is", "a radix is a root"))
    with torch.inference_mode():
        logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return np.array([sum(float(logprobs[at - 1, whole[at]]) for at in range(len(context), len(whole)))])


def close(a, b):
    return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=1e-4)


def outcome(kind, good, folder, damage):
    """What became of a damaged folder; an empty string would be a fault."""
    try:
        found = answer(kind, folder)
    except RadixError as error:
        return "named" if any(name in str(error) for name in damage.names) else f"FAULT not named: {error}"
    except Exception as error:
        return f"FAULT not typed: {type(error).__name__}: {error}"
    if close(found, good):
        return "same"
    try:
        theirs = stock(kind, folder)
    except Exception as error:
        return f"FAULT answered, stock does not: {type(error).__name__}: {str(error)[:200]}"
    return "as stock" if close(found, theirs) else f"FAULT another answer, stock's is a third: {found} {theirs}"


def run(kind, tmp_path, cases):
    good = write_good(kind, tmp_path / "good")
    expected = answer(kind, good)
    assert close(expected, stock(kind, good))
    outcomes = {
        str(damage): outcome(kind, expected, damaged(good, tmp_path / "damaged", damage), damage)
        for damage in cases(list(damages(good)))
    }
    faults = {damage: found for damage, found in outcomes.items() if found.startswith("FAULT")}
    assert not faults, "\n".join(f"{damage}: {found}" for damage, found in faults.items())
    logger.info("%s: %s of %s", kind, dict(Counter(outcomes.values())), len(outcomes))
    logger.info("as stock: %s", [damage for damage, found in outcomes.items() if found == "as stock"])
    return Counter(outcomes.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_any_damage(kind, tmp_path):
    counts = run(kind, tmp_path, lambda cases: cases)
    assert counts["named"] > 50, counts
    assert counts["same"] > 10, counts


@pytest.mark.parametrize("kind", KINDS)
def test_some_damage(kind, tmp_path):
    """A tenth, the same every time."""
    run(kind, tmp_path, lambda cases: random.Random(0).sample(cases, len(cases) // 10))
