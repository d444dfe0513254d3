"""`doctor` on real Spark: all well, and each thing that can be missing."""

import dataclasses
import json
import re
import socket
import sys
import time
from pathlib import Path

import pytest
import yaml
from pyspark import cloudpickle
from small_training import make_job

from pipeline import __main__ as commands
from pipeline import storage
from pipeline.cluster import rendezvous, resources
from pipeline.cluster.errors import LaunchError
from pipeline.distributed.worker import alone
from pipeline.driver import doctor
from pipeline.driver.doctor import LITTLE_BYTES, CheckFailedError, DoubtfulError, check_disk, check_jpeg
from pipeline.training import probe as probe_module
from pipeline.training.job import TOKEN, check_host, facts, identity
from pipeline.training.probe import ProbeTask, WorkerReport, probe

pytestmark = [pytest.mark.spark, pytest.mark.long]
cloudpickle.register_pickle_by_value(sys.modules[__name__])
doctor_module = sys.modules["pipeline.driver.doctor"]  # the package has a function of that name


def states(result):
    return {finding.check: finding.state for finding in result.findings}


def detail(result, check):
    return next(finding.detail for finding in result.findings if finding.check == check)


def changed(settings, section, **changes):
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=changes)})


def test_a_healthy_cluster(spark, settings):
    result = doctor(spark, settings)
    assert result.healthy, result
    assert set(states(result).values()) == {"ok"}
    assert "2 slots for 2 workers" in detail(result, "slots")
    assert "1, 2, 4 workers divide" in detail(result, "dataset")
    assert "Java 1" in detail(result, "Java") or "Java 2" in detail(result, "Java")
    assert detail(result, "JPEG decoding") == "not needed: images are stored as raw"
    assert "summed over 2 workers" in detail(result, "network between workers")
    assert detail(result, "network between workers").endswith(f" ms: {socket.gethostname()} by 127.0.0.1 (lo)")
    assert sorted(path.name for path in Path(settings.output).glob("doctor*")) == ["doctor.json"]  # the rest is gone
    written = json.loads(Path(settings.output, "doctor.json").read_text())
    assert written == result.model_dump(mode="json")
    assert list(written) == ["healthy", "findings"]
    assert list(written["findings"][0]) == ["check", "state", "detail"]


def test_what_is_missing_is_named_and_the_rest_is_still_looked_at(spark, settings):
    broken = changed(
        changed(settings, "dataset", path=f"{settings.output}/none"), "tracking", uri="sqlite:////proc/no.db"
    )
    result = doctor(spark, broken)
    assert not result.healthy
    found = states(result)
    assert (found["dataset"], found["network"], found["same dataset"]) == ("failed", "skipped", "skipped")
    assert (found["tracking"], found["slots"], found["workers"]) == ("failed", "ok", "ok")
    assert "tracking.uri" in detail(result, "tracking")
    assert found["storage"] == "failed"  # no worker can read the dataset's manifest
    assert "rank 0 on" in detail(result, "storage")


def test_a_network_of_ones_own_is_tried_and_imported_by_executors(spark, settings, tmp_path):
    path = tmp_path / "doctored.py"
    path.write_text(
        "from torch import nn\n\ndef build(image_shape, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(image_shape[1] * image_shape[2], num_classes))\n"
    )
    own = changed(settings, "model", network="doctored:build", norm="keep")
    assert detail(doctor(spark, own), "network").startswith("model.network doctored:build: there is no module doctored")
    own = changed(own, "spark", py_files=(str(path),))
    assert detail(doctor(spark, own), "network") == "doctored:build with norm keep: 435 parameters"


def test_too_few_slots_leave_nothing_running(spark, settings):
    result = doctor(spark, changed(settings, "workers", count=4))
    assert states(result)["slots"] == "failed"
    assert "set workers.count to at most 2" in detail(result, "slots")
    assert states(result)["workers"] == "skipped"


def test_an_output_that_workers_do_not_see(spark, settings, monkeypatch):
    publish = storage.publish

    def lose_what_the_driver_writes(path, data, **options):
        if not path.endswith(("/driver", "/rendezvous.json")):
            publish(path, data, **options)

    monkeypatch.setattr(storage, "publish", lose_what_the_driver_writes)
    result = doctor(spark, settings)
    assert (states(result)["workers"], states(result)["storage"]) == ("ok", "failed")
    for rank in range(2):
        assert re.search(
            rf"rank {rank} on \S+: \S+/driver, written by the driver, is not seen", detail(result, "storage")
        )
    assert "set `output` to a place that all share" in detail(result, "storage")
    assert sorted(path.name for path in Path(settings.output).glob("doctor*")) == ["doctor.json"]


def test_an_output_in_the_memory_of_the_driver(spark, settings, remote):
    """Where each process has its own: ranks see neither the driver's files nor each other's."""
    result = doctor(spark, settings.model_copy(update={"output": remote}))
    assert (states(result)["workers"], states(result)["storage"]) == ("ok", "failed")
    assert "written by the driver, is not seen here" in detail(result, "storage")


def test_workers_that_cannot_join_are_named_with_the_cause(spark, settings, monkeypatch):
    """Whether the time is over first, or Spark gives them up, which it starts again and again."""
    monkeypatch.setattr(doctor_module, "LIMIT_SECONDS", 30.0)
    monkeypatch.setitem(spark.sparkContext.environment, "GLOO_DEVICE_TRANSPORT", "carrier pigeon")
    result = doctor(spark, settings)
    assert states(result)["workers"] == "failed"
    assert re.match(
        r"(the barrier stage of 2 workers did not end within 30 s: rank \d on \S+ \(cpu\) in start, epoch 0, step 0: "
        r"|Spark gave up the barrier stage of 2 workers: \S+)GangBrokenError: rank \d at 127\.0\.0\.1 \(lo\) could not "
        r"join the process group with rank .*unsupported gloo device",
        detail(result, "workers"),
    )
    assert sorted(path.name for path in Path(settings.output).glob("doctor*")) == ["doctor.json"]


