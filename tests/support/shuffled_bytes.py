"""What Spark itself says of the bytes that its tasks wrote for shuffles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Shuffled:
    """``written`` is what all stages since the beginning wrote for shuffles, in bytes as they are on the disk."""

    written = 0


@contextmanager
def shuffled(spark: Any) -> Iterator[Shuffled]:
    """Count the bytes of every stage that ends while the context lasts, those that were tried again included."""
    before = set(_stages(spark))
    counted = Shuffled()
    yield counted
    counted.written = sum(written for stage, written in _stages(spark).items() if stage not in before)


def _stages(spark: Any) -> dict[tuple[int, int], int]:
    """Bytes written for shuffles by (stage, attempt), from the store that also feeds Spark's web pages."""
    context = spark.sparkContext
    context._jsc.sc().listenerBus().waitUntilEmpty()  # what tasks report is entered by a thread of its own
    jvm = context._jvm
    quantiles = context._gateway.new_array(jvm.double, 0)
    found = context._jsc.sc().statusStore().stageList(None, False, False, quantiles, jvm.java.util.ArrayList())
    stages = [found.apply(number) for number in range(found.size())]
    return {(stage.stageId(), stage.attemptId()): stage.shuffleWriteBytes() for stage in stages}
