"""Two processes that give one command at the same moment: both are done, or one is told why; nothing is missing."""

import json
from collections import Counter
from pathlib import Path

import command_driver
import mlflow
import pytest
from second_driver import second_driver
from small_training import make_job, make_settings

from pipeline.driver.lease import newest_number, record_path
from pipeline.report.comparison import Comparison, TrialResult

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(3600)]

# A process is told why it may not: another is at it now.
TOLD = "BusyError: "
COMPARED = {"grid": {"model.norm": ["none", "batch"]}, "tune": [], "seeds": [0], "side_by_side": 1}
ROUNDS = 50
STEPS = 24


@pytest.fixture
def drivers(tmp_path):
    with (
        second_driver(command_driver.__file__, tmp_path / "one.log") as one,
        second_driver(command_driver.__file__, tmp_path / "two.log") as two,
    ):
        yield one, two


def newest_record(folder):
    return json.loads(Path(record_path(str(folder), newest_number(str(folder)))).read_text())


def finished_runs(uri, experiment):
    client = mlflow.MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert {run.info.status for run in found} == {"FINISHED"}
    return {run.info.run_id for run in found}


def check_train(output, uri, said):
    """The result is that of a whole training, and every run that was begun has ended."""
    result = TrialResult.model_validate_json((output / "train.json").read_text())
    assert result.steps == STEPS
    records = [newest_record(folder) for folder in (output / "trials").iterdir()]
    assert len(records) == said.count("")  # one that began after the other's end trains anew
    assert all(record["result"]["steps"] == result.steps for record in records)
    assert finished_runs(uri, output.name) == {record["run_id"] for record in records}
    assert result.run_id in {record["run_id"] for record in records}


def check_compare(output, uri, said):
    """The comparison is whole, and each of its trainings was done once."""
    comparison = Comparison.model_validate_json((output / "comparison.json").read_text())
    assert sorted(run.arm for run in comparison.runs) == ["batch", "none"]
    assert (output / "report.html").is_file()
    trials = [newest_record(folder) for folder in (output / "trials").iterdir()]
    assert len(trials) == 2 * said.count("")
    assert all("result" in trial for trial in trials)
    studies = [newest_record(folder) for folder in (output / "studies").iterdir()]
    assert finished_runs(uri, output.name) == {record["run_id"] for record in [*trials, *studies]}
    assert {run.run_id for run in comparison.runs} <= {trial["run_id"] for trial in trials}


@pytest.mark.parametrize(("name", "check"), [("train", check_train), ("compare", check_compare)])
def test_both_are_done_or_one_is_told_why(drivers, dataset, store_uri, tmp_path, name, check):
    outcomes = Counter()
    for turn in range(ROUNDS):
        output = tmp_path / f"round-{turn}"
        job = make_job(dataset, "", epochs=2, batch_size=64)
        settings = make_settings(job, output, store_uri, output.name, master="local[2]", compare=COMPARED)
        for number, driver in enumerate(drivers):
            # In every other round at the same moment, else at any moment of the other's work.
            driver.begin(name, settings.model_dump_json(), 0.0 if turn % 2 else 4.0, 2 * turn + number)
        said = [driver.result() for driver in drivers]
        assert "" in said
        assert all(text == "" or text.startswith(TOLD) for text in said), said
        check(output, store_uri, said)
        outcomes["told why" if any(said) else "both done"] += 1
    print(f"{name}, {ROUNDS} rounds: {dict(outcomes)}")
