"""What the parts of a report have in common: frozen values that JSON can hold."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Count", "Decibels", "NotNegative", "Number", "Positive", "Share", "Value"]

# JSON has no infinity and no NaN.
Number = Annotated[float, Field(allow_inf_nan=False)]
Decibels = Number
NotNegative = Annotated[float, Field(allow_inf_nan=False, ge=0)]
Positive = Annotated[float, Field(allow_inf_nan=False, gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class Value(BaseModel):
    """Immutable; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
