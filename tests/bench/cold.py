"""A cold `sparknorm ingest` of many small files, from the start of Python to its end, and again where nothing changed.

Against the least that any Spark job can take: a new session that runs one mapInArrow job over the same bytes.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from results import Result, compare, leave

FILES, PASSES = int(os.environ.get("BENCH_SMALL_FILES", "3800")), int(os.environ.get("BENCH_COLD_PASSES", "3"))
COLD, UNCHANGED = "sparknorm ingest, cold", "sparknorm ingest, cold, unchanged"
BARE = "a bare Spark session with one mapInArrow job"
_BARE = """
import sys
from pathlib import Path
import pyarrow as pa
from pyspark.sql import SparkSession
def read(batches):
    for batch in batches:
        sizes = [len(Path(path).read_bytes()) for path in batch["path"].to_pylist()]
        yield pa.RecordBatch.from_pydict({"bytes": sizes})
spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
spark.sparkContext.setLogLevel("ERROR")
paths = [(str(path),) for path in Path(sys.argv[1]).rglob("*.jpg")]
found = spark.createDataFrame(paths, "path string").repartition(2).mapInArrow(read, "bytes long").collect()
assert len(found) == len(paths)
spark.stop()
"""
_CONFIG = """
name: cold
output: {work}/output
spark: {{master: "local[2]"}}
dataset:
  path: {work}/made
  name: small
  source: {{kind: folder, path: {work}/files}}
  image: {{shape: [3, 32, 32]}}
"""


def run(work: Path) -> None:
    """Passes of each in turn."""
    work = work.absolute() / "cold"
    make_files(work / "files")
    (work / "ingest.yaml").write_text(_CONFIG.format(work=work))
    ingest = [sys.executable, "-m", "pipeline", "ingest", "-c", str(work / "ingest.yaml")]
    contenders: dict[str, Callable[[], float]] = {
        COLD: functools.partial(_seconds, ingest),
        UNCHANGED: functools.partial(_seconds, ingest),
        BARE: functools.partial(_seconds, [sys.executable, "-c", _BARE, str(work / "files")]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(PASSES):
        shutil.rmtree(work / "made", ignore_errors=True)
        for name, contender in contenders.items():
            seconds[name].append(contender())
    shutil.rmtree(work)
    results = [Result(name, "s", passes) for name, passes in seconds.items()]
    ratios = [compare(results, name, BARE) for name in (COLD, UNCHANGED)]
    leave("cold", results + ratios, f"{FILES:,} small files, from the start of Python")


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[1:4]} failed:\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - started


def make_files(folder: Path) -> None:
    """JPEG files of 48 x 40 pixels in ten classes."""
    from PIL import Image

    shutil.rmtree(folder, ignore_errors=True)
    random = np.random.default_rng(0)
    for number in range(FILES):
        path = folder / f"class{number % 10}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((48, 40)).save(path, quality=90)
