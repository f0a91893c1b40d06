"""`enable` and `disable`: a loaded model folds by itself, per instance and reversibly."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from radix_mlp.errors import InvalidDtypeError, InvalidInputError, UnsupportedModelError
from radix_mlp.hf.adapters import pretrained_in
from radix_mlp.hf.attention_function import FALLBACKS, fallback_of, register
from radix_mlp.hf.dense_mask import install_dense, uninstall_dense
from radix_mlp.hf.dense_types import dense_type_of
from radix_mlp.hf.enabled import CallReport, Settings, enabled_of
from radix_mlp.hf.folding_forward import FoldingForward, HeadForward
from radix_mlp.hf.layer_compiler import LayerCompiler, Mode, check_mode
from radix_mlp.hf.layer_forward import install_layers, uninstall_layers
from radix_mlp.hf.mixers.discovery import Mixers
from radix_mlp.hf.mixers.install import install_mixers, uninstall_mixers
from radix_mlp.hf.model_lock import lock_of
from radix_mlp.hf.pictures.tower import install_pictures, uninstall_pictures
from radix_mlp.hf.support import decoder_of, why_unsupported
from radix_mlp.hf.text_tower import text_modules, tower_of
from radix_mlp.hf.threshold import check_threshold
from radix_mlp.ops.attention.registry import COMPOSITES, IMPLS

__all__ = ["disable", "enable", "is_enabled", "last_call"]

AnyModel = TypeVar("AnyModel", bound=torch.nn.Module)


def enable(
    model: AnyModel,
    *,
    impl: str = "auto",
    threshold: float | Literal["auto"] = "auto",
    compile: Mode = False,  # noqa: A002
) -> AnyModel:
    """Make a loaded Hugging Face model compute shared tokens once, in every call where that pays.

    The model keeps its class, weights and `state_dict`.  Padded (left or right) and packed batches go in and
    outputs come back in the caller's layout, zero at padding places.  `generate` folds the prompts and fills
    transformers' own cache; its later steps, and calls with embeddings, custom masks or attention weights, run as
    before.  `last_call(model)` tells what was done: after `generate`, with the prompts.

    Args:
        model: a `PreTrainedModel` or a PEFT model around one; changed in place.
        impl: the way to run attention (`"auto"`, `"dense"`, `"expand"`, `"reference"`, …).
        threshold: 0 never folds; 1 or more always folds, and a call that cannot be folded is an error; between,
            a batch is folded when its compression is below; `"auto"` folds when the cost model says it pays.
        compile: whether torch compiles the decoder layers of folded calls, each by itself: one graph for all layers and
            batches of any size, compiled at the first step in some 20 seconds. True compiles, and a layer that cannot
            be compiled is an error; `"auto"` compiles in training on CUDA, for types of models that were tested.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: the model cannot be folded exactly, or not compiled with `compile=True`; the message says
            why.
        InvalidInputError: a wrong `impl`, `threshold` or `compile`.

    Examples:
        >>> import torch, radix_mlp
        >>> from radix_mlp.models.tiny import tiny_model
        >>> model = radix_mlp.enable(tiny_model())
        >>> model(torch.tensor([[5, 6, 7], [5, 6, 8]])).logits.shape[:2]
        torch.Size([2, 3])
        >>> radix_mlp.last_call(model).num_compact
        4
    """
    check_threshold(threshold)
    check_mode(compile)
    known = dict.fromkeys(("auto", *IMPLS, *COMPOSITES))
    if impl not in known:
        raise InvalidInputError(f"impl is {impl!r}; it must be one of {', '.join(known)}.")
    inner = _pretrained(model)
    # an engine's batch may be running in another thread
    with lock_of(decoder_of(inner)):
        return _enable(model, inner, impl, threshold, compile)


def _enable(
    model: AnyModel, inner: PreTrainedModel, impl: str, threshold: float | Literal["auto"], mode: Mode
) -> AnyModel:
    trunk = decoder_of(inner)
    for module in (inner, trunk):
        disable(module)
    reason = why_unsupported(model)
    if reason is not None:
        raise UnsupportedModelError(reason)
    fallback = fallback_of(tower_of(trunk).config._attn_implementation)
    if fallback not in FALLBACKS:
        raise UnsupportedModelError(
            f"the model runs {fallback!r} attention; calls that are not folded can go back to {' or '.join(FALLBACKS)} "
            'only. Call model.set_attn_implementation("sdpa") first.'
        )
    try:
        mixers = install_mixers(tower_of(trunk))
        is_dense = dense_type_of(trunk) is not None
        if is_dense:
            install_dense(trunk)
        else:
            _set_attention(inner, register(impl, fallback))
        compiler = LayerCompiler(mode, tower_of(trunk).config.model_type, impl, obstacle=_obstacle(mixers, is_dense))
        if mode is not False:
            install_layers(tower_of(trunk), compiler)
    except UnsupportedModelError:
        uninstall_mixers(trunk)
        raise
    install_pictures(trunk)
    settings = Settings(threshold, impl, fallback, compiler, mixers, is_dense)
    forwards = [FoldingForward(trunk, settings)]
    if inner is not trunk:
        forwards.append((FoldingForward if _is_causal_lm(inner) else HeadForward)(inner, settings))
    for forward in forwards:
        forward.install()
    for forward in forwards:
        reason = None if isinstance(forward, HeadForward) else forward.examination.reason_to_refuse()
        if reason is not None:
            disable(model)
            raise UnsupportedModelError(f"{reason}.")
    return model


def disable(model: AnyModel) -> AnyModel:
    """Undo `enable`: the model's own forward and attention again. Does nothing to a model that is not enabled."""
    inner = _pretrained(model)
    with lock_of(decoder_of(inner)):
        _disable(inner)
    return model


