"""Whether folding a module is exact as the module is now: examined once, and again when its fingerprint changes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from radix_mlp.hf.added_code import reason_of_added_code, reason_of_called_module
from radix_mlp.hf.fingerprint import Fingerprint, fingerprint
from radix_mlp.hf.rebound import forget_functions
from radix_mlp.hf.support import is_proven, why_unsupported
from radix_mlp.hf.text_tower import num_attention_layers, text_modules
from radix_mlp.hf.trial import Tried, cache_trial, trial
from radix_mlp.hf.whole_calls import reason_of_whole_calls

__all__ = ["Examination", "randomness_of", "reason_of_randomness"]


class Examination:
    """Of one enabled module. Comparing fingerprints is all that most calls cost."""

    def __init__(self, tried: Tried) -> None:
        self._tried = tried
        self._reason: str | None = None
        self._is_added_code = False
        self._reason_of_called: str | None = None
        self._made_for: Fingerprint | None = None
        self._reason_of_cache: str | None = None
        self._cache_made_for: Fingerprint | None = None
        self.num_attention_layers = 0
        """Layers that have to see the tree of a folded call."""

    def reason(self) -> str | None:
        """Why calls of the module cannot be folded now; None if they can."""
        module = self._tried.module
        now = fingerprint(module)
        if now.training and (reason := reason_of_randomness(module)) is not None:
            return reason
        # not kept: it depends on whether gradients are on
        if now.counts_ids and torch.is_grad_enabled() and (reason := reason_of_whole_calls(module)) is not None:
            return reason
        if now != self._made_for:
            forget_functions()
            self.num_attention_layers = num_attention_layers(module)
            self._reason, self._is_added_code = _examine(self._tried)
            self._reason_of_called = reason_of_called_module(module)
            # a trial may have made what the module makes at its first call
            self._made_for = fingerprint(module)
        return self._reason

    def reason_of_cache(self) -> str | None:
        """Why a folded call cannot fill a cache; None if it can. The caller has found no `reason`."""
        # by identity: `reason` keeps one until it examines the module again
        if self._cache_made_for is not self._made_for:
            found = None if is_proven(self._tried.module) else cache_trial(self._tried)
            self._reason_of_cache = None if found is None else found.rstrip(".")
            self._cache_made_for = self._made_for
        return self._reason_of_cache

    def reason_on_compact_rows(self) -> str | None:
        """Why the module cannot be called on compact rows, which its own hooks would see; None if it can."""
        return self.reason() or self._reason_of_called

    def reason_to_refuse(self) -> str | None:
        """Why calls cannot be folded in evaluation mode, whatever hooks are removed; None if they can."""
        module = self._tried.module
        training = [part for part in module.modules() if part.training]
        module.eval()
        try:
            reason = self.reason()
            return None if self._is_added_code else reason
        finally:
            for part in training:
                part.training = True

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the module is examined by itself."""
        return vars(Examination(self._tried))


def _examine(tried: Tried) -> tuple[str | None, bool]:
    """The reason not to fold, if any, and whether it is code that was added, which may be removed again."""
    module: PreTrainedModel = tried.module
    added = reason_of_added_code(module)
    if added is not None:
        return added.rstrip("."), True
    reason = why_unsupported(module)
    if reason is None and not is_proven(module):
        reason = trial(tried)
    return None if reason is None else reason.rstrip("."), False


def reason_of_randomness(model: torch.nn.Module) -> str | None:
    """What in training would draw once for all copies of a token."""
    for name, module in text_modules(model):
        if module.training and (random := randomness_of(module)):
            return f"{name}{random} is above 0 in training: copies of a token would share one random draw"
    return None


def randomness_of(module: torch.nn.Module) -> str | None:
    """The attribute of one module by which it draws at random in training, or None."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return ".p" if module.p > 0 else None
    for name, value in vars(module).items():
        is_random = ("drop" in name or "jitter" in name) and "layerdrop" not in name
        if is_random and isinstance(value, float) and value > 0:
            return f".{name}"
    return None
