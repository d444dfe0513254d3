"""A trained network elsewhere: `export` writes it as files that serve it without this package, `register` makes it a
version of a registered model, and `Predictor` runs that on images. What is asked for is imported then: executors import
this package for `Predictor` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.serving.exporting import export, export_folder
    from pipeline.serving.predictor import Predictor
    from pipeline.serving.registering import register, rollback
    from pipeline.serving.result import ExportError, ExportResult

__all__ = ["ExportError", "ExportResult", "Predictor", "export", "export_folder", "register", "rollback"]

_MODULES = {
    "ExportError": "result",
    "ExportResult": "result",
    "Predictor": "predictor",
    "export": "exporting",
    "export_folder": "exporting",
    "register": "registering",
    "rollback": "registering",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
