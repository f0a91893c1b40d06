"""TRL's trainers on folded batches: one line after a trainer is made.

    from radix_mlp.integrations.trl import enable

    trainer = enable(GRPOTrainer(model, reward_funcs, args, train_dataset))
    trainer.train()

TRL's trainers call `model(..., labels=labels, fused_lm_head=True)` for log-probabilities, entropies and what else they
log, and this module answers that one call: the trunk runs on unique tokens, the head on unique rows that predict
something, in tiles, and what comes out has the shapes and meaning that TRL's own answer has.  The trainers' losses,
metrics, generation, checkpoints and wrappers are not touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

import torch
import trl
from packaging.version import Version
from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

import radix_mlp
from radix_mlp.errors import InvalidDtypeError, UnsupportedCallError, UnsupportedModelError
from radix_mlp.hf.enabled import Enabled, enabled_of
from radix_mlp.hf.folding_forward import HeadForward
from radix_mlp.hf.layer_compiler import Mode
from radix_mlp.integrations.edge_forward import (
    EdgeForward,
    autocast_dtype_of,
    check_in_training,
    install_edge_forward,
    is_sharded,
)
from radix_mlp.integrations.trainer_options import reason_of_options
from radix_mlp.ops import edges_to_tokens
from radix_mlp.ops.head.edge_logprobs import EdgeLogprobs
from radix_mlp.train import TreeBatch, head_logprobs, pretrained_of, tree_hidden

__all__ = ["TESTED_TRL", "TRAINERS", "disable", "enable"]

AnyTrainer = TypeVar("AnyTrainer")

TESTED_TRL = ("1.16", "1.17")
"""From this version on, below that one."""
TRAINERS = (GRPOTrainer, RLOOTrainer, DPOTrainer, KTOTrainer, SFTTrainer, RewardTrainer)

# TRL's names of what it asks for -> ours
_STATISTICS: dict[str, str] = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_greedy",
}


def enable(
    trainer: AnyTrainer,
    *,
    impl: str = "auto",
    threshold: float | Literal["auto"] = "auto",
    compile: Mode = False,  # noqa: A002
) -> AnyTrainer:
    """Make a TRL trainer, its reference model included, compute shared tokens once. Call it before `trainer.train()`.

    Args:
        trainer: a GRPO, RLOO, DPO, KTO, SFT or Reward trainer; changed in place.
        impl: the way to run attention, as in `radix_mlp.enable`.
        threshold: when to fold, as in `radix_mlp.enable`: 1 always folds, and a batch that cannot be folded is an
            error; `"auto"` folds where it pays.
        compile: whether torch compiles the decoder layers, as in `radix_mlp.enable`.

    Returns:
        The same trainer.

    Raises:
        InvalidDtypeError: not one of these trainers.
        UnsupportedCallError: an option of the trainer cannot be folded, or this version of TRL was not tested.
        UnsupportedModelError: its model cannot be folded.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from datasets import Dataset
        >>> from trl import SFTConfig
        >>> from radix_mlp.models.tiny import tiny_model, tiny_tokenizer
        >>> rows = [{"prompt": "one root, ", "completion": end} for end in ("two leaves", "no fruit")]
        >>> with TemporaryDirectory() as folder:
        ...     args = SFTConfig(folder, per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to=[])
        ...     data = Dataset.from_list(rows)
        ...     trainer = enable(SFTTrainer(tiny_model(), args, train_dataset=data, processing_class=tiny_tokenizer()))
        ...     loss = trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))
        >>> radix_mlp.last_call(trainer.model).num_compact
        30
    """
    if not Version(TESTED_TRL[0]) <= Version(trl.__version__) < Version(TESTED_TRL[1]):
        raise UnsupportedCallError(
            f"TRL {trl.__version__} was not tested: this adapter stands on the inside of TRL {TESTED_TRL[0]}. Install "
            f'"trl>={TESTED_TRL[0]},<{TESTED_TRL[1]}", or fold the model alone with radix_mlp.enable(trainer.model).'
        )
    if not isinstance(trainer, TRAINERS):
        raise InvalidDtypeError(
            f"trainer is a {type(trainer).__name__}: pass one of {', '.join(kind.__name__ for kind in TRAINERS)}. For "
            "transformers' own Trainer there is radix_mlp.integrations.trainer.enable."
        )
    reason = _reason(trainer)
    if reason is not None:
        raise UnsupportedCallError(f"{type(trainer).__name__} cannot be folded: {reason}.")
    disable(trainer)
    try:
        for model in _models(trainer):
            if isinstance(trainer, RewardTrainer):
                check_in_training(model)
                radix_mlp.enable(model, impl=impl, threshold=threshold, compile=compile)
                _install_score_forward(model)
            else:
                install_edge_forward(
                    model,
                    FusedHeadForward,
                    impl=impl,
                    threshold=threshold,
                    compile=compile,
                    autocast_dtype=autocast_dtype_of(trainer),
                    check_head=model is trainer.model or not is_sharded(model),
                )
    except Exception:
        disable(trainer)
        raise
    return trainer


def disable(trainer: AnyTrainer) -> AnyTrainer:
    """Undo `enable`: TRL's own forward again. Does nothing to a trainer that is not enabled."""
    for model in _models(trainer):
        radix_mlp.disable(model)
    return trainer


