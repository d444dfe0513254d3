"""The trainings of a study, and those of every arm with every seed. Those of a search are in `search`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config import Settings
from pipeline.report.names import Values, arm_name, tag_name
from pipeline.study.arms import Arm


@dataclass(frozen=True)
class Trial:
    """One training of a study.

    kind : ``search`` for one that chooses tuned values for an arm, ``arm`` for one that is compared
    tuned : its values of the tuned settings
    settings : everything it is trained with
    cycle : of its schedule, to the end of which it trains now; None to the end of all
    repeat : of a search, how many seeds of the same values came before it
    """

    kind: Literal["search", "arm"]
    arm: Arm
    tuned: Values
    settings: Settings
    cycle: int | None = None
    repeat: int = 0

    @property
    def name(self) -> str:
        """The name of its MLflow run."""
        if self.kind == "search":
            seed = f" seed={self.settings.train.seed}" if self.repeat else ""
            return f"{self.settings.name} search {self.arm.name} {arm_name(self.tuned)}{seed}"
        return f"{self.settings.name} {self.arm.name} seed={self.settings.train.seed}"

    @property
    def tags(self) -> Mapping[str, Any]:
        """What the columns of MLflow's table and its charts group by."""
        values = {tag_name(name): value for name, value in {**self.arm.values, **self.tuned}.items()}
        return {**values, "kind": self.kind, "arm": self.arm.name, "seed": self.settings.train.seed}


def compared_trials(
    settings: Settings, arms: Sequence[Arm], tuned: Mapping[str, Values], seeds: Sequence[int]
) -> list[Trial]:
    """Every arm with its values of the tuned settings and with every seed, the arms of one seed after each other.

    tuned : the values of each arm, by its name
    """
    trials = []
    for seed in seeds:
        for arm in arms:
            own = settings.with_values({**arm.values, **tuned[arm.name], "train.seed": seed})
            trials.append(Trial("arm", arm, tuned[arm.name], own))
    return trials
