"""What all request bodies have in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

__all__ = ["Body", "ListOf", "Model", "Nothing", "TokenId", "TruncationDirection"]

Item = TypeVar("Item")

ListOf = Annotated[list[Item], Field(fail_fast=True)]
"""A list whose first wrong item is reported: a small body of a million of them would cost gigabytes otherwise."""
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
MOST_FIELDS = 100
"""More than any body has; each unknown one is reported."""
Model = Annotated[str | None, Field(description="The served model answers, whatever stands here.")]
TruncationDirection = Literal["left", "right", "Left", "Right"]


class Body(BaseModel):
    """A JSON object with these fields and no others; numbers are not taken for strings, nor strings for numbers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_number_of_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MOST_FIELDS:
            raise PydanticCustomError("too_many_fields", "{count} fields", {"count": len(value)})
        return value


class Nothing(Body):
    """An empty object, which some clients send along."""
