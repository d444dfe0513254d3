"""Spark Connect: a client without Java, a server whose executors know the code from a zip that the client sends.

Clients run as processes of their own, since a test process has a local session already.
"""

import json
import socket
import subprocess
import sys
import time

import pytest
from connect_server import REPOSITORY, code_zip, connect_server, plain_environment
from small_data import CLASSES

from pipeline.cluster.connect import CONNECT_SECONDS
from pipeline.cluster.errors import spark_reason
from pipeline.config import SettingsError, load_settings
from pipeline.data import load_manifest

pytestmark = pytest.mark.long

QUICKSTART = str(REPOSITORY / "conf" / "quickstart.yaml")
SMALL = (
    "train.batch_size=32", "train.lanes=4", "train.epochs=2", "model.width=4", "workers.count=2",
    "model.norm=[none,batch]", "compare.seeds=[0]", "train.learning_rate=0.05", "tracking.system_metrics=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with connect_server(tmp_path_factory.mktemp("connect")) as found:
        yield found


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    return code_zip(tmp_path_factory.mktemp("code") / "sparknorm.zip")


def client(*words, cwd, **environment):
    # A JAVA_HOME that is none: a client that started a JVM would fail.
    env = {**plain_environment(), "PYTHONPATH": str(REPOSITORY), "JAVA_HOME": "/nowhere", **environment}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=280,
                          check=False)  # fmt: skip


def command(name, *overrides, cwd, **environment):
    options = [word for override in overrides for word in ("-o", override)]
    return client("-m", "pipeline", name, "-c", QUICKSTART, *options, cwd=cwd, **environment)


@pytest.mark.spark
def test_the_same_ingest_and_compare(address, code, dataset, idx_folder, tmp_path):
    session = (f"spark.master={address}", f"spark.py_files=[{code}]", f"dataset.path={tmp_path}/data")
    source = (
        "dataset.name=halves", "dataset.source.kind=idx", f"dataset.source.path={idx_folder}",
        f"dataset.source.classes=[{','.join(CLASSES)}]", "dataset.validation_share=0.2",
        f"dataset.shard_bytes={200 * 12 * 12}", "dataset.row_group_rows=30",
    )  # fmt: skip
    done = command("ingest", *session, *source, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "runs" / "ingest.json").read_text())["digest"] == load_manifest(dataset).digest
    assert load_manifest(str(tmp_path / "data")).spark_application.startswith("local-")

    done = command("compare", *session, *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    comparison = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert [(run["arm"], run["diverged"]) for run in comparison["runs"]] == [("none", False), ("batch", False)]
    assert all(run["best_accuracy"] > 0.8 for run in comparison["runs"])
    assert comparison["dataset"]["rows"]["test"] == 301


LOST = """
from pipeline.cluster import get_session, run
from pipeline.config.cluster import SparkSettings, WorkerSettings

def fails(worker):
    if worker.rank == 1:
        raise KeyError("the seventh image")

spark = get_session(SparkSettings(py_files=(CODE,)), "sparknorm tests")
run(spark, fails, workers=WorkerSettings(count=2))
"""


@pytest.mark.spark
def test_a_workers_error_arrives_with_rank_and_traceback(address, code, tmp_path):
    (tmp_path / "lost.py").write_text(LOST.replace("CODE", repr(str(code))))
    done = client("lost.py", cwd=tmp_path, SPARK_REMOTE=address)
    assert done.returncode == 1
    error = done.stderr[done.stderr.rindex("WorkerError") :]
    assert "rank 1 on " in error
    assert "KeyError: 'the seventh image'" in error
    assert 'lost.py", line 7, in fails' in error


@pytest.mark.spark
def test_executors_without_the_code(address, idx_folder, tmp_path):
    source = ("dataset.source.kind=idx", f"dataset.source.path={idx_folder}", "dataset.source.classes=[a,b,c]")
    done = command("ingest", f"spark.master={address}", *source, cwd=tmp_path)
    assert done.returncode == 1
    assert "No module named 'pipeline'; give executors the code: spark.py_files=[dist/sparknorm.zip]" in done.stderr


def refused(done, words):
    assert (done.returncode, done.stdout) == (1, "")
    error = done.stderr[done.stderr.index("error: ") :]
    assert error.count("\n") == 1, error
    assert words in error, error


def test_no_server_at_the_address(tmp_path):
    with socket.socket() as bound:  # nobody else gets the port, and nobody listens
        bound.bind(("127.0.0.1", 0))
        nobody = f"sc://127.0.0.1:{bound.getsockname()[1]}"
        started = time.monotonic()
        done = command("ingest", cwd=tmp_path, SPARK_REMOTE=f"{nobody}/;token=secret")
        refused(done, f"SPARK_REMOTE is {nobody}/, but no Spark Connect server answers there")
        assert time.monotonic() - started < CONNECT_SECONDS + 30


@pytest.mark.parametrize("wrong", ["sc://", "sc://host:port"])
def test_an_address_that_is_none(tmp_path, wrong):
    refused(command("train", f"spark.master={wrong}", cwd=tmp_path), f"spark.master is {wrong}, but no session")


def test_packages_that_are_missing(tmp_path):
    (tmp_path / "grpc.py").write_text("raise ImportError('No module named grpc')")
    done = command("ingest", "spark.master=sc://host", cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{REPOSITORY}")
    refused(
        done, "spark.master is sc://host, but Spark Connect needs more packages (No module named grpc): pip install"
    )


def test_settings_that_cannot_be_used():
    with pytest.raises(SettingsError, match=r"spark.master: has a token, and settings are logged: set SPARK_REMOTE"):
        load_settings(QUICKSTART, ["spark.master=sc://host/;token=secret"])
    with pytest.raises(SettingsError, match=r"spark.py_files: dist/sparknorm.whl is no .zip, .egg or .py file"):
        load_settings(QUICKSTART, ["spark.py_files=[dist/sparknorm.whl]"])


def test_the_reason_of_an_error_of_the_server():
    error = RuntimeError("[PATH_NOT_FOUND] Path does not exist\n\nJVM stacktrace:\norg.apache.Failed\n\tat a.b(c:1)")
    assert spark_reason(error) == "[PATH_NOT_FOUND] Path does not exist"
    gone = '<RPC that terminated with:\n\tstatus = StatusCode.UNAVAILABLE\n\tdetails = "refused"\n>'
    assert spark_reason(RuntimeError(gone)) == "Spark Connect: refused"
