"""From a source of images to a dataset, as one Spark job: `ingest`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.ingest.job import IngestResult, ingest

__all__ = ["IngestResult", "ingest"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # what the driver runs; executors import this package for its tasks
        from pipeline.ingest import job

        return getattr(job, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
