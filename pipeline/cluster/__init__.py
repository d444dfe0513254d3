"""The Spark half: a session, and functions launched on barrier tasks that find together and are watched."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.cluster.elastic import run
    from pipeline.cluster.errors import WorkerError
    from pipeline.cluster.session import get_session

__all__ = ["WorkerError", "get_session", "run"]

# Imported when they are asked for: executors import this package for `task` alone.
_PLACES = {"WorkerError": "errors", "get_session": "session", "run": "elastic"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
