"""Files that executors get from the driver, for as long as Spark runs there."""

import gc
from pathlib import Path

import pytest

from pipeline.cluster import sent_files


def read(spark, name):
    """What an executor finds."""

    def body(rows):
        from pyspark import SparkFiles

        return [Path(SparkFiles.get(name)).read_bytes() for _ in rows]

    return spark.sparkContext.parallelize([1], 1).mapPartitions(body).collect()


@pytest.mark.spark
def test_every_session_of_a_context_can_send_a_file(spark):
    sent_files.send(spark.newSession(), "of-all.txt", b"1")
    gc.collect()  # the session is gone, and executors that come later ask for the file all the same
    sent_files.send(spark.newSession(), "of-all.txt", b"1")
    assert read(spark, "of-all.txt") == [b"1"]
    assert (sent_files._place(spark) / "of-all.txt").read_bytes() == b"1"


@pytest.mark.spark
def test_a_process_that_comes_later_sends_from_the_same_place(spark):
    """As where Python is restarted and Spark goes on."""
    sent_files.send(spark, "again.txt", b"2")
    sent_files._sent.clear()
    sent_files.send(spark, "again.txt", b"2")
    assert read(spark, "again.txt") == [b"2"]
