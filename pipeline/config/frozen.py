"""The base of everything typed that is read from or written to a file: settings, manifests, results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.config.secrets import masked


class FrozenModel(BaseModel):
    """A pydantic model whose fields cannot be changed, and that refuses fields it does not know.

    Its ``repr`` shows secrets masked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return [(name, masked(value, name or "")) for name, value in super().__repr_args__()]


class FiniteModel(FrozenModel):
    """A `FrozenModel` whose numbers are finite: settings that a network or a training computes with."""

    model_config = ConfigDict(allow_inf_nan=False)
