"""What a training asks of an object store: a real S3 server on this machine, behind a proxy that counts requests.

Two real trainings, everything on S3, steps slowed to a known pace so that they take their time on any machine:
35 seconds on two ranks by `train`, from its call to its end; and some minutes on eight ranks with the settings as they
are by default, of which the first 90 s are left out: intervals grow then, and each rank opens its files.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from results import Result, leave

sys.path.append(str(Path(__file__).parents[1] / "support"))

KINDS = ("PUT", "GET", "HEAD", "LIST")
# Requests of 35 s of training on two ranks, counted when 0.5.0 was the newest version.
BEFORE = {"PUT": 137, "GET": 638, "HEAD": 366, "LIST": 238}
FIRST_SECONDS = 90.0
MINUTES = float(os.environ.get("BENCH_MINUTES", "4"))


class Pace:
    """A hook that makes every step take so many seconds at least."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, moment: Any) -> None:
        if moment.name == "after_step":
            time.sleep(self.seconds)


def run(work: Path) -> None:
    from s3_server import S3Server, reserve_address
    from small_data import write_idx_folder

    work = work / "object_store"
    work.mkdir(parents=True, exist_ok=True)
    server = S3Server(work, reserve_address())
    try:
        source = write_idx_folder(work / "idx", train_rows=1003, test_rows=301)
        leave("requests", _measured(server, work, source), "requests to S3 and objects on it, everything on S3")
    finally:
        server.close()


def _measured(server: Any, work: Path, source: Path) -> list[Result]:
    from small_data import dataset_settings
    from training import start

    from pipeline.ingest.job import ingest_dataset

    spark = start()
    try:
        bucket = server.new_bucket()
        ingest_dataset(spark, dataset_settings(f"{bucket}/data", source), cache=str(work))
        results = two_ranks(spark, server, bucket, work)
    finally:
        spark.stop()
    spark = start("local[8]")
    try:
        return results + eight_ranks(spark, server, bucket, work)
    finally:
        spark.stop()


def _store(work: Path) -> str:
    return f"sqlite:///{work.absolute()}/mlflow.db"


def two_ranks(spark: Any, server: Any, bucket: str, work: Path) -> list[Result]:
    """The requests of one `train` with 35 s of steps: 2 epochs of 25 steps, of which each takes 0.7 s."""
    from paced_training import paced_training, table

    first, started = len(server.faults.requests), time.monotonic()
    result = paced_training(spark, bucket, work, _store(work), ranks=2, epochs=2, pace=Pace(0.7))
    seconds = time.monotonic() - started
    requests = server.faults.requests[first:]
    print(f"2 ranks, {result.steps} steps, {seconds:.0f} s from call to end\n{table(requests)}")
    kinds = Counter(request.kind for request in requests)
    results = []
    for kind in (*KINDS, "all"):
        before = sum(BEFORE.values()) if kind == "all" else BEFORE[kind]
        count = len(requests) if kind == "all" else kinds[kind]
        name = f"sparknorm, 2 ranks, 35 s of training: {kind}"
        results.append(Result(name, "requests", [count], f"0.5.0: {before}", count / before))
    return results


def eight_ranks(spark: Any, server: Any, bucket: str, work: Path) -> list[Result]:
    """Objects and requests of some minutes on eight ranks, one epoch a minute, without the first 90 s.

    Objects of an hour are those that were there after 90 s and what came in each second from then on.
    """
    from paced_training import is_sign_of_life, paced_training, table

    first = len(server.faults.requests)
    paced_training(spark, bucket, work, _store(work), ranks=8, epochs=round(MINUTES) + 2, pace=Pace(60 / 26))
    requests = server.faults.requests[first:]
    # Rank 0 writes its attempt just before the first beats, and every rank reads it before each of its own.
    attempt = [request for request in requests if request.path.endswith("/attempt.json")]
    first_beat = next(request.at for request in attempt if request.kind == "PUT")
    begin, end = first_beat + FIRST_SECONDS, attempt[-1].at
    counted = [request for request in requests if begin <= request.at < end]
    minutes = (end - begin) / 60
    print(f"8 ranks, {minutes:.1f} minutes after the first 90 s\n{table(counted)}")
    signs = [request for request in counted if is_sign_of_life(request)]
    puts = [request for request in requests if request.kind == "PUT"]
    at_first = {request.path for request in puts if request.at < begin}
    later = {request.path for request in puts if begin <= request.at < end} - at_first
    written, others, signs_of_life = (
        len(at_first) + len(later) * (60 - FIRST_SECONDS / 60) / minutes,
        (len(counted) - len(signs)) / minutes / 8,
        len(signs) / minutes / 8,
    )
    return [
        Result("sparknorm, 8 ranks: objects written", "an hour", [written], "600", written / 600),
        Result("sparknorm, 8 ranks: requests but signs of life", "a rank a minute", [others], "2", others / 2),
        Result("sparknorm, 8 ranks: requests of signs of life", "a rank a minute", [signs_of_life]),
    ]
