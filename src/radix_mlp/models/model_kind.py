"""Which kind of model a checkpoint is: with an output head, one for labels or decisions, or the bare trunk."""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from radix_mlp.errors import InvalidInputError, UnsupportedModelError

__all__ = ["KINDS", "Kind", "auto_class_of", "check_kind", "kind_of", "kind_of_checkpoint", "require_kind"]

Kind = Literal["causal", "classifier", "decision", "trunk"]
"""`causal` has logits over the vocabulary, `classifier` scores over labels, `decision` scores over the options of
questions, `trunk` hidden states alone."""
KINDS: tuple[str, ...] = ("auto", *get_args(Kind))

_CLASS_OF_KIND = {
    "causal": "ForCausalLM",
    "classifier": "ForSequenceClassification",
    "decision": "ForDecision",
    "trunk": "Model",
}


def check_kind(kind: str) -> None:
    """Raise `InvalidInputError` for a kind that is none."""
    if kind not in KINDS:
        raise InvalidInputError(f"kind={kind!r}: must be one of {', '.join(KINDS)}.")


def kind_of_checkpoint(config: PreTrainedConfig, kind: str = "auto") -> Kind:
    """What a checkpoint holds, by the class that its configuration names; `kind` other than auto overrules it."""
    check_kind(kind)
    if kind != "auto":
        return kind  # type: ignore[return-value]
    # a class without an output head would get a random one from AutoModelForCausalLM
    classes = config.architectures or ["ForCausalLM"]
    heads = ["ForCausalLM", "LMHeadModel"]
    if not config.is_encoder_decoder:
        # multimodal: text through their head is the same task
        heads.append("ForConditionalGeneration")
    if any(name.endswith(tuple(heads)) for name in classes):
        return "causal"
    if any(name.endswith("ForDecision") for name in classes):
        return "decision"
    return "classifier" if any(name.endswith("ForSequenceClassification") for name in classes) else "trunk"


def auto_class_of(config: PreTrainedConfig, kind: Kind) -> Any:
    """The class of transformers that loads it; of multimodal models some have no causal one."""
    if kind == "causal":
        is_known = type(config) in AutoModelForCausalLM._model_mapping
        is_multimodal = type(config) in AutoModelForMultimodalLM._model_mapping
        return AutoModelForMultimodalLM if is_multimodal and not is_known else AutoModelForCausalLM
    return AutoModelForSequenceClassification if kind == "classifier" else AutoModel


def kind_of(model: PreTrainedModel) -> Kind:
    """What a loaded model is.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_classifier, tiny_model
        >>> kind_of(tiny_model()), kind_of(tiny_classifier()), kind_of(tiny_model().model)
        ('causal', 'classifier', 'trunk')
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    if any("ForSequenceClassification" in name for name in names):
        return "classifier"
    if "DecisionMixin" in names:
        return "decision"
    return "trunk" if model.get_output_embeddings() is None else "causal"


def require_kind(model: PreTrainedModel, wanted: tuple[Kind, ...], task: str) -> Kind:
    """The model's kind; `UnsupportedModelError` if `task` cannot be done with it."""
    kind = kind_of(model)
    if kind not in wanted:
        classes = " or ".join(_CLASS_OF_KIND[name] for name in wanted)
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot {task}: it has no head for that. Load a checkpoint saved from a "
            f"{classes} class; if this one was and its config.json says otherwise, say so with kind={wanted[0]!r}."
        )
    return kind
