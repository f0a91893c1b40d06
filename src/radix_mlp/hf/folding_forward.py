"""The forward of an enabled module: fold this call or run it as it is, and say which."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import replace
from types import CodeType
from typing import Any

import torch
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedCallError, UnsupportedModelError
from radix_mlp.hf.attention_function import every_layer_sees_the_tree
from radix_mlp.hf.dense_mask import run_dense
from radix_mlp.hf.dense_types import dense_pair_cost, reason_of_rows
from radix_mlp.hf.enabled import CallReport, Enabled, Settings
from radix_mlp.hf.examination import Examination
from radix_mlp.hf.fast_forward import FUSED
from radix_mlp.hf.foldable_call import FoldableCall, packed_by, read_call
from radix_mlp.hf.folded_call import FoldedCache, FoldedCall
from radix_mlp.hf.forward import check_token_ids, signature_of, takes_any_keyword
from radix_mlp.hf.fused.generation import FusedGeneration
from radix_mlp.hf.mixers.forward import tree_for_mixers
from radix_mlp.hf.names_in_forward import calls_loss_function
from radix_mlp.hf.origin import is_stock
from radix_mlp.hf.prefill_cache import (
    HOLDS_TOKENS,
    cache_of,
    cache_to_fill,
    is_step,
    keep_report,
    report_of,
    uses_cache,
)
from radix_mlp.hf.spans import reason_of_span_lengths
from radix_mlp.hf.support import decoder_of, takes_positions
from radix_mlp.hf.threshold import should_fold
from radix_mlp.hf.tree_mask import TreeMask
from radix_mlp.plan import RadixPlan

__all__ = ["FoldingForward", "HeadForward"]


class FoldingForward(Enabled):
    """Folds the calls of one module where that is exact and pays."""

    examination: Examination

    def __init__(self, module: PreTrainedModel, settings: Settings) -> None:
        super().__init__(module, settings)
        self.examination = Examination(self)
        # who names a way to run attention has the model's own modules run it
        may_fuse = decoder_of(module) is module and settings.impl == "auto" and not settings.is_dense
        self.fused = FusedGeneration(module) if may_fuse else None

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the module's own forward, since trainers inspect it."""
        return signature_of(self.module)

    @property
    def __code__(self) -> CodeType:
        """That of the module's own forward, since torch.export looks for its place in a file."""
        code: CodeType = inspect.unwrap(type(self.module).forward).__code__
        return code

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a call of the module."""
        if self.successor is not None:
            return self.successor(*args, **kwargs)
        if len(args) > 0 and args[0] is self.module:
            # accelerate's unwrap_model(keep_fp32_wrapper=False) makes this object a method of the module
            args = args[1:]
        mask = kwargs.get("attention_mask")
        if isinstance(mask, TreeMask):
            # within a folded call
            run = self._own if kwargs.get("past_key_values") is None else self._run
            return run_dense(self.module, run, args, self._with_tree(mask, kwargs))
        return self.call(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Fold the call if that is exact and pays."""
        # `is_exporting()` is True for torch.compile too in torch 2.11; this flag is what later releases answer with
        if getattr(torch.compiler, "_is_exporting_flag", False):
            # what follows is not for export to read
            self.settings.refuse_export()
            return self._run(*args, **kwargs)
        if self._stays_unfolded():
            return self._run(*args, **kwargs)
        folded = self._fold(args, kwargs)
        if folded is not None:
            try:
                return self._run_compact(folded)
            except (UnsupportedCallError, UnsupportedModelError) as error:
                self.settings.note_failed(error, is_error=folded.cache is None)
        self._refuse_leaking(args, kwargs)
        return self.run_unfolded(args, kwargs)

    def _with_tree(self, mask: TreeMask, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords of a call on compact rows, with the tree where a head has dropped it: mixers may get no mask."""
        if not self.settings.mixers.any or "radix_tree" in kwargs or not takes_any_keyword(self.module):
            return kwargs
        return {**kwargs, "radix_tree": tree_for_mixers(mask.tree(), mask)}

    @torch.compiler.disable
    def _refuse_leaking(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An error for packed rows where transformers' own code takes a row for one sequence."""
        has_order = self.settings.is_dense and not takes_positions(decoder_of(self.module))
        packing = packed_by(self._named(args, kwargs)) if self.settings.mixers.any or has_order else None
        if packing is not None:
            report = self.settings.last_call
            kind = type(self.module).__name__
            leak = (
                f"{kind} would take the row for one sequence"
                if has_order
                else (f"the states of {kind} would pass from one sequence into the next")
            )
            raise UnsupportedCallError(
                f"several sequences share a row ({packing}), and the call is not folded "
                f"({report.reason if report else 'no reason'}): {leak}. Give every sequence a row of its own, or let "
                "the call fold."
            )

    @torch.compiler.disable(recursive=False)
    def run_unfolded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call as it would be without us: a head's trunk does not fold behind its back."""
        threads, thread = self.settings.unfolded_threads, threading.get_ident()
        if thread in threads:
            return self._run(*args, **kwargs)
        threads.add(thread)
        try:
            return self._run(*args, **kwargs)
        finally:
            threads.discard(thread)

    @torch.compiler.disable
    def _stays_unfolded(self) -> bool:
        return threading.get_ident() in self.settings.unfolded_threads

    def run_folded(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        """A call that is folded, whatever that spares and whatever stands in the way."""
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask}
        call = read_call(self.module, arguments)
        if isinstance(call, str):
            raise UnsupportedCallError(call)
        plan = call.plan().to(input_ids.device, tree=False)
        return self._run_compact(FoldedCall(self.module, arguments, call, plan))

    def run_alone(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        """A call that runs as without us, its trunk included."""
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, "return_dict": True}
        return self.run_unfolded((), arguments)

    def run_step(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, next_ids: torch.Tensor) -> Any:
        """One more token `[B, 1]` of each sequence, from the cache that a folded call of the rest has filled."""
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": True}
        if takes_positions(decoder_of(self.module)):
            arguments["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        call = read_call(self.module, arguments)
        if isinstance(call, str):
            raise UnsupportedCallError(call)
        plan = call.plan().to(input_ids.device, tree=False)
        cache = cache_to_fill(self.module, arguments)
        self._run_compact(FoldedCall(self.module, arguments, call, plan, cache))
        step = {"input_ids": next_ids, "past_key_values": cache, "use_cache": True, "return_dict": True}
        step["attention_mask"] = torch.cat((attention_mask, torch.ones_like(next_ids)), 1)
        if "position_ids" in arguments:
            step["position_ids"] = attention_mask.sum(1, keepdim=True)
        return self.run_unfolded((), step)

    def _run_compact(self, folded: FoldedCall) -> Any:
        if torch.compiler.is_compiling():
            return folded.unfold(run_dense(self.module, self._run, (), folded.arguments))
        with every_layer_sees_the_tree(self.module, self.examination.num_attention_layers):
            outputs = run_dense(self.module, self._run, (), folded.arguments)
        report = self.settings.last_call
        if folded.is_fused and report is not None:
            self.settings.last_call = replace(report, reason=f"{report.reason}, {FUSED}")
            keep_report(folded.cache, self.settings.last_call)
        return folded.unfold(outputs)

    @property
    def _own(self) -> Callable[..., Any]:
        return self.previous or functools.partial(type(self.module).forward, self.module)

    @property
    def _run(self) -> Callable[..., Any]:
        return self._own if self.fused is None else self.fused.around(self._own)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        signature = self.__signature__
        arguments = signature.bind_partial(*args, **kwargs).arguments
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                # most classes call it kwargs, some lm_kwargs
                arguments |= arguments.pop(name, {})
        return arguments

    @torch.compiler.disable
    def _fold(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FoldedCall | None:
        """The call on its way through compact rows, or None if it is to run unfolded."""
        module, arguments = self.module, self._named(args, kwargs)
        cache = cache_of(arguments)
        if isinstance(cache, FoldedCache):
            cache.refuse()
        if is_step(arguments):
            self.settings.last_call = report_of(cache) or CallReport(False, HOLDS_TOKENS)
            return None
        found = self.planned(arguments, lambda call: _reason_of_own_loss(module, arguments))
        cache = cache if found is None else cache_to_fill(module, arguments)
        keep_report(cache, self.settings.last_call)
        if found is None:
            return None
        call, plan = found
        try:
            return FoldedCall(module, arguments, call, plan.to(arguments["input_ids"].device, tree=False), cache)
        except UnsupportedModelError as error:
            self.settings.note_failed(error, is_error=cache is None)
            return None

    def planned(
        self, arguments: dict[str, Any], also: Callable[[FoldableCall], str | None] = lambda call: None
    ) -> tuple[FoldableCall, RadixPlan] | None:
        """The call and its plan, or None if it is to run unfolded; the settings then say why.

        Args:
            arguments: of the call, by name.
            also: one more look at the call: the reason why it cannot be folded, or None.

        Raises:
            UnsupportedCallError: the call cannot be folded and the threshold is 1.
        """
        settings = self.settings
        if settings.threshold == 0:
            settings.last_call = CallReport(False, "threshold is 0")
            return None
        has_cache = uses_cache(arguments)
        call = read_call(self.module, arguments)
        reason = call if isinstance(call, str) else self.examination.reason() or also(call)
        if has_cache and reason is None:
            reason = self.examination.reason_of_cache()
        if reason is not None:
            settings.note_unfolded(reason, is_expected=has_cache)
            return None
        assert isinstance(call, FoldableCall)
        plan = call.plan()
        check_token_ids(self.module, plan)
        trunk = decoder_of(self.module)
        reason = reason_of_rows(trunk, plan) or reason_of_span_lengths(trunk, plan)
        if reason is not None:
            settings.note_unfolded(reason, is_expected=has_cache)
            return None
        fold, reason = should_fold(plan, call.layout.shape, settings.threshold, dense_pair_cost(trunk))
        if not fold and call.is_packed:
            # transformers would take each row for one sequence, unless no cache is configured
            fold, reason = True, f"rows are packed ({reason})"
        expanded = settings.mixers.on_sequences if fold else ()
        if fold and settings.is_dense:
            reason += f", dense mask of {plan.num_rows} x {plan.num_rows}"
        not_compiled = settings.compiler.why_not(self.module.device) if fold else None
        settings.last_call = CallReport(fold, reason, plan.num_tokens, plan.num_compact, expanded, not_compiled)
        if not fold:
            return None
        return call, plan


class HeadForward(FoldingForward):
    """For heads on the trunk's output: the trunk folds, unless the loss would read what stands at padding."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Run the head as it is, its trunk folded or not."""
        reason = self._reason(args, kwargs)
        if reason is not None:
            self.settings.note_unfolded(reason)
            return self.run_unfolded(args, kwargs)
        return self._run(*args, **kwargs)

    @torch.compiler.disable
    def _reason(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if self.settings.threshold == 0:
            return None
        arguments = self._named(args, kwargs)
        labels, mask = arguments.get("labels"), arguments.get("attention_mask")
        per_token = isinstance(labels, torch.Tensor) and isinstance(mask, torch.Tensor) and labels.shape == mask.shape
        if (per_token or arguments.get("start_positions") is not None) and mask is not None and bool((mask == 0).any()):
            return "the loss of this head may count padding, which a folded call does not compute"
        return None


def _reason_of_own_loss(module: PreTrainedModel, arguments: dict[str, Any]) -> str | None:
    """Labels given to a class with a loss of its own: a folded call would make transformers' usual one of them."""
    if arguments.get("labels") is None:
        return None
    if is_stock(type(module)) and calls_loss_function(module):
        return None
    return (
        f"{type(module).__name__} has a forward of its own, which may make another loss of labels than transformers "
        "does. Call it without labels and make the loss from its logits"
    )
