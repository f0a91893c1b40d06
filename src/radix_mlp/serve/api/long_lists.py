"""Lists of many texts or token ids, checked in one pass: pydantic tries every member of a union on every item."""

from __future__ import annotations

from itertools import chain
from typing import Any, Literal

from pydantic import ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

__all__ = ["Kind", "in_one_pass"]

Kind = Literal["texts", "token ids", "lists of texts", "lists of token ids", "texts and lists of token ids"]

MOST_ID = 2**31 - 1
SHORT = 64
"""Pydantic checks lists up to this length: its errors say more."""


def in_one_pass(*kinds: Kind) -> WrapValidator:
    """A validator for a field that takes these kinds of lists, besides what is short.

    >>> from typing import Annotated
    >>> from pydantic import TypeAdapter
    >>> field = TypeAdapter(Annotated[list[str] | list[int], in_one_pass("texts", "token ids")])
    >>> len(field.validate_python(["a"] * 1000))
    1000
    """

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        if type(value) is not list or len(value) <= SHORT:
            return handler(value)
        if not any(_is_of(kind, value) for kind in kinds):
            raise PydanticCustomError("wrong_list", "must be {kinds}", {"kinds": ", or ".join(kinds)})
        return value

    return WrapValidator(check)


def _is_of(kind: Kind, value: list[Any]) -> bool:
    types = set(map(type, value))
    if kind == "texts":
        return types == {str}
    if kind == "token ids":
        return _are_ids(value)
    if not types <= ({list, str} if kind == "texts and lists of token ids" else {list}):
        return False
    lists = value if str not in types else [item for item in value if type(item) is list]
    inner = list(chain.from_iterable(lists))
    return set(map(type, inner)) <= {str} if kind == "lists of texts" else _are_ids(inner)


def _are_ids(value: list[Any]) -> bool:
    return set(map(type, value)) <= {int} and (not value or (min(value) >= 0 and max(value) <= MOST_ID))
