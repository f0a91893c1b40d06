"""Training on folded batches: the same loss and the same gradients, every shared token computed once.

batch = TreeBatch.from_sequences(sequences, labels=labels)       # or a TreeCollator in a data loader
result = tree_logprobs(radix_mlp.enable(model), batch)           # [E] log-probabilities of edges, with gradients
cross_entropy(result.logprob, batch).backward()
"""

from radix_mlp.hf.adapters import pretrained_of
from radix_mlp.hf.padding import PaddedLayout
from radix_mlp.models.heads import language_head
from radix_mlp.train.batch import TreeBatch
from radix_mlp.train.collate import TreeCollator
from radix_mlp.train.contrastive import info_nce, kl_distillation, margin_mse
from radix_mlp.train.cross_entropy import cross_entropy
from radix_mlp.train.dpo import DPO_LOSSES, DPOLoss, PairTerms, dpo_loss
from radix_mlp.train.forward import sequence_logprobs, tree_embeddings, tree_hidden, tree_logprobs, tree_scores
from radix_mlp.train.grpo import GRPO_LOSSES, GRPOLoss, grpo_loss
from radix_mlp.train.micro_batches import GroupBatchSampler, compact_size, split_batch
from radix_mlp.train.model import check_trainable, head_logprobs

__all__ = [
    "DPO_LOSSES",
    "GRPO_LOSSES",
    "DPOLoss",
    "GRPOLoss",
    "GroupBatchSampler",
    "PaddedLayout",
    "PairTerms",
    "TreeBatch",
    "TreeCollator",
    "check_trainable",
    "compact_size",
    "cross_entropy",
    "dpo_loss",
    "grpo_loss",
    "head_logprobs",
    "info_nce",
    "kl_distillation",
    "language_head",
    "margin_mse",
    "pretrained_of",
    "sequence_logprobs",
    "split_batch",
    "tree_embeddings",
    "tree_hidden",
    "tree_logprobs",
    "tree_scores",
]
