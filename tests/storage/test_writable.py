"""Places that settings name and that cannot be written: real files in the way, real disks that are full or read-only.

Permission bits do not stop root, who may run the tests: what they forbid is tried as another user.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from mounts import on_a_disk

from pipeline import __main__ as commands
from pipeline import storage
from pipeline.config.study import TrackingSettings
from pipeline.data.manifest import DatasetError
from pipeline.driver import doctor, train
from pipeline.ingest import ingest
from pipeline.serving import export, register, score
from pipeline.storage.writable import NotWritableError, check_writable, prepare_output
from pipeline.study import compare, tune
from pipeline.tracking import Tracker

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "conf" / "quickstart.yaml"
CHECK = "import sys; from pipeline.storage.writable import check_writable; check_writable('output', sys.argv[1])"


@pytest.fixture
def file(tmp_path):
    """A file, where a user wants a folder."""
    path = tmp_path / "file"
    path.write_text("precious")
    return path


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    check_writable("output", str(tmp_path))
    check_writable("output", str(tmp_path / "new" / "folder"))
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_result_is_removed(tmp_path):
    (tmp_path / "train.json").touch()
    (tmp_path / "other.json").touch()
    prepare_output(str(tmp_path), "train.json", "score.json")
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_storage_elsewhere_is_not_asked(remote):
    check_writable("output", f"{remote}/runs")
    assert not storage.exists(f"{remote}/runs")


def test_what_can_only_be_read_is_refused_at_once():
    with pytest.raises(NotWritableError) as refused:
        prepare_output("http://127.0.0.1:1/runs", "train.json")
    assert str(refused.value) == (
        "output http://127.0.0.1:1/runs cannot be written: http is for reading only; choose another output"
    )


@pytest.mark.parametrize("below", ["", "/runs", "/runs/deep"])
def test_a_file_in_the_way_is_named(file, below):
    with pytest.raises(NotWritableError) as refused:
        check_writable("output", f"{file}{below}")
    assert str(refused.value) == (
        f"output {file}{below} cannot be written from {socket.gethostname()}: Not a directory, since {file} is a "
        "file: move it away, or choose another output"
    )
    assert file.read_text() == "precious"


def refused(words, *, cwd, user=None):
    """The one line that a process ends with which checks, or a command."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(words, cwd=cwd, user=user, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fill": False, "options": ["ro"]}, "Read-only file system: let this user write there"),
        ({"fill": True, "options": ["size=16k"]}, "No space left on device: make room there"),
    ],
)
def test_a_disk_that_takes_nothing(tmp_path, options, says):
    """By the command, and by what it asks."""
    disk = tmp_path / "disk"
    disk.mkdir()
    within = on_a_disk(disk, *options["options"], fill=options["fill"])
    told = f"output {disk}/runs cannot be written from {socket.gethostname()}: {says}, or choose another output"
    assert told in refused([*within, sys.executable, "-c", CHECK, f"{disk}/runs"], cwd=tmp_path)
    words = [sys.executable, "-m", "pipeline", "train", "-c", str(QUICKSTART), "-o", f"output={disk}/runs"]
    assert refused([*within, *words], cwd=tmp_path) == f"error: {told}"


PUBLISH = """
import sys
from pipeline import storage
from pipeline.storage.writable import naming_setting
with naming_setting("score.output", sys.argv[1]):
    storage.publish(sys.argv[1] + "/parts/one", bytes(100_000))
"""


@pytest.mark.parametrize(("option", "says"), [("ro", "let the user of the workers write"), ("size=64k", "make room")])
def test_a_disk_that_takes_no_file_of_a_task(tmp_path, option, says):
    """After the check before the launch, or on another host than that."""
    disk = tmp_path / "disk"
    disk.mkdir()
    told = refused([*on_a_disk(disk, option), sys.executable, "-c", PUBLISH, str(disk)], cwd=tmp_path)
    assert told.startswith("pipeline.storage.writable.NotWritableError: [Errno ")
    assert f"'{disk}/parts" in told
    assert told.endswith(f": {says} there, or choose another score.output")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_permission_that_is_missing(tmp_path):
    """In a process that becomes another user once it has imported all: that user may not see the project."""
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        try:
            check_writable("output", str(tmp_path / "runs"))
        except NotWritableError as error:
            os._exit(0 if "Permission denied: let this user write there, or choose another output" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("name", ["ingest", "train", "compare", "tune", "score", "doctor"])
def test_commands_say_so_before_spark_starts(file, name, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main(lambda: commands.app([name, "-c", str(QUICKSTART), "-o", f"output={file}/runs"]))
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: output {file}/runs cannot be written from ")


@pytest.mark.parametrize("job", [ingest, train, compare, tune, score, doctor])
def test_programs_are_told_by_an_error(settings, file, job):
    with pytest.raises(NotWritableError, match=r"^output \S+ cannot be written from \S+: Not a directory"):
        job(None, settings.model_copy(update={"output": str(file)}))


@pytest.mark.parametrize("job", [export, register])
def test_programs_without_spark_are_told_too(settings, file, job):
    with pytest.raises(NotWritableError, match=r"^output \S+ cannot be written from \S+: Not a directory"):
        job(settings.model_copy(update={"output": str(file)}))


@pytest.mark.spark
def test_ingest_names_dataset_path(spark, settings, file):
    other = settings.dataset.model_copy(update={"path": f"{file}/dataset"})
    with pytest.raises(NotWritableError, match=f"^dataset.path {file}/dataset cannot be written from "):
        ingest(spark, settings.model_copy(update={"dataset": other}))


def test_a_file_in_the_place_of_a_dataset_is_no_dataset(settings, file):
    other = settings.dataset.model_copy(update={"path": f"{file}/dataset"})
    with pytest.raises(DatasetError, match=f"^{file}/dataset: no dataset here"):
        train(None, settings.model_copy(update={"dataset": other}))


@pytest.mark.parametrize("uri", ["sqlite:///{}/mlflow.db", "file://{}/store", "{}/store"])
def test_tracking_uri_is_named(file, uri):
    with pytest.raises(NotWritableError, match=rf"^tracking.uri {file}\S* cannot be written from "):
        Tracker(TrackingSettings(uri=uri.format(file), artifacts="artifacts"))


def test_tracking_artifacts_is_named(settings, tmp_path):
    """Of a new experiment, and of one whose folder has become another thing since."""
    file = tmp_path / "artifacts"
    file.touch()
    for _ in range(2):
        with pytest.raises(NotWritableError, match=f"^tracking.artifacts {file} cannot be written from "):
            Tracker(settings.tracking)
        experiment = mlflow.MlflowClient(settings.tracking.uri).get_experiment_by_name(settings.tracking.experiment)
        if experiment is None:
            file.unlink()
            Tracker(settings.tracking)
            file.touch()
    assert experiment is not None
