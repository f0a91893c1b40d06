"""Text alone through multimodal checkpoints: engine, commands, server and training against the unmodified class."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tests.cli.commands import run
from tests.models.multimodal_folders import model_of, multimodal_folder, tokenizer_of
from transformers import AutoModelForMultimodalLM

import radix_mlp
from radix_mlp.models.load import load
from radix_mlp.train import TreeBatch, sequence_logprobs, tree_logprobs

TYPES = ["gemma3", "qwen3_vl", "mistral3"]
BEGIN = "one root grows under "
TEXTS = [BEGIN + "the tree", BEGIN + "the house", BEGIN, "another root"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def folder_of(model_type: str, kind: str = "causal") -> str:
        if (model_type, kind) not in made:
            made[model_type, kind] = multimodal_folder(tmp_path_factory.mktemp("model"), model_type, kind)
        return made[model_type, kind]

    return folder_of


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor(tokenizer_of()(text)["input_ids"])[None]


@torch.no_grad()
def mean_vectors(model_type: str) -> np.ndarray:
    trunk = model_of(model_type).base_model
    hidden = [trunk(ids_of(text)).last_hidden_state[0].mean(0) for text in TEXTS]
    return torch.nn.functional.normalize(torch.stack(hidden), dim=-1).numpy()


@torch.no_grad()
def logprob_of(model, context: str, answer: str) -> float:
    ids = ids_of(context + answer)
    logprobs = model(ids).logits[0].double().log_softmax(-1)
    start = ids_of(context).shape[1]
    return sum(logprobs[place - 1, ids[0, place]].item() for place in range(start, ids.shape[1]))


@pytest.mark.parametrize("model_type", TYPES)
def test_a_folder_loads_as_transformers_maps_it(folder, model_type) -> None:
    model, tokenizer = load(folder(model_type), device="cpu")
    assert type(model) is type(model_of(model_type))
    assert tokenizer("Hi")["input_ids"] == [72, 105]


@pytest.mark.parametrize("model_type", TYPES)
def test_engine_embeds_and_scores(folder, model_type) -> None:
    engine = radix_mlp.Engine(folder(model_type), device="cpu", threshold=1)
    vectors = engine.embed(TEXTS, pooling="mean")
    np.testing.assert_allclose(np.asarray(vectors), mean_vectors(model_type), atol=1e-5)
    model = model_of(model_type)
    pairs = [(BEGIN.strip(), answer) for answer in (" the tree", " the house", " it")]
    for score, pair in zip(engine.score(pairs), pairs, strict=True):
        assert score.logprob == pytest.approx(logprob_of(model, *pair), rel=1e-5)
    assert engine.stats.num_compact < engine.stats.num_tokens


def test_engine_reranks_with_two_tokens(folder) -> None:
    model = model_of("qwen3_vl")
    engine = radix_mlp.Engine(folder("qwen3_vl"), device="cpu", threshold=1)
    found = engine.score([(BEGIN.strip(), " y"), (BEGIN.strip(), " n")])
    expected = [logprob_of(model, BEGIN.strip(), f" {answer}") for answer in "yn"]
    assert found[0].logprob - found[1].logprob == pytest.approx(expected[0] - expected[1], rel=1e-5)


@torch.no_grad()
def test_engine_classifies(folder) -> None:
    engine = radix_mlp.Engine(folder("gemma3", "classifier"), device="cpu", threshold=1)
    model = model_of("gemma3", "classifier")
    for text, labels in zip(TEXTS, engine.classify(TEXTS), strict=True):
        expected = model(ids_of(text)).logits[0].softmax(-1)
        assert {label.label: label.score for label in labels} == pytest.approx(
            {name: expected[place].item() for place, name in model.config.id2label.items()}, rel=1e-5
        )


@pytest.mark.parametrize("model_type", TYPES)
def test_placeholders_in_a_text_are_what_the_model_makes_of_them(folder, model_type) -> None:
    """Without images, the class embeds them like other tokens (or puts padding in their place)."""
    text = f"{BEGIN}<img>and more"
    with torch.no_grad():
        hidden = model_of(model_type).base_model(ids_of(text)).last_hidden_state[0].mean(0)
    engine = radix_mlp.Engine(folder(model_type), device="cpu", threshold=1)
    vectors = np.asarray(engine.embed([text, BEGIN], pooling="mean", normalize=False))
    np.testing.assert_allclose(vectors[0], hidden.numpy(), atol=1e-4)


def test_commands(folder, tmp_path) -> None:
    lines = tmp_path / "texts.txt"
    lines.write_text("\n".join(TEXTS))
    out = tmp_path / "vectors.jsonl"
    model = folder("gemma3")
    result = run("embed", str(lines), "--model", model, "--device", "cpu", "--pooling", "mean", "--output", str(out))
    assert result.exit_code == 0, result.output
    vectors = [json.loads(line)["embedding"] for line in out.read_text().splitlines()]
    np.testing.assert_allclose(vectors, mean_vectors("gemma3"), atol=1e-5)


@pytest.mark.parametrize("model_type", TYPES)
def test_training(folder, model_type) -> None:
    """Log-probabilities and gradients in training mode, float64."""
    model = model_of(model_type, dtype=torch.float64).train()
    expected = 0.0
    for text in TEXTS:
        ids = ids_of(text)
        logprobs = model(ids).logits.log_softmax(-1)[0, :-1]
        expected = expected + logprobs.gather(1, ids[0, 1:, None]).sum()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    radix_mlp.enable(model)
    batch = TreeBatch.from_sequences([ids_of(text)[0].tolist() for text in TEXTS])
    found = sequence_logprobs(tree_logprobs(model, batch).logprob, batch.edges).sum()
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    scale = max(gradient.abs().max() for gradient in gradients.values())
    assert scale > 1
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-6 * scale, msg=name)


def test_generation_runs_as_before() -> None:
    model = model_of("qwen3_vl")
    ids = ids_of(BEGIN)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(radix_mlp.enable(model).generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_the_loaded_class_is_taken_too(folder) -> None:
    model = AutoModelForMultimodalLM.from_pretrained(folder("mistral3"))
    engine = radix_mlp.Engine(model, tokenizer=tokenizer_of(), threshold=1)
    np.testing.assert_allclose(np.asarray(engine.embed(TEXTS, pooling="mean")), mean_vectors("mistral3"), atol=1e-5)
