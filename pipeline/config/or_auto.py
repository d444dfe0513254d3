"""The type of settings that are a number or ``auto``."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar, cast

from pydantic import PlainSerializer, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import InitErrorDetails

# What stands for a number that the size of the training split decides: see `pipeline.config.auto`.
AUTO = "auto"
T = TypeVar("T")


def _auto_or_checked(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Let `AUTO` pass. Where anything else is wrong, the error names `AUTO` too, before what is wrong as a number."""
    if value == AUTO:
        return value
    try:
        return check(value)
    except ValidationError as error:
        auto = InitErrorDetails(type="literal_error", loc=(), input=value, ctx={"expected": f"'{AUTO}'"})
        others = [cast(InitErrorDetails, item) for item in error.errors()]
        raise ValidationError.from_exception_data(error.title, [auto, *others]) from None


# A number, or `AUTO` until a dataset is known. What computes with settings gets them after that.
OrAuto = Annotated[
    T,
    WrapValidator(_auto_or_checked),
    PlainSerializer(lambda value: value),
]
