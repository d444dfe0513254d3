"""Many trainings that answer one question: which arm does best (`compare`), which values of settings do (`tune`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.study.job import compare
    from pipeline.study.tuning.job import tune

__all__ = ["compare", "tune"]

_MODULES = {"compare": "job", "tune": "tuning.job"}


def __getattr__(name: str) -> Any:  # these import MLflow and what draws, which executors may not have
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
