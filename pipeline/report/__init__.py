"""A comparison, a search or a registration as typed data, and as a page of tables and figures. No Spark, no MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.report.comparison import Comparison
    from pipeline.report.page import render
    from pipeline.report.registration import Registration
    from pipeline.report.tuning import Tuning

__all__ = ["Comparison", "Registration", "Tuning", "render"]

_MODULES = {"Comparison": "comparison", "Registration": "registration", "Tuning": "tuning", "render": "page"}


def __getattr__(name: str) -> Any:  # `page` imports matplotlib and jinja2, which a driver may not have
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
