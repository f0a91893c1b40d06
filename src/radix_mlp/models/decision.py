"""Decision models: what transformers says about one, and the version of transformers that has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from radix_mlp.errors import InvalidDtypeError, InvalidInputError, UnsupportedModelError

__all__ = [
    "check_adapter",
    "decision_config_of",
    "has_decision_head",
    "has_decisions",
    "load_decision_model",
    "require_decisions",
]

FIRST_VERSION = "5.23"


def has_decisions() -> bool:
    """Whether this transformers has decision models."""
    return hasattr(transformers, "DecisionConfig") and hasattr(transformers, "AutoModelForDecision")


def require_decisions() -> None:
    """Raise `UnsupportedModelError` if this transformers does not have decision models."""
    if not has_decisions():
        raise UnsupportedModelError(
            f"decisions need transformers {FIRST_VERSION} or later, which prepares their prompts; this is "
            f"{transformers.__version__}. Install it: pip install 'transformers>={FIRST_VERSION}'."
        )


def has_decision_head(name: str, config: PreTrainedConfig) -> bool:
    """Whether a checkpoint ships a decision head in files beside its weights, as transformers reads them."""
    if not has_decisions():
        return False
    mapping: Any = transformers.AutoModelForDecision._model_mapping
    return type(config) in mapping and mapping[type(config)].checkpoint_config(name)[0] is not None


def load_decision_model(name: str, config: PreTrainedConfig, **options: Any) -> tuple[PreTrainedModel, Any]:
    """The decision model of a checkpoint and transformers' report on its weights (`output_loading_info`).

    Args:
        name: folder or hub id: one that `save_pretrained` wrote, or that ships a head in files beside its weights.
        config: what its config.json says.
        options: of `from_pretrained`.
    """
    require_decisions()
    mapping = transformers.AutoModelForDecision._model_mapping
    if type(config) not in mapping:
        raise InvalidInputError(
            f"model={name!r}: kind='decision', but transformers has no decision model of type {config.model_type}. "
            "Leave kind out: a chat model decides by the logits of labels."
        )
    model_class: Any = mapping[type(config)]
    head_config, decision_config = model_class.checkpoint_config(name)
    if head_config is None and not isinstance(config, model_class.config_class):
        raise InvalidInputError(
            f"model={name!r}: kind='decision', but there is no head of a {model_class.__name__} beside its weights. "
            "Leave kind out: a chat model decides by the logits of labels."
        )
    # transformers' own from_pretrained of decision models gives no report
    load: Any = PreTrainedModel.from_pretrained
    model, found = load.__func__(model_class, name, config=head_config or config, output_loading_info=True, **options)
    bias = "proj.bias"
    if head_config is not None and bias in found["missing_keys"] and not model.get_parameter(bias).any():
        # heads in files of their own have no bias, and transformers leaves its own zero
        found["missing_keys"] = set(found["missing_keys"]) - {bias}
    model.decision_config = decision_config or decision_config_of(None, name)
    if model.decision_config.adapter:
        # as transformers' pipeline does
        model.load_adapter(name, adapter_kwargs={"subfolder": model.decision_config.adapter})
    return model, found


def check_adapter(model: Any, config: Any) -> None:
    """Raise `UnsupportedModelError` if decisions need an adapter that was not loaded with the model."""
    if config.adapter and not getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"the model's decision.json names the adapter {config.adapter!r}, which is not loaded. Load it "
            f"(model.load_adapter(folder, adapter_kwargs={{'subfolder': {config.adapter!r}}})) and pass the model, or "
            "merge it into the weights."
        )


def decision_config_of(model: Any, given: Any = None) -> Any:
    """The `DecisionConfig` by which a model reads questions, found as transformers' pipeline finds it.

    Args:
        model: a decision model, whose own it is, or any other, whose folder may have a `decision.json`.
        given: a `DecisionConfig`, or a folder or hub id with a `decision.json`, in place of the model's.

    Raises:
        UnsupportedModelError: this transformers has no decision models.
        InvalidDtypeError: `given` is something else.
        InvalidInputError: the files cannot be read.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_model
        >>> decision_config_of(tiny_model()).noul_options if has_decisions() else ["true", "false"]
        ['true', 'false']
    """
    require_decisions()
    if isinstance(given, transformers.DecisionConfig):
        return given
    if given is None:
        own = getattr(model, "decision_config", None)
        if own is not None:
            return own
        given = model.config.name_or_path
    if not isinstance(given, str | Path):
        raise InvalidDtypeError(
            f"decision_config must be a DecisionConfig, or the folder of one, not {type(given).__name__}."
        )
    try:
        return transformers.DecisionConfig.from_pretrained(given)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidInputError(
            f"decision_config={str(given)!r}: its decision.json could not be read ({type(error).__name__}: {reason}). "
            "Give the folder of a downloaded model, or pass a DecisionConfig."
        ) from error
