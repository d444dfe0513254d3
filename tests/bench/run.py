"""`make bench`: loading, ingest, scale (rows, ranks, manifests), training, studies, searches, norms, GPU, verdicts.

Nothing here fails.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
# Spark's Python workers import the benchmark's functions too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
WORK = Path("runs/bench/work")


PARTS = (
    "loader",
    "ingest",
    "scale",
    "ranks",
    "manifest",
    "training",
    "study",
    "tune",
    "norms",
    "gpu",
    "verdicts",
    "requests",
)


def main() -> None:
    import ingest
    import loader

    parts = sys.argv[1:] or PARTS
    unknown = set(parts) - set(PARTS)
    if unknown:
        sys.exit(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if set(parts) & {"loader", "ingest", "scale"}:
        spark = ingest.start()
        try:
            if "loader" in parts:
                loader.run(ingest.fashion_mnist(spark, WORK))
            if "ingest" in parts:
                ingest.run(spark, WORK)
            if "scale" in parts:
                ingest.run_scale(spark, WORK)
        finally:
            spark.stop()
    _alone(parts)


def _alone(parts: Sequence[str]) -> None:
    """Those that have a session of their own, or none."""
    import ingest
    import manifest
    import norms
    import object_store
    import ranks
    import study
    import training
    import tune
    import verdicts

    if {"scale", "ranks"} & set(parts):
        ranks.run(WORK)
    if {"scale", "manifest"} & set(parts):
        manifest.run(WORK)
    for part, run in (("training", training.run), ("study", study.run), ("tune", tune.run)):
        if part in parts:
            spark = training.start()
            try:
                run(spark, ingest.fashion_mnist(spark, WORK), WORK)
            finally:
                spark.stop()
    if "norms" in parts:
        norms.run()
    if "gpu" in parts:
        import gpu
        import gpu_norms

        if gpu.is_there():
            gpu.run(WORK)
            gpu_norms.run()
    if "verdicts" in parts:
        verdicts.run()
    if "requests" in parts:
        object_store.run(WORK)


if __name__ == "__main__":
    main()