def _disable(inner: PreTrainedModel) -> None:
    uninstall_layers(decoder_of(inner))
    uninstall_mixers(decoder_of(inner))
    uninstall_dense(decoder_of(inner))
    uninstall_pictures(decoder_of(inner))
    for module in (inner, decoder_of(inner)):
        enabled = enabled_of(module)
        if enabled is None:
            continue
        enabled.remove()
        if not enabled.settings.is_dense:
            _set_attention(inner, enabled.settings.fallback)


def is_enabled(model: torch.nn.Module) -> bool:
    """Whether `enable` is in force on this model."""
    return enabled_of(_pretrained(model)) is not None


def last_call(model: torch.nn.Module) -> CallReport | None:
    """What the last call of an enabled model did: folded or not and why, tokens and compact tokens.

    A step of generation reports what the call did that put the prompts into its cache.
    """
    enabled = enabled_of(_pretrained(model))
    if enabled is None:
        raise InvalidInputError("model is not enabled: call radix_mlp.enable(model) first.")
    return enabled.settings.last_call


def _pretrained(model: torch.nn.Module) -> PreTrainedModel:
    inner = pretrained_in(model)
    if inner is not None:
        return inner
    raise InvalidDtypeError(
        f"model must be a transformers PreTrainedModel or a PEFT model around one, not {type(model).__name__}. "
        "For a wrapper of another library, pass the transformers model inside it."
    )


def _set_attention(model: PreTrainedModel, name: str) -> None:
    trunk = decoder_of(model)
    tower = tower_of(trunk)
    # those of models for images and sounds keep theirs
    (model if tower is trunk else tower).set_attn_implementation(name)
    for _, module in text_modules(tower):
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and config._attn_implementation != name:
            # a layer that was copied has a configuration of its own
            config._attn_implementation = name
    found = tower.config._attn_implementation
    if found != name:
        raise UnsupportedModelError(
            f"{type(model).__name__} kept its attention implementation {found!r}: it does not use transformers' "
            "attention interface. Run it unfolded."
        )


def _obstacle(mixers: Mixers, is_dense: bool) -> str | None:
    """Why layers cannot be compiled, if so."""
    if is_dense:
        return "the model computes attention itself, on a dense mask"
    return "its convolutions or states follow each tree in other steps" if mixers.any else None


def _is_causal_lm(model: PreTrainedModel) -> bool:
    """Whether `logits` of this class are one row a token: then the head, too, runs on unique tokens."""
    # the only decoder-only classes of the third name are multimodal
    names = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    is_named = any(name in cls.__name__ for cls in type(model).__mro__ for name in names)
    return is_named and model.get_output_embeddings() is not None
