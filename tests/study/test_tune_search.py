"""What a search tries, prunes and forgets: real Optuna over simulated curves."""

import json
import math
import random
import statistics
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from simulated_tuning import EPOCHS, STEPS, Doom, Killed, open_search, simulate, true_score, tune_settings
from small_manifests import trainable

from pipeline.cluster.errors import WorkerError
from pipeline.study.tuning.best import best_trials
from pipeline.study.tuning.journal import LINES
from pipeline.study.tuning.sampling import Search, StorageHeldError
from pipeline.study.tuning.space import check_space, grid_of, trial_settings


def shown(trials):
    """All that must be the same of two searches."""
    return [
        replace(trial, facts={name: fact for name, fact in trial.facts.items() if "seconds" not in name})
        for trial in trials
    ]


def test_a_search_finds_what_is_best_and_prunes_what_is_not(tmp_path):
    trials, run = simulate(tmp_path, tune_settings(trials=30))
    assert run.ended_by == "trials"
    assert [trial.number for trial in trials] == list(range(30))
    assert {trial.state for trial in trials} == {"complete", "pruned"}
    best = max((trial for trial in trials if trial.value), key=lambda trial: trial.value)
    assert best.values["model.norm"] == "batch"
    assert 0.05 < best.values["train.learning_rate"] < 0.2
    for trial in trials:
        assert trial.facts["images"] == 2 * STEPS * max(trial.points)
        assert (len(trial.points) == 4) or trial.state == "pruned"
        assert ("model.norm_momentum" in trial.values) == (trial.values["model.norm"] == "batch")


def test_without_a_pruner_all_come_to_their_end_and_the_best_is_about_as_good(tmp_path):
    whole, _ = simulate(tmp_path / "whole", tune_settings(trials=30, pruner="none"))
    pruned, _ = simulate(tmp_path / "pruned", tune_settings(trials=30))
    assert {trial.state for trial in whole} == {"complete"}
    best = [max(trial.value or 0 for trial in trials) for trials in (whole, pruned)]
    assert best[1] > best[0] - 0.02
    images = [sum(trial.facts["images"] for trial in trials) for trials in (whole, pruned)]
    assert images[1] < 0.7 * images[0]


@pytest.mark.parametrize("least", [1, 2, 3])
def test_no_trial_is_pruned_before_it_has_so_many_evaluations(tmp_path, least):
    trials, _ = simulate(tmp_path, tune_settings(trials=30, pruner="median", pruner_evaluations=least))
    assert min(len(trial.points) for trial in trials) == least


