"""A dataset on disk: `load_manifest` says what it holds, `TrainLoader` gives a rank its batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.data.manifest import Manifest
from pipeline.data.versions import load_manifest

if TYPE_CHECKING:
    from pipeline.data.loader import TrainLoader

__all__ = ["Manifest", "TrainLoader", "load_manifest"]


def __getattr__(name: str) -> Any:
    if name == "TrainLoader":  # needs torch, which those who only look at a manifest may not have
        from pipeline.data.loader import TrainLoader

        return TrainLoader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
