"""transformers' `pipeline("decision")` that answers all its prompts in one folded pass.

    from radix_mlp.integrations.decision import enable

    decide = enable(pipeline("decision", model="Qwen/Qwen2.5-0.5B-Instruct"))
    decide({"state": ..., "questions": ...})              # same arguments, same answers
    decide([request, request])                            # a list of requests is one batch

The pipeline runs one prompt after another, and encodes and computes the state again for each. Here transformers
prepares the same prompts, what they share is encoded once, and the engine runs them together on unique tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from radix_mlp.engine.engine import Engine
from radix_mlp.engine.tasks.decide import Decided, prompts_request
from radix_mlp.engine.tokenization.decision_prompts import prompt_of
from radix_mlp.engine.tokenization.decision_reader import reader_of, reading
from radix_mlp.errors import InvalidDtypeError, InvalidInputError
from radix_mlp.models.decision import require_decisions

__all__ = ["disable", "enable", "stats"]

ENGINE = "radix_engine"
FOLDED = "FoldedDecisionPipeline"


def enable(pipeline: Any, **options: Any) -> Any:
    """Make a decision pipeline compute shared tokens once, over all prompts of a call.

    The pipeline keeps its model, tokenizer and decision config, and prepares prompts as before.

    Args:
        pipeline: what `transformers.pipeline("decision")` returns; changed in place.
        options: of the engine: `max_batch_tokens`, `threshold`, `impl`, …, as `radix_mlp.Engine` has them.

    Returns:
        The same pipeline.

    Raises:
        InvalidDtypeError: something else than a decision pipeline.
        UnsupportedModelError: a model that cannot be folded; says why. Or transformers has no decisions.

    Calls raise `InvalidInputError` for images, and `NonFiniteAnswersError` where the model's scores are not finite.
    """
    require_decisions()
    from transformers.pipelines.decision import DecisionPipeline

    if not isinstance(pipeline, DecisionPipeline):
        raise InvalidDtypeError(f"pipeline must be a transformers DecisionPipeline, not {type(pipeline).__name__}.")
    disable(pipeline)
    setattr(pipeline, ENGINE, Engine(pipeline.model, tokenizer=pipeline.tokenizer, **options))
    pipeline.__class__ = _folded(type(pipeline))
    return pipeline


def disable(pipeline: Any) -> Any:
    """Undo `enable`: the pipeline's own class, and the model as it was. Does nothing to one that is not enabled."""
    if hasattr(pipeline, ENGINE):
        getattr(pipeline, ENGINE).close()
        delattr(pipeline, ENGINE)
        pipeline.__class__ = type(pipeline).__bases__[0]
    return pipeline


def stats(pipeline: Any) -> Any:
    """What the last call of an enabled pipeline took, as `Engine.stats`."""
    if not hasattr(pipeline, ENGINE):
        raise InvalidInputError("pipeline is not enabled: call radix_mlp.integrations.decision.enable(pipeline) first.")
    return getattr(pipeline, ENGINE).stats


def _folded(own: Any) -> Any:
    """A class like the pipeline's own that runs its prompts through the engine."""

    def call(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(inputs, list) or args or kwargs:
            return own.__call__(self, inputs, *args, **kwargs)
        return [dict(found) for found in _answers(self, _prepared(own, self, inputs))]

    def preprocess(self: Any, request: Any) -> dict[str, Any]:
        return {"prompts": _prepared(own, self, [request])[0]}

    def forward(self: Any, model_inputs: Any) -> dict[str, Any]:
        return {"answers": dict(_answers(self, [model_inputs["prompts"]])[0])}

    def postprocess(self: Any, model_outputs: Any) -> dict[str, Any]:
        answers: dict[str, Any] = model_outputs["answers"]
        return answers

    steps = {"preprocess": preprocess, "_forward": forward, "postprocess": postprocess}
    return type(FOLDED, (own,), {"__call__": call, **steps})


def _prepared(own: Any, pipeline: Any, requests: Sequence[Any]) -> list[Any]:
    """The prompts of every request, as the pipeline's own class makes them, with shared text encoded once."""
    if pipeline.processor is not None:
        return [own.preprocess(pipeline, request)["prompts"] for request in requests]
    config = pipeline.decision_config
    reader = reader_of(pipeline.tokenizer, config)
    with reading(reader):
        return [config.prepare_inputs(request, reader) for request in requests]


def _answers(pipeline: Any, prepared: Sequence[Any]) -> list[Decided]:
    engine: Engine = getattr(pipeline, ENGINE)
    prompts = [[prompt_of(inputs, questions) for inputs, questions in prompts] for prompts in prepared]
    return engine.answer(prompts_request(engine.loaded, engine.tokenizer, prompts, pipeline.decision_config))
