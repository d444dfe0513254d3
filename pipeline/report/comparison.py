"""What trainings, arms and a whole comparison have shown: the content of ``comparison.json``, defined here alone.

Fields that do not apply are left unset, and absent from the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Literal, TypeVar

from pydantic import Field

from pipeline.config.frozen import FrozenModel
from pipeline.report.names import SettingValue, arm_words
from pipeline.training.result import TrainResult, TrainSummary

Metric = Literal["accuracy", "balanced_accuracy"]
# What a search may be about: a metric, or the mean cross-entropy in nats, of which less is better.
Objective = Literal["accuracy", "balanced_accuracy", "cross_entropy"]
# How sure an answer is, the worst news first.
Grade = Literal[
    "diverged", "did not learn", "search undecided", "cannot be told", "likely", "equivalent", "clear"
]  # fmt: skip


class LayerGradient(FrozenModel):
    """The L2 norm of the gradient by all parameters of one layer, over the steps at which diagnostics looked."""

    layer: str = Field(description="name of the module in the network")
    first: float | None = Field(description="norm at the first of these steps")
    median: float | None = Field(description="median of the norm over all of them")


class TrialResult(TrainResult):
    """One training and its MLflow run: the content of ``train.json``."""

    gradient_norms: tuple[LayerGradient, ...] = Field(
        (), description="in the network's order; absent where train.diagnostics is off"
    )
    run_id: str = Field(description="the MLflow run")


class StudyTrial(FrozenModel):
    """Which of a study's trainings it was."""

    arm: str = Field(description="name of the arm")
    values: dict[str, SettingValue] = Field(description="values of the settings that make the arm, by dotted name")
    tuned: dict[str, SettingValue] = Field(description="values of the tuned settings, by dotted name")
    learning_rate: float = Field(description="peak of the schedule")
    global_batch: int = Field(description="images of one optimizer step, over all workers")
    seed: int = Field(description="train.seed")


class StudyRun(TrialResult, StudyTrial):
    """One training of a study."""


class SearchTrial(TrainSummary, StudyTrial):
    """The short training that tried values of the tuned settings for an arm, as far as it came, without its curves."""

    learned: bool = Field(
        True, description="whether it was right more often than always naming the largest class, beyond uncertainty"
    )
    rungs: int = Field(1, description="rungs of the search that it trained, each twice as long as the one before")
    beyond_grid: bool = Field(False, description="whether its value extends the grid at an edge")
    run_id: str = Field(description="the MLflow run")


class ComparedRun(StudyRun):
    """One training of an arm with one seed, and when it was as good as the target asks."""

    score: float = Field(description="the comparison's metric at the evaluation that counts, from 0 to 1")
    learned: bool = Field(description="whether that is more than the best constant answer has, and chance over images")
    target: float | None = Field(
        description="value of the metric to reach, from 0 to 1; null where it would be that of a run of the baseline "
        "that diverged or did not learn"
    )
    steps_to_target: int | None = Field(
        description="optimizer steps before the first evaluation that reached it; null also where the target is of a "
        "run that diverged or did not learn"
    )
    images_to_target: int | None = Field(description="training images before that evaluation")
    seconds_to_target: float | None = Field(description="seconds of the optimizer steps before that evaluation")

    @property
    def is_healthy(self) -> bool:
        """Whether it neither diverged nor failed to learn, and its score, as of a cross-entropy, is finite."""
        return self.learned and not self.diverged and math.isfinite(self.score)


class Difference(FrozenModel):
    """The metric of an arm minus that of the baseline, paired by seed, with 95% intervals.

    It is over the seeds where neither run diverged or did not learn. Ends of intervals that are not known are null.
    """

    mean: float = Field(description="mean over seeds of run minus baseline's run of the same seed")
    low: float | None = Field(description="lower end of the headline interval, of what `covers` says")
    high: float | None = Field(description="its upper end")
    n: int = Field(description="seeds")
    covers: Literal["seeds and images", "seeds", "images", "nothing"] = Field(
        description="what the headline interval covers; images only where the predictions of all runs are there"
    )
    seeds_low: float | None = Field(description="lower end of Student's interval over seeds, for these test images")
    seeds_high: float | None = Field(description="its upper end")
    images_low: float | None = Field(
        description="lower end of the interval over test images, were seeds without number"
    )
    images_high: float | None = Field(description="its upper end")
    p_value: float | None = Field(description="two-sided, of the headline interval")
    p_adjusted: float | None = Field(None, description="the same after Holm's correction for the number of arms")
    seeds_needed: int | None = Field(
        None,
        description="how many would decide, were mean and spread to stay; absent where no number up to 1,000 would",
    )
    mcnemar_p: float | None = Field(
        None, description="of two arms: exact p-value of McNemar's test on the predictions of the first seed"
    )


