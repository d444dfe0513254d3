"""Sessions that are made here, in processes of their own: a test process has a session already."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.java import without_incubator_warning

REPOSITORY = Path(__file__).parents[2]
WARNING = "WARNING: Using incubator modules: jdk.incubator.vector"

SESSION = """
import sys
import threading
import psutil
from pipeline.cluster import get_session
from pipeline.config.cluster import SparkSettings

secret = "spark.hadoop.fs.s3a.secret.key"
settings = SparkSettings(master="local[1]", conf={"spark.driver.memory": "600m", secret: "hunter2"})
spark = get_session(settings, "sparknorm tests")
assert get_session(settings, "another") is spark
assert spark.conf.get(secret) == "hunter2"
command = psutil.Process(spark.sparkContext._gateway.proc.pid).cmdline()  # which everybody on the machine can read
assert "-Xmx600m" in command
assert "hunter2" not in " ".join(command)
print(spark.sparkContext.appName, spark.conf.get("spark.driver.memory"), spark.conf.get("spark.barrier.sync.timeout"))
print(spark.sparkContext._jvm.java.lang.Runtime.getRuntime().maxMemory() >> 20)

def write(rows):
    sys.stderr.write("a worker's own words\\n")
    return rows

spark.sparkContext.parallelize([1], 1).mapPartitions(write).collect()
spark.stop()
"""


LATER_SESSIONS = """
import os
from pipeline.cluster import get_session
from pipeline.cluster.session import SessionError, _driver_host
from pipeline.config.cluster import SparkSettings

os.environ.pop("SPARK_LOCAL_IP", None)
mine = {"spark.mine": "1", "spark.of.file": "mine"}
first = get_session(SparkSettings(master="local[1]", conf=mine), "first", trains=True)
assert first.sparkContext.getConf().get("spark.of.file") == "mine"
first.stop()
assert "SPARK_LOCAL_IP" not in os.environ
second = get_session(SparkSettings(master="local[2]", conf={"spark.yours": "2"}), "second")
found = dict(second.sparkContext.getConf().getAll())
assert {"spark.mine", "spark.python.daemon.module", "spark.python.task.killTimeout"}.isdisjoint(found), found
assert (found["spark.master"], found["spark.app.name"], found["spark.yours"]) == ("local[2]", "second", "2")
assert found["spark.of.file"] == "file's"
second.stop()
third = get_session(SparkSettings(master="local[1]"), "third", trains=True)
found = dict(third.sparkContext.getConf().getAll())
assert "spark.yours" not in found and found["spark.python.daemon.module"] == "pipeline.daemon"
third.stop()
assert _driver_host(SparkSettings(master="spark://127.0.0.1:7077,127.0.0.2:7077")) == {"spark.driver.host": "127.0.0.1"}
for settings in (SparkSettings(master="yarn"), SparkSettings(master="local[1]", conf={"spark.driver.memory": "2g"})):
    try:
        get_session(settings, "fourth")
    except SessionError as error:
        print(error)
"""


@pytest.mark.spark
def test_a_later_session_has_nothing_of_an_earlier_one(tmp_path):
    """Java is the same: it keeps what it was started with, and its environment."""
    (tmp_path / "spark-defaults.conf").write_text("spark.of.file file's\n")
    done = subprocess.run(
        [sys.executable, "-c", LATER_SESSIONS],
        cwd=REPOSITORY, env={**os.environ, "SPARK_CONF_DIR": str(tmp_path)}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    of_cluster, of_java = done.stdout.splitlines()
    assert of_cluster.startswith("yarn cannot follow a local master in one process, since ")
    assert "restart Python, or set spark.conf.spark.driver.host" in of_cluster
    assert of_java.startswith("spark.driver.memory decides how Java starts, and ")


@pytest.mark.spark
def test_a_local_session_says_nothing_but_what_is_written_in_it():
    # Java repeats these options on standard error.
    plain = {name: value for name, value in os.environ.items() if name != "JDK_JAVA_OPTIONS"}
    done = subprocess.run(
        [sys.executable, "-c", SESSION],
        cwd=REPOSITORY, env=plain, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    settings, memory = done.stdout.splitlines()
    assert settings == "sparknorm tests 600m 300"
    assert 500 < int(memory) <= 600  # settings reached the JVM before it started
    assert done.stderr.splitlines() == ["a worker's own words"]


def test_only_the_warning_is_left_out_of_what_a_child_writes(capfd):
    script = f"echo first; echo '{WARNING}'; echo '{WARNING}, and more'; printf 'no end of line'"
    with without_incubator_warning() as stderr:
        child = subprocess.Popen(["sh", "-c", script], stdout=stderr)
    assert child.wait(30) == 0
    for thread in [thread for thread in threading.enumerate() if "java-stderr" in thread.name]:
        thread.join(0.5)
    assert capfd.readouterr().err == f"first\n{WARNING}, and more\nno end of line"
