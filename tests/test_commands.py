"""Bad input, as a person gives it: one clear error in seconds, exit code 1, nothing left that looks finished.

A command that needs Spark runs in a process of its own once; the others use the session of the tests, which takes a
tenth of the time.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_data import CLASSES, make_images, write_idx, write_idx_folder

from pipeline import __main__ as commands
from pipeline.config import load_settings
from pipeline.java import JavaError, require_java

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).parents[1]
QUICKSTART = REPOSITORY / "conf" / "quickstart.yaml"


def command(*words, cwd, env=None):
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(env or {})},
        check=False,
    )


def refused(name, *overrides, cwd, words, env=None, seconds=60):
    """The command ends with one error that has the words."""
    started = time.monotonic()
    done = command(name, *options(overrides), cwd=cwd, env=env)
    assert time.monotonic() - started < seconds
    assert_one_error(done.returncode, done.stdout, done.stderr, words)


def options(overrides):
    return ["-c", str(QUICKSTART), *(part for override in overrides for part in ("-o", override))]


def assert_one_error(code, stdout, stderr, words):
    assert code == 1, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    error = stderr[stderr.index("error: ") :]
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error


@pytest.fixture
def refused_here(spark, tmp_path, monkeypatch, capsys):
    """As `refused`, in this process and its session."""
    monkeypatch.chdir(tmp_path)

    def refuse(name, *overrides, words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            commands.main(lambda: commands.app([name, *options(overrides)], standalone_mode=False))
        assert_one_error(ended.value.code, *capsys.readouterr(), words)

    return refuse


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epocs=3", ["unknown setting train.epocs", "did you mean train.epochs?"]),
        ("workers.count=3", ["workers.count 3 does not divide train.lanes 16", "[1, 2, 4, 8, 16]"]),
    ],
)
def test_settings_are_refused_before_spark_starts(tmp_path, override, words):
    refused("train", override, cwd=tmp_path, words=words, seconds=15)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_settings_file(tmp_path):
    done = command("compare", "-c", "nothing.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: nothing.yaml: no such settings file\n"


def test_settings_are_printed_as_a_file_that_can_be_used(tmp_path):
    printed = command("settings", "-c", str(QUICKSTART), "-o", "model.norm_scale=off", cwd=tmp_path)
    assert (printed.returncode, printed.stderr) == (0, "")
    (tmp_path / "whole.yaml").write_text(printed.stdout)
    assert load_settings(tmp_path / "whole.yaml") == load_settings(QUICKSTART, ["model.norm_scale=off"])
    assert "norm_scale: off  # default: learned" in printed.stdout
    refused("settings", "train.epocs=3", cwd=tmp_path, words=["did you mean train.epochs?"])


def of_idx(folder):
    return [f"dataset.source.path={folder}", "dataset.source.kind=idx", f"dataset.source.classes=[{','.join(CLASSES)}]"]


@pytest.mark.spark
def test_a_missing_source(refused_here, tmp_path):
    refused_here("ingest", "dataset.source.path=/nowhere", words=["/nowhere: no such folder"])
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.spark
def test_a_cut_idx_file(refused_here, tmp_path):
    folder = write_idx_folder(tmp_path / "idx", train_rows=50, test_rows=20)
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-99])
    refused_here("ingest", *of_idx(folder), words=[str(path), "is cut or damaged"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.spark
def test_more_labels_than_images(refused_here, tmp_path):
    folder = write_idx_folder(tmp_path / "idx", train_rows=50, test_rows=20)
    write_idx(folder, "train-labels-idx1-ubyte", make_images(51, 0)[1])
    refused_here(
        "ingest",
        *of_idx(folder),
        words=["has 50 images, but", "has 51 labels: give files of one and the same data set"],
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.spark
def test_a_missing_dataset(refused_here, tmp_path):
    refused_here("compare", words=["no dataset here", "run `ingest` first"])
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.spark
def test_more_workers_than_slots(refused_here, tmp_path, dataset):
    overrides = [f"dataset.path={dataset}", "workers.count=4", "train.batch_size=32", "model.width=8"]
    words = ["workers.count is 4, but local[2] has 2 slots", "local[4]"]
    refused("compare", *overrides, cwd=tmp_path, words=words)
    refused_here("train", *overrides, words=words)
    assert not list(tmp_path.rglob("*.json"))
    assert not list(tmp_path.rglob("*.db"))


def test_java_that_is_missing_or_too_old(tmp_path):
    refused(
        "ingest",
        cwd=tmp_path,
        env={"JAVA_HOME": str(tmp_path)},
        words=["needs Java 17 or newer", "JAVA_HOME", "apt-get"],
    )
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\" 2019-01-15' >&2\n")
    java.chmod(0o755)
    refused("ingest", cwd=tmp_path, env={"JAVA_HOME": str(tmp_path)}, words=[f"{java} is version 11"])


@pytest.mark.spark
def test_tables_and_columns_that_are_missing(refused_here, spark):
    table = ("dataset.source.kind=table", "dataset.image.shape=[1,12,12]")
    refused_here(
        "ingest", *table, "dataset.source.path=no.such", words=["table no.such cannot be opened: [TABLE_OR_VIEW"]
    )
    spark.range(3).createOrReplaceTempView("no_images")
    refused_here(
        "ingest", *table, "dataset.source.path=no_images", words=["no_images has no column 'image'", "it has id"]
    )
    spark.catalog.dropTempView("no_images")


@pytest.mark.spark
def test_errors_of_spark_itself_are_one_line(spark, capsys):
    def fails(call, *words):
        with pytest.raises(SystemExit) as ended:
            commands.main(call)
        written = capsys.readouterr()
        assert_one_error(ended.value.code, *written, words)
        assert written.err.count("\n") == 1  # and nothing of Spark's own beside it

    fails(lambda: spark.table("no.such"), "error: Spark: [TABLE_OR", "`no`.`such` cannot be found")
    fails(lambda: spark.sql("SELECT nothing FROM range(3)"), "error: Spark: [UNRESOLVED_COLUMN", "`nothing` cannot be")
    fails(lambda: spark.sql("SELECT 1 +"), "error: Spark: ", "[PARSE_SYNTAX_ERROR]")
    fails(lambda: spark.sparkContext._jvm.java.lang.Integer.parseInt("x"), 'error: Spark: For input string: "x"')
    fails(lambda: spark.sql("SELECT 1 / id FROM range(3)").collect(), "error: Spark: [DIVIDE_BY_ZERO]")


INTERRUPTED = """
import sys
import time
from pathlib import Path

