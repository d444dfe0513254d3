"""A candidate of a search, what its rungs have shown, and the values beyond a grid."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from pipeline.config import Settings
from pipeline.config.training import TrainSettings
from pipeline.data import Manifest
from pipeline.report.comparison import StudyRun
from pipeline.report.learned import beats_constant
from pipeline.report.names import SettingValue, Values, is_number
from pipeline.study.rung_scores import RungScore


@dataclass
class CandidateSeed:
    """What a candidate trains with one seed.

    settings : of its one trial, whose schedule has a cycle for each rung
    runs, scores : of its rungs so far
    """

    settings: Settings
    runs: list[StudyRun] = field(default_factory=list)
    scores: list[RungScore] = field(default_factory=list)


@dataclass
class Candidate:
    """Values of the tuned settings that an arm tries.

    seeds : what it trains with each seed that it has begun; always with the first, ``compare.search_seed``
    beyond_grid : whether the grid lacks it
    """

    tuned: Values
    seeds: list[CandidateSeed]
    beyond_grid: bool = False

    @property
    def settings(self) -> Settings:
        """Those of its trial with the first seed."""
        return self.seeds[0].settings

    @property
    def scores(self) -> list[RungScore]:
        """Those of its rungs with the first seed."""
        return self.seeds[0].scores

    @property
    def repeats(self) -> list[list[RungScore]]:
        """The scores of its rungs with each further seed."""
        return [each.scores for each in self.seeds[1:]]

    @property
    def images(self) -> int:
        """Training images that its trials have taken so far."""
        return sum(each.runs[-1].steps * each.runs[-1].global_batch for each in self.seeds if each.runs)


def value_beyond(edge: SettingValue, inner: SettingValue) -> int | float | None:
    """The value beyond the edge of a grid by the factor between the edge and the value next to it.

    None where there is none: of values that are not positive numbers, and of whole numbers whose next is not whole.
    """
    if not is_number(edge) or not is_number(inner) or min(edge, inner) <= 0:
        return None
    value = Fraction(str(edge)) ** 2 / Fraction(str(inner))
    if isinstance(edge, int) and isinstance(inner, int):
        return int(value) if value.denominator == 1 else None
    return float(f"{float(value):.6g}")


def score_of(run: StudyRun, metric: str, class_weights: np.ndarray | None = None) -> RungScore:
    """What a rung has shown, from the predictions that its last evaluation has left.

    Parameters
    ----------
    metric : ``compare.search_metric``
    class_weights : see `weights_of_classes`
    """
    from pipeline.training.predictions import read

    assert run.predictions is not None, run.run_id
    found = read(run.predictions)
    wrong = (found.prediction != found.label).astype(np.float64)
    costs = found.loss.astype(np.float64) if metric == "cross_entropy" else wrong
    counts = np.bincount(found.label, minlength=0 if class_weights is None else len(class_weights))
    weights = np.ones(len(counts)) if class_weights is None else class_weights
    diverged = run.diverged or not np.isfinite(found.loss).all()
    hits = np.bincount(found.label, 1 - wrong, minlength=len(counts))
    learned = not diverged and beats_constant(hits, counts, weights)
    return RungScore(weights[found.label] * costs, learned, bool(diverged))


def weights_of_classes(train: TrainSettings, manifest: Manifest) -> np.ndarray | None:
    """How much an image of each class counts in what an arm is trained for: its class weights, and its sampling.

    An arm that is trained to balance the classes is not judged by how often it names the largest one.

    Returns
    -------
    float64 (classes,); None where every image counts alike
    """
    from pipeline.training.class_weights import weights_of

    weights = weights_of(train, manifest)
    if train.sampling != "balanced":
        return weights
    counts = np.array(manifest.split("train").label_counts, dtype=np.float64)
    even = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return even if weights is None else weights * even
