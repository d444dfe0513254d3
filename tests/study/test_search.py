"""What a search trains and chooses: budgets and grids as arithmetic, and trainings of imbalanced pictures."""

import itertools
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from imbalanced_data import write_imbalanced

from pipeline.config import Settings, SettingsError
from pipeline.data import load_manifest
from pipeline.distributed.worker import alone
from pipeline.report.comparison import Comparison, StudyRun
from pipeline.report.page import render
from pipeline.study.arms import arms_of, candidates_of, with_final_network
from pipeline.study.candidates import value_beyond
from pipeline.study.job import _say_begin
from pipeline.study.rung_plan import LEAST_STEPS, plan_rungs
from pipeline.study.rung_scores import units_of
from pipeline.study.search import ArmSearch, run_search
from pipeline.study.seeds import run_seeds
from pipeline.study.summary import metrics_of, summarize
from pipeline.training import fit
from pipeline.training.job import Job

RATES = (0.02, 0.1, 0.5)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_budget_holds_whatever_the_study(share):
    """The first rung of all, and all that units allow, for many numbers of candidates, seeds, epochs and steps."""
    for count, seeds, epochs, steps, extends in itertools.product(
        (2, 3, 5, 8, 12), (1, 2, 3, 10), (1, 2, 8, 90), (1, 23, 215, 5000), (False, True)
    ):
        batches = [steps, 2 * steps + 1] if count == 2 else [steps] * count  # also where the batch is tuned
        plan = plan_rungs(share=share, epochs=epochs, seeds=seeds, epoch_steps=batches, extends=extends)
        in_all, budget = Fraction(str(share)) * seeds * epochs, plan.budget
        longest_unit = max(Fraction(int(plan.first_epochs * each), each) for each in batches)
        assert budget.units * longest_unit <= in_all
        if not budget.rungs:  # not even without a second seed
            assert int(min(in_all / (3 * (count + extends)), Fraction(epochs, 2)) * min(batches)) < LEAST_STEPS
            continue
        assert min(int(plan.first_epochs * each) for each in batches) >= LEAST_STEPS
        assert budget.rungs >= 2
        assert budget.units >= 3 * (count + extends)  # all of them, and one beyond the grid, can train two rungs
        assert plan.first_epochs * 2 ** (budget.rungs - 1) <= epochs  # no rung is longer than a training compared
        assert count + 2 * (units_of(budget.rungs) - 1) <= budget.units


def test_a_budget_too_small_for_any_rung_has_none():
    plan = plan_rungs(share=0.5, epochs=8, seeds=2, epoch_steps=[10] * 3, extends=True)
    assert (plan.budget.units, plan.budget.rungs) == (0, 0)


@pytest.mark.parametrize(
    ("edge", "inner", "expected"),
    [(0.5, 0.1, 2.5), (0.02, 0.1, 0.004), (0.003, 0.01, 0.0009), (64, 32, 128), (4, 8, 2), (3, 2, None),
     (0.0, 0.001, None), (0.1, 0.0, None), ("batch", "none", None), (True, False, None), (None, 0.1, None)],
)  # fmt: skip
def test_the_value_beyond_an_edge_has_the_same_factor(edge, inner, expected):
    assert value_beyond(edge, inner) == expected
    assert type(value_beyond(edge, inner)) is type(expected)


@pytest.fixture(scope="module")
def imbalanced(tmp_path_factory):
    """The folder of 3,820 pictures of ten classes, one with 61%; 23 steps of 128 in an epoch."""
    path = str(tmp_path_factory.mktemp("imbalanced") / "data")
    write_imbalanced(path)
    return path


def study(dataset, output, norms=("group",), rates=RATES, **compare):
    train = {"epochs": 8, "batch_size": 128, "lanes": 8, "warmup_epochs": 1, "evaluation_batch_size": 400}
    grid = {"model.norm": norms, "train.learning_rate": rates}
    return Settings.model_validate(
        {
            "name": "imbalanced",
            "output": str(output),
            "dataset": {"path": dataset},
            "model": {"depth": 3, "width": 4, "norm_groups": 2},
            "train": train,
            "workers": {"count": 1},
            "compare": {"grid": grid, "seeds": (0, 1), **compare},
        }
    )


def searches_of(settings):
    manifest = load_manifest(settings.dataset.path)
    return [ArmSearch(settings, arm, candidates_of(settings), manifest) for arm in arms_of(settings)]


