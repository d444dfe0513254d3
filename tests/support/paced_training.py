"""A real training with everything on S3 whose steps are slowed to a known pace, and what it asked of the server."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fault_proxy import Request

from pipeline.config.settings import Settings
from pipeline.driver.trial import run_trial
from pipeline.report.comparison import TrialResult
from pipeline.tracking import Tracker
from pipeline.training.hooks import Hook

# Signs of life: of the ranks, of their attempt, of the driver, which also lists its folder to see whether it has it.
_SIGN_OF_LIFE = re.compile(r"/ranks/|/attempt\.json$|/lease(-\d+)?\.json$|/trials/[^/]+/$")


def paced_training(
    spark: Any, bucket: str, folder: Path, store_uri: str, *, ranks: int, epochs: int, pace: Hook
) -> TrialResult:
    """Train on ``BUCKET/data`` as `train` does, with the settings' defaults for all that decides about requests.

    Parameters
    ----------
    folder : on the local disk, for copies of shards and for artifacts
    pace : makes each step take its time
    """
    settings = Settings.model_validate(
        {
            "name": "paced",
            "output": f"{bucket}/runs-{ranks}",
            "dataset": {"path": f"{bucket}/data"},
            "model": {"network": "cnn", "norm": "batch", "depth": 3, "width": 4},
            "train": {"epochs": epochs, "batch_size": 32, "lanes": 8},
            "reader": {"cache": str(folder / "cache")},
            "workers": {"count": ranks, "device": "cpu"},
            "tracking": {"uri": store_uri, "artifacts": str(folder / "artifacts"), "system_metrics": False},
        }
    )
    tracker = Tracker(settings.tracking)
    return run_trial(spark, settings, tracker, name="paced", log_model=False, hook=pace)


def is_sign_of_life(request: Request) -> bool:
    return bool(_SIGN_OF_LIFE.search(request.path))


def table(requests: Sequence[Request]) -> str:
    """How often which kind of request was made for which kind of object, a line each."""
    kinds = Counter(
        (request.kind, re.sub(r"-[0-9a-f]{12,}|\d+", "#", request.path.partition("/runs-")[2] or request.path))
        for request in requests
    )
    return "\n".join(f"{count:6d} {kind:6s} {path}" for (kind, path), count in kinds.most_common())
