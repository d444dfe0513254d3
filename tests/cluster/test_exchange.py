"""A worker is killed while the ranks of its gang find together: the gang starts anew, and no executor has to."""

import json

import pytest
from small_training import LOCAL_CLUSTER
from standalone_cluster import run_driver

pytestmark = [pytest.mark.spark, pytest.mark.long]

DRIVER = """
import json, os, signal, sys, time
from pathlib import Path
from pyspark import BarrierTaskContext, cloudpickle
from pipeline.cluster import barrier
from pipeline.cluster.session import get_session
from small_training import LOCAL_CLUSTER, TWO

cloudpickle.register_pickle_by_value(sys.modules["__main__"])

def die_once(folder, rank):
    if BarrierTaskContext.get().partitionId() == rank and not Path(folder, "died").exists():
        time.sleep(1)  # the other rank waits
        Path(folder, "died").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    return {}

def now(worker, folder, rank):
    return time.time()

spark = get_session(LOCAL_CLUSTER, "exchange")
seconds = []
for number, rank in enumerate([0, 1, 0, 1]):
    folder = Path(sys.argv[2], str(number))
    folder.mkdir()
    args = (str(folder), rank)
    ended = barrier.run(spark, now, args, workers=TWO, facts=die_once, folder=str(folder), limit_seconds=100)
    seconds.append(max(ended) - float((folder / "died").read_text()))
executors = spark.sparkContext._jsc.sc().statusStore().executorList(False)
alive = [executors.apply(index).isActive() for index in range(executors.size())]
print(json.dumps({"seconds": seconds, "alive": alive}))
spark.stop()
"""


def test_no_executor_ends_when_a_worker_is_killed_while_the_ranks_find_together(tmp_path):
    """With Spark's `allGather` each kill ended the executor of the rank that waited, and took 12 s or more."""
    told = json.loads(run_driver(DRIVER, LOCAL_CLUSTER.master, str(tmp_path), timeout=300).splitlines()[-1])
    print(told)
    assert told["alive"] == [True] * 3  # the driver and two executors, the first two of the session
    assert len(told["seconds"]) == 4