# Why a search has not decided: candidates tie, none has learned, all diverged, or no rung is within the budget.
SearchUndecided = Literal["tied", "not_learned", "diverged", "no_budget"]


class ArmSummary(FrozenModel):
    """What the runs of one arm show. Deviations are those of a sample, null for fewer than two values.

    Means are over all runs but where they say otherwise. The fields of the search are absent where nothing was tuned;
    those from ``difference`` to ``overhead`` are absent of the baseline, which they compare the arm with.
    """

    arm: str = Field(description="name of the arm")
    values: dict[str, SettingValue] = Field(description="values of the settings that make the arm, by dotted name")
    tuned: dict[str, SettingValue] = Field(description="values of the tuned settings that were chosen for it")
    global_batch: int = Field(description="images of one optimizer step, over all workers")
    n: int = Field(description="runs, one for each seed")
    diverged: int = Field(description="how many of the runs diverged")
    not_learned: int = Field(
        description="how many of the others were no better than the best constant answer, by more than chance"
    )
    grade: Grade | None = Field(
        None,
        description="how sure the difference from the baseline is, or why there is none; absent of a sound baseline",
    )
    score_mean: float = Field(
        description="mean of the comparison's metric at the evaluation that counts, over the runs that neither "
        "diverged nor failed to learn, or over all where every run did"
    )
    score_std: float | None = Field(description="its standard deviation")
    best_accuracy_mean: float = Field(description="mean over runs of the highest accuracy of their evaluations")
    best_accuracy_std: float | None = Field(description="its standard deviation")
    final_accuracy_mean: float = Field(description="mean over runs of the accuracy of the evaluation that counts")
    final_accuracy_std: float | None = Field(description="its standard deviation")
    final_balanced_accuracy_mean: float = Field(description="mean over runs of its balanced accuracy")
    final_balanced_accuracy_std: float | None = Field(description="its standard deviation")
    final_macro_f1_mean: float = Field(description="mean over runs of its macro F1 score")
    final_macro_f1_std: float | None = Field(description="its standard deviation")
    final_loss_mean: float | None = Field(
        description="mean over the runs where it is finite of its cross-entropy, in nats"
    )
    final_loss_std: float | None = Field(description="its standard deviation")
    final_calibration_error_mean: float | None = Field(
        description="mean over the runs where it is finite of its expected calibration error"
    )
    final_calibration_error_std: float | None = Field(description="its standard deviation")
    had_target: int = Field(
        0,
        description="how many of the runs had a target: those whose run of the baseline was sound, or all where "
        "compare.target_accuracy is given; absent of files of 0.7.0 and before",
    )
    reached_target: int = Field(description="how many of these reached it")
    images_per_second_mean: float | None = Field(
        description="mean over the sound runs of which the speed is known, or over all where none is sound"
    )
    images_per_second_std: float | None = Field(description="its standard deviation")
    highest_stable_rate: float | None = Field(
        description="highest learning rate up to which no trial diverged or collapsed; null where there is none or "
        "only one was tried"
    )
    highest_stable_is_bound: bool = Field(description="whether it is the highest that was tried")
    steps_to_target_mean: float | None = Field(description="mean over the runs that reached the target")
    steps_to_target_std: float | None = Field(description="its standard deviation")
    images_to_target_mean: float | None = Field(description="mean over the runs that reached the target")
    images_to_target_std: float | None = Field(description="its standard deviation")
    seconds_to_target_mean: float | None = Field(description="mean over the runs that reached the target")
    seconds_to_target_std: float | None = Field(description="its standard deviation")
    search_tied: tuple[dict[str, SettingValue], ...] = Field(
        (),
        description="all values of the tuned settings that the search could not tell apart, by dotted name, the chosen "
        "ones among them; empty where those stand out",
    )
    search_undecided: SearchUndecided | None = Field(
        None,
        description="why the choice of the tuned values is not certain: several are tied, none had learned "
        "(not_learned), all diverged, or compare.search_budget holds no rung (no_budget); null where it is certain",
    )
    search_seeds: int = Field(
        1, description="seeds that this choice rests on: those of the candidates that were left, where the budget held"
    )
    search_cost: float | None = Field(
        None,
        description="training images of the arm's search / those of its trainings that are compared, if none ends "
        "early: the ratio of optimizer steps where the batch is the same",
    )
    difference: Difference | None = Field(
        None, description="its metric against the baseline's; absent where no seed has two runs to compare"
    )
    steps_ratio: float | None = Field(
        None, description="baseline's steps to the target / the arm's, over the seeds where both reached it"
    )
    seconds_ratio: float | None = Field(None, description="the same ratio of the seconds to the target")
    overhead: float | None = Field(
        None, description="median over seeds of the extra time of a training image: 0.1 is a tenth more"
    )
    overhead_low: float | None = Field(None, description="the least of any seed; absent of a single one")
    overhead_high: float | None = Field(None, description="the most of any seed")

    confusion: tuple[tuple[int, ...], ...] | None = Field(
        None,
        description="images of these evaluations by label (rows) and prediction (columns), summed over the runs "
        "that did not diverge, or over all; absent for more than 30 classes",
    )

    @property
    def words(self) -> str:
        """The arm in words: ``batch norm, depth 20``."""
        return arm_words(self.arm, self.values)

    @property
    def all_diverged(self) -> bool:
        return self.diverged == self.n

    @property
    def healthy(self) -> int:
        """How many of the runs neither diverged nor failed to learn."""
        return self.n - self.diverged - self.not_learned


