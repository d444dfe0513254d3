"""A real standalone cluster: two Workers on one host, GPU addresses by script, executors in processes of their own."""

import json
import os
import re
import shutil
import socket
from pathlib import Path

import pyarrow
import pytest
from standalone_cluster import REPOSITORY, WorkerOffer, run_driver, standalone_cluster

pytestmark = pytest.mark.spark

GPUS = ("GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77", "MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    # Packages put into the first folder later are those of the second Worker only.
    path = os.pathsep.join([str(folder / "other"), str(REPOSITORY)])
    offers = [WorkerOffer(gpus=GPUS[:1]), WorkerOffer(gpus=GPUS[1:], environment={"PYTHONPATH": path})]
    with standalone_cluster(offers, folder) as running:
        yield running


TRAINING = """
import json, sys
from pipeline.cluster import barrier, errors, resources
from pipeline.config.cluster import WorkerSettings
from standalone_cluster import driver_session, shipped_properties

small = {"spark.executor.instances": "2", "spark.executor.cores": "2", "spark.executor.memory": "512m"}
spark = driver_session(sys.argv[1], {**shipped_properties("gpu-cluster.conf"), **small, "spark.cores.max": "4"})

def introduce(worker):
    return {**assigned(), "device": str(worker.device), "local": [worker.local_rank, worker.local_world_size]}

def assigned():
    import os
    from pyspark import TaskContext
    context = TaskContext.get()
    gpu = context.resources()["gpu"].addresses if "gpu" in context.resources() else []
    return {"gpu": gpu, "cpus": context.cpus(), "executor": os.getcwd()}  # each executor has a work folder of its own

def etl(batches):
    import json, time
    import pyarrow as pa
    started = time.time()
    for _ in batches:
        time.sleep(3)
    task = {**assigned(), "started": started, "ended": time.time()}
    yield pa.RecordBatch.from_pydict({"task": [json.dumps(task)]})

plain = WorkerSettings(count=2, device="cpu", slots_wait_seconds=60)
profiled = plain.model_copy(update={"task_cpus": 2, "task_gpus": 1})
ranks = barrier.run(spark, introduce, workers=profiled)
slots = {
    "plain": resources.slots(spark, plain),
    "profiled": resources.slots(spark, profiled),
    "cpus": resources.slots(spark, plain.model_copy(update={"task_cpus": 2})),
    "gpus": resources.slots(spark, plain.model_copy(update={"task_gpus": 1})),
}
tasks = spark.range(0, 4, 1, 4).mapInArrow(etl, "task string").collect()
refused = []
for asked in ({"task_gpus": 2}, {"task_cpus": 3}, {"count": 3, "task_gpus": 1, "slots_wait_seconds": 0}):
    try:
        barrier.run(spark, introduce, workers=plain.model_copy(update=asked))
    except (ValueError, errors.LaunchError) as error:
        refused.append(str(error))
print(json.dumps({"ranks": ranks, "slots": slots, "tasks": [json.loads(row.task) for row in tasks], "refused": refused,
                  "advice": [resources.idle_gpus(spark, workers) for workers in (profiled, plain, WorkerSettings())],
                  "again": barrier.run(spark, introduce, workers=profiled)}))
spark.stop()
"""


AFTER_LOCAL = """
import os, sys
from pipeline.cluster import get_session
from pipeline.config.cluster import SparkSettings

del os.environ["SPARK_LOCAL_IP"]
small = {"spark.executor.memory": "512m", "spark.cores.max": "2", "spark.ui.enabled": "false"}
get_session(SparkSettings(master="local[1]"), "local", trains=True).stop()
spark = get_session(SparkSettings(master=sys.argv[1], conf=small), "cluster", trains=True)
assert spark.sparkContext.getConf().get("spark.driver.bindAddress") is None
assert spark.sparkContext.getConf().get("spark.python.daemon.module") is None
print(spark.sparkContext.getConf().get("spark.driver.host"), spark.range(0, 10, 1, 4).selectExpr("sum(id)").first()[0])
spark.stop()
"""


def test_a_cluster_can_follow_a_local_session(cluster):
    """In one process, as in a notebook: executors on other hosts reach the driver."""
    assert run_driver(AFTER_LOCAL, cluster.master) == f"{cluster.master.split('/')[2].split(':')[0]} 45\n"


@pytest.fixture(scope="module")
def seen(cluster):
    """What one driver saw that ran ETL and training stages in turns."""
    return json.loads(run_driver(TRAINING, cluster.master).splitlines()[-1])


def test_every_rank_has_the_gpu_that_spark_assigned(seen):
    assert sorted(rank["gpu"] for rank in seen["ranks"]) == [[gpu] for gpu in sorted(GPUS)]
    assert [rank["device"] for rank in seen["ranks"]] == ["cpu", "cpu"]  # as workers.device says
    assert sorted(rank["gpu"] for rank in seen["again"]) == [[gpu] for gpu in sorted(GPUS)]


def test_executors_of_one_host_share_its_local_ranks(seen):
    assert len({rank["executor"] for rank in seen["ranks"]}) == 2
    assert [rank["local"] for rank in seen["ranks"]] == [[0, 2], [1, 2]]


def test_training_takes_cores_and_gpus_that_etl_does_not(seen):
    assert [rank["cpus"] for rank in seen["ranks"]] == [2, 2]
    assert [(task["cpus"], task["gpu"]) for task in seen["tasks"]] == [(1, [])] * 4
    # Four tasks of the ETL on four cores: all had begun before the first was done.
    assert max(task["started"] for task in seen["tasks"]) < min(task["ended"] for task in seen["tasks"])
    assert len({task["executor"] for task in seen["tasks"]}) == 2


def test_slots_are_those_of_the_profile(seen):
    assert seen["slots"] == {"plain": 4, "profiled": 2, "cpus": 2, "gpus": 2}


def test_gpus_that_nobody_asks_for_are_told(seen):
    *none, advice = seen["advice"]
    assert none == [None, None]
    assert advice.startswith("an executor has 1 GPUs, but neither workers.task_gpus nor")


def test_what_no_executor_has_is_refused_in_words_of_the_settings(seen):
    gpus, cpus, count = seen["refused"]
    assert gpus.startswith("workers.task_gpus is 2, but an executor has 1 GPUs: set")
    assert cpus.startswith("workers.task_cpus is 3, but an executor has 2 cores: set")
    assert re.match(r"workers.count is 3, but spark://\S+ has 2 slots of [^:]+: set workers.count to at most 2", count)


DISAGREEING = """
import sys
from pathlib import Path
from pipeline.cluster import WorkerError, run
from pipeline.config.cluster import WorkerSettings
from standalone_cluster import driver_session

spark = driver_session(sys.argv[1], {"spark.executor.cores": "2", "spark.executor.resource.gpu.amount": "1"})

def begin(worker, folder):
    Path(folder, f"begun-{worker.rank}").touch()

workers = WorkerSettings(count=2, device="cpu", task_cpus=2, slots_wait_seconds=60)
try:
    run(spark, begin, (sys.argv[2],), workers=workers)
except WorkerError as error:
    print("WorkerError:", str(error).splitlines()[0])
spark.stop()
"""


def test_ranks_with_other_versions_of_this_package_stop_before_the_start(cluster, tmp_path):
    copy = cluster.folder / "other" / "pipeline"
    shutil.copytree(REPOSITORY / "pipeline", copy)
    try:
        init = copy / "__init__.py"
        text, changed = re.subn(r'__version__ = "[^"]+"', '__version__ = "0.0.1"', init.read_text())
        assert changed == 1
        init.write_text(text)
        said = run_driver(DISAGREEING, cluster.master, str(tmp_path))
    finally:
        shutil.rmtree(copy)
    assert re.search(
        r"WorkerError: rank \d on .*ranks disagree about sparknorm: rank 0 on 127.0.0.1 has \S+, rank 1", said
    )
    assert "0.0.1" in said
    assert list(tmp_path.iterdir()) == []


INGEST = """
import sys
import time
from pathlib import Path
from small_data import dataset_settings
from pipeline.ingest.job import ingest_dataset
from standalone_cluster import driver_session

conf = {"spark.executor.cores": "2", "spark.executor.instances": "2", "spark.executor.resource.gpu.amount": "1"}
spark = driver_session(sys.argv[1], conf)
while spark.sparkContext.defaultParallelism < 4:  # until both executors are there, or `run_driver` gives up
    time.sleep(0.2)
try:
    ingest_dataset(spark, dataset_settings(Path(sys.argv[2]), Path(sys.argv[3])), cache="unused")
except ValueError as error:
    print("ValueError:", error)
spark.stop()
"""


def test_executors_with_other_versions_of_pyarrow_stop_ingest_before_it_writes(cluster, idx_folder, tmp_path):
    real = Path(pyarrow.__file__).parent
    copy = cluster.folder / "other" / "pyarrow"
    copy.mkdir(parents=True)
    try:
        for path in real.iterdir():
            if path.name not in ("_generated_version.py", "__pycache__"):
                (copy / path.name).symlink_to(path)
        (copy / "_generated_version.py").write_text('__version__ = version = "24.0.0"\n')
        said = run_driver(INGEST, cluster.master, str(tmp_path / "data"), str(idx_folder))
    finally:
        shutil.rmtree(copy)
    host = socket.gethostname()
    there = f"24.0.0 on {host} and {pyarrow.__version__} on {host}"
    assert f"executors have several versions of pyarrow, on which the bytes of a dataset hang: {there}" in said
    assert not list(tmp_path.rglob("*.parquet"))
