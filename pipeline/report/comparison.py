"""What trainings, arms and a whole comparison have shown: the content of ``comparison.json``, defined here alone.

Fields that do not apply are left unset, and absent from the file.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

from pydantic import Field

from pipeline.config.frozen import FrozenModel
from pipeline.report.names import SettingValue, arm_words
from pipeline.training.result import TrainResult, TrainSummary


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
    """One short training that tried values of the tuned settings for an arm, without its curves."""

    run_id: str = Field(description="the MLflow run")

    @classmethod
    def of(cls, run: StudyRun) -> SearchTrial:
        return cls(**run.model_dump(include=set(cls.model_fields)))


class ComparedRun(StudyRun):
    """One training of an arm with one seed, and when it was as accurate as the target asks."""

    target: float = Field(description="accuracy to reach, from 0 to 1")
    steps_to_target: int | None = Field(description="optimizer steps before the first evaluation that reached it")
    images_to_target: int | None = Field(description="training images before that evaluation")
    seconds_to_target: float | None = Field(description="seconds of the optimizer steps before that evaluation")


class Difference(FrozenModel):
    """Best accuracy of an arm minus that of the baseline, paired by seed, with Student's 95% interval."""

    mean: float = Field(description="mean over seeds of run minus baseline's run of the same seed")
    low: float | None = Field(description="lower end of the interval; null for a single seed")
    high: float | None = Field(description="upper end of the interval; null for a single seed")
    n: int = Field(description="seeds")

    @property
    def is_unclear(self) -> bool:
        """Whether the interval contains zero. False for a single seed, which has no interval."""
        return self.low is not None and self.high is not None and self.low <= 0 <= self.high


class ArmSummary(FrozenModel):
    """What the runs of one arm show. Deviations are those of a sample, null for fewer than two values.

    The fields from ``difference`` to ``overhead`` are absent of the baseline, which they compare the arm with.
    """

    arm: str = Field(description="name of the arm")
    values: dict[str, SettingValue] = Field(description="values of the settings that make the arm, by dotted name")
    tuned: dict[str, SettingValue] = Field(description="values of the tuned settings that were chosen for it")
    global_batch: int = Field(description="images of one optimizer step, over all workers")
    n: int = Field(description="runs, one for each seed")
    diverged: int = Field(description="how many of the runs diverged")
    best_accuracy_mean: float = Field(description="mean over runs of the highest accuracy of their evaluations")
    best_accuracy_std: float | None = Field(description="its standard deviation")
    final_accuracy_mean: float = Field(description="mean over runs of the accuracy of their last evaluation")
    final_accuracy_std: float | None = Field(description="its standard deviation")
    final_balanced_accuracy_mean: float = Field(description="mean over runs of the balanced accuracy of the last one")
    final_balanced_accuracy_std: float | None = Field(description="its standard deviation")
    final_macro_f1_mean: float = Field(description="mean over runs of the macro F1 score of the last evaluation")
    final_macro_f1_std: float | None = Field(description="its standard deviation")
    final_loss_mean: float | None = Field(
        description="mean over the runs where it is finite of the cross-entropy of the last evaluation, in nats"
    )
    final_loss_std: float | None = Field(description="its standard deviation")
    final_calibration_error_mean: float | None = Field(
        description="mean over the runs where it is finite of the expected calibration error of the last evaluation"
    )
    final_calibration_error_std: float | None = Field(description="its standard deviation")
    reached_target: int = Field(description="how many of the runs reached the target")
    images_per_second_mean: float | None = Field(description="mean over the runs of which the speed is known")
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
    difference: Difference | None = Field(None, description="best accuracy against the baseline's")
    steps_ratio: float | None = Field(
        None, description="baseline's steps to the target / the arm's, over the seeds where both reached it"
    )
    seconds_ratio: float | None = Field(None, description="the same ratio of the seconds to the target")
    overhead: float | None = Field(
        None, description="median over seeds of the extra time of a training image: 0.1 is a tenth more"
    )

    confusion: tuple[tuple[int, ...], ...] | None = Field(
        None,
        description="images of the last evaluations by label (rows) and prediction (columns), summed over the runs "
        "that did not diverge, or over all; absent for more than 30 classes",
    )

    @property
    def words(self) -> str:
        """The arm in words: ``batch norm, depth 20``."""
        return arm_words(self.arm, self.values)

    @property
    def all_diverged(self) -> bool:
        return self.diverged == self.n


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


class Comparison(FrozenModel):
    """A whole comparison: every training, what the runs of each arm show, and what one should know to believe it."""

    name: str = Field(description="name of the study")
    baseline: str = Field(description="name of the arm that the others are compared with, the first")
    varied: tuple[str, ...] = Field(description="settings that make the arms, by dotted name")
    tuned: tuple[str, ...] = Field(description="settings of which each arm has its own best value")
    grid: dict[str, tuple[SettingValue, ...]] = Field(description="values of both, by setting")
    evaluated_on: str = Field(description="split that the accuracies are of")
    target_accuracy: float | None = Field(
        description="accuracy to reach, from 0 to 1; null: the best of the baseline's run of the same seed"
    )
    dataset: ComparedDataset
    settings: dict[str, Any] = Field(description="all settings of the study, section by section")
    runs: tuple[ComparedRun, ...] = Field(description="every arm with every seed")
    arms: tuple[ArmSummary, ...] = Field(description="the baseline first")
    search: tuple[SearchTrial, ...] = Field(description="trials of the tuned settings; empty if nothing was chosen")
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
