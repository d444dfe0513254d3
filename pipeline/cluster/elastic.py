"""Launch a function on barrier tasks, and launch it again from what it has saved, with fewer workers where executors
are gone.

Spark itself restarts a gang a few times (`barrier.py`). This is for what it gives up: more deaths than it allows one
stage, executors that do not come back or cannot be reached any more, and exceptions, of which some pass (storage or
network for a moment) and others come again; a function that has saved nothing new since it was launched is not launched
again. Nor is one that was launched `LAUNCHES` times without a new step, on whatever number of workers: a cluster that
comes and goes may offer another number each time, and never for long enough.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.cluster import barrier, resources
from pipeline.cluster.errors import GangLostError, LaunchError, ShortageError, StallError, WorkerError
from pipeline.cluster.introduction import Facts
from pipeline.cluster.stop import Stop
from pipeline.config.cluster import WorkerSettings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)

# Launches in a row that may end without a step that was not saved before.
LAUNCHES = 10

Sizes = Callable[[int], bool]


def any_size(count: int) -> bool:
    """Any number of workers fits a function that divides its work freely."""
    return True


def nothing_saved() -> int:
    """A function that saves nothing would only begin anew."""
    return 0


def run(
    spark: SparkSession,
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    *,
    workers: WorkerSettings,
    sizes: Sizes = any_size,
    saved_step: Callable[[], int] = nothing_saved,
    facts: Callable[..., Facts] | None = None,
    check: Callable[..., None] | None = None,
    folder: str | None = None,
    stop: Stop | None = None,
    ask_to_end: Callable[[], None] | None = None,
) -> list[Any]:
    """Run ``fn(worker, *args)`` on as many workers as there are, at most ``workers.count``; the results in rank order.

    Parameters
    ----------
    fn
        A module-level function; executors import its module. Launched again, it goes on from what it has saved.
    sizes
        ``sizes(count)`` says whether the function can run on this number of workers.
    saved_step
        Returns how far what was saved reaches. The function is launched again on the same number of workers only if
        this has changed since it was launched, and on any number only `LAUNCHES` times without a step beyond the
        highest one.
    facts, check, folder, stop, ask_to_end
        As in `barrier.run`.

    Raises
    ------
    LaunchError
        There are fewer slots than ``workers.min_count`` (``workers.count`` where it is null), or the gang was lost
        again and had saved nothing new; or `LAUNCHES` in a row have ended without a new step.
    StoppedError
        ``stop`` was set.
    WorkerError
        The function failed, and launched again it had saved nothing new; or it failed in a way that does not pass.
    """
    size = world_size(spark, workers, sizes)
    step_before = newest = saved_step()
    fruitless: list[str] = []
    while True:
        gang = workers.model_copy(update={"count": size})
        try:
            return barrier.run(
                spark, fn, args, workers=gang, facts=facts, check=check, folder=folder, stop=stop, ask_to_end=ask_to_end
            )
        except (GangLostError, ShortageError, WorkerError) as error:
            next_size = _size_after(error, spark, workers, sizes, size)
            step = _saved_after(error, saved_step)
            if next_size == size and step == step_before:  # it is less where the newest state was damaged
                raise
            reason = str(error).partition("\n")[0]
            fruitless = [] if step > newest else [*fruitless, f"on {size} workers: {reason}"]
            if len(fruitless) >= LAUNCHES:
                raise LaunchError(_given_up(newest, fruitless)) from error
            log.warning("%s; going on from step %d with %d workers", reason, step, next_size)
            size, step_before, newest = next_size, step, max(step, newest)


def _saved_after(error: RuntimeError, saved_step: Callable[[], int]) -> int:
    """How far what was saved reaches after a launch that has ended so; raises its error where that cannot be known."""
    try:
        return saved_step()
    except Exception as failure:  # noqa: BLE001 - the launch's error is the one to show
        log.warning("not launched again, since what was saved cannot be read: %s", failure)
        raise error from None


def _given_up(newest: int, fruitless: Sequence[str]) -> str:
    reasons = [f"{count} x {reason}" if count > 1 else reason for reason, count in Counter(fruitless).items()]
    return (
        f"launched {len(fruitless)} times since step {newest} was saved, and no later step was: the cluster does not "
        f"stay long enough for one, or what is saved gets lost. They ended {'; '.join(reasons)}"
    )


def world_size(spark: SparkSession, workers: WorkerSettings, sizes: Sizes = any_size) -> int:
    """The largest number of workers that fits, at most ``workers.count``; the call waits for that many first.

    Raises
    ------
    LaunchError
        Not even ``workers.min_count`` fit after ``workers.slots_wait_seconds``.
    """
    try:
        resources.wait_for_slots(spark, workers)
    except ShortageError as error:
        fitting = [size for size in _allowed_sizes(workers, sizes) if size <= error.slots]
        if not fitting:
            raise
        log.warning("%s; going on with %d, since workers.min_count is %s", error, fitting[0], workers.min_count)
        return fitting[0]
    return workers.count


def _allowed_sizes(workers: WorkerSettings, sizes: Sizes) -> list[int]:
    """The largest comes first."""
    least = workers.min_count or workers.count
    return [size for size in range(workers.count, least - 1, -1) if sizes(size)]


def _size_after(error: RuntimeError, spark: SparkSession, workers: WorkerSettings, sizes: Sizes, size: int) -> int:
    """The number of workers to go on with after a gang of ``size``; raises the error where going on is no use."""
    final = isinstance(error, WorkerError) and error.final
    # Ranks may also stand still because one of their hosts is cut off.
    cut_off = [] if final and not isinstance(error, StallError) else resources.drop_cut_off_executors(spark)
    if cut_off:
        log.warning("%s: Spark is told to give it up", "; ".join(cut_off))
        try:
            return world_size(spark, workers.model_copy(update={"slots_wait_seconds": 0}), sizes)
        except ShortageError as shortage:
            raise ShortageError(f"{'; '.join(cut_off)}, and {shortage} ({error})", shortage.slots) from error
    if isinstance(error, WorkerError):
        if final:
            raise error
        return size
    if "UNAVAILABLE" in str(error.__cause__):  # the Spark Connect server is gone, and each call waits for it
        raise error
    if resources.slots(spark, workers) is None:
        # Over Spark Connect nobody says how many slots there are: one size less.
        time.sleep(1)
        return next((smaller for smaller in _allowed_sizes(workers, sizes) if smaller < size), size)
    has_waited = isinstance(error, ShortageError) or (isinstance(error, GangLostError) and error.waited)
    return world_size(spark, workers.model_copy(update={"slots_wait_seconds": 0}) if has_waited else workers, sizes)
