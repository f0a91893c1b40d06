"""Our losses beside TRL's own code, which gets its log-probabilities from the unmodified model."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.train.oracle import assert_same, logprobs_of
from tools.model_types.sweep import pad
from tools.model_types.training import gradients_of
from torch import Tensor

import radix_mlp
from radix_mlp.ops import edges_to_tokens
from radix_mlp.train import GRPO_LOSSES, TreeBatch, dpo_loss, grpo_loss, sequence_logprobs, tree_logprobs

# importing TRL's trainers takes longer than all tests beside this one
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PROMPT = 9


class Accelerator:
    """One process."""

    device = torch.device("cpu")
    num_processes = 1
    sync_gradients = False

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: Tensor, reduction: str = "sum") -> Tensor:
        return x

    def unwrap_model(self, model: Any) -> Any:
        return model


def padded_logprobs(model: Any, sequences: list[Tensor], mask: Tensor) -> Tensor:
    """`[B, T - 1]` of the unmodified model, 0 where the mask is."""
    rows = [torch.nn.functional.pad(logprobs_of(model, s), (0, mask.shape[1] - len(s))) for s in sequences]
    return (torch.stack(rows) * mask)[:, 1:]


@pytest.mark.parametrize("loss_type", GRPO_LOSSES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo(model, sequences, loss_type, level) -> None:
    trainers = pytest.importorskip("trl.trainer.grpo_trainer")
    group = sequences[:4]
    ids, present = pad(group, "right")
    mask = present * (torch.arange(ids.shape[1]) >= PROMPT)
    logps = padded_logprobs(model, group, mask)[:, PROMPT - 1 :]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, *logps.shape, generator=generator, dtype=logps.dtype)
    old, reference = logps.detach() + 0.5 * noise[0], logps.detach() + 0.5 * noise[1]
    advantages = torch.tensor([1.2, -0.7, 0.4, -0.9], dtype=torch.float64)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=Accelerator(),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=1.6, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=0.04,
        current_gradient_accumulation_steps=1,
        epsilon_low=0.15,
        epsilon_high=0.3,
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=20,
        model=model.train(),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_adaptive_entropy=False,
        use_vllm=False,
        entropy_coef=0.0,
    )
    inputs = {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": present[:, :PROMPT],
        "completion_ids": ids[:, PROMPT:],
        "completion_mask": mask[:, PROMPT:],
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": torch.tensor(123.0),
    }
    expected = trainers.GRPOTrainer._compute_loss(trainer, model, inputs)
    gradients = gradients_of(model, expected)

    in_answers = torch.nn.functional.pad
    batch = TreeBatch.from_padded(
        ids,
        present,
        wanted=mask,
        tokens={"old": in_answers(old, (PROMPT, 0)), "reference": in_answers(reference, (PROMPT, 0))},
    )
    logprob = tree_logprobs(radix_mlp.enable(model), batch).logprob
    out = grpo_loss(
        edges_to_tokens(logprob, batch.edges),
        advantages,
        batch,
        old_logprobs=batch.tokens["old"],
        ref_logprobs=batch.tokens["reference"],
        epsilon_low=0.15,
        epsilon_high=0.3,
        delta=1.6,
        beta=0.04,
        loss_type=loss_type,
        importance_sampling=level,
        max_completion_length=20,
        num_items_in_batch=123 if loss_type == "dapo" else None,
    )
    assert_same(model, out.loss, expected, gradients)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "apo_zero"])
def test_dpo(model, sequences, loss_type) -> None:
    trainers = pytest.importorskip("trl.trainer.dpo_trainer")
    # TRL's batch: all chosen answers, then all rejected ones
    pairs = [sequences[0], sequences[2], sequences[1], sequences[3]]
    ids, present = pad(pairs, "right")
    mask = present * (torch.arange(ids.shape[1]) >= PROMPT)
    reference = torch.tensor([-31.0, -28.0, -35.0, -40.0], dtype=torch.float64)
    smoothing = 0.1 if loss_type == "robust" else 0.0

    def forward(**_: Any) -> SimpleNamespace:
        logps = padded_logprobs(model, pairs, mask)
        return SimpleNamespace(
            log_probs=logps,
            entropy=torch.zeros_like(logps),
            mean_logits=torch.zeros_like(logps),
            is_top1=torch.zeros_like(logps, dtype=torch.bool),
        )

    trainer = SimpleNamespace(
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        beta=0.3,
        f_divergence_type="reverse_kl",
        label_smoothing=smoothing,
        ld_alpha=None,
        loss_types=[loss_type],
        loss_weights=[1.0],
        model=model,
        precompute_ref_logps=True,
        use_weighting=False,
    )
    inputs = {
        "input_ids": ids,
        "attention_mask": present,
        "completion_mask": mask,
        "ref_chosen_logps": reference[:2],
        "ref_rejected_logps": reference[2:],
    }
    expected = trainers.DPOTrainer._compute_loss(trainer, forward, inputs, return_outputs=False)
    gradients = gradients_of(model, expected)

    batch = TreeBatch.from_padded(ids, present, wanted=mask)
    policy = sequence_logprobs(tree_logprobs(radix_mlp.enable(model), batch).logprob, batch.edges)
    lengths = mask.sum(1)
    out = dpo_loss(
        policy[:2],
        policy[2:],
        reference[:2],
        reference[2:],
        beta=0.3,
        loss_type=loss_type,
        label_smoothing=smoothing,
        chosen_length=lengths[:2],
        rejected_length=lengths[2:],
    )
    assert_same(model, out.loss, expected, gradients)


def test_statistics_of_the_fused_head(model, sequences) -> None:
    """Entropy and the rest, as TRL's trainers log them."""
    kernels = pytest.importorskip("trl.kernels.chunked_logprob")
    batch = TreeBatch.from_sequences(sequences)
    radix_mlp.enable(model)
    names = {"entropy": "entropy", "log_sum_sq_probs": "log_sum_sq_probs", "mean_logits": "mean_logit"}
    ours = tree_logprobs(model, batch, temperature=0.8, statistics=(*names.values(), "is_greedy"))
    edges = batch.edges.to("cpu")
    from radix_mlp.train import tree_hidden

    hidden = tree_hidden(model, batch.plan)[edges.parents[edges.parent_at]].float()
    theirs = kernels.ChunkedLogProbFunction.apply(
        hidden, model.lm_head.weight.float(), None, edges.targets, 0.8, 64, None, 1.0, kernels.OPTIONAL_OUTPUTS
    )
    fields = dict(zip(("log_probs", *kernels.OPTIONAL_OUTPUTS), theirs, strict=True))
    close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(ours.logprob, fields["log_probs"], **close)
    for name, own in names.items():
        torch.testing.assert_close(getattr(ours, own), fields[name], **close)
    assert torch.equal(ours.is_greedy, fields["is_top1"])