class Trainer:
    """Trains the trials of a search here, in a folder for each candidate, as `run_trial` does on workers.

    steps : optimizer steps that were trained, by the name of a trial
    """

    def __init__(self, folder):
        self.folder, self.steps, self.rungs = folder, {}, []

    def __call__(self, trials):
        self.rungs.append([(trial.arm.name, *trial.tuned.values(), trial.cycle) for trial in trials])
        return [self.train(trial) for trial in trials]

    def train(self, trial):
        torch.set_num_threads(1)
        settings = trial.settings
        job = Job(settings.dataset.path, str(self.folder / trial.name), settings.model, settings.train)
        result = fit(alone("cpu"), replace(job, until_cycle=trial.cycle))
        self.steps[trial.name] = result.steps
        train = settings.train
        return StudyRun(
            arm=trial.arm.name, values=trial.arm.values, tuned=trial.tuned, learning_rate=train.learning_rate,
            global_batch=train.global_batch, seed=train.seed, run_id=trial.name, **result.model_dump(),
        )  # fmt: skip


def test_a_rate_at_which_a_short_training_sees_the_largest_class_alone_is_not_chosen(imbalanced, tmp_path):
    """The issue's folder: after one epoch all rates are at 61%, and by accuracy the tie fell to the lowest."""
    settings = study(imbalanced, tmp_path, norms=("group", "none"))
    searches, trainer = searches_of(settings), Trainer(tmp_path)
    run_search(searches, trainer)
    for search in searches:
        slow = search.candidates[0]
        assert slow.tuned == {"train.learning_rate": 0.02}
        assert not slow.scores[0].learned  # the largest class's share, after the steps of the first rung
        assert search.tuned["train.learning_rate"] >= 0.1
        assert next(trial for trial in search.trials() if trial.tuned == search.tuned).learned
        assert search.images / search.compared_images <= settings.compare.search_budget
    # All arms train their rungs together, and no step is trained twice.
    assert len(trainer.rungs[0]) == 6
    spent = sum(candidate.images for search in searches for candidate in search.candidates)
    assert spent == 128 * sum(trainer.steps.values())


def test_a_search_that_was_killed_goes_on_from_its_results(imbalanced, tmp_path):
    """From the results so far a new search asks for what the old one would have asked for."""
    settings = study(imbalanced, tmp_path)
    (search,), trainer, results = searches_of(settings), Trainer(tmp_path), []
    while trials := search.next_trials():
        (again,) = searches_of(settings)
        for past, runs in results:
            assert [trial.tuned for trial in again.next_trials()] == [trial.tuned for trial in past]
            for trial, run in zip(past, runs, strict=True):
                again.add(trial, run)
        assert again.next_trials() == trials
        # A rung's predictions are copied by `run_trial`, since the next one replaces them.
        runs = [preserved(run, tmp_path / f"{number}-{len(results)}") for number, run in enumerate(trainer(trials))]
        results.append((trials, runs))
        for trial, run in zip(trials, runs, strict=True):
            search.add(trial, run)


def preserved(run, path):
    path.write_bytes(Path(run.predictions).read_bytes())
    return run.model_copy(update={"predictions": str(path)})


def test_a_winner_at_the_edge_extends_the_grid(imbalanced, tmp_path):
    settings = study(imbalanced, tmp_path, norms=("batch",), rates=(0.004, 0.02), search_budget=1.0)
    (search,), trainer = searches_of(settings), Trainer(tmp_path)
    run_search([search], trainer)
    tried = [(trial.tuned["train.learning_rate"], trial.beyond_grid) for trial in search.trials()]
    assert tried[:3] == [(0.004, False), (0.02, False), (0.1, True)]
    assert len(tried) <= 4  # two more at most
    assert search.tuned["train.learning_rate"] >= 0.1
    assert search.images / search.compared_images <= 1.0
    none = study(imbalanced, tmp_path, norms=("batch",), rates=(0.004, 0.02), search_extensions=0)
    (search,) = searches_of(none)
    run_search([search], Trainer(tmp_path / "none"))
    assert [candidate.beyond_grid for candidate in search.candidates] == [False, False]
    assert search.tuned == {"train.learning_rate": 0.02}


def test_a_second_seed_is_set_aside_unless_the_first_rung_were_too_short():
    plans = [
        plan_rungs(share=0.5, epochs=8, seeds=3, epoch_steps=[steps] * 3, extends=True, search_seeds=seeds)
        for steps in (12, 11) for seeds in (3, 1)
    ]  # fmt: skip
    assert [plan.first_epochs for plan in plans] == [Fraction(12, 14), Fraction(1), Fraction(1), Fraction(1)]
    assert [plan.budget.seeds for plan in plans] == [3, 1, 3, 1]


