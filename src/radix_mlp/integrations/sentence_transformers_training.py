"""Training with sentence-transformers on folded batches: one line after the trainer is made.

    from radix_mlp.integrations.sentence_transformers_training import enable

    trainer = enable(SentenceTransformerTrainer(model, args, train_dataset=..., loss=...))
    trainer.train()

Losses call the model once a column (anchors, positives, negatives), and every such call folds: texts under one
instruction, pairs of one query.  The library's own pooling and losses get what they got before.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from sentence_transformers.base.trainer import BaseTrainer

import radix_mlp
from radix_mlp.errors import InvalidDtypeError, UnsupportedCallError
from radix_mlp.hf.layer_compiler import Mode
from radix_mlp.integrations.edge_forward import check_in_training
from radix_mlp.integrations.sentence_transformers_modules import tail_of
from radix_mlp.integrations.trainer_options import reason_of_options

__all__ = ["disable", "enable"]

AnyTrainer = TypeVar("AnyTrainer", bound=BaseTrainer)

# modules that read nothing at padding, or come after the pooling
_KNOWN_MODULES = {"Dense", "Dropout", "LayerNorm", "LogitScore", "Normalize", "Pooling"}


def enable(
    trainer: AnyTrainer,
    *,
    impl: str = "auto",
    threshold: float | Literal["auto"] = "auto",
    compile: Mode = False,  # noqa: A002
) -> AnyTrainer:
    """Make a trainer of sentence-transformers compute shared tokens once. Call it before `trainer.train()`.

    Args:
        trainer: a `SentenceTransformerTrainer` or `CrossEncoderTrainer` around a causal transformer; changed in place.
        impl: the way to run attention, as in `radix_mlp.enable`.
        threshold: when to fold, as in `radix_mlp.enable`: 1 always folds, and a call that cannot be folded is an
            error; `"auto"` folds where it pays.
        compile: whether torch compiles the decoder layers, as in `radix_mlp.enable`.

    Returns:
        The same trainer.

    Raises:
        InvalidDtypeError: not such a trainer.
        UnsupportedCallError: an option cannot be folded; says which.
        UnsupportedModelError: the transformer cannot be folded, or a module is not known.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from datasets import Dataset
        >>> from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
        >>> from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
        >>> from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
        >>> from radix_mlp.models.tiny import tiny_model, tiny_tokenizer
        >>> with TemporaryDirectory() as folder:
        ...     tiny_model().model.save_pretrained(folder)
        ...     files = tiny_tokenizer().save_pretrained(folder)
        ...     model = SentenceTransformer(modules=[Transformer(folder), Pooling(64, "lasttoken")], device="cpu")
        >>> data = Dataset.from_dict({"anchor": ["a query", "a question"], "positive": ["yes", "no"]})
        >>> loss = MultipleNegativesRankingLoss(model)
        >>> trainer = enable(SentenceTransformerTrainer(model, train_dataset=data, loss=loss))
        >>> radix_mlp.hf.is_enabled(model[0].model)
        True
    """
    if not isinstance(trainer, BaseTrainer):
        raise InvalidDtypeError(
            f"trainer is a {type(trainer).__name__}: pass a SentenceTransformerTrainer or a CrossEncoderTrainer."
        )
    model: Any = trainer.model
    reason = _reason(trainer, model)
    if reason is not None:
        raise UnsupportedCallError(f"{type(trainer).__name__} cannot be folded: {reason}.")
    transformer = tail_of(model).transformer
    check_in_training(transformer)
    radix_mlp.enable(transformer, impl=impl, threshold=threshold, compile=compile)
    return trainer


def disable(trainer: AnyTrainer) -> AnyTrainer:
    """Undo `enable`. Does nothing to a trainer that is not enabled."""
    model: Any = trainer.model
    radix_mlp.disable(tail_of(model).transformer)
    return trainer


def _reason(trainer: BaseTrainer, model: Any) -> str | None:
    modules = list(model.children())[1:]
    for module in modules:
        kind = type(module)
        if kind.__name__ not in _KNOWN_MODULES or not kind.__module__.startswith("sentence_transformers."):
            return (
                f"its module {kind.__name__} may read what stands at padding, which a folded call does not compute. "
                f"Known are {', '.join(sorted(_KNOWN_MODULES))}"
            )
    return reason_of_options(trainer)
