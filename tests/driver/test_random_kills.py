"""Python workers and executors killed at random moments of a training: every training ends with the same bits."""

import json
import statistics

import pytest
from small_training import LOCAL_CLUSTER
from standalone_cluster import run_driver

pytestmark = [pytest.mark.spark, pytest.mark.long]

PROGRAM = "import sys, kill_driver; kill_driver.main(*sys.argv[1:])"


def kill(dataset, folder, *how, timeout):
    """The trainings of a driver that kills until it has killed so often."""
    run_driver(PROGRAM, LOCAL_CLUSTER.master, dataset, str(folder), *map(str, how), timeout=timeout)
    return [json.loads(line) for line in (folder / "kills.jsonl").read_text().splitlines()]


def judge(runs):
    """Print what happened, and assert that no training ended otherwise than the undisturbed one. Returns all kills."""
    disturbed = [run for run in runs if run["kills"]]
    done = [kill for run in disturbed for kill in run["kills"]]
    print(
        f"{len(done)} kills in {len(disturbed)} trainings, {sum(len(run['kills']) > 1 for run in disturbed)} of them "
        f"killed twice: {sum(run['equal'] for run in disturbed)} of {len(disturbed)} ended with equal weights; "
        f"undisturbed a training takes {min(run['undisturbed_seconds'] for run in runs):.1f} s"
    )
    for victim in ("worker", "executor"):
        lost = sorted(k["lost_seconds"] for k in done if k["victim"] == victim and k["lost_seconds"] is not None)
        if lost:
            middle = statistics.median(lost)
            print(f"{victim}: kill to first new step, n={len(lost)}: {lost[0]:.1f}, {middle:.1f}, {lost[-1]:.1f} s")
    for run in runs:
        what = [f"{kill['victim']} {kill['rank']}, {kill['phase']}, step {kill['step']}" for kill in run["kills"]]
        seen = run["error"], run["failed"], run["equal"], run["steps_not_told"]
        assert seen == ("", None, True, []), f"run {run['run']}, killed: {what}"
    return done


@pytest.mark.slow
def test_three_random_kills_change_no_bit(dataset, tmp_path):
    assert len(judge(kill(dataset, tmp_path, 3, 6, 0, timeout=400))) >= 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_random_kills_change_no_bit(dataset, tmp_path):
    done = judge(kill(dataset, tmp_path, 50, 20, 0.1, timeout=3500))
    assert len(done) >= 50
    # They came before the first step, between steps, and near the end.
    assert {kill["phase"] for kill in done} >= {"no sign of life", "forward"}
