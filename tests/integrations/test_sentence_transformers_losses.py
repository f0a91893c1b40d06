"""Every loss of sentence-transformers that fits a causal transformer: folded and as it comes, the same training."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder import losses as cross_encoder_losses
from sentence_transformers.sentence_transformer import losses
from tests.integrations.models import embedder, reranker, save
from tests.integrations.trainers import arguments, assert_same_training, train

from radix_mlp.integrations.sentence_transformers_training import enable
from radix_mlp.models.tiny import tiny_classifier, tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

COUNT = 12
PROMPT = "Instruct: find what answers.\nQuery: "
QUERIES = [f"query number {n % 4} asks" for n in range(COUNT)]
GOOD, BAD, OTHER = (
    [f"the {word} {n}" for n in range(COUNT)] for word in ("answer is", "answer is not", "question was")
)
WIDTH = 24


def columns(texts, label=None) -> Dataset:
    data = {f"text_{n}": column for n, column in enumerate(texts)}
    return Dataset.from_dict(data | ({} if label is None else {"label": [label(n) for n in range(COUNT)]}))


def vector(n: int) -> list[float]:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(n)).tolist()


RANKED = columns([QUERIES, GOOD, BAD, OTHER])
PAIRS, TRIPLES = columns([QUERIES, GOOD]), columns([QUERIES, GOOD, BAD])
SCORED, LABELLED = (columns([QUERIES, GOOD], label) for label in (lambda n: n % 5 / 4, lambda n: n % 2))
SINGLE = columns([[query + text for query, text in zip(QUERIES, GOOD, strict=True)]], lambda n: n % 3)
TAUGHT = columns([QUERIES, GOOD, BAD], lambda n: float(n % 7) - 3)
DISTRIBUTIONS = columns([QUERIES, GOOD, BAD], lambda n: [float(n % 4), float(n % 3)])
VECTORS = columns([GOOD], vector)


def ranking(model, **options):
    return losses.MultipleNegativesRankingLoss(model, **options)


def cached(model):
    return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=6)


def guided(model):
    """The guide is another model: by its own similarities, ties would be broken by rounding."""
    guide = copy.deepcopy(model)
    torch.nn.init.normal_(guide[2].linear.weight, generator=torch.Generator().manual_seed(2))
    return losses.GISTEmbedLoss(model, guide)


EMBEDDER_LOSSES = {
    "symmetric": (losses.MultipleNegativesSymmetricRankingLoss, PAIRS),
    "cached": (cached, RANKED),
    "cached symmetric": (lambda m: losses.CachedMultipleNegativesSymmetricRankingLoss(m, mini_batch_size=6), PAIRS),
    "CoSENT": (losses.CoSENTLoss, SCORED),
    "AnglE": (losses.AnglELoss, SCORED),
    "cosine": (losses.CosineSimilarityLoss, SCORED),
    "contrastive": (losses.ContrastiveLoss, LABELLED),
    "online contrastive": (losses.OnlineContrastiveLoss, LABELLED),
    "triplet": (losses.TripletLoss, TRIPLES),
    "MarginMSE": (losses.MarginMSELoss, TAUGHT),
    "KL": (losses.DistillKLDivLoss, DISTRIBUTIONS),
    "MSE": (losses.MSELoss, VECTORS),
    "softmax": (lambda m: losses.SoftmaxLoss(m, WIDTH, 2), LABELLED),
    "all triplets": (losses.BatchAllTripletLoss, SINGLE),
    "hard triplets": (losses.BatchHardTripletLoss, SINGLE),
    "GIST": (guided, TRIPLES),
    "orthogonal": (losses.GlobalOrthogonalRegularizationLoss, PAIRS),
    "Matryoshka": (lambda m: losses.MatryoshkaLoss(m, ranking(m), [WIDTH, 12, 6]), RANKED),
    "Matryoshka, cached": (lambda m: losses.MatryoshkaLoss(m, cached(m), [WIDTH, 12, 6]), RANKED),
    "adaptive layers": (lambda m: losses.AdaptiveLayerLoss(m, ranking(m), n_layers_per_step=-1), RANKED),
    "Matryoshka in two dimensions": (lambda m: losses.Matryoshka2dLoss(m, ranking(m), [WIDTH, 12]), RANKED),
}


def trainer_of(tmp_path, loss=ranking, data=RANKED, *, adapter=False, prompts=PROMPT, learning_rate=0.02, **options):
    model = embedder(tmp_path / "model", **options)
    if adapter:
        model.add_adapter(LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"]))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    args = SentenceTransformerTrainingArguments(**arguments(tmp_path, prompts=prompts, learning_rate=learning_rate))
    return SentenceTransformerTrainer(model, args, train_dataset=data, loss=loss(model))


def assert_same(make) -> None:
    def inner(model):
        return model[0].model

    expected = train(make, inner=inner)
    assert_same_training(train(make, lambda trainer: enable(trainer, threshold=1), inner=inner), expected)


@pytest.mark.parametrize("name", EMBEDDER_LOSSES)
def test_losses_of_embedders(tmp_path, name) -> None:
    loss, data = EMBEDDER_LOSSES[name]
    # gradients of this loss are small
    options = {"learning_rate": 5.0} if name == "KL" else {}
    assert_same(lambda: trainer_of(tmp_path, loss, data, **options))


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize(
    "options", [{"mode": "weightedmean"}, {"mode": "max"}, {"mode": "mean", "include_prompt": False}], ids=str
)
def test_poolings(tmp_path, options, padding_side) -> None:
    assert_same(lambda: trainer_of(tmp_path, padding_side=padding_side, **options))


def test_a_prompt_for_each_column(tmp_path) -> None:
    prompts = {"text_0": "query: ", "text_1": "document: ", "text_2": "document: "}
    assert_same(lambda: trainer_of(tmp_path, prompts=prompts))


def test_adapters(tmp_path) -> None:
    assert_same(lambda: trainer_of(tmp_path, adapter=True))


LISTS = Dataset.from_dict(
    {
        "query": QUERIES,
        "documents": [[f"document {n} {k}" for k in range(2 + n % 3)] for n in range(COUNT)],
        "labels": [[(n + k) % 2 for k in range(2 + n % 3)] for n in range(COUNT)],
    }
)
HALVES = columns([QUERIES, GOOD], lambda n: float(n % 2))
CROSS_ENCODER_LOSSES = {
    "MSELoss": HALVES,
    "MarginMSELoss": TAUGHT,
    "MultipleNegativesRankingLoss": TRIPLES,
    "CachedMultipleNegativesRankingLoss": TRIPLES,
    **dict.fromkeys(("LambdaLoss", "ListMLELoss", "PListMLELoss", "ListNetLoss", "RankNetLoss", "ADRMSELoss"), LISTS),
}


@pytest.mark.parametrize("name", CROSS_ENCODER_LOSSES)
@pytest.mark.parametrize("kind", ["yes and no", "score"])
def test_losses_of_cross_encoders(tmp_path, kind, name) -> None:
    def make():
        if kind == "score":
            folder = save(tiny_classifier(["score"]), tiny_tokenizer(), tmp_path / "model")
            model = CrossEncoder(folder, device="cpu")
        else:
            model = reranker(tmp_path / "model")
        options = {"num_negatives": 3} if "Negatives" in name else {}
        loss = getattr(cross_encoder_losses, name)(model, **options)
        args = CrossEncoderTrainingArguments(**arguments(tmp_path))
        return CrossEncoderTrainer(model, args, train_dataset=CROSS_ENCODER_LOSSES[name], loss=loss)

    assert_same(make)
