"""One training on one rank: `fit` does a `Job` and returns a `TrainResult`. No Spark, no MLflow."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.training.job import Job
    from pipeline.training.loop import fit
    from pipeline.training.result import TrainResult

__all__ = ["Job", "TrainResult", "fit"]

# Imported when they are asked for: `loop` imports torch, which a driver may not have.
_MODULES = {"Job": "job", "TrainResult": "result", "fit": "loop"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
