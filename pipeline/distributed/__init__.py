"""One rank among others: which it is, its device, and what ranks exchange. No Spark."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.distributed.worker import Worker, alone, from_torchrun

__all__ = ["Worker", "alone", "from_torchrun"]


def __getattr__(name: str) -> Any:  # `worker` imports torch, which a driver may not have
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.worker"), name)
