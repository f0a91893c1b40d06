"""transformers' `Trainer` on folded batches: one line after the trainer is made.

    from radix_mlp.integrations.trainer import enable

    trainer = enable(Trainer(model, args, train_dataset=..., data_collator=...))
    trainer.train()

A model that was enabled by `radix_mlp.enable` folds under a `Trainer` already, but its logits `[B, T, V]` are made for
the loss.  This one makes the loss of causal language models from log-probabilities of edges: while training, no logits
of the batch exist.  Evaluation and prediction get logits as before.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import transformers

import radix_mlp
from radix_mlp.errors import InvalidDtypeError, UnsupportedCallError
from radix_mlp.hf.layer_compiler import Mode
from radix_mlp.integrations.edge_forward import (
    autocast_dtype_of,
    check_in_training,
    install_edge_forward,
)
from radix_mlp.integrations.loss_forward import LossForward, has_usual_loss
from radix_mlp.integrations.trainer_options import reason_of_options
from radix_mlp.train import pretrained_of

__all__ = ["disable", "enable"]

AnyTrainer = TypeVar("AnyTrainer", bound=transformers.Trainer)


def enable(
    trainer: AnyTrainer,
    *,
    impl: str = "auto",
    threshold: float | Literal["auto"] = "auto",
    compile: Mode = False,  # noqa: A002
) -> AnyTrainer:
    """Make a `Trainer` compute shared tokens once. Call it before `trainer.train()`.

    A causal language model with transformers' own loss trains without logits; any other model, or a trainer with a
    loss of its own (`compute_loss_func`, label smoothing), gets its usual outputs from a folded trunk.

    Args:
        trainer: changed in place. Its collator pads (left or right) or packs as it did.
        impl: the way to run attention, as in `radix_mlp.enable`.
        threshold: when to fold, as in `radix_mlp.enable`: 1 always folds, and a batch that cannot be folded is an
            error; `"auto"` folds where it pays.
        compile: whether torch compiles the decoder layers, as in `radix_mlp.enable`.

    Returns:
        The same trainer.

    Raises:
        InvalidDtypeError: not a `Trainer`.
        UnsupportedCallError: an option cannot be folded; says which.
        UnsupportedModelError: its model cannot be folded.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
        >>> from radix_mlp.models.tiny import tiny_model, tiny_tokenizer
        >>> tokens = tiny_tokenizer()(["one root, two leaves", "one root, no fruit"])["input_ids"]
        >>> data = [{"input_ids": ids, "labels": ids} for ids in tokens]
        >>> with TemporaryDirectory() as folder:
        ...     args = TrainingArguments(folder, use_cpu=True, report_to=[])
        ...     collator = DataCollatorForSeq2Seq(tiny_tokenizer())
        ...     trainer = enable(Trainer(tiny_model(), args, train_dataset=data, data_collator=collator))
        ...     loss = trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))
        >>> radix_mlp.last_call(trainer.model).num_compact
        28
    """
    if not isinstance(trainer, transformers.Trainer):
        raise InvalidDtypeError(f"trainer is a {type(trainer).__name__}: pass a transformers Trainer.")
    reason = reason_of_options(trainer)
    if reason is not None:
        raise UnsupportedCallError(f"{type(trainer).__name__} cannot be folded: {reason}.")
    model: Any = trainer.model
    disable(trainer)
    try:
        if _has_usual_loss(trainer):
            install_edge_forward(
                model,
                LossForward,
                impl=impl,
                threshold=threshold,
                compile=compile,
                autocast_dtype=autocast_dtype_of(trainer),
            )
        else:
            check_in_training(model)
            radix_mlp.enable(model, impl=impl, threshold=threshold, compile=compile)
    except Exception:
        disable(trainer)
        raise
    return trainer


def disable(trainer: AnyTrainer) -> AnyTrainer:
    """Undo `enable`. Does nothing to a trainer that is not enabled."""
    model: Any = trainer.model
    radix_mlp.disable(model)
    return trainer


def _has_usual_loss(trainer: transformers.Trainer) -> bool:
    """Whether training reads nothing but the loss, and that is the mean over next tokens."""
    model: Any = trainer.model
    # a method of a subclass, or a function put into the object
    own = getattr(trainer.compute_loss, "__func__", None) is not transformers.Trainer.compute_loss
    return (
        not own
        and trainer.compute_loss_func is None
        and trainer.label_smoother is None
        and has_usual_loss(pretrained_of(model))
    )
