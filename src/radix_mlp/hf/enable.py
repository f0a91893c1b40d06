"""`enable` and `disable`: a loaded model folds by itself, per instance and reversibly."""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from transformers import PreTrainedModel

from radix_mlp.errors import InvalidDtypeError, InvalidInputError, UnsupportedCallError, UnsupportedModelError
from radix_mlp.hf.attention_function import FALLBACKS, is_tree_mask, register
from radix_mlp.hf.calls import USES_CACHE, read_call
from radix_mlp.hf.forward import takes_any_keyword
from radix_mlp.hf.outputs import FoldedCache, FoldedCall
from radix_mlp.hf.probe import probe
from radix_mlp.hf.proven import PROVEN_TYPES
from radix_mlp.hf.support import decoder_of, why_unsupported
from radix_mlp.hf.threshold import check_threshold, should_fold
from radix_mlp.ops.registry import COMPOSITES, IMPLS
from radix_mlp.plan import build_plan

__all__ = ["CallReport", "disable", "enable", "is_enabled", "last_call"]

# the keyword with which a head tells its trunk that this call runs unfolded
_STAY_UNFOLDED = "radix_stay_unfolded"

AnyModel = TypeVar("AnyModel", bound=torch.nn.Module)


@dataclass(frozen=True)
class CallReport:
    """What the last call of an enabled model did."""

    folded: bool
    reason: str
    num_tokens: int = 0
    num_compact: int = 0


@dataclass
class _Settings:
    threshold: float | Literal["auto"]
    fallback: str
    last_call: CallReport | None = None
    warned: set[str] = field(default_factory=set)


@dataclass
class _Enabled:
    """What `enable` leaves on a module, for its forward and for `disable`."""

    settings: _Settings
    previous_forward: Callable[..., Any] | None


def enable(model: AnyModel, *, impl: str = "auto", threshold: float | Literal["auto"] = "auto") -> AnyModel:
    """Make a loaded Hugging Face model compute shared tokens once, in every call where that pays.

    The model keeps its class, weights and `state_dict`.  Padded (left or right) and packed batches go in and
    outputs come back in the caller's layout, zero at padding places.  Calls with a key-value cache (generation),
    embeddings, custom masks or attention weights run as before.  `last_call(model)` tells what was done.

    Args:
        model: a `PreTrainedModel` or a PEFT model around one; changed in place.
        impl: the way to run attention (`"auto"`, `"dense"`, `"expand"`, `"reference"`, …).
        threshold: 0 never folds; 1 or more always folds, and a call that cannot be folded is an error; between,
            a batch is folded when its compression is below; `"auto"` folds when the cost model says it pays.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: the model cannot be folded exactly; the message says why.
        InvalidInputError: a wrong `impl` or `threshold`.

    Example:
        >>> import torch, radix_mlp
        >>> from radix_mlp.testing.tiny import tiny_model
        >>> model = radix_mlp.enable(tiny_model())
        >>> model(torch.tensor([[5, 6, 7], [5, 6, 8]])).logits.shape[:2]
        torch.Size([2, 3])
        >>> radix_mlp.last_call(model).num_compact
        4
    """
    check_threshold(threshold)
    known = dict.fromkeys(("auto", *IMPLS, *COMPOSITES))
    if impl not in known:
        raise InvalidInputError(f"impl is {impl!r}; it must be one of {', '.join(known)}.")
    inner = _pretrained(model)
    trunk = decoder_of(inner)
    for module in (inner, trunk):
        disable(module)
    reason = why_unsupported(inner)
    if reason is not None:
        raise UnsupportedModelError(reason)
    fallback = trunk.config._attn_implementation
    if fallback not in FALLBACKS:
        raise UnsupportedModelError(
            f"the model runs {fallback!r} attention; calls that are not folded can go back to {' or '.join(FALLBACKS)} "
            'only. Call model.set_attn_implementation("sdpa") first.'
        )
    _set_attention(inner, register(impl, fallback))
    settings = _Settings(threshold, fallback)
    for module in {id(m): m for m in (trunk, inner)}.values():
        previous = module.__dict__.get("forward")
        module.__dict__["_radix"] = _Enabled(settings, previous)
        if module is trunk or _is_causal_lm(module):
            module.__dict__["forward"] = _folding_forward(module)
    if trunk.config.model_type not in PROVEN_TYPES:
        try:
            probe(trunk)
        except UnsupportedModelError:
            disable(model)
            raise
    return model


def disable(model: AnyModel) -> AnyModel:
    """Undo `enable`: the model's own forward and attention again. Does nothing to a model that is not enabled."""
    inner = _pretrained(model)
    for module in (inner, decoder_of(inner)):
        enabled: _Enabled | None = module.__dict__.pop("_radix", None)
        if enabled is not None:
            module.__dict__.pop("forward", None)
            if enabled.previous_forward is not None:
                module.__dict__["forward"] = enabled.previous_forward
            _set_attention(inner, enabled.settings.fallback)
    return model


