"""The callables for Ray Data: with and without Ray, against transformers one text at a time."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from tests.ray_local import ray_node  # noqa: F401

from radix_mlp.cli.sample import few_shot_pairs, rerank_texts
from radix_mlp.engine.batching.scheduler import lexicographic_order
from radix_mlp.engine.tokenization.tokenize import tokenize_texts
from radix_mlp.errors import InvalidDtypeError, InvalidInputError
from radix_mlp.integrations.ray import Classify, Embed, PrefixKey, Rerank, Score
from radix_mlp.models.tiny import tiny_classifier, tiny_model, tiny_reranker, tiny_tokenizer

TEXTS = rerank_texts()[::16]

pytestmark = pytest.mark.filterwarnings("ignore")


def alone(model, text):
    """Hidden states of the last layer and logits, of the unmodified model given one text."""
    with torch.inference_mode():
        ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
        return ids[0], model(ids, output_hidden_states=True)


def test_embed():
    vectors = [alone(tiny_model(), text)[1].hidden_states[-1][0, -1] for text in TEXTS]
    expected = torch.nn.functional.normalize(torch.stack(vectors), dim=-1).numpy()
    batch = {"body": np.array(TEXTS), "n": np.arange(len(TEXTS))}
    worker = Embed("tiny", column="body", output="vector", engine={"max_batch_tokens": 2000})
    found = worker(batch)
    assert list(found) == ["body", "n", "vector"]
    assert np.allclose(found["vector"], expected, atol=1e-5)
    table = worker(pa.table({"body": TEXTS}))
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 64)
    assert np.allclose(table["vector"].to_pylist(), expected, atol=1e-5)
    assert worker(pa.table({"body": pa.array([], pa.string())})).num_rows == 0


def test_score():
    pairs = few_shot_pairs()[:5]
    batch = {"context": np.array([a for a, _ in pairs]), "continuation": np.array([b for _, b in pairs])}
    found = Score("tiny")(batch)
    for place, (context, continuation) in enumerate(pairs):
        ids, output = alone(tiny_model(), context + continuation)
        logprobs = output.logits[0].log_softmax(-1)
        start = len(context.rstrip().encode())
        expected = [float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids))]
        assert np.allclose(found["token_logprobs"][place], expected, atol=1e-4)
        assert found["logprob"][place] == pytest.approx(sum(expected), abs=1e-4)
    table = Score("tiny")(pa.table({name: values.tolist() for name, values in batch.items()}))
    assert np.allclose(table["logprob"].to_numpy(), found["logprob"], atol=1e-6)
    assert table.schema.field("token_logprobs").type == pa.list_(pa.float64())


def test_classify():
    worker = Classify("tiny-classifier")
    found = worker({"text": np.array(TEXTS)})
    for place, text in enumerate(TEXTS):
        logits = alone(tiny_classifier(), text)[1].logits[0]
        expected = logits.softmax(-1)
        assert np.allclose(found["scores"][place], expected.numpy(), atol=1e-5)
        assert found["label"][place] == worker.labels[int(expected.argmax())]
        assert found["score"][place] == pytest.approx(float(expected.max()), abs=1e-5)


def test_rerank():
    from radix_mlp.engine.tasks.rerank_template import QWEN3_INSTRUCTION, Qwen3Template
    from radix_mlp.models.tiny import tiny_reranker_tokenizer

    documents = ["a root", "a vegetable", "the base of a number"]
    batch = {"q": np.array(["what is a radix?"] * 3), "d": np.array(documents)}
    found = Rerank("tiny-reranker", query_column="q", document_column="d", raw_scores=True)(batch)["score"]
    tokenizer = tiny_reranker_tokenizer()
    yes, no = (tokenizer(word)["input_ids"][0] for word in ("yes", "no"))
    for document, score in zip(documents, found, strict=True):
        text = Qwen3Template(tokenizer).text("what is a radix?", document, QWEN3_INSTRUCTION)
        with torch.inference_mode():
            logits = tiny_reranker()(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
        assert score == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)


@pytest.mark.parametrize("kind", ["numpy", "pyarrow"])
def test_rows_that_cannot_be_run(kind, caplog):
    texts = ["a", "", None, "b", "x" * 9000]

    def batch():
        table = pa.table({"text": texts, "n": list(range(5))})
        return table if kind == "pyarrow" else {"text": np.array(texts, object), "n": np.arange(5)}

    with pytest.raises(InvalidInputError, match="row 2 of the batch, 'text': not a text"):
        Embed("tiny")(batch())
    found = Embed("tiny", on_error="skip")(batch())
    kept = found["n"].to_pylist() if kind == "pyarrow" else found["n"].tolist()
    assert kept == [0, 3]
    assert "3 of 5 rows left out" in caplog.text
    vectors = found["embedding"].to_pylist() if kind == "pyarrow" else found["embedding"]
    assert np.allclose(vectors, Embed("tiny")({"text": np.array(["a", "b"])})["embedding"], atol=1e-5)


def test_wrong_arguments():
    batch = {"text": np.array(["a"])}
    with pytest.raises(InvalidInputError, match="on_error='never': must be"):
        Embed("tiny", on_error="never")
    with pytest.raises(InvalidInputError, match="no column 'body' in the batch; there are 'text'"):
        Embed("tiny", column="body")(batch)
    with pytest.raises(InvalidInputError, match="a column 'text' already"):
        Embed("tiny", output="text")(batch)
    with pytest.raises(InvalidDtypeError, match="not list"):
        Embed("tiny")(["a"])
    with pytest.raises(TypeError, match="normalise"):
        Embed("tiny", normalise=True)(batch)


def test_prefix_keys_sort_as_token_ids():
    texts = [*TEXTS, "a", "ab", "a\0", "é", ""]
    found = PrefixKey("tiny", ["text"])({"text": np.array(texts, object)})["prefix_key"].tolist()
    ids = [
        row if text else row[:0]
        for text, row in zip(texts, tokenize_texts(tiny_tokenizer(), [text or "x" for text in texts]), strict=True)
    ]
    assert sorted(range(len(texts)), key=found.__getitem__) == lexicographic_order(ids).tolist()
    cut = PrefixKey("tiny", ["text", "text"], num_tokens=3, output="key")(pa.table({"text": texts}))
    assert {len(key) for key in cut["key"].to_pylist()[:-1]} <= {8, 12}


@pytest.mark.slow
def test_on_a_cluster(ray_node):  # noqa: F811
    ray = ray_node
    texts = [f"{text} {number}" for number in range(4) for text in TEXTS]
    data = ray.data.from_items([{"text": text, "n": number} for number, text in enumerate(texts)])
    data = data.map_batches(
        PrefixKey, fn_constructor_args=["tiny", ["text"]], compute=ray.data.ActorPoolStrategy(size=1)
    )
    data = data.sort("prefix_key").map_batches(
        Embed, fn_constructor_args=["tiny"], batch_size=16, compute=ray.data.ActorPoolStrategy(size=1)
    )
    rows = sorted(data.take_all(), key=lambda row: row["n"])
    assert [row["text"] for row in rows] == texts
    expected = Embed("tiny")({"text": np.array(texts)})["embedding"]
    assert np.allclose([row["embedding"] for row in rows], expected, atol=1e-5)


@pytest.mark.gpu
def test_a_worker_on_a_gpu():
    vectors = [alone(tiny_model(), text)[1].hidden_states[-1][0, -1] for text in TEXTS]
    expected = torch.nn.functional.normalize(torch.stack(vectors), dim=-1).numpy()
    found = Embed("tiny", engine={"device": "cuda"})({"text": np.array(TEXTS)})["embedding"]
    assert np.allclose(found, expected, atol=1e-4)
