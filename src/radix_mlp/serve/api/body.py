"""What the request bodies of all protocols share: the base class and the types of their fields."""

from __future__ import annotations

from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from radix_mlp.serve.api.long_lists import in_one_pass

__all__ = [
    "Body",
    "Ignored",
    "ListOf",
    "MaxTokens",
    "ModelName",
    "Nothing",
    "TextsOrIds",
    "TextsOrOnlyIds",
    "TokenId",
]

Item = TypeVar("Item")

ListOf = Annotated[list[Item], Field(fail_fast=True)]
"""Reports only the first wrong item: reporting a million of them would cost gigabytes for a small body."""
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
MOST_FIELDS = 100
"""More than any body has; each unknown one is reported."""
ModelName = Annotated[str | None, Field(description="Ignored: the served model always answers.")]
TextsOrIds = Annotated[
    str | ListOf[str] | ListOf[TokenId] | ListOf[str | ListOf[TokenId]],
    in_one_pass("texts", "token ids", "texts and lists of token ids"),
]
"""One text, several, the token ids of one, or a mixture of texts and lists of token ids."""
TextsOrOnlyIds = Annotated[
    str | ListOf[str] | ListOf[TokenId] | ListOf[ListOf[TokenId]],
    in_one_pass("texts", "token ids", "lists of token ids"),
]
"""The same without the mixture."""
Ignored = Annotated[Any, Field(description="Accepted and without effect: clients always send it.")]
MaxTokens = Annotated[
    int | None, Field(ge=-1, description="Cut texts at this many tokens; -1: at the model's limit, as vLLM does.")
]


def _with_null(schema: dict[str, Any]) -> None:
    """Say in a JSON schema that the fields which may be left out may be null."""
    about = {"title", "default", "description"}
    for name, field in schema.get("properties", {}).items():
        what = {key: value for key, value in field.items() if key not in about}
        may_be_left_out = name not in schema.get("required", []) and what
        if may_be_left_out and {"type": "null"} not in what.get("anyOf", []):
            for key in what:
                del field[key]
            field["anyOf"] = [*what.get("anyOf", [what]), {"type": "null"}]


class Body(BaseModel):
    """A JSON object with these fields and no others; numbers, strings and booleans are not taken for one another.

    A field that may be left out may also be null, which clients send for what they were not given.

    >>> class Request(Body):
    ...     normalize: bool = True
    >>> Request.model_validate({"normalize": None})
    Request(normalize=True)
    """

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_with_null)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > MOST_FIELDS:
            raise PydanticCustomError("too_many_fields", "{count} fields", {"count": len(value)})
        left_out = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: item for name, item in value.items() if item is not None or name not in left_out}

    @field_validator("*", mode="before")
    @classmethod
    def _constants_keep_their_type(cls, value: Any, info: ValidationInfo) -> Any:
        # in Python False == 0, so a Literal[0] alone takes false
        if info.field_name is None or type(value) not in (bool, int, float):
            return value
        annotation: Any = cls.model_fields[info.field_name].annotation
        constants = {type(item) for item in _constants(annotation)}
        if type(value) is bool and int in constants and bool not in constants:
            raise PydanticCustomError("number_type", "must be a number, not a boolean")
        if type(value) is not bool and bool in constants and int not in constants:
            raise PydanticCustomError("boolean_type", "must be a boolean, not a number")
        return value


@cache
def _constants(annotation: Any) -> tuple[Any, ...]:
    """The values of all `Literal`s in a field's type, outside of lists.

    >>> _constants(Literal[0, 1] | None)
    (0, 1)
    """
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) not in (Union, UnionType, Annotated):
        return ()
    return tuple(value for part in get_args(annotation) for value in _constants(part))


class Nothing(Body):
    """An empty object, which some clients send along."""
