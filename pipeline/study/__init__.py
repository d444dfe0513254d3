"""Many trainings that answer one question: `compare` trains every arm with every seed and reports what did best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.study.job import compare

__all__ = ["compare"]


def __getattr__(name: str) -> Any:  # `job` imports MLflow and what draws, which executors may not have
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.job"), name)
