"""What `register` has done and why: the content of ``register.json``, defined here alone."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.frozen import FrozenModel

Decision = Literal["promoted", "first", "rejected", "forced", "unchanged", "rolled back"]


class ClassRecall(FrozenModel):
    """One class of the images that both models have seen."""

    name: str = Field(description="of the class")
    images: int = Field(description="of the class")
    challenger: float | None = Field(description="share of them that it recognized; null where there are none")
    champion: float | None = Field(description="the same of the champion; null also where there is none")
    p_value: float | None = Field(description="McNemar's exact test within the class; null where there is no champion")


class GatedModel(FrozenModel):
    """A model as the gate has seen it."""

    version: str = Field(description="of the registered model")
    accuracy: float = Field(description="share of the images that it recognized, from 0 to 1")
    milliseconds: float = Field(description="median time of one image on this driver, from pixels to probabilities")


class GateReport(FrozenModel):
    """Two models on the same images; the counts are of images that the first, the second, both or neither had right."""

    split: str = Field(description="of the dataset")
    images: int = Field(description="the first ones of the split")
    challenger: GatedModel
    champion: GatedModel | None = Field(description="null where there was none")
    both_right: int
    only_challenger_right: int
    only_champion_right: int
    neither_right: int
    p_value: float | None = Field(description="McNemar's exact test, two-sided; null where there is no champion")
    latency_ratio: float | None = Field(description="challenger's milliseconds / champion's")
    classes: tuple[ClassRecall, ...]
    reasons: tuple[str, ...] = Field(description="why the challenger does not pass, as sentences; empty: it passes")

    @property
    def passes(self) -> bool:
        return not self.reasons


class TrainingOrigin(FrozenModel):
    """The training that was registered."""

    training: str = Field(description="what tells it from all others: its run in MLflow, and its steps")
    name: str = Field(description="of its run")
    run_id: str = Field(description="its run in MLflow")
    kind: Literal["comparison", "train"] = Field(description="which command trained it")
    why: str = Field(description="why this one, as a sentence")
    arm: str | None = Field(None, description="of the comparison")
    seed: int = Field(description="train.seed")
    comparison_run: str | None = Field(None, description="the comparison's run in MLflow")
    comparison_report: str | None = Field(None, description="path of its page")
    network: str
    norm: str
    dataset: str = Field(description="name")
    dataset_digest: str


class Registration(FrozenModel):
    """What `register` has done."""

    model: str = Field(description="name of the registered model")
    version: str = Field(description="the version that the decision is about")
    is_new: bool = Field(description="whether this call made the version")
    decision: Decision = Field(
        description="promoted: it passed the gate and is the champion; first: so, as there was none; rejected: the "
        "gate did not let it pass; forced: it is the champion without passing; unchanged: nothing was decided; rolled "
        "back: it is no longer the champion"
    )
    why: tuple[str, ...] = Field(description="as sentences")
    champion: str | None = Field(description="version that is the champion now")
    champion_before: str | None = Field(description="version that was the champion before")
    aliases: dict[str, str] = Field(description="version of each alias now")
    uri: str | None = Field(description="what loads the champion: models:/NAME@champion; null where there is none")
    origin: TrainingOrigin | None = Field(description="null of a rollback")
    gate: GateReport | None = Field(description="null where the gate was not asked")
    notes: tuple[str, ...] = Field((), description="what a reader should know, as sentences")
