"""A comparison -> learning curves: accuracy and training loss of each arm over the training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.report.comparison import ComparedRun, Comparison, by
from pipeline.report.figures.style import Drawing, LineStyle, legend, line_styles, panels, size_of
from pipeline.report.learned import score_at
from pipeline.report.sentences import capital, metric_words

# Highest value / lowest from which on a logarithmic axis shows more than a linear one.
_WIDE = 10
# Markers on a line; more hide it.
_MOST_MARKERS = 20

# What the values of a drawing are, where they are no accuracies.
_LOSS = "loss"


class CurvePoint(NamedTuple):
    """One point of an arm's curve.

    at : steps or images since the training began
    mean, least, most : over seeds
    n : seeds
    diverged : whether all runs of the arm did
    """

    arm: str
    at: int
    mean: float
    least: float
    most: float
    n: int
    diverged: bool


def learning_curves(comparison: Comparison) -> Drawing | None:
    """Accuracy at each evaluation, with the target as a line; None where no run was evaluated twice."""
    points = _points(comparison, lambda run: [score_at(point, comparison.metric) for point in run.curve])
    targets, given = [run.target for run in comparison.runs if run.target is not None], comparison.target_accuracy
    target = statistics.fmean(targets) if targets else None
    metric = metric_words(comparison)
    goal = f"the final {metric} of {comparison.baseline_arm.words}" if given is None else "the target"
    seeds = "Mean over seeds, the band from the worst to the best of them. " if comparison.seeds > 1 else ""
    caption = (
        f"{seeds}Dashed: {goal}{', mean over seeds' if seeds and given is None else ''}." if targets else seeds.rstrip()
    )
    low = _accuracy_limits(points, target)[0] if points else 0.0
    if any(point.mean < low for point in points):
        caption += " Triangles at the lower edge stand for evaluations below it, mostly the first ones."
    title = f"{capital(metric)} on the {comparison.evaluated_on} split"
    return _curves(comparison, "learning_curves", title, caption, comparison.metric, points, target)


def training_loss(comparison: Comparison) -> Drawing | None:
    """Loss between evaluations; None where no run was evaluated twice."""
    points = _points(comparison, lambda run: run.train_loss)
    seeds = ", over all seeds; the band goes from the lowest to the highest" if comparison.seeds > 1 else ""
    caption = f"Mean over the steps since the evaluation before{seeds}."
    return _curves(comparison, "training_loss", "Training loss", caption, _LOSS, points)


def steps_or_images(comparison: Comparison) -> str:
    """What arms are compared along: ``steps`` or, where steps differ in their number of images, ``images``."""
    return "steps" if len({arm.global_batch for arm in comparison.arms}) == 1 else "images"


def _points(comparison: Comparison, values: Callable[[ComparedRun], Sequence[float | None]]) -> list[CurvePoint]:
    """Runs that diverged are left out where others of the arm did not."""
    images = steps_or_images(comparison) == "images"
    curves: list[CurvePoint] = []
    for arm, runs in by(comparison.runs, lambda run: run.arm).items():
        healthy = [run for run in runs if not run.diverged]
        values_at: dict[int, list[float]] = {}
        for run in healthy or runs:
            for point, value in zip(run.curve, values(run), strict=True):
                if value is not None and math.isfinite(value):
                    values_at.setdefault(point.step * (run.global_batch if images else 1), []).append(value)
        curves += [
            CurvePoint(arm, at, statistics.fmean(seeds), min(seeds), max(seeds), len(seeds), not healthy)
            for at, seeds in sorted(values_at.items())
        ]
    return curves


def _curves(
    comparison: Comparison, name: str, title: str, caption: str, value: str, points: list[CurvePoint],
    target: float | None = None,
) -> Drawing | None:  # fmt: skip
    if not points or all(len(run.curve) < 2 for run in comparison.runs):  # one point is no curve
        return None
    styles, along = line_styles({arm.arm: arm.values for arm in comparison.arms}), steps_or_images(comparison)
    if along == "images":
        caption += " Steps of the arms differ in their number of images, so the axis counts images."
    if any(arm.diverged for arm in comparison.arms):
        caption += " Runs that diverged are left out where others of the arm did not; a cross ends an arm that did."
    columns: tuple[str, ...] = ("arm", along, f"{value}_mean", f"{value}_min", f"{value}_max", "n", "diverged")
    rows: list[tuple[Any, ...]] = [*points]
    if target is not None:
        columns, rows = (*columns, "target_mean"), [(*point, target) for point in points]
    paint = partial(_paint, points=points, styles=styles, along=along, target=target, value=value)
    return Drawing(name, title, caption, columns, rows, size_of(styles.values(), int(target is not None)), paint)


def _paint(
    figure: Figure, points: list[CurvePoint], styles: Mapping[str, LineStyle], along: str, target: float | None,
    value: str,
) -> None:  # fmt: skip
    """Accuracies, with the target where there is one, or losses."""
    grid = panels(figure, styles.values())
    first = next(iter(grid.values()))
    if value == _LOSS:
        _limit_losses(first, points)
    else:
        first.set_ylim(*_accuracy_limits(points, target))
        first.yaxis.set_major_formatter(PercentFormatter(1))
    for arm, curve in by(points, lambda point: point.arm).items():
        _draw_curve(grid[styles[arm].panel], curve, styles[arm], first.get_ylim())
    more = []
    if target is not None:
        ink = matplotlib.rcParams["text.color"]
        for axes in grid.values():
            axes.axhline(target, zorder=1.5, color=ink, linestyle="--", linewidth=1)
        more = [Line2D([], [], label="target", color=ink, linestyle="--", linewidth=1)]
    first.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    first.xaxis.set_major_formatter("{x:,.0f}")
    figure.supxlabel("training images seen" if along == "images" else "step", fontsize=10)
    figure.supylabel("cross-entropy (nats)" if value == _LOSS else value.replace("_", " "), fontsize=10)
    legend(figure, styles.values(), *more)


def _draw_curve(axes: Axes, curve: list[CurvePoint], style: LineStyle, limits: tuple[float, float]) -> None:
    """A line with its band over seeds; a cross at the end of an arm all of whose runs diverged."""
    at = [point.at for point in curve]
    axes.plot(at, [point.mean for point in curve], color=style.color, linestyle=style.dash, marker=style.marker,
              markersize=3, linewidth=1.6, markevery=-(-len(at) // _MOST_MARKERS))  # fmt: skip
    low, high = limits
    below = [point.at for point in curve if point.mean < low]
    if below:  # an empty line that is not clipped has no place, and the layout would make room for the figure's corner
        axes.plot(below, [low] * len(below), "v", color=style.color, markersize=6, clip_on=False)
    if max(point.n for point in curve) > 1:
        least, most = [point.least for point in curve], [point.most for point in curve]
        axes.fill_between(at, least, most, color=style.color, alpha=0.2, linewidth=0)
    if curve[-1].diverged:
        axes.plot(at[-1], min(max(curve[-1].mean, low), high), "x", color=style.color, markersize=10,
                  markeredgewidth=2, clip_on=False)  # fmt: skip


# Limits leave room for what matters: a run that diverged, or the first points of a curve, may be far from the rest.
def _accuracy_limits(points: list[CurvePoint], target: float | None) -> tuple[float, float]:
    shown = [point for point in points if not point.diverged] or points
    means = sorted(point.mean for point in shown)
    lowest_end = min(curve[-1].least for curve in by(shown, lambda point: point.arm).values())
    targets = [] if target is None else [target]
    low, most = min([means[len(means) // 10], lowest_end, *targets]), max([*(each.most for each in shown), *targets])
    return max(0.0, low - 0.02), min(1.0, most + 0.01)


def _limit_losses(axes: Axes, points: list[CurvePoint]) -> None:
    shown = [point for point in points if not point.diverged] or points
    least, most = min(point.least for point in shown), max(point.most for point in shown)
    if least > 0 and most > _WIDE * least:
        axes.set_yscale("log")
        axes.set_ylim(0.8 * least, 1.25 * most)
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(0.9 * min(0.0, least), 1.05 * most or 1.0)
