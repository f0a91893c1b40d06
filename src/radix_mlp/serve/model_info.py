"""What a loaded model is to a client: its type, limits and labels."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from radix_mlp.engine.engine import Engine
from radix_mlp.engine.tasks.rerank_template import choose_template
from radix_mlp.errors import InvalidInputError
from radix_mlp.models.decision import has_decisions
from radix_mlp.models.labels import label_names
from radix_mlp.models.model_kind import kind_of
from radix_mlp.models.pooler import pooler_of
from radix_mlp.ops.pool import POOLINGS
from radix_mlp.serve.http.errors import WrongModelError
from radix_mlp.serve.settings import POOLING_NAMES, ServeSettings

__all__ = ["ModelInfo", "ModelType", "model_info"]

logger = logging.getLogger("radix_mlp.serve")

ModelType = Literal["embedding", "reranker", "classifier"]

# the words of text-embeddings-inference
_WRONG = {
    "embedding": "Model is not an embedding model",
    "reranker": "model is not a re-ranker model",
    "classifier": "model is not a classifier model",
}


@dataclass(frozen=True)
class ModelInfo:
    """A model as `/info` reports it."""

    name: str
    sha: str | None
    dtype: str
    device: str
    type: ModelType
    has_labels: bool
    """Whether it is a classifier, be it one that serves as a reranker."""
    labels: list[str]
    label_scores: Literal["probability", "log-odds", "number"]
    """What a classifier's scores are: of one label they are log-odds, of a regression numbers of any size."""
    pooling: str | None
    dimensions: int | None
    """Length of an embedding; None for other types."""
    template: str | None
    """How a reranker reads query and document: qwen3, chat or pair; None for other types."""
    vocab_size: int
    max_input_length: int
    tasks: list[str]
    """What it can be asked, what it is served as first: embed, rerank, classify, score."""

    def require(self, *types: ModelType) -> None:
        """Raise `WrongModelError` unless the model is of one of the types."""
        if self.type not in types:
            raise WrongModelError(_WRONG[types[0]])

    def type_for_info(self) -> dict[str, Any]:
        """`model_type` of `/info`."""
        if self.type == "embedding":
            function = POOLINGS.get(self.pooling or "")
            return {"embedding": {"pooling": self.pooling if function is None else function.__name__}}
        id2label = {str(index): label for index, label in enumerate(self.labels)}
        # a name of several labels has no number
        label2id = {label: index for index, label in enumerate(self.labels) if self.labels.count(label) == 1}
        return {self.type: {"id2label": id2label, "label2id": label2id}}


def model_info(engine: Engine, settings: ServeSettings, sha: str | None = None) -> ModelInfo:
    """What the engine's model is, by its files.

    Raises:
        InvalidInputError: the settings do not go with the model.
    """
    kind = model_type(engine, settings)
    has_labels = kind_of(engine.model) == "classifier"
    pooling, dimensions = None, None
    if kind == "embedding":
        chosen = POOLING_NAMES[settings.pooling] if settings.pooling else None
        pooler = pooler_of(engine.loaded.folder, chosen)
        pooling, dimensions = "+".join(pooler.modes), engine.loaded.folder.dimensions or pooler.width(engine.model)
        # tells at the start of a prompt that is not there
        engine.loaded.folder.prompt(settings.default_prompt, settings.default_prompt_name)
    else:
        for option in ("pooling", "default_prompt", "default_prompt_name"):
            if getattr(settings, option) is not None:
                raise InvalidInputError(
                    f"--{option.replace('_', '-')} is for embedding models, and this is a {kind}. Rerank requests "
                    "carry an `instruction` of their own."
                )
    return ModelInfo(
        name=settings.name,
        sha=sha,
        dtype=str(engine.model.dtype).removeprefix("torch."),
        device=str(engine.model.device),
        type=kind,
        has_labels=has_labels,
        labels=label_names(engine.model) if has_labels else [],
        label_scores=_label_scores(engine) if has_labels else "number",
        pooling=pooling,
        dimensions=dimensions,
        template=_template(engine, kind, settings),
        vocab_size=int(engine.model.get_input_embeddings().get_parameter("weight").shape[0]),
        max_input_length=engine.max_length or settings.max_batch_tokens,
        tasks=_tasks(engine, kind, has_labels),
    )


def _template(engine: Engine, kind: ModelType, settings: ServeSettings) -> str | None:
    """The reranker's template, found out when the server starts: not at the first request, and never by a name."""
    if kind == "reranker":
        return choose_template(settings.template, engine.model, engine.tokenizer, engine.loaded.folder).name
    if settings.template != "auto":
        raise InvalidInputError(
            f"--template {settings.template} is for rerankers, and {settings.model_id} is of the type {kind}."
        )
    return None


def _label_scores(engine: Engine) -> Literal["probability", "log-odds", "number"]:
    problem = engine.model.config.problem_type
    if problem == "multi_label_classification":
        return "probability"
    if len(label_names(engine.model)) == 1:
        return "log-odds"
    return "number" if problem == "regression" else "probability"


def _tasks(engine: Engine, kind: ModelType, has_labels: bool) -> list[str]:
    found = {"embedding": ["embed"], "reranker": ["rerank"], "classifier": []}[kind]
    found += ["classify"] if has_labels else []
    found += ["score"] if kind_of(engine.model) == "causal" else []
    return found + (["decide"] if decides(engine) else [])


def decides(engine: Engine) -> bool:
    """Whether the model answers questions: a decision model, or a causal one with a chat template."""
    kind = kind_of(engine.model)
    return has_decisions() and (kind == "decision" or (kind == "causal" and bool(engine.tokenizer.chat_template)))


def model_type(engine: Engine, settings: ServeSettings) -> ModelType:
    """What the model serves as: a classifier with labels, a reranker, or else an embedding model."""
    called_reranker = "rerank" in f"{settings.model_id} {engine.model.config.name_or_path}".lower()
    # a template is for nothing else
    is_meant = called_reranker or settings.template != "auto"
    if kind_of(engine.model) == "classifier":
        count = len(label_names(engine.model))
        return "reranker" if count == 1 or (count == 2 and is_meant) else "classifier"
    modules = [module.kind for module in engine.loaded.folder.modules]
    if modules:
        return "reranker" if modules[0] == "LogitScore" else "embedding"
    if kind_of(engine.model) != "causal":
        return "embedding"
    if settings.template == "auto":
        # nothing in the files of a causal language model says which it is
        logger.warning(
            "%s is served as %s, which only its name decides: give --template (qwen3, chat or pair) for a reranker, or "
            "--kind trunk for an embedding model",
            settings.model_id,
            "a reranker" if called_reranker else "an embedding model",
        )
    return "reranker" if is_meant else "embedding"