class ComparedDataset(FrozenModel):
    """The dataset that the arms were trained and evaluated on."""

    name: str = Field(description="dataset.name")
    digest: str = Field(description="of its manifest: sha256 and 64 hex digits")
    classes: int = Field(description="number of classes")
    class_names: tuple[str, ...] = Field(description="their names, in the order of labels, recall and confusion")
    rows: dict[str, int] = Field(description="images, by split")


class ComparisonRun(FrozenModel):
    """Where MLflow has the comparison."""

    parent_run_id: str = Field(description="the run whose children are the trainings")
    experiment: str = Field(description="tracking.experiment")


class VerdictSentence(FrozenModel):
    """One sentence of the verdict, and what it rests on."""

    id: str = Field(description="name of the sentence in this file, and its anchor in the report")
    grade: Grade | None = Field(None, description="how sure it is; absent of a sentence that only states figures")
    arm: str | None = Field(None, description="name of the arm that it is about; absent where it is about several")
    text: str = Field(description="the sentence")
    evidence: dict[str, SettingValue] = Field(
        description="values of this file that it was computed from, by their JSON pointer (RFC 6901)"
    )


class Comparison(FrozenModel):
    """A whole comparison: every training, what the runs of each arm show, and what one should know to believe it."""

    name: str = Field(description="name of the study")
    baseline: str = Field(description="name of the arm that the others are compared with, the first")
    varied: tuple[str, ...] = Field(description="settings that make the arms, by dotted name")
    tuned: tuple[str, ...] = Field(description="settings of which each arm has its own best value")
    grid: dict[str, tuple[SettingValue, ...]] = Field(description="values of both, by setting")
    evaluated_on: str = Field(description="split that the accuracies are of")
    selected_on: str | None = Field(
        None, description="split by which an evaluation of each run was chosen that counts; absent: the last one counts"
    )
    metric: Metric = Field(description="what arms are compared by, as compare.metric and the split's labels say")
    constant_score: float = Field(description="the metric of the best constant answer on that split, from 0 to 1")
    smallest_difference: float = Field(description="arms that differ by less are equivalent, from 0 to 1")
    target_accuracy: float | None = Field(
        description="value of the metric to reach, from 0 to 1; null: the end of the baseline's run of the same seed"
    )
    dataset: ComparedDataset
    settings: dict[str, Any] = Field(description="all settings of the study, section by section; secrets are masked")
    runs: tuple[ComparedRun, ...] = Field(description="every arm with every seed")
    arms: tuple[ArmSummary, ...] = Field(description="the baseline first")
    search: tuple[SearchTrial, ...] = Field(description="trials of the tuned settings; empty if nothing was chosen")
    search_cost: float | None = Field(
        None, description="training images of all searches / those of all trainings that are compared; null: no search"
    )
    trials_saved: int | None = Field(
        None,
        description="of a study that adds seeds until it is certain: trials that compare.max_seeds would have taken "
        "beyond those that were trained; absent where the number of seeds was fixed",
    )
    verdict: tuple[VerdictSentence, ...] = Field((), description="the answer in sentences, the worst news first")
    warnings: tuple[str, ...] = Field(description="what a reader should know, as sentences")
    not_measured: tuple[str, ...] = Field(description="questions that the study does not answer")
    side_by_side: int = Field(description="how many trials trained at once")
    mlflow: ComparisonRun

    def arm(self, name: str) -> ArmSummary:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.arm == name)

    @property
    def baseline_arm(self) -> ArmSummary:
        return self.arm(self.baseline)

    @property
    def seeds(self) -> int:
        """Runs of an arm."""
        return max(arm.n for arm in self.arms)


Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


def by(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The items by what ``key`` says of each, in their order."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