def test_storage_that_fails_afterwards_does_not_hide_what_workers_say(spark, settings, monkeypatch):
    remove = storage.remove

    def fail(*_, **__):
        raise LaunchError("the workers' own reason")

    def fail_for_the_probe(path):
        if "/doctor-" in path:
            raise storage.UnreachableError(f"{path} cannot be removed")
        remove(path)

    monkeypatch.setattr(doctor_module, "_LAST_SECONDS", 0.0)
    monkeypatch.setattr(doctor_module.barrier, "run", fail)
    monkeypatch.setattr(storage, "remove", fail_for_the_probe)
    assert "the workers' own reason" in detail(doctor(spark, settings), "workers")


def hang_on_the_second(worker, task):
    if worker.rank == 1:
        time.sleep(1000)
    worker.wait_for_all()


def test_a_worker_that_hangs_is_named_with_its_stack(spark, settings, monkeypatch):
    monkeypatch.setattr(doctor_module, "STALL_SECONDS", 3.0)
    monkeypatch.setattr(probe_module, "probe", hang_on_the_second)
    result = doctor(spark, settings)
    assert states(result)["workers"] == "failed"
    assert re.search(r"rank 1 on \S+ \(cpu\) has been in start at step 0 for \d+ s", detail(result, "workers"))
    assert "in hang_on_the_second" in detail(result, "workers")
    # Not a value of a setting that nobody has set.
    assert settings.workers.stall_seconds == 180
    assert "(the limit of doctor is 3)" in detail(result, "workers")
    assert "workers.stall_seconds" not in detail(result, "workers")
    monkeypatch.setattr(doctor_module, "STALL_SECONDS", 90.0)
    result = doctor(spark, changed(settings, "workers", stall_seconds=4))
    assert "(workers.stall_seconds is 4)" in detail(result, "workers")


def report_of(host, output_free_bytes, local_free_bytes):
    return WorkerReport(0, host, "3.11", "cpu", None, None, output_free_bytes, local_free_bytes, 0.0, ())


def test_a_disk_that_is_nearly_full_is_a_doubt_and_a_full_one_a_failure():
    reports = [report_of("a", None, 9 << 30), report_of("b", 8 << 30, 9 << 30)]
    assert check_disk(reports) == "at least 8.0 GiB free on the output disk of b"
    for least, error in ((LITTLE_BYTES - 1, DoubtfulError), (storage.LEAST_FREE_BYTES - 1, CheckFailedError)):
        with pytest.raises(error, match="GiB free on the local disk of c"):
            check_disk([*reports, report_of("c", 9 << 30, least)])


def test_executors_without_simplejpeg_are_a_doubt():
    reports = [report_of(host, None, 9 << 30) for host in ("a", "b", "b")]
    assert check_jpeg(reports) == "baseline files are decoded by simplejpeg, others by Pillow"
    reports[1:] = [
        dataclasses.replace(each, without_simplejpeg="simplejpeg cannot be imported") for each in reports[1:]
    ]
    with pytest.raises(DoubtfulError, match=r"^on b, simplejpeg cannot be imported: Pillow .* install simplejpeg for"):
        check_jpeg(reports)


def test_one_gpu_for_two_workers_of_a_host_is_a_failure():
    rendezvous.one_gpu_each(["0", "1", "0", None, None], ["a", "a", "b", "b", "b"])
    with pytest.raises(ValueError, match=r"ranks 1 and 2 on b were both assigned GPU 1: set workers\.task_gpus=1"):
        rendezvous.one_gpu_each(["1", "1", "1"], ["a", "b", "b"])


def test_executors_of_two_java_versions_are_a_failure():
    assert resources.equal_java(["17.0.9", "17.0.12"]) == ["17.0.9", "17.0.12"]
    with pytest.raises(ValueError, match=r"executors run Java 17\.0\.9 and 21\.0\.1: install one version everywhere"):
        resources.equal_java(["17.0.9", "21.0.1"])


def test_each_rank_looks_at_the_folder_before_a_launch_and_one_of_each_host_writes(dataset, tmp_path, monkeypatch):
    job = dataclasses.replace(make_job(dataset, tmp_path / "job"), token="of this launch")
    storage.publish(f"{job.folder}/{TOKEN}", b"of this launch")
    assert facts(job) == identity(job)
    check_host(job)
    assert storage.names(job.folder) == [TOKEN]
    monkeypatch.setattr(storage, "LEAST_FREE_BYTES", 1 << 60)
    with pytest.raises(
        ValueError, match=r"job has \d+ MiB left, and checkpoints may not fit: make room, or set `output`"
    ):
        check_host(job)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        storage.check_replaces(str(tmp_path / "file" / "name"), "text")


def test_the_command_prints_a_table_and_leaves_json(spark, settings, tmp_path, capsys):
    config = tmp_path / "study.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    commands.app(["doctor", "-c", str(config), "-o", "workers.count=1"], standalone_mode=False)
    printed = capsys.readouterr()
    left = json.loads(Path(printed.out.strip()).read_text())
    assert left["healthy"]
    assert {finding["check"] for finding in left["findings"]} >= {"slots", "Java", "storage", "disk", "GPUs"}
    assert "can it train here?" in printed.err


def test_the_probe_alone_tells_what_it_cannot_see(tmp_path, dataset):
    report = probe(alone("cpu"), ProbeTask(str(tmp_path / "unseen"), "token", dataset, None))
    assert "written by the driver, is not seen here" in report.problems[0]
    assert report.digest.startswith("sha256:")
