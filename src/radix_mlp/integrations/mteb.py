"""mteb: its own wrappers of sentence-transformers, with shared tokens computed once.

    import mteb
    from radix_mlp.integrations.mteb import RadixCrossEncoder, RadixEncoder

    mteb.evaluate(RadixEncoder("Qwen/Qwen3-Embedding-0.6B"), tasks)
    mteb.evaluate(RadixCrossEncoder("Qwen/Qwen3-Reranker-0.6B"), reranking_tasks)

Prompts by task and type, metadata and similarities are those of the wrappers that these classes extend. For many models
mteb has settings of its own besides, or a class; to fold what it makes of them:

    from radix_mlp.integrations.sentence_transformers import enable

    model = mteb.get_model("Qwen/Qwen3-Embedding-0.6B")
    enable(model.model)
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from mteb.models import CrossEncoderWrapper, SentenceTransformerEncoderWrapper
from mteb.models.model_implementations import MODEL_REGISTRY

from radix_mlp.engine.engine import JobStats
from radix_mlp.errors import InvalidInputError
from radix_mlp.integrations.sentence_transformers import enable, stats

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import PromptType

__all__ = ["RadixCrossEncoder", "RadixEncoder"]


class _Folding:
    """What both wrappers have in common; stands before one of mteb's among a class's bases."""

    model: Any
    mteb_model_meta: Any

    def __init__(
        self,
        model: Any,
        revision: str | None = None,
        device: str | None = None,
        *,
        max_batch_tokens: int = 16384,
        threshold: float | Literal["auto"] = "auto",
        impl: str = "auto",
        engine_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(model, str):
            _warn_of_settings(model, options)
        super().__init__(model, revision, device, **options)  # type: ignore[call-arg]
        self.mteb_model_meta = self.mteb_model_meta.model_copy(update={"loader": type(self)})
        enable(self.model, max_batch_tokens=max_batch_tokens, threshold=threshold, impl=impl, **(engine_options or {}))

    @property
    def stats(self) -> JobStats:
        """What the last call of `encode` or `predict` took: tokens, tokens computed, batches, seconds."""
        return stats(self.model)


def _warn_of_settings(name: str, options: dict[str, Any]) -> None:
    """Warn if mteb's own results for this model are made in another way than ours would be."""
    known = MODEL_REGISTRY.get(name)
    if known is None or known.loader is None:
        return
    other = sorted(key for key, value in known.loader_kwargs.items() if options.get(key) != value)
    if known.loader in (CrossEncoderWrapper, SentenceTransformerEncoderWrapper) and not other:
        return
    loader = getattr(known.loader, "__name__", known.loader)
    settings = f" with {', '.join(other)}" if other else ""
    warnings.warn(
        f"mteb's own results for {name} are made by {loader}{settings}, and here by the model's own "
        "configuration, so scores may differ. To fold mteb's way, take model = mteb.get_model(…) and call "
        "radix_mlp.integrations.sentence_transformers.enable(model.model).",
        stacklevel=3,
    )


class RadixEncoder(_Folding, SentenceTransformerEncoderWrapper):
    """An encoder by mteb's `EncoderProtocol`.

    Args:
        model: a hub id, a folder or a loaded `SentenceTransformer`, which is enabled for folding.
        revision: of a hub id.
        device: where to load it.
        max_batch_tokens: budget of a batch, in tokens computed.
        threshold: whether to fold, as in `radix_mlp.Engine`.
        impl: the way to run attention.
        engine_options: more options of `radix_mlp.Engine`, as a dictionary.
        options: those of mteb's wrapper (`model_prompts`, `embed_dim`, …) and of `SentenceTransformer`.

    Raises:
        UnsupportedModelError: the model cannot be folded exactly; says why.
    """


def _take_back_scoring_hook(model: Any) -> None:
    """Remove the hook by which mteb's wrapper has the logits of two tokens in float32.

    The engine reads just these two rows of the head, in float32, unless there is a hook to call: then it needs all.
    """
    head = model.model.get_output_embeddings() if hasattr(model.model, "get_output_embeddings") else None
    if isinstance(head, torch.nn.Module):
        for key, hook in list(head._forward_hooks.items()):
            if hook.__module__.startswith("mteb.") and hook.__name__ == "upcast_token_logits":
                del head._forward_hooks[key]


class RadixCrossEncoder(_Folding, CrossEncoderWrapper):
    """A cross-encoder by mteb's `CrossEncoderProtocol`, for reranking tasks; arguments as in `RadixEncoder`.

    All pairs of a call are scored together, so that every document of a query finds the others; mteb's wrapper scores
    one batch of its loader at a time. Scores are read from the head in float32, as mteb has them.
    """

    def __init__(self, model: Any, revision: str | None = None, device: str | None = None, **options: Any) -> None:
        super().__init__(model, revision, device, **options)
        _take_back_scoring_hook(self.model)

    def predict(
        self,
        inputs1: Any,
        inputs2: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Any:
        """Relevance `[n]` of all pairs of inputs1 (queries) and inputs2 (documents)."""
        queries, documents = (
            [text for batch in self._iter_inputs(loader, prefix) for text in batch]
            for loader, prefix in ((inputs1, self.query_prefix), (inputs2, self.passage_prefix))
        )
        if len(queries) != len(documents):
            raise InvalidInputError(f"inputs1 has {len(queries)} texts and inputs2 {len(documents)}: they form pairs.")
        if not queries:
            return np.array([])
        options = {"show_progress_bar": True, **kwargs}
        return np.asarray(self.model.predict(list(zip(queries, documents, strict=True)), **options))
