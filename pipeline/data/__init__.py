"""A dataset on disk: `load_manifest` says what it holds, `TrainLoader` gives a rank its batches.

Each is imported when it is asked for: a loader needs torch, which those who only look at a manifest may not have, and
processes that decode images need neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.data.loader import TrainLoader
    from pipeline.data.manifest import Manifest
    from pipeline.data.versions import load_manifest

__all__ = ["Manifest", "TrainLoader", "load_manifest"]


def __getattr__(name: str) -> Any:
    if name == "TrainLoader":
        from pipeline.data.loader import TrainLoader

        return TrainLoader
    if name == "Manifest":
        from pipeline.data.manifest import Manifest

        return Manifest
    if name == "load_manifest":
        from pipeline.data.versions import load_manifest

        return load_manifest
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
