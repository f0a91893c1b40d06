"""What losses are given: shapes that do not fit end in an error, and constants are constants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from radix_mlp.errors import InvalidInputError
from radix_mlp.train import (
    PairTerms,
    TreeBatch,
    cross_entropy,
    dpo_loss,
    grpo_loss,
    info_nce,
    kl_distillation,
    margin_mse,
)


def test_refusals(sequences) -> None:
    batch = TreeBatch.from_sequences(sequences)
    number, edges = batch.num_tokens, batch.edges.num_edges
    for call, message in [
        (lambda: cross_entropy(torch.zeros(3), batch), "edges"),
        (
            lambda: cross_entropy(torch.zeros(edges), batch, weights=torch.ones(number, 1)),
            rf"pass \[N\] with N = {number}",
        ),
        (lambda: cross_entropy(torch.zeros(edges), batch, weights=torch.ones(edges)), rf"weights is \({edges},\)"),
        (lambda: grpo_loss(torch.zeros(3), torch.zeros(6), batch), f"N = {number}"),
        (lambda: grpo_loss(torch.zeros(number), torch.zeros(5), batch), r"\[6\]"),
        (lambda: grpo_loss(torch.zeros(number), torch.zeros(6), batch, beta=0.1), "ref_logprobs"),
        (lambda: grpo_loss(torch.zeros(number), torch.zeros(6), batch, loss_type="ppo"), "ppo"),  # type: ignore[arg-type]
        (lambda: grpo_loss(torch.zeros(number), torch.zeros(6), batch, loss_type="dr_grpo"), "max_completion"),
        (lambda: grpo_loss(torch.zeros(number), torch.zeros(6), batch, loss_type="dapo"), "num_items_in_batch"),
        (lambda: grpo_loss(torch.zeros(number), torch.zeros(6), batch, epsilon_low=-0.2), "epsilon_low=-0.2"),
        (lambda: grpo_loss(torch.zeros(number), torch.zeros(6), batch, beta=-0.1), "beta=-0.1"),
        (lambda: dpo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2)), "both, or neither"),
        (lambda: dpo_loss(torch.zeros(2), torch.zeros(3)), r"rejected is \(3,\)"),
        (
            lambda: dpo_loss(*torch.zeros(2, 2), loss_type="ipo", chosen_length=torch.ones(2, 1)),
            r"chosen_length is \(2, 1\), chosen is \(2,\)",
        ),
        (lambda: dpo_loss(*torch.zeros(2, 2), rejected_length=torch.ones(1)), r"rejected_length is \(1,\)"),
        (lambda: dpo_loss(torch.zeros(2), torch.zeros(2), beta=0.0), "beta=0"),
        (lambda: dpo_loss(torch.zeros(2), torch.zeros(2), loss_type="kto"), "kto"),
        (lambda: dpo_loss(torch.zeros(2), torch.zeros(2), loss_type="ipo"), "chosen_length"),
        (lambda: dpo_loss(torch.zeros(2), torch.zeros(2), loss_type="hinge", label_smoothing=0.1), "does nothing"),
        (lambda: dpo_loss(torch.zeros(2), torch.zeros(2), label_smoothing=0.5), "label_smoothing=0.5"),
        (lambda: info_nce(torch.zeros(2, 3), torch.zeros(2, 4)), r"\[Q, d\]"),
        (lambda: info_nce(torch.zeros(2, 3), torch.zeros(1, 3)), "positive document"),
        (lambda: kl_distillation(torch.zeros(2, 3), torch.zeros(3, 2)), "must agree"),
        (lambda: kl_distillation(*torch.zeros(2, 2, 3, 4)), r"scores is \(2, 3, 4\): pass \[Q, K\]"),
        (lambda: margin_mse(torch.zeros(2), torch.zeros(3), torch.zeros(2), torch.zeros(3)), r"\[P\]"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            call()


def test_a_callable_gets_the_terms() -> None:
    seen: list[PairTerms] = []

    def own(terms: PairTerms) -> Tensor:
        seen.append(terms)
        return terms.chosen

    out = dpo_loss(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([0.0]), loss_type=own)
    assert out.loss == 0.5
    assert seen[0].beta == 0.1


def test_old_and_reference_are_constants() -> None:
    """Also where somebody has computed them with gradients: the policy's own would cancel, and nothing be learnt."""
    batch = TreeBatch.from_sequences([[5, 6, 7], [5, 6, 8]])
    advantages = torch.tensor([1.0, -0.5])

    def gradient(constant) -> Tensor:
        logprobs = torch.linspace(-2, -1, 6, requires_grad=True)
        old, reference = constant(logprobs), constant(2 * logprobs)
        grpo_loss(logprobs, advantages, batch, old_logprobs=old, ref_logprobs=reference, beta=0.1).loss.backward()
        pair = logprobs[:2], logprobs[2:4]
        dpo_loss(*pair, *map(constant, pair), loss_type="hinge").loss.backward()
        return logprobs.grad

    expected = gradient(Tensor.detach)
    assert expected.count_nonzero() > 4
    assert torch.equal(gradient(lambda values: values), expected)
