"""Secrets that are planted wherever one may write them are in nothing that runs leave: files, MLflow's store and
database, logs, and what the driver writes to its terminal.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import rank_faults
from mlflow_server import MlflowServer
from small_data import CLASSES, make_images, write_idx, write_idx_folder

from pipeline import __main__ as commands
from pipeline.config import Settings, load_settings
from pipeline.data import load_manifest
from pipeline.driver import trial
from pipeline.driver.record import Record
from pipeline.driver.trial import run_trial
from pipeline.study import job
from pipeline.tracking import Tracker
from pipeline.training import predictions

pytestmark = [pytest.mark.spark, pytest.mark.long]

REPOSITORY = Path(__file__).parents[1]
PLANTED = "hunter2x7"
# An error as drivers of storage, databases and the web write them.
FAILURE = (
    f"cannot open s3a://AKIA:{PLANTED}@bucket/x?X-Amz-Signature={PLANTED} with {{'secret': '{PLANTED}', 'a': 1}}: "
    f"(psycopg2) postgresql+psycopg2://me:{PLANTED}@host/db; fs.azure.account.key.me.net={PLANTED}; "
    f"Authorization: Bearer {PLANTED}"
)


def found_in(folder: Path) -> list[str]:
    """The files below a folder that hold what was planted, also where they are compressed."""
    return [str(path) for path in sorted(folder.rglob("*")) if path.is_file() and PLANTED in text_of(path)]


def text_of(path: Path) -> str:
    data = path.read_bytes().decode(errors="replace")
    if path.suffix == ".parquet":
        data += str(pq.read_table(path).to_pylist())
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            data += "".join(archive.read(name).decode(errors="replace") for name in archive.namelist())
    return data


def overrides(folder: Path, tracking_uri: str) -> list[str]:
    """Settings of a small study whose folders have names with secrets in them."""
    source = write_idx_folder(folder / f"idx;token={PLANTED}", train_rows=600, test_rows=200)
    labels = make_images(600, 1)[1]
    labels[7] = 99  # no class: this image is set aside, with the path that it came from
    write_idx(source, "train-labels-idx1-ubyte", np.asarray(labels))
    return [
        f"output={folder}/runs;password={PLANTED}", f"dataset.path={folder}/data;sig={PLANTED}", "dataset.name=halves",
        "dataset.source.kind=idx", f"dataset.source.path={source}", f"dataset.source.classes=[{','.join(CLASSES)}]",
        "dataset.validation_share=0.2", "dataset.row_group_rows=30", f"tracking.uri={tracking_uri}",
        f"tracking.artifacts={folder}/artifacts", "tracking.system_metrics=false",
        f"spark.conf.spark.hadoop.fs.s3a.secret.key={PLANTED}", f"spark.conf.spark.x.url=ftp://me:{PLANTED}@host",
        f"spark.conf.spark.hadoop.fs.azure.account.key.me={PLANTED}", "model.width=4", "model.norm=batch",
        "train.batch_size=32", "train.lanes=4", "train.epochs=1", "train.evaluations_per_epoch=1",
        "train.learning_rate=0.05", "compare.seeds=[0]",
    ]  # fmt: skip


def options(lines: list[str]) -> list[str]:
    return ["-c", "conf/quickstart.yaml", *(part for line in lines for part in ("-o", line))]


def train_and_fail(spark, settings: Settings) -> None:
    """A training whose storage fails with an error that has secrets in it."""
    hook = rank_faults.storage_fails(FAILURE, rank=1, step=2)
    run_trial(spark, settings, Tracker(settings.tracking), name="fails", hook=hook)


def test_planted_secrets_are_in_nothing_that_runs_leave(spark, tmp_path, monkeypatch, capfd, empty_store):
    monkeypatch.chdir(REPOSITORY)
    store = tmp_path / f"store;token={PLANTED}"
    store.mkdir()
    (store / "mlflow.db").write_bytes(empty_store.read_bytes())
    lines = overrides(tmp_path, f"sqlite:///{store}/mlflow.db")
    settings = load_settings("conf/quickstart.yaml", lines)
    for name in ("ingest", "compare"):
        commands.main(lambda name=name: commands.app([name, *options(lines)], standalone_mode=False))
    with pytest.raises(SystemExit):
        commands.main(lambda: train_and_fail(spark, settings))
    written = capfd.readouterr()
    assert PLANTED not in written.out + written.err
    assert f"{tmp_path}/runs;password=***" in written.out
    assert "OSError: cannot open s3a://***@bucket/x" in written.err

    (output,) = tmp_path.glob("runs;*")
    left = [path for path in tmp_path.rglob("*") if path.is_file() and "idx;" not in str(path)]
    names = {path.name for path in left}
    assert {"record.json", "comparison.json", "report.html", "ingest.json", "mlflow.db", "MLmodel"} <= names
    assert any(path.match("events/*.jsonl") for path in left)
    assert any(path.match("ranks/failure-*.json") for path in left)
    assert any(path.match("quarantine/*.parquet") for path in left)
    assert found_in(tmp_path) == []
    assert json.loads((output / "comparison.json").read_text())["settings"]["spark"]["conf"] == {
        "spark.hadoop.fs.s3a.secret.key": "***", "spark.x.url": "ftp://***@host",
        "spark.hadoop.fs.azure.account.key.me": "***",
    }  # fmt: skip
    assert "***" in (output / "report.html").read_text()
    # What is masked in a record is whole for whoever goes on from it.
    (record,) = [Record(str(path.parent)) for path in output.glob("trials/*seed*/record.json")]
    assert len(predictions.read(record.result().predictions)) == 200


def test_another_password_begins_nothing_anew(settings):
    """What was begun is found by names and digests that hold no secret."""
    manifest = load_manifest(settings.dataset.path)
    changed = settings.model_copy(
        update={
            "tracking": settings.tracking.model_copy(update={"uri": "postgresql://me:another@host/db"}),
            "spark": settings.spark.model_copy(update={"conf": {"spark.hadoop.fs.s3a.secret.key": "another"}}),
        }
    )
    assert job._find_record(changed, manifest).folder == job._find_record(settings, manifest).folder
    folders = [trial._begin(each, manifest, "small", None).record.folder for each in (settings, changed)]
    assert folders[0] == folders[1]


@pytest.mark.slow
def test_real_commands_with_real_stores_and_sparks_event_log_leave_none(tmp_path):
    """In processes of their own: Spark has the secrets as properties, and MLflow's server gets a password."""
    (tmp_path / "server").mkdir()
    (tmp_path / "log").mkdir()
    server = MlflowServer(tmp_path / "server")
    server.start()
    try:
        lines = overrides(tmp_path, server.uri.replace("//", f"//me:{PLANTED}@"))
        lines += ["spark.conf.spark.eventLog.enabled=true", f"spark.conf.spark.eventLog.dir=file://{tmp_path}/log",
                  "spark.conf.spark.eventLog.compress=false"]  # fmt: skip
        for name in ("ingest", "train", "compare", "doctor", "settings"):
            done = command(name, lines)
            assert done.returncode == 0, done.stderr[-3000:]
            assert PLANTED not in done.stdout + done.stderr, name
        failing = command("train", [*lines, "train.learning_rate=1e30", "train.on_divergence=fail", "train.epochs=2"])
        lost = command("train", [*lines, f"tracking.uri=http://me:{PLANTED}@127.0.0.1:1"])
        debug = command("train", [*lines, f"tracking.uri=postgresql://me:{PLANTED}@127.0.0.1:1/x"], "--debug")
    finally:
        server.kill()
    assert (failing.returncode, lost.returncode, debug.returncode) == (1, 1, 1)
    assert "Traceback" in debug.stderr
    for done in (failing, lost, debug):
        assert PLANTED not in done.stdout + done.stderr
    assert "http://***@127.0.0.1:1" in lost.stderr
    logs = "".join(path.read_text() for path in (tmp_path / "log").rglob("*") if path.is_file())
    assert '"spark.hadoop.fs.s3a.secret.key":"*********(redacted)"' in logs
    assert '"spark.hadoop.fs.azure.account.key.me":"*********(redacted)"' in logs
    assert [path for path in found_in(tmp_path) if "/idx;" not in path] == []


def command(name: str, lines: list[str], *before: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pipeline", *before, name, *options(lines)]
    return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)
