"""The trainings of a study: short ones that choose the tuned values of each arm, then every arm with every seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config import Settings
from pipeline.report.comparison import SearchTrial
from pipeline.report.names import Values, arm_name, short_name
from pipeline.study.arms import Arm


@dataclass(frozen=True)
class Trial:
    """One training of a study.

    kind : ``search`` for one that chooses tuned values for an arm, ``arm`` for one that is compared
    tuned : its values of the tuned settings
    settings : everything it is trained with
    """

    kind: Literal["search", "arm"]
    arm: Arm
    tuned: Values
    settings: Settings

    @property
    def name(self) -> str:
        """The name of its MLflow run."""
        if self.kind == "search":
            return f"{self.settings.name} search {self.arm.name} {arm_name(self.tuned)}"
        return f"{self.settings.name} {self.arm.name} seed={self.settings.train.seed}"

    @property
    def tags(self) -> Mapping[str, Any]:
        """What the columns of MLflow's table and its charts group by."""
        values = {short_name(name): value for name, value in {**self.arm.values, **self.tuned}.items()}
        return {"kind": self.kind, "arm": self.arm.name, "seed": self.settings.train.seed, **values}


def search_trials(settings: Settings, arms: Sequence[Arm], candidates: Sequence[Values]) -> list[Trial]:
    """Every arm with every candidate; none where there is nothing to choose.

    A trial is short and judged on another split. At most half of it is warm-up, so that it does try the rate it is for.
    """
    if len(candidates) < 2:
        return []
    options = settings.compare
    short: Values = {
        "train.warmup_epochs": min(settings.train.warmup_epochs, options.search_epochs / 2),
        "train.seed": options.search_seed,
        "train.epochs": options.search_epochs,
        "train.evaluate_on": options.search_on,
        "train.evaluations_per_epoch": 1,
    }
    return [
        Trial("search", arm, tuned, settings.with_values({**arm.values, **tuned, **short}))
        for arm in arms
        for tuned in candidates
    ]


def compared_trials(
    settings: Settings, arms: Sequence[Arm], candidates: Sequence[Values], search: Sequence[SearchTrial]
) -> list[Trial]:
    """Every arm with its own best candidate and with every seed, the arms of one seed after each other."""
    trials = []
    for seed in settings.compare.seeds:
        for arm in arms:
            tuned = best_of(search, arm, candidates)
            trials.append(Trial("arm", arm, tuned, settings.with_values({**arm.values, **tuned, "train.seed": seed})))
    return trials


def best_of(search: Sequence[SearchTrial], arm: Arm, candidates: Sequence[Values]) -> Values:
    """The arm's candidate with the highest accuracy; those that diverged are taken only if all did."""
    trials = [trial for trial in search if trial.arm == arm.name]
    if not trials:
        return candidates[0]
    return max(trials, key=lambda trial: (not trial.diverged, trial.best_accuracy)).tuned
