"""What the code of a forward refers to by name: which masks it makes, which settings it reads, which loss."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from transformers import PreTrainedModel

from radix_mlp.hf.text_tower import is_multimodal

__all__ = ["calls_loss_function", "names_in_forward"]


@functools.cache
def names_in_forward(model_class: Any) -> frozenset[str]:
    """What the forward of a class, or one that it overrides and may call, refers to by name, and the texts in it.

    Examples:
        >>> from transformers import Gemma2ForCausalLM
        >>> "final_logit_softcapping" in names_in_forward(Gemma2ForCausalLM)
        True
    """
    forwards = (inspect.unwrap(vars(cls)["forward"]) for cls in model_class.__mro__ if "forward" in vars(cls))
    codes = (code for forward in forwards for code in _codes(getattr(forward, "__code__", None)))
    return frozenset(name for code in codes for name in (*code.co_names, *code.co_freevars, *_texts(code.co_consts)))


def _texts(constants: tuple[Any, ...]) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from _texts(constant)


def calls_loss_function(model: PreTrainedModel) -> bool:
    """Whether labels go to the model's `loss_function`; some multimodal classes compute a loss in their forward."""
    model_class: Any = type(model)
    return not is_multimodal(model.config) or "loss_function" in names_in_forward(model_class)


def _codes(code: object) -> Iterator[CodeType]:
    if isinstance(code, CodeType):
        yield code
        for constant in code.co_consts:
            yield from _codes(constant)
