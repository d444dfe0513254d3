"""Whether a challenger may take the champion's place: both on the same images. Arithmetic: no files, no networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.config.registry import RegistrySettings
from pipeline.report.learned import learned, metric_for
from pipeline.report.registration import ClassRecall, GatedModel, GateReport
from pipeline.report.significance import mcnemar

# 0.9 - 0.895 is more than 0.005 in floats; shares of so few images as these lie further apart than this.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Seen:
    """What a model has made of the images.

    version : of the registered model
    predictions : int (images,), the most probable class of each
    milliseconds : median time of a single image
    """

    version: str
    predictions: np.ndarray
    milliseconds: float


def judge(
    labels: np.ndarray,
    challenger: Seen,
    champion: Seen | None,
    *,
    split: str,
    classes: Sequence[str],
    settings: RegistrySettings,
) -> GateReport:
    """Compare the two, and say what keeps the challenger from passing.

    A challenger has to have learned at all. Beside a champion it must not be less accurate by more than the bound, nor
    by anything that McNemar's test does not take for chance; no class may lose more recall than its bound and chance
    within the class allow; and a single image must not take it too long.

    Parameters
    ----------
    labels : int (images,)
    split : that the images are of
    classes : names, in the order of the labels
    settings : the bounds
    """
    right = challenger.predictions == labels
    counts = np.bincount(labels, minlength=len(classes))
    before = None if champion is None else champion.predictions == labels
    by_class = [_recall(name, labels == number, right, before) for number, name in enumerate(classes)]
    other = np.zeros_like(right) if before is None else before
    report = GateReport(
        split=split,
        images=len(labels),
        challenger=_gated(challenger, right),
        champion=None if champion is None else _gated(champion, other),
        both_right=int(np.count_nonzero(right & other)),
        only_challenger_right=int(np.count_nonzero(right & ~other)),
        only_champion_right=int(np.count_nonzero(other & ~right)),
        neither_right=int(np.count_nonzero(~right & ~other)),
        p_value=None if before is None else mcnemar(right, before),
        latency_ratio=None if champion is None else challenger.milliseconds / champion.milliseconds,
        classes=tuple(by_class),
        reasons=(),
    )
    reasons = []
    if not learned([each.challenger for each in by_class], metric_for("auto", counts.tolist()), counts.tolist()):
        reasons.append(
            f"it has not learned: an accuracy of {_percent(report.challenger.accuracy)} is no better than the best "
            f"constant answer, {_percent(counts.max() / len(labels))}, beyond chance"
        )
    if report.champion is not None:
        reasons += _against(report, report.champion, settings)
    return report.model_copy(update={"reasons": tuple(reasons)})


def _against(report: GateReport, champion: GatedModel, settings: RegistrySettings) -> list[str]:
    """What keeps it from passing, beside a champion."""
    reasons, gain = [], report.challenger.accuracy - champion.accuracy
    p_value, bound = report.p_value or 0.0, settings.significance
    accuracies = (
        f"{_percent(report.challenger.accuracy)} right against {_percent(champion.accuracy)} of version "
        f"{champion.version}"
    )
    if -gain > settings.max_accuracy_drop + _ROUNDING:
        most = 100 * settings.max_accuracy_drop
        reasons.append(f"{accuracies}: more than registry.max_accuracy_drop, {most:g} points, below")
    elif gain < 0 and p_value < bound:
        reasons.append(f"{accuracies}: less accurate beyond chance (McNemar's p = {p_value:.2g} < {bound:g})")
    elif settings.require == "better" and not (gain > 0 and p_value < bound):
        reasons.append(
            f"{accuracies}: not better beyond chance (McNemar's p = {p_value:.2g}), and registry.require is better"
        )
    for each in report.classes:
        if each.challenger is None or each.champion is None or each.p_value is None:
            continue
        if each.champion - each.challenger > settings.max_recall_drop + _ROUNDING and each.p_value < bound:
            reasons.append(
                f"class {each.name}: {_percent(each.challenger)} of its images right against "
                f"{_percent(each.champion)}, more than registry.max_recall_drop, {100 * settings.max_recall_drop:g} "
                f"points, below (p = {each.p_value:.2g})"
            )
    ratio, most_ratio = report.latency_ratio or 0.0, settings.max_latency_ratio
    if most_ratio is not None and ratio > most_ratio:
        reasons.append(
            f"an image takes {report.challenger.milliseconds:.2f} ms, {ratio:.2f} times the champion's "
            f"{champion.milliseconds:.2f} ms: more than registry.max_latency_ratio, {most_ratio:g}"
        )
    return reasons


def _recall(name: str, of_class: np.ndarray, right: np.ndarray, before: np.ndarray | None) -> ClassRecall:
    known = bool(of_class.any())
    paired = known and before is not None
    return ClassRecall(
        name=name,
        images=int(np.count_nonzero(of_class)),
        challenger=float(right[of_class].mean()) if known else None,
        champion=float(before[of_class].mean()) if paired and before is not None else None,
        p_value=mcnemar(right[of_class], before[of_class]) if paired and before is not None else None,
    )


def _gated(seen: Seen, right: np.ndarray) -> GatedModel:
    return GatedModel(version=seen.version, accuracy=float(right.mean()), milliseconds=seen.milliseconds)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