@pytest.mark.parametrize("pruner", ["median", "successive_halving", "hyperband"])
def test_one_slot_and_one_seed_give_the_same_search_again_and_another_seed_another(tmp_path, pruner):
    one, same, other = (
        simulate(tmp_path / name, tune_settings(seed=seed, pruner=pruner, trials=12))[0]
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert shown(one) == shown(same)
    assert [trial.values for trial in one] != [trial.values for trial in other]


@pytest.mark.parametrize("pruner", ["median", "successive_halving", "hyperband", "none"])
def test_a_search_for_the_least_cross_entropy_is_that_for_the_highest_accuracy_where_one_follows_from_the_other(
    tmp_path, pruner
):
    """The simulated loss is one minus the accuracy: the same values are tried, the same trials pruned."""
    high, _ = simulate(tmp_path / "high", tune_settings(trials=25, pruner=pruner))
    low, _ = simulate(tmp_path / "low", tune_settings(trials=25, pruner=pruner, metric="cross_entropy"))
    assert [(trial.state, trial.values) for trial in low] == [(trial.state, trial.values) for trial in high]
    assert {len(trial.points) for trial in low} == ({EPOCHS} if pruner == "none" else {len(t.points) for t in high})
    for one, other in zip(low, high, strict=True):
        assert list(one.points.values()) == [pytest.approx(1 - score) for score in other.points.values()]
    best = [trial.number for trial in best_trials(low, 3, "cross_entropy")]
    assert best == [trial.number for trial in best_trials(high, 3, "accuracy")]
    assert low[best[0]].value == min(trial.value for trial in low if trial.value is not None)


def test_a_cross_entropy_that_is_not_finite_at_the_end_counts_as_diverged(tmp_path):
    trials, _ = simulate(tmp_path, tune_settings(trials=4, metric="cross_entropy"), endless=frozenset({1}))
    assert [trial.state for trial in trials][1] == "pruned"
    assert trials[1].facts["diverged"]
    assert all(math.isfinite(trial.value) for trial in trials if trial.state == "complete")


@pytest.mark.skipif(find_spec("cmaes") is None, reason="the package cmaes is not installed")
def test_cma_es_draws_the_numbers_and_tpe_the_rest(tmp_path):
    space = {
        "model.norm": ["none", "batch"],
        "train.learning_rate": {"low": 0.001, "high": 1.0, "log": True},
        "train.momentum": {"low": 0.1, "high": 0.9},
        "model.norm_momentum": {"low": 0.01, "high": 0.5, "log": True, "when": {"model.norm": "batch"}},
    }
    settings = tune_settings(sampler="cmaes", trials=60, pruner="none", space=space)
    trials, _ = simulate(tmp_path / "one", settings)
    assert shown(trials) == shown(simulate(tmp_path / "same", settings)[0])
    late = [math.log10(trial.values["train.learning_rate"]) for trial in trials[40:]]
    early = [math.log10(trial.values["train.learning_rate"]) for trial in trials[:10]]
    assert statistics.fmean(abs(rate + 1) for rate in late) < statistics.fmean(abs(rate + 1) for rate in early)
    search = open_search(tmp_path / "one", settings)
    drawn = [trial for trial in search._study.get_trials() if any(key.startswith("cma:") for key in trial.system_attrs)]
    assert len(drawn) >= 40  # all but those at random in the beginning
    for trial in trials:
        assert ("model.norm_momentum" in trial.values) == (trial.values["model.norm"] == "batch")


@pytest.mark.parametrize(
    "sampler",
    ["tpe", "random", "grid", pytest.param("cmaes", marks=pytest.mark.skipif(
        find_spec("cmaes") is None, reason="the package cmaes is not installed"))],
)  # fmt: skip
def test_killed_at_any_moment_it_goes_on_to_the_same_end(tmp_path, sampler):
    space = {"model.norm": ["none", "batch"], "train.learning_rate": {"low": 0.05, "high": 0.5, "step": 0.05}}
    if sampler == "cmaes":
        space["train.momentum"] = {"low": 0.1, "high": 0.9}
    changes = {"trials": 12, "sampler": sampler, **({"space": space} if sampler in ("grid", "cmaes") else {})}
    settings = tune_settings(**changes)
    doom = Doom()
    expected, _ = simulate(tmp_path / "undisturbed", settings, doom=doom)
    moments, draw = doom.passed, random.Random(sampler)
    for number in range(3):
        folder, results, kills = tmp_path / str(number), {}, 0
        while True:
            doom = Doom(draw.randint(1, moments // 2))
            try:
                trials, _ = simulate(folder, settings, doom=doom, results=results)
                break
            except Killed:
                kills += 1
        assert kills
        assert shown(trials) == shown(expected)
        assert len(results) == sum(trial.state == "complete" and "same_as" not in trial.facts for trial in trials)


def test_a_trial_that_was_running_has_the_values_that_it_had_also_those_that_were_not_drawn_yet(tmp_path):
    settings = tune_settings()
    whole = open_search(tmp_path / "whole", settings).ask()
    search = open_search(tmp_path / "cut", settings)
    search._study.ask()  # and no value was drawn
    assert open_search(tmp_path / "cut", settings).take_up(0).values == whole.values


def test_a_grid_tries_every_combination_once(tmp_path):
    space = {
        "model.norm": ["none", "batch"],
        "train.learning_rate": {"low": 0.1, "high": 0.3, "step": 0.1},
        "model.norm_scale": {"choices": ["learned", "off"], "when": {"model.norm": "batch"}},
    }
    settings = tune_settings(sampler="grid", trials=None, space=space)
    trials, run = simulate(tmp_path, settings)
    assert run.ended_by == "grid"
    assert len(trials) == 3 + 3 * 2
    key = json.dumps
    assert sorted(key(trial.values) for trial in trials) == sorted(map(key, grid_of(settings.tune.space)))


def test_values_that_were_tried_are_not_trained_again(tmp_path):
    trained = []
    settings = tune_settings(space={"model.norm": ["none", "batch"]}, trials=6)
    trials, _ = simulate(tmp_path, settings, trained=trained)
    assert len(trained) == 2
    for trial in trials:
        first = next(each for each in trials if each.values == trial.values)
        assert (trial.value, trial.points) == (first.value, first.points)
        assert trial.facts.get("same_as") == (None if trial is first else first.number)
    assert [trial.number for trial in best_trials(trials, 3, "accuracy")] == sorted(
        {trials.index(next(e for e in trials if e.values == t.values)) for t in trials}, key=lambda n: -trials[n].value
    )


def test_the_limit_of_images_is_that_of_all_trials(tmp_path):
    trials, run = simulate(tmp_path, tune_settings(trials=None, images=100))
    assert run.ended_by == "images"
    assert 100 <= sum(trial.facts["images"] for trial in trials) < 100 + 2 * STEPS * EPOCHS


def test_the_limit_of_seconds_counts_those_of_drivers_that_were_killed(tmp_path):
    settings = tune_settings(trials=None, seconds=1000)
    search = open_search(tmp_path, settings)
    search.tell(search.ask().number, "complete", 0.5, images=1, search_seconds=999.99)
    trials, run = simulate(tmp_path, settings)
    assert run.ended_by == "seconds"
    assert run.seconds >= 1000
    assert len(trials) < 5


def test_a_limit_that_is_raised_adds_trials_to_the_same_ones(tmp_path):
    first, _ = simulate(tmp_path, tune_settings(trials=6))
    both, _ = simulate(tmp_path, tune_settings(trials=12))
    whole, _ = simulate(tmp_path / "whole", tune_settings(trials=12))
    assert shown(both)[:6] == shown(first)
    assert shown(both) == shown(whole)


def test_a_trial_that_diverges_is_one_to_stay_away_from_and_is_not_chosen(tmp_path):
    trials, _ = simulate(tmp_path, tune_settings(trials=8), diverging=frozenset({0, 3}))
    assert {trial.number for trial in trials if trial.facts.get("diverged")} <= {0, 3}
    assert trials[0].facts["diverged"]
    assert trials[0].state == "pruned"
    assert trials[0].facts["images"] == 2 * STEPS * 2
    assert not {0, 3} & {trial.number for trial in best_trials(trials, 8, "accuracy")}


def test_some_trials_may_fail_and_one_more_ends_the_search_and_is_tried_again(tmp_path):
    settings = tune_settings(trials=8, max_failures=1)
    with pytest.raises(WorkerError, match="out of memory"):
        simulate(tmp_path, settings, failing=frozenset({2, 4}))
    search = open_search(tmp_path, settings)
    assert [trial.state for trial in search.trials()][2:] == ["failed", "complete", "running"]
    assert search.trials()[2].facts["reason"] == "rank 0 on host x: out of memory"
    trials, _ = simulate(tmp_path, settings)
    assert [trial.state for trial in trials].count("failed") == 1
    assert len(trials) == 8


def test_a_value_within_a_range_that_cannot_be_trained_fails_its_trial_and_the_search_goes_on(tmp_path):
    """Three groups do not divide the channels of the network; the ends of the range, which are checked, do."""
    space = {"model.norm": ["group"], "model.norm_groups": {"low": 1, "high": 8}}
    settings = tune_settings(trials=8, sampler="random", pruner="none", space=space, max_failures=8)
    check_space(settings, trainable())
    trials, _ = simulate(tmp_path, settings, manifest=trainable(), checks=True)
    states = {trial.values["model.norm_groups"]: trial.state for trial in trials}
    assert states == {groups: "complete" if groups in (1, 2, 4, 8) else "failed" for groups in states}
    assert set(states.values()) == {"complete", "failed"}
    failed = next(trial for trial in trials if trial.state == "failed")
    assert "norm_groups" in failed.facts["reason"]
    assert failed.facts["images"] == 0
    few = settings.model_copy(update={"tune": settings.tune.model_copy(update={"max_failures": 0})})
    with pytest.raises(ValueError, match="norm_groups"):
        simulate(tmp_path / "none may", few, manifest=trainable(), checks=True)


def test_importance_names_the_setting_that_matters_most(tmp_path):
    space = {"train.learning_rate": {"low": 0.001, "high": 1.0, "log": True}, "train.weight_decay": [0.0, 1e-4, 1e-3]}
    settings = tune_settings(trials=30, pruner="none", sampler="random", space=space)
    _, run = simulate(tmp_path, settings)
    found = run.search.importance()
    assert found.keys() == space.keys()
    assert found["train.learning_rate"] > 0.8
    assert sum(found.values()) == pytest.approx(1)


def test_too_few_trials_have_no_importance(tmp_path):
    _, run = simulate(tmp_path, tune_settings(trials=3))
    assert run.search.importance() == {}


def test_a_database_holds_a_search_for_one_output_alone(tmp_path):
    settings = tune_settings(storage=f"sqlite:///{tmp_path}/optuna.db")

    def opened(output):
        return Search("sim", settings.tune, output=output, evaluations=4, journal=str(tmp_path / "none"))

    search = opened("here")
    asked = search.ask()
    assert opened("here").take_up(0).values == asked.values
    with pytest.raises(StorageHeldError, match=r"has a search 'sim' of here, which holds it: set another `name`"):
        opened("there")
    assert not (tmp_path / "none").exists()


def test_the_database_of_mlflow_is_refused(store_uri, tmp_path):
    before = Path(tmp_path, "mlflow.db").read_bytes()
    settings = tune_settings(storage=store_uri)
    with pytest.raises(ValueError, match="not the one of MLflow: both keep the version of their tables"):
        Search("sim", settings.tune, output="here", evaluations=4, journal=str(tmp_path))
    assert Path(tmp_path, "mlflow.db").read_bytes() == before


def test_a_damaged_history_is_named(tmp_path):
    simulate(tmp_path, tune_settings(trials=3))
    file = sorted(tmp_path.glob("*.jsonl"))[0]
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"000000\.jsonl is damaged, and the search cannot go on"):
        open_search(tmp_path, tune_settings())


def test_the_history_is_in_few_files(tmp_path):
    simulate(tmp_path, tune_settings(trials=20))
    files = sorted(tmp_path.glob("*.jsonl"))
    assert len(files) <= 7
    assert all(len(file.read_bytes().splitlines()) <= LINES + 5
               for file in files)  # fmt: skip


def test_the_best_settings_are_those_of_the_best_trial(tmp_path):
    settings = tune_settings()
    trials, _ = simulate(tmp_path, settings)
    (best,) = best_trials(trials, 1, "accuracy")
    made = trial_settings(settings, best.values)
    assert made.train.evaluate_on == "validation"
    assert best.value == pytest.approx(true_score(made) * (1 - 0.5**4))
