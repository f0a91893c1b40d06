"""Embedding: one vector a text, straight from compact rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.engine.job import Progress
from radix_mlp.engine.pooler import pooler_of
from radix_mlp.engine.runner import Runner
from radix_mlp.engine.tokenize import RejectedItemsError, prompt_length, shown, tokenize_texts
from radix_mlp.errors import InvalidInputError
from radix_mlp.plan import RadixPlan

__all__ = ["embed"]


def embed(
    engine: Runner,
    texts: Sequence[str],
    *,
    prompt: str | None,
    prompt_name: str | None,
    normalize: bool,
    dimensions: int | None,
    pooling: str | None,
    truncate: bool,
    progress: Progress | None,
) -> NDArray[np.float32]:
    """`Engine.embed`."""
    folder = engine.folder
    pooler = pooler_of(folder, pooling)
    prompt = folder.prompt(prompt, prompt_name)
    dimensions = folder.dimensions if dimensions is None else dimensions
    sequences = tokenize_texts(
        engine.tokenizer,
        texts,
        prompt=prompt,
        max_length=engine.max_length,
        truncate=truncate,
        lower_case=folder.lower_case,
    )
    skip = 0 if pooler.include_prompt or not prompt else prompt_length(engine.tokenizer, prompt)
    rejected = [
        (index, f"{shown(texts[index])} has no tokens besides the prompt's, which this model does not pool")
        for index, sequence in enumerate(sequences)
        if len(sequence) <= skip
    ]
    if rejected:
        raise RejectedItemsError("texts", rejected)

    def finish(indices: list[int], hidden: Tensor, plan: RadixPlan) -> Tensor:
        pooled = pooler(hidden, plan, skip)
        if dimensions is not None and not 1 <= dimensions <= pooled.shape[1]:
            raise InvalidInputError(f"dimensions={dimensions}: the model has {pooled.shape[1]}.")
        pooled = pooled[:, :dimensions].float()
        return torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled

    vectors = np.empty((0, dimensions or pooler.width(engine.model)), np.float32)
    for indices, _, pooled in engine.run(sequences, finish, progress):
        if not len(vectors):
            vectors = np.empty((len(sequences), pooled.shape[1]), np.float32)
        vectors[indices] = pooled.cpu().numpy()
    engine.check_finite(np.asarray(np.isfinite(vectors).all(axis=1)), "texts")
    return vectors
