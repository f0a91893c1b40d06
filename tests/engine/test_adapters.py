"""Engines of PEFT models: the stock PEFT model one text at a time, whatever became of its adapters before a job."""

import copy
import shutil
from functools import partial

import numpy as np
import peft
import pytest
import torch
from tests.engine import oracle
from tests.engine.test_rerank import NO, YES, prompt_ids
from tests.hf.adapters import LAYERS, NOT_LAYERS, QV, adapted, shake

import radix_mlp
import radix_mlp.hf.fused
from radix_mlp import Engine
from radix_mlp.engine.verify import verify
from radix_mlp.errors import InvalidDtypeError, InvalidInputError, UnsupportedModelError
from radix_mlp.hf.fast_forward import FUSED, FastForward
from radix_mlp.hf.fused.layers import why_not_fused
from radix_mlp.hf.graphs import GraphedDecoder
from radix_mlp.hf.support import decoder_of
from radix_mlp.models import load as loading
from radix_mlp.models.tiny import tiny_classifier, tiny_model, tiny_reranker, tiny_reranker_tokenizer, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:Model has `tie_word_embeddings")

TEXTS = ["one root, two leaves", "one root, no fruit", "one root", "another root"]
IDS = [list(text.encode()) for text in TEXTS]
PAIRS = [(ids[:3], ids[3:]) for ids in IDS]


@torch.no_grad()
def stock(model):
    """Last hidden state of every text, and the log-probability of all but its first tokens, by PEFT's own class."""
    # the engine finds its own as it left it
    model = radix_mlp.disable(copy.deepcopy(model))
    vectors, logprobs = [], []
    for ids in IDS:
        found = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        vectors.append(found.hidden_states[-1][0, -1].numpy())
        after = found.logits[0, 2:-1].log_softmax(-1)
        logprobs.append(float(after[torch.arange(len(after)), torch.tensor(ids[3:])].sum()))
    return np.stack(vectors), np.asarray(logprobs)


def check(engine, model):
    """The engine's answers, which are the stock ones."""
    vectors, scores = engine.embed(IDS, normalize=False), engine.score(PAIRS)
    assert engine.stats.num_compact < engine.stats.num_tokens
    expected_vectors, expected_scores = stock(model)
    np.testing.assert_allclose(vectors, expected_vectors, rtol=0, atol=1e-5)
    np.testing.assert_allclose([score.logprob for score in scores], expected_scores, rtol=1e-5)
    return vectors


def engine_of(model, **options):
    return Engine(model, tokenizer=tiny_tokenizer(), **{"threshold": 1.0} | options)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "layers again"])
def test_answers_are_those_of_the_stock_model(name):
    model = tiny_model()
    before = engine_of(model).embed(IDS, normalize=False)
    model = adapted(model, LAYERS[name]())
    engine = engine_of(model)
    found = check(engine, model)
    # an adapter of the head alone moves no vectors
    assert np.abs(found - before).max() > 1e-2
    # what is never folded goes another way
    np.testing.assert_allclose(
        engine.with_folding(threshold=0).embed(IDS, normalize=False),
        found,
        rtol=0,
        atol=1e-5,
    )


def test_what_becomes_of_adapters_between_two_jobs_counts():
    """Switched, switched off for a job, merged, taken back, weighed, trained, taken out: each by the job after."""
    model = adapted(tiny_model(), LAYERS["LoRA"]())
    model.add_adapter("second", LAYERS["MLP"]())
    model.set_adapter("second")
    shake(model)
    engine = engine_of(model)
    second = check(engine, model)
    model.set_adapter("default")
    first = check(engine, model)
    with model.disable_adapter():
        without = check(engine, model)
    assert np.array_equal(check(engine, model), first)
    for one, other in ((first, second), (first, without), (second, without)):
        assert np.abs(one - other).max() > 1e-2
    model.merge_adapter()
    np.testing.assert_allclose(check(engine, model), first, rtol=0, atol=1e-4)
    model.unmerge_adapter()
    shake(model, seed=2)
    trained = check(engine, model)
    assert np.abs(trained - first).max() > 1e-2
    model.delete_adapter("second")
    check(engine, model)
    unloaded = model.merge_and_unload()
    np.testing.assert_allclose(check(engine, unloaded), trained, rtol=0, atol=1e-4)


def test_adapters_that_transformers_adds_itself():
    model = tiny_model()
    engine = engine_of(model)
    seen = [check(engine, model)]
    for name, config in (("first", LAYERS["LoRA"]()), ("second", LAYERS["MLP"]())):
        model.add_adapter(config, name)
        shake(model)
        seen.append(check(engine, model))
    for change in (lambda: model.set_adapter("first"), model.disable_adapters, model.enable_adapters):
        change()
        seen.append(check(engine, model))
    assert np.allclose(seen[3], seen[1], atol=1e-6)
    assert np.allclose(seen[4], seen[0], atol=1e-6)
    assert np.abs(seen[1] - seen[0]).max() > 1e-2
    assert np.abs(seen[2] - seen[1]).max() > 1e-2


@pytest.mark.slow
def test_fused_layers_come_back_once_an_adapter_is_merged(monkeypatch):
    """On the CPU, through Triton's interpreter: no weight from before is left in them."""
    monkeypatch.setattr(FastForward, "_why_not_fused", lambda forward: why_not_fused(decoder_of(forward.model)))
    monkeypatch.setattr(radix_mlp.hf.graphs, "GraphedDecoder", partial(GraphedDecoder, max_rows=0))
    model = tiny_model(num_layers=1)
    engine = engine_of(model, impl="dense")
    plain = check(engine, model)
    assert engine.forward.describe() == FUSED
    wrapped = adapted(model, LAYERS["LoRA"]())
    check(engine, wrapped)
    assert "peft" in engine.forward.describe()
    merged = wrapped.merge_and_unload()
    found = check(engine, merged)
    assert engine.forward.describe() == FUSED
    assert np.abs(found - plain).max() > 1e-2
    # without a job between them
    again = adapted(merged, LAYERS["DoRA"]()).merge_and_unload()
    assert np.abs(check(engine, again) - found).max() > 1e-2
    assert engine.forward.describe() == FUSED


def test_labels_by_a_head_that_was_trained_whole():
    """As PEFT does it for every sequence classifier."""
    config = peft.LoraConfig(target_modules=QV, task_type="SEQ_CLS")
    model = adapted(tiny_classifier(), config)
    assert type(model.get_base_model().score).__name__ == "ModulesToSaveWrapper"
    found = engine_of(model).classify(IDS, raw_scores=True)
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).logits[0].tolist() for ids in IDS]
    for labels, row in zip(found, expected, strict=True):
        names = dict(labels)
        assert [names[name] for name in ("negative", "neutral", "positive")] == pytest.approx(row, rel=0, abs=1e-5)
    assert np.ptp(expected, axis=0).min() > 1e-2


@pytest.mark.parametrize("change", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_relevance_by_a_head_that_was_adapted(change):
    model = tiny_reranker()
    # of its own, so that embeddings stay as they are
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    pairs = [("a root?", "a root"), ("a root?", "a leaf"), ("a root?", "no")]
    model = adapted(model, peft.LoraConfig(**{"target_modules": QV} | change))
    engine = Engine(model, tokenizer=tiny_reranker_tokenizer(), threshold=1.0)
    found = engine.rerank_pairs(pairs)
    assert found == pytest.approx([oracle.relevance(model, prompt_ids(*pair), YES, NO) for pair in pairs], abs=1e-5)
    assert np.ptp(found) > 1e-3
    with model.disable_adapter():
        assert np.abs(engine.rerank_pairs(pairs) - found).max() > 1e-2


@pytest.mark.parametrize("name", NOT_LAYERS)
@pytest.mark.parametrize("threshold", [0, "auto"])
def test_what_only_pefts_class_does_is_refused(name, threshold):
    model = peft.get_peft_model(tiny_model(), NOT_LAYERS[name]())
    with pytest.raises(UnsupportedModelError, match=rf"adapter 'default'.*{name}"):
        engine_of(model, threshold=threshold)


def test_verify_takes_the_model_in_pefts_class():
    model = adapted(tiny_model(), LAYERS["LoRA"]())
    found = verify(engine_of(model, threshold=1.0), [np.asarray(ids, np.int32) for ids in IDS])
    assert found.passed
    assert found.flips == 0


def test_folders_with_an_adapter(tmp_path, monkeypatch):
    """With the model: as transformers loads both. Alone: refused, as it is where PEFT is missing."""
    model = tiny_model()
    both, alone = tmp_path / "both", tmp_path / "alone"
    model.save_pretrained(both)
    for folder in (both, alone):
        tiny_tokenizer().save_pretrained(folder)
    wrapped = adapted(model, LAYERS["LoRA"]())
    wrapped.save_pretrained(alone)
    for file in alone.glob("adapter_*"):
        shutil.copy(file, both)
    check(Engine(str(both), threshold=1.0), wrapped)
    with pytest.raises(InvalidInputError, match=r"holds an adapter.*without its model.*merge_and_unload"):
        Engine(str(alone))
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(InvalidInputError, match="pip install peft"):
        Engine(str(both))


def test_another_module_is_no_model():
    with pytest.raises(InvalidDtypeError, match="not Linear"):
        engine_of(torch.nn.Linear(1, 1))
