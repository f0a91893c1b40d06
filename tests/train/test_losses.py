"""Every loss on a tree: the number and all gradients of the unmodified model fed one sequence at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.train.oracle import assert_same, hidden_of, logits_of, logprobs_of
from tools.model_types.training import gradients_of, relative_error
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize
from transformers import PreTrainedModel

import radix_mlp
from radix_mlp.models.tiny import tiny_classifier
from radix_mlp.ops import edges_to_tokens
from radix_mlp.train import (
    DPO_LOSSES,
    GRPO_LOSSES,
    TreeBatch,
    cross_entropy,
    dpo_loss,
    grpo_loss,
    info_nce,
    kl_distillation,
    language_head,
    margin_mse,
    sequence_logprobs,
    tree_embeddings,
    tree_hidden,
    tree_logprobs,
    tree_scores,
)

PROMPT = 9


def answers(sequences: list[Tensor]) -> list[Tensor]:
    """The first four, of which the first 9 tokens are a prompt: two answers share 5 tokens more, two are apart."""
    return [*sequences[:4]]


def answer_masks(sequences: list[Tensor]) -> list[list[bool]]:
    return [[i >= PROMPT for i in range(len(s))] for s in sequences]


def token_logprobs(model: PreTrainedModel, batch: TreeBatch, **options: Any) -> Tensor:
    return edges_to_tokens(tree_logprobs(model, batch, **options).logprob, batch.edges)


def test_cross_entropy_is_that_of_transformers(model, sequences) -> None:
    labels = [s.masked_fill(torch.arange(len(s)) < 3, -100) for s in sequences]
    labels[2][5] = 77
    count = sum(int((x[1:] != -100).sum()) for x in labels)
    # transformers' own loss of each sequence
    expected = sum(
        model(s[None], labels=x[None], num_items_in_batch=count, use_cache=False).loss
        for s, x in zip(sequences, labels, strict=True)
    )
    gradients = gradients_of(model, expected)
    batch = TreeBatch.from_sequences(sequences, labels=labels)
    assert batch.num_predictions == count
    radix_mlp.enable(model)
    assert_same(model, cross_entropy(tree_logprobs(model, batch).logprob, batch), expected, gradients)
    half = cross_entropy(tree_logprobs(model, batch).logprob, batch, num_items_in_batch=2 * count)
    assert relative_error(2 * half, expected) < 1e-6


def test_cross_entropy_with_weights(model, sequences) -> None:
    weights = [torch.rand(len(s), dtype=torch.float64) for s in sequences]
    total = sum(w[1:].sum() for w in weights)
    expected = -sum((w * logprobs_of(model, s)).sum() for s, w in zip(sequences, weights, strict=True)) / total
    gradients = gradients_of(model, expected)
    batch = TreeBatch.from_sequences(sequences)
    logprob = tree_logprobs(radix_mlp.enable(model), batch).logprob
    assert_same(model, cross_entropy(logprob, batch, weights=torch.cat(weights)), expected, gradients)


def test_a_shift_of_labels_on_folded_rows_fails(model, sequences) -> None:
    """The mistake that edges are there against is far outside of the tolerance."""
    batch = TreeBatch.from_sequences(sequences)
    radix_mlp.enable(model)
    right = cross_entropy(tree_logprobs(model, batch).logprob, batch)
    right_gradients = gradients_of(model, right)
    plan = batch.plan.to("cpu")
    logits = language_head(model)(tree_hidden(model, batch.plan))
    weights = torch.bincount(plan.unfold_index).double()
    wrong_terms = logits[:-1].log_softmax(-1).gather(1, plan.compact_ids[1:, None])[:, 0] * weights[1:]
    wrong = -wrong_terms.sum() / weights[1:].sum()
    # a hundred times what passes
    assert relative_error(wrong, right) > 1e-3
    with pytest.raises(AssertionError, match=r"weight|embed"):
        assert_same(model, wrong - wrong.detach() + right.detach(), right, right_gradients)


@pytest.mark.parametrize("loss_type", [*DPO_LOSSES, "reference-free", "callable"])
def test_dpo(model, sequences, loss_type) -> None:
    pairs = answers(sequences)
    masks = answer_masks(pairs)
    beta, smoothing = 0.3, 0.1 if loss_type in ("sigmoid", "robust") else 0.0
    reference = torch.tensor([-31.0, -28.0, -35.0, -40.0], dtype=torch.float64)
    free = loss_type == "reference-free"
    lengths = torch.tensor([len(s) - PROMPT for s in pairs])

    def kind() -> Any:
        if free:
            return "sigmoid"
        return (lambda terms: (terms.chosen - terms.rejected).square()) if loss_type == "callable" else loss_type

    own = torch.stack([logprobs_of(model, s)[PROMPT:].sum() for s in pairs])
    ratios = own - (0 if free else reference)
    chosen, rejected = ratios[[0, 2]], ratios[[1, 3]]
    expected = plain_dpo(kind(), chosen, rejected, lengths[[0, 2]], lengths[[1, 3]], beta, smoothing)
    gradients = gradients_of(model, expected)

    batch = TreeBatch.from_sequences(pairs, wanted=masks)
    result = tree_logprobs(radix_mlp.enable(model), batch)
    policy = sequence_logprobs(result.logprob, batch.edges)
    out = dpo_loss(
        policy[[0, 2]],
        policy[[1, 3]],
        None if free else reference[[0, 2]],
        None if free else reference[[1, 3]],
        beta=beta,
        loss_type=kind(),
        label_smoothing=smoothing,
        chosen_length=lengths[[0, 2]],
        rejected_length=lengths[[1, 3]],
    )
    torch.testing.assert_close(out.chosen_rewards, beta * chosen.detach(), rtol=1e-6, atol=1e-6)
    assert_same(model, out.loss, expected, gradients)


def plain_dpo(
    kind: Any, chosen: Tensor, rejected: Tensor, chosen_length: Tensor, rejected_length: Tensor, beta: float, eps: float
) -> Tensor:
    """The formulas of the papers, written anew."""
    delta = beta * (chosen - rejected)
    if callable(kind):
        return (chosen - rejected).square().mean()
    means = chosen / chosen_length - rejected / rejected_length
    return {
        "sigmoid": -(1 - eps) * logsigmoid(delta) - eps * logsigmoid(-delta),
        "robust": (-(1 - eps) * logsigmoid(delta) + eps * logsigmoid(-delta)) / (1 - 2 * eps),
        "hinge": (1 - delta).clamp(min=0),
        "ipo": (means - 0.5 / beta).square(),
        "sigmoid_norm": -logsigmoid(beta * means),
        "apo_zero": 1 - (beta * chosen).sigmoid() + (beta * rejected).sigmoid(),
    }[kind].mean()


@pytest.mark.parametrize("loss_type", GRPO_LOSSES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo(model, sequences, loss_type, level) -> None:
    """Copies of a token with their own advantages, old and reference log-probabilities: nothing about it is linear."""
    group = answers(sequences)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        near = [logprobs_of(model, s, 0.9) for s in group]

    def moved(scale: float) -> list[Tensor]:
        noise = [torch.randn(len(x), generator=generator, dtype=x.dtype) for x in near]
        # one shift a sequence as well, so that ratios of sequences are clipped, too
        return [x + scale * (n + shift) for x, n, shift in zip(near, noise, (1.0, -1.0, -0.5, 1.5), strict=True)]

    old, reference = moved(-0.4), moved(0.6)
    advantages = torch.tensor([1.2, -0.7, 0.4, -0.9], dtype=torch.float64)
    options = {"epsilon_low": 0.15, "epsilon_high": 0.3, "delta": 1.6, "beta": 0.04}
    per_token: list[Tensor] = []
    for s, a, o, r in zip(group, advantages, old, reference, strict=True):
        logprobs = logprobs_of(model, s, 0.9)[PROMPT:]
        log_ratio = logprobs - o[PROMPT:]
        if level == "sequence":
            log_ratio = log_ratio.mean().expand(len(logprobs))
        ratio = log_ratio.exp()
        surrogate = torch.minimum(ratio.clamp(max=1.6) * a, ratio.clamp(0.85, 1.3) * a)
        gap = r[PROMPT:] - logprobs
        per_token.append(-surrogate + 0.04 * (gap.exp() - gap - 1))
    expected = {
        "grpo": torch.stack([x.mean() for x in per_token]).mean(),
        "bnpo": torch.cat(per_token).mean(),
        "dr_grpo": torch.cat(per_token).sum() / (4 * 20),
        "dapo": torch.cat(per_token).sum() / 123,
    }[loss_type]
    gradients = gradients_of(model, expected)

    batch = TreeBatch.from_sequences(group, wanted=answer_masks(group))
    # answers share a part, so that some edges stand for several tokens
    assert batch.edges.num_edges < batch.num_predictions
    out = grpo_loss(
        token_logprobs(radix_mlp.enable(model), batch, temperature=0.9),
        advantages,
        batch,
        old_logprobs=torch.cat(old),
        ref_logprobs=torch.cat(reference),
        loss_type=loss_type,
        importance_sampling=level,
        max_completion_length=20,
        num_items_in_batch=123 if loss_type == "dapo" else None,
        **options,
    )
    assert 0 < out.clip_fraction < 1
    assert out.kl is not None
    assert out.kl > 0
    assert_same(model, out.loss, expected, gradients)


def test_grpo_on_policy_with_advantages_of_tokens(model, sequences) -> None:
    group = answers(sequences)
    advantages = [torch.randn(len(s), dtype=torch.float64) for s in group]
    terms = []
    for s, a in zip(group, advantages, strict=True):
        logprobs = logprobs_of(model, s)[PROMPT:]
        terms.append(-((logprobs - logprobs.detach()).exp() * a[PROMPT:]).mean())
    expected = torch.stack(terms).mean()
    gradients = gradients_of(model, expected)
    batch = TreeBatch.from_sequences(group, wanted=answer_masks(group))
    out = grpo_loss(token_logprobs(radix_mlp.enable(model), batch), torch.cat(advantages), batch)
    assert_same(model, out.loss, expected, gradients)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_stands_at_prompts_reaches_no_gradient(sequences, level) -> None:
    group, masks = answers(sequences), answer_masks(sequences)[:4]
    batch = TreeBatch.from_sequences(group, wanted=masks)
    counts = torch.tensor([wanted for mask in masks for wanted in mask])
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, batch.num_tokens, generator=generator, dtype=torch.float64)

    def gradient(values: Tensor) -> Tensor:
        logprobs, advantages, old, reference = values.clone().requires_grad_()
        options = {"old_logprobs": old, "ref_logprobs": reference, "beta": 0.1, "importance_sampling": level}
        loss = grpo_loss(logprobs, advantages, batch, **options).loss
        (found,) = torch.autograd.grad(loss, logprobs)
        return found

    expected = gradient(values)
    assert expected[counts].any()
    values[1:, ~counts] = torch.nan
    torch.testing.assert_close(gradient(values), expected, rtol=0, atol=0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo"])
def test_an_answer_of_which_nothing_counts_adds_nothing(level, loss_type) -> None:
    """It is one of the sequences all the same, as TRL counts them."""
    batch = TreeBatch.from_sequences([[5, 6, 7], [5, 6]], wanted=[[False, True, True], [False, False]])
    logprobs = torch.tensor([0.0, -1.0, -2.0, 0.0, -1.0], requires_grad=True)
    loss = grpo_loss(logprobs, torch.tensor([1.5, -9.0]), batch, loss_type=loss_type, importance_sampling=level).loss
    assert loss.item() == (-1.5 / 2 if loss_type == "grpo" else -1.5)
    (found,) = torch.autograd.grad(loss, logprobs)
    assert found.tolist() == [0, loss.item() / 2, loss.item() / 2, 0, 0]


def test_half_precision_does_not_round_counts() -> None:
    """bfloat16 has no 299 and no 301."""
    alone = TreeBatch.from_sequences([list(range(1, 301))])
    logprobs = torch.zeros(300, dtype=torch.bfloat16)
    loss = grpo_loss(logprobs, torch.tensor([1.0]), alone).loss
    assert loss == pytest.approx(-1, rel=1e-6)
    copies = TreeBatch.from_sequences([[5, 5]] * 300 + [[5, 6]])
    loss = cross_entropy(torch.tensor([-1.0, -3.0], dtype=torch.bfloat16), copies)
    assert loss == pytest.approx(303 / 301, rel=1e-6)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce(model, sequences, pooling, symmetric) -> None:
    """Queries and documents under one instruction, in one tree."""

    def vector(sequence: Tensor) -> Tensor:
        hidden = hidden_of(model, sequence)
        return normalize(hidden[-1] if pooling == "last" else hidden.mean(0), dim=0)

    vectors = torch.stack([vector(s) for s in sequences])
    scores = vectors[:2] @ vectors[2:].T / 0.2
    positives = torch.tensor([1, 3])
    expected = -scores.log_softmax(1)[[0, 1], positives].mean()
    if symmetric:
        expected = (expected - scores[:, positives].T.log_softmax(1).diagonal().mean()) / 2
    gradients = gradients_of(model, expected)
    found = tree_embeddings(radix_mlp.enable(model), TreeBatch.from_sequences(sequences), pooling=pooling)
    loss = info_nce(found[:2], found[2:], positives, temperature=0.2, symmetric=symmetric)
    assert_same(model, loss, expected, gradients)


def test_documents_that_answer_too_are_no_negatives() -> None:
    queries, documents = torch.randn(2, 4), torch.randn(3, 4)
    same = torch.tensor([[True, False, True], [False, False, False]])
    scores = queries @ documents.T / 0.05
    expected = -(scores[0, 0] - scores[0, :2].logsumexp(0) + scores[1, 1] - scores[1].logsumexp(0)) / 2
    torch.testing.assert_close(info_nce(queries, documents, same=same), expected)


def test_info_nce_of_several_queries_a_document() -> None:
    torch.manual_seed(0)
    queries, documents, positives = torch.randn(5, 4), torch.randn(2, 4), torch.tensor([0, 0, 1, 1, 0])
    expected = -(queries @ documents.T / 0.05).log_softmax(1)[torch.arange(5), positives].mean()
    torch.testing.assert_close(info_nce(queries, documents, positives), expected)


@pytest.mark.parametrize("tokens", [None, (42, 17)])
def test_distillation_of_rerankers(model, sequences, tokens) -> None:
    if tokens is None:
        model = tiny_classifier(["relevant"], dtype=torch.float64)
        plain = [model(s[None], use_cache=False).logits[0, 0] for s in sequences]
    else:
        plain = [logits_of(model, s)[-1] for s in sequences]
        plain = [x[tokens[0]] - x[tokens[1]] for x in plain]
    own = torch.stack(plain)
    teacher = torch.linspace(-1, 2, 6, dtype=torch.float64)
    divergence = (
        teacher.view(2, 3).div(2).softmax(1)
        * (teacher.view(2, 3).div(2).log_softmax(1) - own.view(2, 3).div(2).log_softmax(1))
    ).sum() * 2
    margins = own[:2, None] - own[2:].view(2, 2) - (teacher[:2, None] - teacher[2:].view(2, 2))
    expected = divergence + margins.square().mean()
    gradients = gradients_of(model, expected)
    batch = TreeBatch.from_sequences(sequences)
    scores = tree_scores(radix_mlp.enable(model, threshold=1.0), batch, tokens=tokens).view(6)
    loss = kl_distillation(scores.view(2, 3), teacher.view(2, 3), temperature=2.0)
    loss = loss + margin_mse(scores[:2], scores[2:].view(2, 2), teacher[:2], teacher[2:].view(2, 2))
    assert_same(model, loss, expected, gradients)


def test_classifiers_pass_over_their_pad_token_as_transformers_has_them(sequences) -> None:
    """Texts often end with the end token, which often is the pad token, too."""
    model = tiny_classifier(["a", "b"], dtype=torch.float64)
    pad = model.config.pad_token_id = int(sequences[0][-1])
    ends = [torch.tensor([pad]), torch.tensor([pad, pad])]
    texts = [*sequences, torch.cat([sequences[1], *ends]), torch.cat([sequences[2], ends[0]]), ends[1]]
    expected = torch.cat([model(text[None], use_cache=False).logits for text in texts])
    gradients = gradients_of(model, expected.square().sum())
    scores = tree_scores(radix_mlp.enable(model, threshold=1.0), TreeBatch.from_sequences(texts))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    assert_same(model, scores.square().sum(), expected.square().sum(), gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_teacher_of_another_precision(dtype) -> None:
    scores, teacher = torch.tensor([[1.0, 0.5, 9.0]]), torch.tensor([[0.0, 2.0, -9.0]])
    mask = torch.tensor([[True, True, False]])
    found = kl_distillation(scores, teacher.to(dtype), mask=mask)
    torch.testing.assert_close(found.float(), kl_distillation(scores[:, :2], teacher[:, :2]), rtol=1e-2, atol=1e-2)


def test_masked_candidates_do_not_count() -> None:
    scores = torch.tensor([[1.0, 0.5, 9.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 2.0, -9.0]])
    loss = kl_distillation(scores, teacher, mask=torch.tensor([[True, True, False]]))
    torch.testing.assert_close(loss, kl_distillation(scores[:, :2], teacher[:, :2]))
    loss.backward()
    assert scores.grad is not None
    assert scores.grad[0, 2] == 0
    assert scores.grad.isfinite().all()