import typer

from pipeline.__main__ import main
from pipeline.cluster import get_session
from pipeline.config.cluster import SparkSettings


def wait(frames, begun=sys.argv[1]):
    Path(begun).touch()
    time.sleep(100)
    yield from frames


app = typer.Typer(pretty_exceptions_enable=False)
spark = get_session(SparkSettings(master="local[1]"), "sparknorm tests")
app.command()(lambda: spark.range(1).mapInPandas(wait, "id long").collect())
main(lambda: app([]))
"""


@pytest.mark.spark
def test_ctrl_c_while_spark_works_is_one_line(tmp_path):
    """In a process of its own, since the signal is for all of it."""
    begun = tmp_path / "begun"
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(begun)], stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    ) as process:  # fmt: skip
        until = time.monotonic() + 100
        while not begun.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped by Ctrl-C: give the same command again" in said
    assert "Traceback" not in said


def test_spark_that_does_not_start(tmp_path):
    starts = "Spark does not start with spark.master"
    refused("train", "spark.master=nonsense", cwd=tmp_path, words=[f"{starts} nonsense", "Master must either be yarn"])
    memory = "spark.conf.spark.driver.memory=lots"
    refused("compare", memory, cwd=tmp_path, words=[f"{starts} local[2]", "Invalid maximum heap size: -Xmxlots"])
    memory = "spark.conf.spark.driver.memory=99999g"
    refused("compare", memory, cwd=tmp_path, words=[f"{starts} local[2]", "Could not reserve enough space for"])


@pytest.mark.slow
@pytest.mark.spark
def test_a_master_that_does_not_answer(tmp_path):
    nobody = "spark://127.0.0.1:1"
    refused("train", f"spark.master={nobody}", cwd=tmp_path, words=[nobody, "no master answers there"], seconds=110)


KILLED = """
from pipeline.__main__ import main
from pipeline.cluster import get_session
from pipeline.config.cluster import SparkSettings

spark = get_session(SparkSettings(master="local[1]"), "sparknorm tests")
process = spark.sparkContext._gateway.proc
process.kill()
process.wait(30)
main(lambda: spark.range(3).collect())
"""


KILLED_AT_WORK = """
import time
from pipeline.__main__ import main
from pipeline.cluster import get_session
from pipeline.cluster.progress import spark_tasks
from pipeline.config.cluster import SparkSettings

def run():
    spark = get_session(SparkSettings(master="local[1]"), "sparknorm tests")
    with spark_tasks(spark, "work"):
        spark.range(3).count()
        spark.sparkContext._gateway.proc.kill()
        time.sleep(2)
        spark.range(3).collect()

main(run)
"""


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.parametrize("script", [KILLED, KILLED_AT_WORK], ids=["before", "at work"])
def test_java_that_is_killed(tmp_path, script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=False)  # fmt: skip
    assert_one_error(done.returncode, done.stdout, done.stderr, ["the driver's Java process has ended (exit code -9)"])


def test_java_that_does_not_answer(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    java = tmp_path / "bin" / "java"
    java.write_text("#!/bin/sh\nexec sleep 60\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setattr("pipeline.java._ANSWER_SECONDS", 0.5)
    with pytest.raises(JavaError, match=f"or newer, but {java} does not say within 0.5 s which version it is: install"):
        require_java()
    java.write_text("no program")
    with pytest.raises(
        JavaError, match=rf"or newer, but {java} does not run \(\[Errno 8\] Exec format error.*: install"
    ):
        require_java()


def test_debug_shows_where_an_error_came_from(tmp_path):
    done = command("--debug", "settings", *options(["train.epocs=3"]), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: " in done.stderr
    assert "Traceback (most recent call last)" in done.stderr
    assert "pipeline.config.settings.SettingsError: " in done.stderr


def test_make_says_the_same_before_it_installs_anything(tmp_path):
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "constraints.txt").touch()
    (tmp_path / "pipeline").mkdir()
    for name in ("__init__.py", "java.py"):
        (tmp_path / "pipeline" / name).write_bytes((REPOSITORY / "pipeline" / name).read_bytes())
    env = {**os.environ, "JAVA_HOME": "/nowhere", "PYTHONPATH": ""}
    make = ["make", "-C", str(tmp_path), "setup", f"PYTHON={sys.executable}"]
    done = subprocess.run(make, capture_output=True, text=True, timeout=60, env=env, check=False)
    assert done.returncode != 0
    assert "Spark needs Java 17 or newer, but JAVA_HOME=/nowhere has no bin/java: install it" in done.stderr
    assert not (tmp_path / ".venv").exists()
