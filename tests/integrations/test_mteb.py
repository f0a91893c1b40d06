"""mteb's mock tasks: our wrappers against its own."""

import warnings

import mteb
import numpy as np
import pytest
import torch
from mteb.mocks import mock_tasks
from mteb.models import (
    CrossEncoderProtocol,
    CrossEncoderWrapper,
    EncoderProtocol,
    ModelMeta,
    SentenceTransformerEncoderWrapper,
)
from mteb.models.instruct_wrapper import InstructSentenceTransformerModel
from tests.integrations.models import embedder, reranker

from radix_mlp.errors import InvalidInputError, UnsupportedModelError
from radix_mlp.integrations.mteb import RadixCrossEncoder, RadixEncoder, _warn_of_settings
from radix_mlp.integrations.sentence_transformers import enable, stats
from radix_mlp.models.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")

ENCODER_TASKS = [
    ["RetrievalTask", "PairClassificationTask"],
    pytest.param(["STSTask", "RerankingTask", "ClassificationTask"], marks=pytest.mark.slow),
]


def scores(model, tasks, tmp_path):
    tasks = [getattr(mock_tasks, f"Mock{task}")() for task in tasks]
    results = mteb.evaluate(model, tasks, cache=None, encode_kwargs={"batch_size": 2}, overwrite_strategy="always")
    return {result.task_name: numbers(result.scores) for result in results.task_results}


def numbers(value):
    """All numbers of nested scores, by their path."""
    if isinstance(value, dict):
        return {(key, *path): n for key, part in value.items() for path, n in numbers(part).items()}
    if isinstance(value, list):
        return {(key, *path): n for key, part in enumerate(value) for path, n in numbers(part).items()}
    return {(): value} if isinstance(value, float) and not np.isnan(value) else {}


@pytest.mark.parametrize("tasks", ENCODER_TASKS)
def test_encoder(tmp_path, tasks):
    stock = SentenceTransformerEncoderWrapper(embedder(tmp_path / "stock", "mean"))
    ours = RadixEncoder(embedder(tmp_path / "ours", "mean"), threshold=1)
    assert isinstance(ours, EncoderProtocol)
    expected = scores(stock, tasks, tmp_path)
    found = scores(ours, tasks, tmp_path)
    assert len(found) == len(tasks)
    for task, values in expected.items():
        assert values
        assert found[task] == pytest.approx(values, abs=1e-4), task
    assert ours.stats.num_tokens > 0
    assert ours.mteb_model_meta.loader is RadixEncoder


def test_cross_encoder(tmp_path):
    stock = CrossEncoderWrapper(reranker(tmp_path / "stock"))
    ours = RadixCrossEncoder(reranker(tmp_path / "ours"), threshold=1)
    assert isinstance(ours, CrossEncoderProtocol)
    expected = scores(stock, ["RerankingTask", "InstructionReranking"], tmp_path)
    found = scores(ours, ["RerankingTask", "InstructionReranking"], tmp_path)
    assert len(found) == 2
    assert all(found.values())
    assert found == {task: pytest.approx(values, abs=1e-4) for task, values in expected.items()}


def loader(texts):
    from datasets import Dataset
    from mteb._create_dataloaders import create_dataloader

    return create_dataloader(
        Dataset.from_dict({"text": texts, "id": list(map(str, range(len(texts))))}),
        task_metadata=mock_tasks.MockSTSTask.metadata,
        batch_size=2,
        num_proc=None,
    )


@pytest.mark.parametrize("prompt_type", [None, mteb.types.PromptType.query, mteb.types.PromptType.document])
def test_vectors_with_prompts(tmp_path, prompt_type):
    texts = ["a radix", "a radix is a root", "other"]
    where = {"task_metadata": mock_tasks.MockSTSTask.metadata, "hf_split": "test", "hf_subset": "default"}
    prompts = {"query": "ask: ", "document": "tell: ", "MockSTSTask-query": "task: "}
    stock = SentenceTransformerEncoderWrapper(embedder(tmp_path / "stock"), model_prompts=prompts)
    ours = RadixEncoder(embedder(tmp_path / "ours"), model_prompts=prompts, threshold=1)
    expected = stock.encode(loader(texts), prompt_type=prompt_type, **where)
    found = ours.encode(loader(texts), prompt_type=prompt_type, **where)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    enabled = SentenceTransformerEncoderWrapper(enable(stock.model, threshold=1), model_prompts=prompts)
    np.testing.assert_allclose(enabled.encode(loader(texts), prompt_type=prompt_type, **where), expected, atol=2e-5)
    assert stats(stock.model).num_compact < stats(stock.model).num_tokens
    similarity = ours.similarity(found, found), stock.similarity(expected, expected)
    torch.testing.assert_close(*similarity, atol=1e-4, rtol=0)


