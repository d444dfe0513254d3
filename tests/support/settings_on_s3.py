"""Settings of a small training that has everything on a real S3 server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from image_files import SHAPE
from small_training import TWO

from pipeline.config.settings import Settings


def everything_on(bucket: str, store_uri: str, local: Path, **dataset: Any) -> Settings:
    """Pictures, dataset and output are in the bucket; the reader's cache and MLflow's artifacts are below ``local``."""
    return Settings.model_validate(
        {
            "name": "remote",
            "output": f"{bucket}/runs",
            "dataset": {
                "path": f"{bucket}/data",
                "name": "pictures",
                "source": {"kind": "folder", "path": f"{bucket}/pictures"},
                "image": {"shape": SHAPE},
                "validation_share": 0.2,
                "test_share": 0.2,
                "deduplicate": True,
                "shard_bytes": 20 * 3 * 8 * 8,
                "row_group_rows": 8,
                **dataset,
            },
            "model": {"network": "cnn", "norm": "batch", "depth": 3, "width": 4},
            "train": {"epochs": 1, "batch_size": 16, "lanes": 4, "evaluation_batch_size": 16},
            "reader": {"cache": str(local / "cache")},
            "checkpoint": {"every_steps": 2},
            "workers": TWO.model_dump(),
            "tracking": {"uri": store_uri, "artifacts": str(local / "artifacts"), "system_metrics": False},
            "export": {"formats": ["torchscript"]},
        }
    )