class FusedHeadForward(EdgeForward):
    """Answers `fused_lm_head=True` from a tree; every other call is that of an enabled model."""

    def __init__(self, usual: Enabled) -> None:
        super().__init__(usual.module, usual.settings)
        options = _options_of_fused_head(usual)
        self.temperature: float = options["temperature"]
        self.float32_head: bool = options["cast_lm_head_to_fp32"]
        self.statistics: list[str] = [_STATISTICS[name] for name in options["outputs"] if name in _STATISTICS]

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Fold the call if that is exact and pays."""
        # labels that are shifted already stand in place of labels
        if not kwargs.get("fused_lm_head") or kwargs.get("labels") is None or kwargs.get("shift_labels") is not None:
            return super().call(*args, **kwargs)
        batch = self.read_batch(args, kwargs, ("fused_lm_head", "num_items_in_batch"))
        if batch is None:
            return self.run_unfolded(args, kwargs)
        with self.autocast():
            found = self._logprobs(batch)
        return self._output(found, batch, kwargs["labels"], kwargs.get("num_items_in_batch"))

    def _logprobs(self, batch: TreeBatch) -> EdgeLogprobs:
        hidden = tree_hidden(self.module, batch.plan)
        context: AbstractContextManager[Any] = nullcontext()
        if self.float32_head:
            # as TRL does: in float32, and out of autocast
            hidden, context = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
        with context:
            return head_logprobs(
                self.module,
                hidden,
                batch.edges,
                check=False,
                temperature=self.temperature,
                statistics=self.statistics,
            )

    def _output(
        self, found: EdgeLogprobs, batch: TreeBatch, labels: Tensor, num_items_in_batch: Tensor | int | None
    ) -> FusedCausalLMOutput:
        layout = batch.layout
        assert layout is not None

        def by_token(values: Tensor | None) -> Tensor | None:
            # [B, T - 1]: nothing predicts the first column; not a view, on which FSDP2 cannot hook
            return None if values is None else layout.pad(edges_to_tokens(values, batch.edges))[:, 1:].clone()

        log_probs = by_token(found.logprob)
        assert log_probs is not None
        mask = labels[:, 1:] != -100
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / count,
            log_probs=log_probs,
            entropy=by_token(found.entropy),
            log_sum_sq_probs=by_token(found.log_sum_sq_probs),
            mean_logits=by_token(found.mean_logit),
            is_top1=by_token(found.is_greedy),
            label_mask=mask,
        )


class ScoreForward(HeadForward):
    """Of a reward model: TRL passes the margins of the pairs to the model, too, which nothing in it reads."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Run the head without them."""
        kwargs.pop("margin", None)
        return super().call(*args, **kwargs)


def _install_score_forward(model: torch.nn.Module) -> None:
    inner = pretrained_of(model)
    usual = enabled_of(inner)
    if not isinstance(usual, HeadForward):
        raise UnsupportedModelError(f"{type(inner).__name__} is no classifier: a reward model has a layer `score`.")
    forward = ScoreForward(inner, usual.settings)
    forward.previous = usual.previous
    forward.install()


def _options_of_fused_head(usual: Enabled) -> dict[str, Any]:
    """What TRL gave the model's fused head when the trainer was made: it is kept in that function alone."""
    for function in _chain(usual.previous):
        code = getattr(function, "__code__", None)
        if code is not None and code.co_name == "_fused_forward":
            cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
            return {name: cells[name].cell_contents for name in ("temperature", "cast_lm_head_to_fp32", "outputs")}
    raise UnsupportedModelError(
        f"{type(usual.module).__name__} has lost the fused head that TRL's trainer gave it (another wrapper has "
        "replaced its forward). Make a new trainer and enable it right after."
    )


def _chain(function: Any) -> Iterator[Any]:
    """A forward and what it wraps: bound methods, decorators, our own forwards."""
    while function is not None:
        function = getattr(function, "__func__", function)
        yield function
        is_ours = isinstance(function, Enabled)
        function = function.previous if is_ours else getattr(function, "__wrapped__", None)


def _models(trainer: Any) -> list[torch.nn.Module]:
    return [model for model in (trainer.model, getattr(trainer, "ref_model", None)) if model is not None]


def _reason(trainer: Any) -> str | None:
    """The option of the trainer that cannot be folded, with what to do about it."""
    if getattr(trainer, "aux_loss_enabled", False):
        return (
            "a balancing loss of experts is on, which counts tokens and would count unique tokens. Set "
            "router_aux_loss_coef to 0"
        )
    return reason_of_options(trainer)
