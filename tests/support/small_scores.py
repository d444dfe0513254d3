"""Small sources of unlabelled images, settings that score them, and the rows that a folder of scores lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from small_models import photo

from pipeline import storage
from pipeline.config.settings import Settings
from pipeline.serving import load_scores


def write_photos(folder: Path, count: int, first: int = 0) -> Path:
    """Photographs without classes, as JPEG and PNG files of several sizes, in folders of ten."""
    for number in range(first, first + count):
        path = folder / f"{number // 10}" / f"{number}.{('jpg', 'png')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = ("JPEG", "PNG")[number % 2]
        path.write_bytes(photo(14 + number % 7, 12 + number % 5, kind=kind, seed=number))
    return folder


def score_settings(
    folder: Path,
    model: Path | str | None,
    store: Path,
    *,
    source: dict[str, Any] | None = None,
    dataset: str = "",
    **changes,
) -> Settings:
    """Settings that score a source into ``folder/scores``.

    Parameters
    ----------
    model : a folder, or what MLflow calls it
    store : the SQLite file of MLflow
    source, changes : of the section ``score``
    dataset : that scores are compared with; "" is one that is not there
    """
    score = {"model": model and str(model), "source": source or {}, "part_rows": 16, "batch_size": 8, **changes}
    return Settings.model_validate(
        {
            "name": "small",
            "output": str(folder),
            "dataset": {"path": dataset or str(folder / "no dataset")},
            "workers": {"device": "cpu"},
            "tracking": {
                "uri": f"sqlite:///{store}",
                "artifacts": str(folder / "artifacts"),
                "system_metrics": False,
                "outage_seconds": 1,
            },
            "score": score,
        }
    )


def rows_of(folder: Path | str) -> list[dict[str, Any]]:
    """Every row of the parts that the newest version lists, by id."""
    rows = [
        row
        for part in load_scores(str(folder)).parts
        for row in pq.read_table(storage.join(str(folder), part.path)).to_pylist()
    ]
    return sorted(rows, key=lambda row: (row["id"], row["origin"]))


def aside_of(folder: Path | str) -> dict[str, str]:
    """The reason for each origin that the newest version has set aside."""
    rows = [
        row
        for path in load_scores(str(folder)).quarantine
        for row in pq.read_table(storage.join(str(folder), path)).to_pylist()
    ]
    assert len({row["origin"] for row in rows}) == len(rows)
    return {row["origin"]: row["reason"] for row in rows}


def probabilities_of(rows: list[dict[str, Any]]) -> np.ndarray:
    """float32 (rows, classes)."""
    return np.array([row["probabilities"] for row in rows], np.float32)
