"""What all request bodies have in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Body", "Model", "Nothing", "TokenId", "TruncationDirection"]

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Model = Annotated[str | None, Field(description="The served model answers, whatever stands here.")]
TruncationDirection = Literal["left", "right", "Left", "Right"]


class Body(BaseModel):
    """A JSON object with these fields and no others; numbers are not taken for strings, nor strings for numbers."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Nothing(Body):
    """An empty object, which some clients send along."""
