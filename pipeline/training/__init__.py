"""One training on one rank: `fit` does a `Job` and returns a `TrainResult`. No Spark, no MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.training.job import Job
    from pipeline.training.loop import fit
    from pipeline.training.result import TrainResult

__all__ = ["Job", "TrainResult", "fit"]

_MODULES = {"Job": "job", "TrainResult": "result", "fit": "loop"}


def __getattr__(name: str) -> Any:  # `loop` imports torch, which a driver may not have
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
