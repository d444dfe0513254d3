"""The base of everything typed that is read from or written to a file: settings, manifests, results."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """A pydantic model whose fields cannot be changed, and that refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")
