"""Many ranks on one machine: from the call to the end of the first step, for 2, 4, ... ranks of a tiny network.

On Spark's local[N], warm: the Python workers are there, with torch, as Spark keeps them from one training to the next.
What is left is what each rank does (one core has many of them to do) and what all do together.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from results import Result, compare, leave

from pipeline.cluster import barrier
from pipeline.config.cluster import SparkSettings, WorkerSettings
from pipeline.config.dataset import DatasetSettings, SourceSettings
from pipeline.config.model import ModelSettings
from pipeline.config.training import TrainSettings
from pipeline.ingest.job import ingest_dataset
from pipeline.training.job import Job, check_host, facts

RANKS = int(os.environ.get("BENCH_RANKS", "64"))
PASSES = int(os.environ.get("BENCH_PASSES", "3"))
ROWS, SIZE = 4_096, 8


def run(work: Path) -> None:
    """Time to the first step; leaves ``ranks.json``."""
    from pipeline.cluster.session import get_session

    os.environ["OMP_NUM_THREADS"] = "1"
    spark = get_session(SparkSettings(master=f"local[{RANKS}]"), "sparknorm benchmarks", trains=True)
    try:
        folder = work / "ranks"
        shutil.rmtree(folder, ignore_errors=True)
        dataset = _tiny(spark, folder)
        counts = [2**power for power in range(1, RANKS.bit_length()) if 2**power <= RANKS]
        seconds: dict[int, list[float]] = {count: [] for count in counts}
        for number in range(PASSES + 1):
            for count in reversed(counts):  # the largest first: all Python workers are there for the others
                taken = first_step_seconds(spark, dataset, folder / "job", count)
                if number:
                    seconds[count].append(taken)
        shutil.rmtree(folder)
    finally:
        spark.stop()
    results = [Result(_name(count), "s", passes) for count, passes in seconds.items()]
    ratios = [compare(results, _name(count), _name(counts[0])) for count in counts[1:]]
    leave("ranks", results + ratios, f"call to first step on local[{RANKS}], {os.cpu_count()} cores, warm")


def _name(count: int) -> str:
    return f"sparknorm, call to first step, {count} ranks"


def first_step_seconds(spark: Any, dataset: str, folder: Path, count: int) -> float:
    """Seconds from the call until every rank has done the first step of a training."""
    from training import first_step

    shutil.rmtree(folder, ignore_errors=True)
    model = ModelSettings(depth=3, width=4)
    job = Job(dataset, str(folder), model, TrainSettings(epochs=3, batch_size=2 * RANKS, lanes=RANKS))
    workers = WorkerSettings(count=count, device="cpu")
    started = time.time()
    ended = barrier.run(spark, first_step, (job,), workers=workers, facts=facts, check=check_host, folder=job.folder)
    return max(ended) - started


def _tiny(spark: Any, folder: Path) -> str:
    """A dataset of noise with a row group for each lane."""
    random = np.random.default_rng(0)
    source = folder / "source"
    source.mkdir(parents=True)
    for prefix, rows in (("train", ROWS), ("t10k", 100)):
        _write_idx(source / f"{prefix}-images-idx3-ubyte", random.integers(0, 256, (rows, SIZE, SIZE)))
        _write_idx(source / f"{prefix}-labels-idx1-ubyte", random.integers(0, 2, rows))
    settings = DatasetSettings(
        path=str(folder / "dataset"),
        name="noise",
        source=SourceSettings(kind="idx", path=str(source), classes=("a", "b")),
        validation_share=0.1,
        row_group_rows=ROWS // RANKS // 2,
    )
    ingest_dataset(spark, settings, cache=str(folder / "cache"))
    return str(folder / "dataset")


def _write_idx(path: Path, array: np.ndarray) -> None:
    header = np.array([0x0800 | array.ndim, *array.shape], ">i4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())
