"""A command is told to end, as cluster managers do it (SIGTERM) and people (Ctrl-C), and given again."""

import signal
from pathlib import Path

import mlflow
import pytest
from command_process import again, family, in_a_process, is_under_way, steps_in_mlflow, wait_for
from small_training import TWO, equal, final_state, launch, make_job, make_settings, trial_folder

pytestmark = [pytest.mark.spark, pytest.mark.long]

EPOCHS = 24
# So many that neither of two trials has ended when the other, which may start seconds later, is under way.
EPOCHS_OF_A_STUDY = 60
SECONDS = 45  # for the end of the command; what is not ended by itself is killed by Kubernetes after 30


def runs_of(settings):
    """All MLflow runs of the settings' experiment, by id."""
    client = mlflow.MlflowClient(settings.tracking.uri)
    experiment = client.get_experiment_by_name(settings.tracking.experiment)
    return {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}


def assert_all_killed(runs):
    assert {run.info.status for run in runs.values()} == {"KILLED"}, [run.data.tags for run in runs.values()]
    assert not [run for run in runs.values() if {"failure", "state"} & run.data.tags.keys()]


def assert_ended(process, folder, code, name):
    assert process.wait(SECONDS) == code
    told = Path(folder, "errors").read_text()
    assert told.splitlines()[-1] == f"stopped by {name}: give the same command again, and it goes on from what is saved"
    assert "Traceback" not in told


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")])
def test_train_ends_its_run_as_killed_and_goes_on_with_the_same_bits(
    spark, dataset, store_uri, tmp_path, number, code, name
):
    job = make_job(dataset, tmp_path / "undisturbed", epochs=EPOCHS)
    expected = launch(spark, job).result
    settings = make_settings(job, tmp_path / "runs", store_uri, "ended", master="local[2]")
    with in_a_process("train", settings, tmp_path / "first") as process:
        folder = wait_for("trial", lambda: trial_folder(settings.output), process, tmp_path / "first")
        wait_for("step 60", lambda: is_under_way(folder), process, tmp_path / "first")
        below = family(process.pid)[1:]
        process.send_signal(number)
        assert_ended(process, tmp_path / "first", code, name)
        for member in below:  # the JVM and its Python workers end by themselves
            member.wait(30)
    assert_all_killed(before := runs_of(settings))
    again("train", settings, tmp_path)
    (run,) = runs_of(settings).values()
    assert (run.info.run_id, run.info.status) == (next(iter(before)), "FINISHED")
    assert steps_in_mlflow(store_uri, run.info.run_id) == list(range(1, expected.steps + 1))
    assert equal(final_state(job), final_state(make_job(dataset, folder, epochs=EPOCHS)))


STUDIES = {
    "compare": {"compare": {"grid": {"model.norm": ["none", "batch"], "train.learning_rate": [0.1]}, "seeds": [0]}},
    "tune": {
        "tune": {
            "space": {"train.learning_rate": {"choices": [0.1, 0.05]}}, "sampler": "grid", "pruner": "none",
            "confirm": 0,
        }
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "whom"),
    [
        ("compare", "command"),
        ("tune", "all"),
        pytest.param("compare", "all", marks=pytest.mark.slow),
        pytest.param("tune", "command", marks=pytest.mark.slow),
    ],
)
def test_a_study_ends_as_killed_with_all_that_train_in_it(spark, dataset, store_uri, tmp_path, name, whom):
    """Two trials of one worker each train at once. The signal is for the command alone, as Kubernetes sends it, or for
    all its processes, as systemd does."""
    job = make_job(dataset, tmp_path / "unused", epochs=EPOCHS_OF_A_STUDY)
    workers = {**TWO.model_dump(), "count": 1}
    settings = make_settings(
        job, tmp_path / "runs", store_uri, "ended", master="local[2]", workers=workers, **STUDIES[name]
    )

    def both_are_under_way():
        folders = list(Path(settings.output, "trials").glob("*/"))
        return len(folders) == 2 and all(map(is_under_way, folders))

    with in_a_process(name, settings, tmp_path / "first") as process:
        wait_for("two trials at step 60", both_are_under_way, process, tmp_path / "first")
        for member in family(process.pid) if whom == "all" else [process]:
            member.send_signal(signal.SIGTERM)
        assert_ended(process, tmp_path / "first", 143, "SIGTERM")
    assert_all_killed(before := runs_of(settings))
    assert len(before) == 3  # the parent and the two
    again(name, settings, tmp_path)
    after = runs_of(settings)
    assert before.keys() <= after.keys()
    assert {run.info.status for run in after.values()} == {"FINISHED"}
    children = [run for run in after.values() if "mlflow.parentRunId" in run.data.tags]
    for run in children:
        assert steps_in_mlflow(store_uri, run.info.run_id) == list(range(1, int(run.data.metrics["steps"]) + 1))
