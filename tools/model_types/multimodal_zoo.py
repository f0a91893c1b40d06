"""A tiny model of every multimodal type that the installed transformers knows, its towers kept small: see `zoo.py`."""

from typing import cast

import torch
from transformers import AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from tools.model_types.zoo import quiet, randomize, replace_vision_tower, shrunk
from tools.model_types.zoo_overrides import OVERRIDES

__all__ = ["multimodal_problem", "multimodal_types", "tiny_multimodal"]

# beyond this a model is not tiny any more: some tower was not made small
MAX_PARAMETERS = 130_000_000


def multimodal_types() -> list[str]:
    """Every model type that the installed transformers builds with `AutoModelForMultimodalLM`, sorted."""
    return sorted(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)


def multimodal_problem(model_type: str) -> str | None:
    """Why `tiny_multimodal(model_type)` cannot be built here, in one line; None if it can."""
    try:
        tiny_multimodal(model_type)
    except NotImplementedError as error:
        return str(error)
    return None


def tiny_multimodal(model_type: str, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A tiny model of this type in evaluation mode, its weights large and drawn from `seed`.

    Raises:
        KeyError: the installed transformers does not know the type.
        NotImplementedError: the type cannot be built here.

    Example:
        >>> import torch
        >>> tiny_multimodal("mistral3")(torch.arange(10, 15)[None]).logits.shape
        torch.Size([1, 5, 128])
    """
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            config = shrunk(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))
            if model_type == "gemma3n":
                replace_vision_tower(config)
            with torch.device("meta"):
                skeleton = AutoModelForMultimodalLM.from_config(config)
            size = sum(parameter.numel() for parameter in skeleton.parameters())
            if size > MAX_PARAMETERS:
                raise NotImplementedError(f"{size / 1e6:.0f} million parameters")
            model = AutoModelForMultimodalLM.from_config(config, dtype=dtype, experts_implementation="eager")
        except NotImplementedError:
            raise
        except Exception as error:
            raise NotImplementedError(f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]) from error
    randomize(model, seed)
    return cast(PreTrainedModel, model.to(dtype).eval())
