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
    from pipeline.serving.scoring.errors import ScoreError
    from pipeline.serving.scoring.job import score, scores_folder
    from pipeline.serving.scoring.result import ScoreResult
    from pipeline.serving.scoring.scores import load_scores

__all__ = [
    "ExportError",
    "ExportResult",
    "Predictor",
    "ScoreError",
    "ScoreResult",
    "export",
    "export_folder",
    "load_scores",
    "register",
    "rollback",
    "score",
    "scores_folder",
]

_MODULES = {
    "ExportError": "result",
    "ExportResult": "result",
    "Predictor": "predictor",
    "ScoreError": "scoring.errors",
    "ScoreResult": "scoring.result",
    "export": "exporting",
    "export_folder": "exporting",
    "load_scores": "scoring.scores",
    "score": "scoring.job",
    "scores_folder": "scoring.job",
    "register": "registering",
    "rollback": "registering",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
