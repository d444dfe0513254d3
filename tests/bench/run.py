"""`make bench`: loading, ingest, scale (of rows, ranks and manifests), training, studies, norms, one GPU, verdicts,
fine-tuning, scores and searches.

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
    *("loader", "jpeg", "ingest", "cold", "scale", "ranks", "manifest", "training", "study"),
    *("norms", "gpu", "verdicts", "requests", "finetune", "score", "tune"),
)


def main() -> None:
    import ingest
    import jpeg
    import loader

    parts = sys.argv[1:] or PARTS
    unknown = set(parts) - set(PARTS)
    if unknown:
        sys.exit(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if set(parts) & {"loader", "ingest", "scale", "jpeg"}:
        spark = ingest.start()
        try:
            if "loader" in parts:
                loader.run(ingest.fashion_mnist(spark, WORK))
            if "ingest" in parts:
                ingest.run(spark, WORK)
            if "scale" in parts:
                ingest.run_scale(spark, WORK)
            if "jpeg" in parts:
                jpeg.run(spark, WORK)
        finally:
            spark.stop()
    _alone(parts)


def _alone(parts: Sequence[str]) -> None:
    """Those that have a session of their own, or none."""
    import cold
    import finetune
    import ingest
    import manifest
    import many_ranks
    import norms
    import object_store
    import score
    import study
    import training
    import tune
    import verdicts

    if "cold" in parts:
        cold.run(WORK)
    if {"scale", "ranks"} & set(parts):
        many_ranks.run(WORK)
    if {"scale", "manifest"} & set(parts):
        manifest.run(WORK)
    sessions = {"training": training.start, "study": training.start, "tune": training.start, "score": score.start}
    of_part = {
        "training": lambda spark: training.run(spark, ingest.fashion_mnist(spark, WORK), WORK),
        "study": lambda spark: study.run(spark, ingest.fashion_mnist(spark, WORK), WORK),
        "tune": lambda spark: tune.run(spark, ingest.fashion_mnist(spark, WORK), WORK),
        "score": lambda spark: score.run(spark, WORK),
    }
    for part in [part for part in of_part if part in parts]:
        spark = sessions[part]()
        try:
            of_part[part](spark)
        finally:
            spark.stop()
    alone = {
        "norms": norms.run,
        "gpu": _gpu,
        "verdicts": verdicts.run,
        "finetune": lambda: finetune.run(WORK),
        "requests": lambda: object_store.run(WORK),
    }
    for part in [part for part in alone if part in parts]:
        alone[part]()


def _gpu() -> None:
    import gpu
    import gpu_norms

    if gpu.is_there():
        gpu.run(WORK)
        gpu_norms.run()


if __name__ == "__main__":
    main()
