"""The driver is killed in the middle of a command, or away for a while; and the same command is given again."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import mlflow
import psutil
import pytest
from command_process import again, family, in_a_process, is_under_way, steps_in_mlflow, wait_for
from small_training import Running, equal, final_state, launch, make_job, make_settings, trial_folder

from pipeline.driver.lease import BusyError, newest_number, record_path
from pipeline.driver.trial import run_trial
from pipeline.tracking.tracker import Tracker

pytestmark = [pytest.mark.spark, pytest.mark.long]

EPOCHS = 24


@pytest.fixture(scope="module")
def tracking_uri(empty_store, tmp_path_factory):
    """One store for all tests."""
    return f"sqlite:///{shutil.copy(empty_store, tmp_path_factory.mktemp('mlflow'))}"


@pytest.fixture(scope="module")
def undisturbed(spark, dataset, tmp_path_factory):
    """The job of a training that nobody kills, and its result."""
    job = make_job(dataset, tmp_path_factory.mktemp("undisturbed"), epochs=EPOCHS)
    outcome = launch(spark, job)
    assert outcome.result is not None, outcome.error
    return job, outcome.result.model_dump(mode="json")


def kill(process):
    """SIGKILL of the driver alone. Its JVM, its executors and their Python workers must end by themselves."""
    _, *below = family(process.pid)
    assert "java" in {member.name() for member in below}
    process.kill()
    process.wait(30)
    _, left = psutil.wait_procs(below, timeout=60)
    for member in left:
        member.kill()
    assert left == []


def read(path):
    return json.loads(Path(path).read_text())


def newest_record(folder):
    return read(record_path(str(folder), newest_number(str(folder))))


def test_train_goes_on_in_the_same_run_with_the_same_bits(spark, undisturbed, dataset, tracking_uri, tmp_path):
    job, expected = undisturbed
    settings = make_settings(job, tmp_path / "runs", tracking_uri, "killed")
    tracker = Tracker(settings.tracking)
    with in_a_process("train", settings, tmp_path) as process:
        folder = wait_for("trial", lambda: trial_folder(settings.output), process, tmp_path)
        wait_for("step 60", lambda: is_under_way(folder), process, tmp_path)
        # A second driver that wants the same.
        with pytest.raises(BusyError, match=rf"is being trained by process {process.pid} on \S+: wait for it, end it"):
            run_trial(spark, settings, tracker, name="small batch seed=0")
        assert process.poll() is None
        kill(process)
    record = newest_record(folder)
    assert "result" not in record
    again("train", settings, tmp_path)
    result = read(tmp_path / "runs" / "train.json")
    assert result["run_id"] == record["run_id"]
    assert result["attempts"] == 2
    assert result["curve"] == expected["curve"]
    assert equal(final_state(job), final_state(make_job(dataset, folder, epochs=EPOCHS)))
    (run,) = mlflow.MlflowClient(tracking_uri).search_runs([tracker.experiment_id])
    assert (run.info.run_id, run.info.status) == (record["run_id"], "FINISHED")
    assert steps_in_mlflow(tracking_uri, record["run_id"]) == list(range(1, result["steps"] + 1))


def test_compare_goes_on_with_the_trial_it_was_at(undisturbed, dataset, tracking_uri, tmp_path):
    job, _ = undisturbed
    arms = {"grid": {"model.norm": ["none", "batch"], "train.learning_rate": [0.1]}, "seeds": [0]}
    settings = make_settings(job, tmp_path / "runs", tracking_uri, "compared", master="local[2]", compare=arms)
    trials, studies = (Path(settings.output, name) for name in ("trials", "studies"))

    def second_trial():
        return [folder for folder in trials.glob("small-batch-*") if is_under_way(folder)]

    with in_a_process("compare", settings, tmp_path) as process:
        (begun,) = wait_for("second trial", second_trial, process, tmp_path)
        kill(process)
    (finished,), (study,) = trials.glob("small-none-*"), studies.glob("*")
    before, parent = newest_record(finished), newest_record(study)["run_id"]
    again("compare", settings, tmp_path)
    # The trial that was finished is not trained again, and the other went on where it was.
    assert newest_record(finished) == before
    assert newest_record(begun)["result"]["attempts"] == 2
    assert equal(final_state(job), final_state(make_job(dataset, begun, epochs=EPOCHS)))
    comparison = read(Path(settings.output, "comparison.json"))
    assert comparison["mlflow"]["parent_run_id"] == parent
    none, batch = comparison["runs"]
    assert none["run_id"] == before["run_id"]
    # One parent and two children, each step once.
    experiment = Tracker(settings.tracking).experiment_id
    runs = mlflow.MlflowClient(tracking_uri).search_runs([experiment])
    assert {run.info.run_id for run in runs} == {parent, none["run_id"], batch["run_id"]}
    assert {run.info.status for run in runs} == {"FINISHED"}
    for arm in (none, batch):
        assert steps_in_mlflow(tracking_uri, arm["run_id"]) == list(range(1, arm["steps"] + 1))


@pytest.mark.slow
def test_a_search_that_is_killed_twice_goes_on_and_chooses_the_same(spark, dataset, tracking_uri, tmp_path):
    """In the second rung of the first seed, and in the second seed; another study of the same settings is not killed.

    Two rates that are close train 100 and 200 steps each, twice: no step twice, and all numbers are equal.
    """
    search = {"grid": {"train.learning_rate": [0.1, 0.1001]}, "seeds": [0], "search_budget": 2.0}
    compared = {**search, "search_extensions": 0}
    job = make_job(dataset, tmp_path, epochs=EPOCHS)
    settings, undisturbed = (
        make_settings(job, tmp_path / name, tracking_uri, name, master="local[2]", compare=compared)
        for name in ("killed-search", "undisturbed-search")
    )
    trials = Path(settings.output, "trials")

    def is_in_second_rung():
        return any(beat.step >= 150 for folder in trials.glob("*") for beat in Running(folder).beats().values())

    def is_in_second_seed():
        folders = list(trials.glob("*"))
        return len(folders) > 2 and any(
            beat.step >= 50 for beat in Running(trial_folder(settings.output)).beats().values()
        )

    for number, moment in enumerate((is_in_second_rung, is_in_second_seed)):
        with in_a_process("compare", settings, tmp_path / str(number)) as process:
            wait_for(moment.__name__, moment, process, tmp_path / str(number))
            kill(process)
    again("compare", settings, tmp_path)
    again("compare", undisturbed, tmp_path)
    killed, expected = (read(Path(each.output, "comparison.json")) for each in (settings, undisturbed))
    assert [(trial["seed"], trial["rungs"], trial["steps"]) for trial in killed["search"]] == [
        (1000, 2, 300), (1000, 2, 300), (1001, 2, 300), (1001, 2, 300),
    ]  # fmt: skip
    scores = ("tuned", "seed", "final_accuracy", "final_loss", "final_balanced_accuracy", "learned")
    assert [[trial[key] for key in scores] for trial in killed["search"]] == [
        [trial[key] for key in scores] for trial in expected["search"]
    ]
    choice = ("tuned", "search_tied", "search_undecided", "search_seeds", "search_cost")
    assert [killed["arms"][0][key] for key in choice] == [expected["arms"][0][key] for key in choice]
    assert killed["search_cost"] == 1200 / 600
    assert killed["arms"][0]["search_seeds"] == 2, killed["search"]
    assert killed["runs"][0]["curve"] == expected["runs"][0]["curve"]
    attempts = sum(trial["attempts"] for trial in killed["search"])
    assert attempts == sum(trial["attempts"] for trial in expected["search"]) + 2
    for trial in [*killed["search"], *killed["runs"]]:
        assert steps_in_mlflow(tracking_uri, trial["run_id"]) == list(range(1, trial["steps"] + 1))
    runs = mlflow.MlflowClient(tracking_uri).search_runs([Tracker(settings.tracking).experiment_id])
    assert len(runs) == 1 + 4 + 1
    assert {run.info.status for run in runs} == {"FINISHED"}


# A process with another namespace of processes is of another machine: its number means nothing elsewhere.
ANOTHER_MACHINE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def can_be_another_machine():
    return bool(shutil.which("unshare")) and subprocess.run([*ANOTHER_MACHINE, "true"], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_be_another_machine(), reason="needs the right to make a namespace of processes (unshare)")
def test_a_driver_that_was_away_is_succeeded_from_elsewhere_and_told_so(undisturbed, dataset, tracking_uri, tmp_path):
    """The driver and all below it stand still, as a suspended host does, for longer than its lease; and then go on."""
    job, expected = undisturbed
    settings = make_settings(job, tmp_path / "runs", tracking_uri, "away")
    with in_a_process("train", settings, tmp_path / "here") as old:
        folder = wait_for("trial", lambda: trial_folder(settings.output), old, tmp_path / "here")
        wait_for("step 60", lambda: is_under_way(folder), old, tmp_path / "here")
        members = family(old.pid)
        for member in members:
            member.send_signal(signal.SIGSTOP)
        with in_a_process("train", settings, tmp_path / "there", within=ANOTHER_MACHINE) as new:
            assert new.wait(300) == 0, Path(tmp_path, "there", "errors").read_text()[-3000:]
        record, result = newest_record(folder), read(tmp_path / "runs" / "train.json")
        for member in members:
            member.send_signal(signal.SIGCONT)
        assert old.wait(90) == 1
    told = Path(tmp_path, "here", "errors").read_text()
    driver = record["driver"]
    assert f"was taken over by process {driver['pid']} on {driver['host']} at {driver['since']}" in told
    assert "Traceback" not in told
    # What the new driver has made is as it left it.
    assert newest_record(folder) == record
    assert record["result"]["attempts"] == 2
    assert read(tmp_path / "runs" / "train.json") == result
    assert result["curve"] == expected["curve"]
    assert equal(final_state(job), final_state(make_job(dataset, folder, epochs=EPOCHS)))
    (run,) = mlflow.MlflowClient(tracking_uri).search_runs([Tracker(settings.tracking).experiment_id])
    assert (run.info.run_id, run.info.status) == (result["run_id"], "FINISHED")
    assert "failure" not in run.data.tags
    assert steps_in_mlflow(tracking_uri, result["run_id"]) == list(range(1, result["steps"] + 1))