def is_enabled(model: torch.nn.Module) -> bool:
    """Whether `enable` is in force on this model."""
    return "_radix" in _pretrained(model).__dict__


def last_call(model: torch.nn.Module) -> CallReport | None:
    """What the last call of an enabled model did: folded or not and why, tokens and compact tokens."""
    if not is_enabled(model):
        raise InvalidInputError("model is not enabled: call radix_mlp.enable(model) first.")
    return _enabled(_pretrained(model)).settings.last_call


def _pretrained(model: torch.nn.Module) -> PreTrainedModel:
    if isinstance(model, PreTrainedModel):
        return model
    get_base_model = getattr(model, "get_base_model", None)
    inner = get_base_model() if callable(get_base_model) else None
    if isinstance(inner, PreTrainedModel):
        return inner
    raise InvalidDtypeError(
        f"model must be a transformers PreTrainedModel or a PEFT model around one, not {type(model).__name__}. "
        "For a wrapper of another library, pass the transformers model inside it."
    )


def _set_attention(model: PreTrainedModel, name: str) -> None:
    model.set_attn_implementation(name)
    found = decoder_of(model).config._attn_implementation
    if found != name:
        raise UnsupportedModelError(
            f"{type(model).__name__} kept its attention implementation {found!r}: it does not use transformers' "
            "attention interface. Run it unfolded."
        )


def _is_causal_lm(model: PreTrainedModel) -> bool:
    """Whether `logits` of this class are one row a token: then the head, too, runs on unique tokens."""
    return model.get_output_embeddings() is not None and "ForCausalLM" in "".join(
        cls.__name__.replace("LMHeadModel", "ForCausalLM") for cls in type(model).__mro__
    )


def _enabled(module: PreTrainedModel) -> _Enabled:
    enabled: _Enabled = module.__dict__["_radix"]
    return enabled


def _folding_forward(module: PreTrainedModel) -> types.MethodType:
    """The forward of an enabled module, with the signature of its own (trainers inspect it)."""
    original = type(module).forward
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        run = _enabled(self).previous_forward or functools.partial(original, self)
        if kwargs.pop(_STAY_UNFOLDED, False) or is_tree_mask(kwargs.get("attention_mask")):
            return run(*args, **kwargs)
        arguments = signature.bind_partial(self, *args, **kwargs).arguments
        arguments |= arguments.pop("kwargs", {})
        del arguments["self"]
        folded = _fold_call(self, arguments)
        if folded is not None:
            return folded.unfold(run(**folded.arguments))
        if self is not decoder_of(self) and takes_any_keyword(type(self)):
            # a head that stays unfolded must not have its trunk fold behind its back
            kwargs[_STAY_UNFOLDED] = True
        return run(*args, **kwargs)

    # a bound method, not a closure over the instance: a deep copy of the model then runs the copy
    return types.MethodType(forward, module)


@torch.compiler.disable
def _fold_call(model: PreTrainedModel, arguments: dict[str, Any]) -> FoldedCall | None:
    """A call on its way through compact rows, or None if it is to run unfolded; `last_call` says why."""
    settings = _enabled(model).settings
    if isinstance(arguments.get("past_key_values"), FoldedCache):
        arguments["past_key_values"].refuse()
    if settings.threshold == 0:
        settings.last_call = CallReport(False, "threshold is 0")
        return None
    call = read_call(model, arguments)
    if isinstance(call, str):
        _note_unfolded(settings, call)
        return None
    plan = build_plan(call.input_ids, call.cu_seq_lengths, call.position_ids)
    fold, reason = should_fold(plan, call.batch_shape[0] * call.batch_shape[1], settings.threshold)
    settings.last_call = CallReport(fold, reason, plan.num_tokens, plan.num_compact)
    if not fold:
        return None
    attention = decoder_of(model).config._attn_implementation
    if not attention.startswith("radix"):
        raise UnsupportedCallError(
            f"the attention implementation was set to {attention!r} after radix_mlp.enable, so no layer would see the "
            "tree. Call radix_mlp.enable(model) again."
        )
    return FoldedCall(model, arguments, call, plan.to(arguments["input_ids"].device))


def _note_unfolded(settings: _Settings, reason: str) -> None:
    settings.last_call = CallReport(False, reason)
    if reason == USES_CACHE:
        return
    if settings.threshold != "auto" and settings.threshold >= 1:
        raise UnsupportedCallError(
            f"this call cannot be folded: {reason}. Change the call, or enable the model with threshold='auto' to "
            "run such calls unfolded."
        )
    if reason not in settings.warned:
        settings.warned.add(reason)
        warnings.warn(f"radix-mlp runs this call unfolded: {reason}.", UserWarning, stacklevel=5)
