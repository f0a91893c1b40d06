"""Folders that sentence-transformers itself writes, and its own answers. Skipped where it is not installed."""

import numpy as np
import pytest
import torch

from radix_mlp import Engine
from radix_mlp.models.tiny import (
    tiny_classifier,
    tiny_model,
    tiny_reranker,
    tiny_reranker_tokenizer,
    tiny_tokenizer,
)

pytestmark = pytest.mark.slow
library = pytest.importorskip("sentence_transformers")

TEXTS = ["a radix is a root", "a radix", "something else entirely, and long", "a radix is a root", "z"]
PAIRS = [("what is it?", "a root"), ("what is it?", "a fruit, or a vegetable"), ("why?", "because"), ("why?", "no")]
CHAT = (
    "{% set query = messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first %}"
    "{% set document = messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first %}"
    "{% set system = messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first %}"
    "<|im_start|>{{ system | default('the default') }}: {{ query }} | {{ document }}<|im_end|>answer:"
)


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def close(a, b):
    return np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", ["lasttoken", "mean", "cls", "weightedmean", ("mean", "lasttoken")])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_encode(tmp_path, mode, include_prompt):
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    transformer = Transformer(save(tiny_model().model, tiny_tokenizer(), tmp_path / "model"))
    torch.manual_seed(0)
    pooling = Pooling(64, mode, include_prompt=include_prompt)
    size = 64 * (1 if isinstance(mode, str) else len(mode))
    theirs = library.SentenceTransformer(
        modules=[transformer, pooling, Dense(size, 24), Normalize()],
        prompts={"query": "query: ", "say": "Say: "},
        default_prompt_name="query",
        device="cpu",
    )
    theirs.save_pretrained(str(tmp_path / "saved"))
    engine = Engine(str(tmp_path / "saved"), device="cpu")
    for options in ({}, {"prompt_name": "say"}, {"prompt": "x "}):
        close(engine.embed(TEXTS, normalize=False, **options), theirs.encode(TEXTS, **options))
    expected = theirs.encode(TEXTS, truncate_dim=8, normalize_embeddings=True)
    close(engine.embed(TEXTS, dimensions=8), expected)


def test_encode_without_a_norm_and_with_saved_dimensions(tmp_path):
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(save(tiny_model().model, tiny_tokenizer(), tmp_path / "model"))
    theirs = library.SentenceTransformer(modules=[transformer, Pooling(64, "mean")], truncate_dim=10, device="cpu")
    theirs.max_seq_length = 9
    theirs.save_pretrained(str(tmp_path / "saved"))
    engine = Engine(str(tmp_path / "saved"), device="cpu")
    close(engine.embed(TEXTS, normalize=False, truncate=True), theirs.encode(TEXTS))


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("activation", ["Sigmoid", "Identity"])
def test_cross_encoder_with_a_logit_score(tmp_path, chat, activation):
    tokenizer = tiny_reranker_tokenizer()
    tokenizer.chat_template = CHAT if chat else None
    folder = save(tiny_reranker(), tokenizer, tmp_path / "model")
    theirs = library.CrossEncoder(folder, activation_fn=getattr(torch.nn, activation)(), device="cpu")
    theirs.save_pretrained(str(tmp_path / "saved"))
    engine = Engine(str(tmp_path / "saved"), device="cpu")
    assert engine.loaded.folder.chat == chat
    close(engine.rerank_pairs(PAIRS), theirs.predict(PAIRS))
    close(engine.rerank_pairs(PAIRS, instruction="find"), theirs.predict(PAIRS, prompt="find"))
    ranked = theirs.rank(PAIRS[0][0], [document for _, document in PAIRS])
    ours = engine.rerank(PAIRS[0][0], [document for _, document in PAIRS])
    assert [place.index for place in ours] == [place["corpus_id"] for place in ranked]
    if chat:
        # not saved by that library, the same checkpoint is read the same way
        close(
            Engine(folder, device="cpu").rerank_pairs(PAIRS, raw_scores=True),
            engine.rerank_pairs(PAIRS, raw_scores=True),
        )


@pytest.mark.parametrize("prompts", [{}, {"prompts": {"web": "find: "}, "default_prompt_name": "web"}])
def test_cross_encoder_of_a_classifier(tmp_path, prompts):
    folder = save(tiny_classifier(["relevant"]), tiny_tokenizer(), tmp_path / "model")
    theirs = library.CrossEncoder(folder, device="cpu", **prompts)
    # before it is saved, the checkpoint is a plain one
    if not prompts:
        close(Engine(folder, device="cpu").rerank_pairs(PAIRS, template="pair"), theirs.predict(PAIRS))
    theirs.save_pretrained(str(tmp_path / "saved"))
    close(Engine(str(tmp_path / "saved"), device="cpu").rerank_pairs(PAIRS), theirs.predict(PAIRS))


def test_cross_encoder_with_labels(tmp_path):
    folder = save(tiny_classifier(), tiny_tokenizer(), tmp_path / "model")
    theirs = library.CrossEncoder(folder, device="cpu").predict(PAIRS, apply_softmax=True)
    ours = Engine(folder, device="cpu").classify(PAIRS)
    close([[dict(answer)[label] for label in ("negative", "neutral", "positive")] for answer in ours], theirs)
