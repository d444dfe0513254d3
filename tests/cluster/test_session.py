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