def test_candidates_that_tie_train_with_seeds_of_their_own(imbalanced, tmp_path):
    """Two rates that are close, and seeds 1000 and 1002, since 1001 is one of those compared; no step twice."""
    settings = study(imbalanced, tmp_path, rates=(0.1, 0.1001), search_budget=1.0, search_extensions=0, seeds=(0, 1001))
    (search,), trainer = searches_of(settings), Trainer(tmp_path)
    run_search([search], trainer)
    trained = [(trial.seed, trial.rungs, trial.steps) for trial in search.trials()]
    assert trained[:4] == [(1000, 2, 90), (1000, 2, 90), (1002, 2, 90), (1002, 2, 90)]
    assert search.choice.seeds == 2
    assert search.images == 128 * sum(trainer.steps.values())
    assert len(trainer.steps) == len(trained) == 4
    assert 0.3 < search.images / search.compared_images <= 1.0
    again = {trial.name for trial in search.next_trials()}
    assert not again


def test_what_a_trial_of_the_search_is_trained_with(imbalanced, tmp_path):
    (search,) = searches_of(study(imbalanced, tmp_path))
    for trial in search.next_trials():
        train = trial.settings.train
        assert (train.evaluate_on, train.seed, train.evaluations_per_epoch) == ("validation", 1000, 1)
        # 8 epochs hold 14 first rungs: of three candidates, and of two of them a second rung, both again with another
        # seed, and a first one beyond the grid: 13 steps of 23, and then 26.
        assert (train.first_cycle_epochs, train.epochs, trial.cycle) == (13 / 23, 2, 1)
        assert trial.settings.compare.grid == {}


def test_a_trial_of_the_search_ends_with_its_last_network(imbalanced, tmp_path):
    settings = with_final_network(study(imbalanced, tmp_path, checkpoint="best_on_validation"), "balanced_accuracy")
    assert settings.train.final_network == "lowest_loss"
    (search,) = searches_of(settings)
    assert {trial.settings.train.final_network for trial in search.next_trials()} == {"last"}


def test_where_the_budget_holds_no_rung_the_middle_is_taken_and_it_is_said(imbalanced, tmp_path):
    (search,) = searches_of(study(imbalanced, tmp_path, search_budget=0.1))
    assert search.next_trials() == []
    assert (search.tuned, search.choice.undecided) == ({"train.learning_rate": 0.1}, "no_budget")
    assert (search.images, search.trials(), len(search.tied)) == (0, [], 3)


def test_before_the_training_it_is_said_that_the_budget_holds_no_rung(imbalanced, tmp_path, capsys):
    for budget, words, others in [
        (0.1, "group: no short trials choose train.learning_rate", "3 short"),
        (0.5, "3 short trials", "no short"),
    ]:
        settings = study(imbalanced, tmp_path, search_budget=budget)
        _say_begin(arms_of(settings), searches_of(settings), settings, at_once=1)
        said = capsys.readouterr().err
        assert words in said
        assert others not in said


def test_settings_that_a_search_sets_cannot_be_tuned():
    tree = {"name": "x", "compare": {"grid": {"train.epochs": [1, 2]}, "tune": ["train.epochs"]}}
    with pytest.raises(ValueError, match=r"compare\.tune cannot choose train\.epochs.*its values make arms"):
        Settings.model_validate(tree)


def test_the_old_setting_says_what_took_its_place():
    from pipeline.config import load_settings

    with pytest.raises(SettingsError, match=r"search_epochs 2 is no longer a setting.*search_budget"):
        load_settings("conf/quickstart.yaml", ["compare.search_epochs=2"])


def test_weights_by_class_are_an_arm_of_a_comparison_and_of_its_report(imbalanced, tmp_path):
    settings = study(imbalanced, tmp_path, seeds=(0, 1))
    tree = settings.model_dump()
    tree["train"] |= {"epochs": 1}
    weights = ["none", {"class 9": 5, "class 8": 2.5}]
    tree["compare"] |= {"grid": {"train.class_weights": weights}, "tune": ()}
    settings = Settings.model_validate(tree)
    manifest, arms = load_manifest(imbalanced), arms_of(settings)
    runs = run_seeds(settings, manifest, arms, {arm.name: {} for arm in arms}, Trainer(tmp_path))
    comparison = summarize(settings, manifest, runs, [], side_by_side=1, parent_run_id="")
    assert [arm.arm for arm in comparison.arms] == ["class_weights none", "class_weights class 8 2.5 class 9 5"]
    text = "{class 8: 2.5, class 9: 5}"
    assert comparison.grid["train.class_weights"] == ("none", text)
    assert comparison.arms[1].values == {"train.class_weights": text}
    assert Comparison.model_validate_json(comparison.model_dump_json()) == comparison
    losses = {run.arm: run.train_loss for run in runs if run.seed == 0}
    assert losses["class_weights none"] != losses["class_weights class 8 2.5 class 9 5"]
    page = render(comparison)
    assert "class weights class 8 2.5 and class 9 5" in page
    assert "no class weights" in page
    names = {name.partition("/")[0] for name in metrics_of(comparison.arms)}
    assert names == {"class_weights none", "class_weights class 8 2.5 class 9 5"}
