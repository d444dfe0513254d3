"""From telemetry to MLflow, on the driver alone; nothing else imports mlflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.tracking.tracker import Tracker

__all__ = ["Tracker"]


def __getattr__(name: str) -> Any:
    """`Tracker`, imported when it is asked for, since MLflow takes seconds."""
    if name != "Tracker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.tracking.tracker import Tracker

    return Tracker
