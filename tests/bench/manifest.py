"""A manifest of a billion rows in 100,000 shards and a million row groups: published, loaded, an epoch planned.

The manifest is made and no image is: what a driver and each rank must hold and do before the first image. Every part
runs in a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from results import Result, leave

SHARDS = int(os.environ.get("BENCH_SHARDS", "100000"))
GROUPS, GROUP_ROWS = 10, 1_000
PASSES = int(os.environ.get("BENCH_PASSES", "3"))
PARTS = ("made, nothing else", "published", "loaded", "an epoch planned")


def run(work: Path) -> None:
    """Seconds and most memory of each part; leaves ``manifest.json``."""
    folder = work / "manifest"
    results = []
    for part in PARTS:
        passes = [_in_a_process(part, folder) for _ in range(PASSES)]
        rows = f"{SHARDS * GROUPS * GROUP_ROWS:,} rows, {part}"
        results += [Result(f"{rows}: time", "s", [seconds for seconds, _ in passes])]
        results += [Result(f"{rows}: most memory", "MB", [megabytes for _, megabytes in passes])]
    leave("manifest", results, f"{SHARDS:,} shards, {SHARDS * GROUPS:,} row groups")


def _in_a_process(part: str, folder: Path) -> tuple[float, float]:
    words = [sys.executable, __file__, part, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def make() -> object:
    """The manifest, as `ingest` builds it from what its tasks report. It is not sealed."""
    from pipeline.data import manifest

    rows = GROUPS * GROUP_ROWS
    shards = tuple(
        manifest.Shard(path=f"train/job-{number:06d}-{number % 9973:08x}.parquet", rows=rows, bytes=rows * 3_072,
                       sha256=f"{number:064x}", row_groups=tuple(GROUP_ROWS for _ in range(GROUPS)))
        for number in range(SHARDS)
    )  # fmt: skip
    total = SHARDS * rows
    split = manifest.with_statistics([total // 2, total - total // 2], [[total] * 3] * 2, shards, (3, 32, 32))
    return manifest.Manifest(
        name="made", settings_digest="", spark_application="", classes=("a", "b"), input_rows=total, set_aside={},
        sources=(), splits={"train": split}, image=manifest.Image(encoding="raw", shape=(3, 32, 32)),
    )  # fmt: skip


def plan(folder: str) -> int:
    """What a rank does with it, and the windows of its first lane."""
    from pipeline.config.training import TrainSettings
    from pipeline.data import load_manifest, plan
    from pipeline.data.loader import plan_of
    from pipeline.data.shards import SplitFiles

    found = load_manifest(folder)
    SplitFiles(folder, found, "train")
    epoch = plan_of(found, TrainSettings(epochs=1, batch_size=1024), epoch=0)
    return next(plan.lane_windows(epoch, 0)).rows_read


def main(part: str, folder: str) -> None:
    import resource
    import shutil

    from pipeline.data import load_manifest, versions

    if part in PARTS[:2]:
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir(parents=True)
    started = time.perf_counter()
    if part in PARTS[:2]:
        made = make()
        if part == "published":
            started = time.perf_counter()
            versions.publish(folder, made)
    elif part == "loaded":
        load_manifest(folder)
    else:
        plan(folder)
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


if __name__ == "__main__":
    main(*sys.argv[1:])
