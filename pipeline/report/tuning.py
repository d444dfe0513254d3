"""What a search has shown: the content of ``tune.json``, defined here alone.

Fields that do not apply are null, or left unset and absent from the file.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pipeline.config.frozen import FrozenModel
from pipeline.report.comparison import ComparedDataset, ComparisonRun, Difference, Objective
from pipeline.report.names import SettingValue

# How a trial ended. `diverged`: its loss was not finite.
TrialState = Literal["complete", "pruned", "diverged", "failed"]
# What ended a search: a limit, or that every combination of a grid was tried.
EndedBy = Literal["trials", "seconds", "images", "grid"]


class EvaluatedScore(FrozenModel):
    """The metric at one evaluation of a trial."""

    evaluation: int = Field(description="number of the evaluation in its trial, 1 is the first")
    score: float = Field(description="the metric on the split that chooses: from 0 to 1, or a cross-entropy in nats")


class TunedTrial(FrozenModel):
    """One trial of the search."""

    number: int = Field(description="0 is the first")
    state: TrialState = Field(description="how it ended")
    values: dict[str, SettingValue] = Field(description="values tried, by dotted name; those whose condition holds")
    score: float | None = Field(description="the metric at its last evaluation; null unless it is complete")
    curve: tuple[EvaluatedScore, ...] = Field(description="its evaluations, in order")
    images: int = Field(description="training images that it took, as far as its evaluations tell")
    learning_rate: float = Field(description="peak of the schedule")
    global_batch: int = Field(description="images of one optimizer step, over all workers")
    seconds: float | None = Field(None, description="from its launch to its end, in the driver that ended it")
    same_as: int | None = Field(None, description="number of an earlier trial with these values, whose result it has")
    reason: str | None = Field(None, description="why it failed")
    run_id: str | None = Field(None, description="the MLflow run")

    @property
    def name(self) -> str:
        """``trial 7``"""
        return f"trial {self.number}"


class SeedScore(FrozenModel):
    """A training with one seed."""

    seed: int = Field(description="train.seed")
    score: float | None = Field(
        description="the metric at its last evaluation: from 0 to 1, or a cross-entropy in nats; null where that is "
        "not finite"
    )
    diverged: bool = Field(description="whether its loss was not finite, in training or at its last evaluation")
    learned: bool = Field(
        True, description="whether it was right of more images than the best constant answer, and chance, explain"
    )
    run_id: str = Field(description="the MLflow run")

    @property
    def fallen(self) -> str | None:
        """``diverged`` or ``did not learn``; None of a sound training."""
        return "diverged" if self.diverged else None if self.learned else "did not learn"


class ConfirmedTrial(FrozenModel):
    """One of the best trials, trained again with new seeds and evaluated on the split that chooses."""

    number: int = Field(description="of the trial")
    searched_score: float = Field(description="its metric in the search, by which it was chosen: it flatters")
    runs: tuple[SeedScore, ...] = Field(description="one for each seed")
    mean: float | None = Field(
        description="mean of the metric over the seeds where it is finite; null if it is of none"
    )
    std: float | None = Field(description="its sample standard deviation; null of fewer than two")
    difference: Difference | None = Field(
        None, description="its metric minus that of the winner, paired by seed; absent of the winner itself"
    )


class TestFigure(FrozenModel):
    """The winner on the split that judges, by which nothing was chosen."""

    __test__ = False  # pytest takes it for a test by its name

    split: str = Field(description="train.evaluate_on")
    runs: tuple[SeedScore, ...] = Field(description="one for each seed of the confirmation")
    mean: float | None = Field(
        description="mean of the metric over the seeds where it is finite; null if it is of none"
    )
    std: float | None = Field(description="its sample standard deviation; null of fewer than two")


class Tuning(FrozenModel):
    """A search for values of settings: every trial, the best, and how sure that is."""

    name: str = Field(description="name of the study")
    metric: Objective = Field(description="what was maximized, or minimized where it is the cross-entropy")
    search_on: str = Field(description="split that chose")
    evaluations: int = Field(description="evaluations of a trial that is not pruned, at most")
    sampler: str = Field(description="tune.sampler")
    pruner: str = Field(description="tune.pruner")
    space: dict[str, str] = Field(description="what was tried, in words, by setting")
    dataset: ComparedDataset = Field(description="what was trained on")
    trials: tuple[TunedTrial, ...] = Field(description="in the order in which they were begun")
    ended_by: EndedBy = Field(description="what ended the search")
    images: int = Field(description="training images of all trials")
    seconds: float = Field(description="for which the search ran, over all its commands")
    importance: dict[str, float] = Field(
        description="how much each setting decides whether a complete trial is among the best, in sum 1 (PED-ANOVA); "
        "empty where there were too few"
    )
    confirmed: tuple[ConfirmedTrial, ...] = Field(description="the winner first; empty where tune.confirm is 0")
    winner: int = Field(description="number of the trial whose values were taken")
    values: dict[str, SettingValue] = Field(description="its values")
    smallest_difference: float = Field(description="compare.smallest_difference: less is of no interest")
    test: TestFigure | None = Field(description="the winner on the test split; null where it was not confirmed")
    verdict: tuple[str, ...] = Field((), description="what this says, in sentences")
    notes: tuple[str, ...] = Field((), description="what a person should know of the dataset and the search")
    side_by_side: int = Field(description="trials that trained at once")
    settings: dict[str, Any] = Field(description="of the study, secrets masked")
    mlflow: ComparisonRun = Field(description="the MLflow run whose children they are")

    @property
    def complete(self) -> list[TunedTrial]:
        """The trials that trained to their end, or have the result of one that did."""
        return [trial for trial in self.trials if trial.state == "complete"]

    def trial(self, number: int) -> TunedTrial:
        """The trial of this number."""
        return self.trials[number]