def test_pairs_of_all_batches_are_scored_together(tmp_path):
    where = {"task_metadata": mock_tasks.MockRerankingTask.metadata, "hf_split": "test", "hf_subset": "default"}
    queries, documents = ["what is it?"] * 7, [f"thing {number}" for number in range(7)]
    stock = CrossEncoderWrapper(reranker(tmp_path / "stock"), query_prefix="Q", passage_prefix="D")
    model = RadixCrossEncoder(reranker(tmp_path / "ours"), query_prefix="Q", passage_prefix="D", threshold=1)
    expected = stock.predict(loader(queries), loader(documents), **where)
    np.testing.assert_allclose(model.predict(loader(queries), loader(documents), **where), expected, atol=5e-5)
    assert model.stats.num_requests == 7
    assert model.stats.num_batches == 1
    with pytest.raises(InvalidInputError, match="7 texts and inputs2 3"):
        model.predict(loader(queries), loader(documents[:3]), **where)


def test_scores_in_bfloat16_have_a_head_in_float32(tmp_path):
    where = {"task_metadata": mock_tasks.MockRerankingTask.metadata, "hf_split": "test", "hf_subset": "default"}
    queries, documents = ["what is it?"] * 60, [f"thing {number}" for number in range(60)]

    def scored(wrapper, dtype, **options):
        model = reranker(tmp_path / f"{wrapper.__name__}{dtype}", model_kwargs={"dtype": dtype})
        model.activation_fn = torch.nn.Identity()
        wrapped = wrapper(model, **options)
        return wrapped, np.asarray(wrapped.predict(loader(queries), loader(documents), **where), np.float64)

    truth = scored(CrossEncoderWrapper, torch.float32)[1]
    stock, expected = scored(CrossEncoderWrapper, torch.bfloat16)
    ours, found = scored(RadixCrossEncoder, torch.bfloat16, threshold=1)
    assert np.abs(found - truth).max() < 2 * np.abs(expected - truth).max() < truth.std()
    # mteb's way to it would make the engine compute the logits of the whole vocabulary
    assert stock.model.model.lm_head._forward_hooks
    assert not ours.model.model.lm_head._forward_hooks


def test_by_name_and_through_metadata(tmp_path):
    folder = str(tmp_path / "saved")
    embedder(tmp_path / "model").save_pretrained(folder, create_model_card=False)
    direct = RadixEncoder(folder, device="cpu", threshold=1, max_batch_tokens=50)
    assert direct.mteb_model_meta.loader is RadixEncoder
    meta = ModelMeta.create_empty(
        overwrites={"name": f"me/{tmp_path.name}", "revision": "1", "loader": by_folder(folder)}
    )
    assert isinstance(meta.load_model(device="cpu"), RadixEncoder)


def test_models_as_mteb_makes_them(tmp_path):
    folder = str(tmp_path / "saved")
    embedder(tmp_path / "model").save_pretrained(folder, create_model_card=False)
    where = {"task_metadata": mock_tasks.MockSTSTask.metadata, "hf_split": "test", "hf_subset": "default"}
    texts = ["a radix", "a radix is a root", "other"] * 3

    def made():
        return InstructSentenceTransformerModel(folder, "1", instruction_template="Do: {instruction}\nQuery: ")

    stock, ours = made(), made()
    enable(ours.model, threshold=1)
    np.testing.assert_allclose(ours.encode(loader(texts), **where), stock.encode(loader(texts), **where), atol=2e-5)
    assert stats(ours.model).num_compact < stats(ours.model).num_tokens


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("Qwen/Qwen3-Embedding-0.6B", {}, "made by q3e_instruct_loader, and"),
        ("zeroentropy/zerank-2", {}, "made by CrossEncoderWrapper with trust_remote_code, and"),
        ("zeroentropy/zerank-2", {"trust_remote_code": True}, None),
        ("google/embeddinggemma-300m", {}, None),
        ("me/mine", {}, None),
    ],
)
def test_settings_of_mteb_that_are_not_taken_are_told(name, options, told):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _warn_of_settings(name, options)
    assert [told in str(warning.message) for warning in caught] == ([True] if told else [])


def by_folder(folder):
    return lambda name, revision=None, device=None, **options: RadixEncoder(folder, device=device, **options)


def test_models_that_cannot_fold_are_refused(tmp_path):
    both_ways = tiny_model().model
    both_ways.config.is_causal = False
    with pytest.raises(UnsupportedModelError, match="both directions"):
        RadixEncoder(embedder(tmp_path / "model", model=both_ways))
