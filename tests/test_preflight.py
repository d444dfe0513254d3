"""`doctor` on real Spark: all well, and each thing that can be missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline import preflight, probe, storage
from pipeline.preflight import examine, healthy

pytestmark = pytest.mark.spark


def states(findings):
    return {finding.check: finding.state for finding in findings}


def detail(findings, check):
    return next(finding.detail for finding in findings if finding.check == check)


def changed(settings, section, **changes):
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=changes)})


def test_a_healthy_cluster(spark, settings):
    findings = examine(spark, settings)
    assert healthy(findings), findings
    assert set(states(findings).values()) == {"ok"}
    assert "2 slots for 2 workers" in detail(findings, "slots")
    assert "1, 2, 4 workers divide" in detail(findings, "dataset")
    assert "Java 1" in detail(findings, "Java") or "Java 2" in detail(findings, "Java")
    assert "summed over 2 workers" in detail(findings, "network between workers")
    assert not list(Path(settings.output).glob("doctor-*"))  # what it wrote is gone


def test_what_is_missing_is_named_and_the_rest_is_still_looked_at(spark, settings):
    broken = changed(
        changed(settings, "dataset", path=f"{settings.output}/none"), "tracking", uri="sqlite:////proc/no.db"
    )
    findings = examine(spark, broken)
    assert not healthy(findings)
    found = states(findings)
    assert (found["dataset"], found["network"], found["same dataset"]) == ("failed", "skipped", "skipped")
    assert (found["tracking"], found["slots"], found["workers"]) == ("failed", "ok", "ok")
    assert "tracking.uri" in detail(findings, "tracking")
    assert found["storage"] == "failed"  # no worker can read the dataset's manifest
    assert "rank 0 on" in detail(findings, "storage")


def test_too_few_slots_leave_nothing_running(spark, settings):
    findings = examine(spark, changed(settings, "workers", count=4))
    assert states(findings)["slots"] == "failed"
    assert "set workers.count to at most 2" in detail(findings, "slots")
    assert states(findings)["workers"] == "skipped"


def test_an_output_that_workers_do_not_see(spark, settings, monkeypatch):
    publish = storage.publish
    monkeypatch.setattr(
        preflight.storage, "publish", lambda path, data: None if path.endswith("/driver") else publish(path, data)
    )
    findings = examine(spark, settings)
    assert states(findings)["storage"] == "failed"
    assert "set `output` to a place that all share" in detail(findings, "storage")


def test_a_disk_that_is_nearly_full_is_a_doubt_and_a_full_one_a_failure(spark, settings, monkeypatch):
    for least, state in ((preflight.LITTLE_BYTES - 1, "warning"), (preflight.TOO_LITTLE_BYTES - 1, "failed")):
        reports = [{"host": "a", "free_bytes": {"output": None, "local": least}}]
        with pytest.raises((preflight._ProblemError, preflight._DoubtError)) as raised:
            preflight._disk(reports)
        assert (raised.type is preflight._DoubtError) == (state == "warning")
        assert "GiB free on the local disk of a" in str(raised.value)


def test_one_gpu_for_two_workers_is_a_failure(settings):
    reports = [{"rank": rank, "host": "a", "gpu": "0", "device": "cuda:0"} for rank in range(2)]
    with pytest.raises(preflight._ProblemError, match=r"set workers\.task_gpus=1"):
        preflight._gpus(settings, reports)


def test_the_command_prints_a_table_and_leaves_json(settings, tmp_path):
    config = tmp_path / "study.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    command = [sys.executable, "-m", "pipeline", "doctor", "-c", str(config)]
    done = subprocess.run([*command, "-o", "workers.count=1"], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    left = json.loads(Path(done.stdout.strip()).read_text())
    assert left["healthy"]
    assert {finding["check"] for finding in left["findings"]} >= {"slots", "Java", "storage", "disk", "GPUs"}
    assert "can it train here?" in done.stderr


def test_the_probe_alone_tells_what_it_cannot_see(tmp_path, dataset):
    from pipeline.worker import alone

    report = probe.probe(alone("cpu"), probe.Task(str(tmp_path / "unseen"), "token", dataset, None))
    assert "written by the driver, is not seen here" in report["problems"][0]
    assert report["digest"].startswith("sha256:")
