"""A comparison -> the error against the batch size, and the accuracy against the depth."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from pipeline.report.comparison import Comparison, by
from pipeline.report.figures.style import Drawing, LineStyle, legend, line_styles, size_of
from pipeline.report.names import BATCH_SIZES, values_words
from pipeline.report.sentences import metric_words

# The line of arms that differ in nothing else.
_ALL = "all"


class SizePoint(NamedTuple):
    """One arm.

    line : its other values in words
    size : value of the setting
    mean, std : of the best accuracy or its complement, over seeds
    n, diverged : runs, and how many of them diverged
    """

    line: str
    size: float
    mean: float
    std: float | None
    n: int
    diverged: int


def batch_size(comparison: Comparison) -> Drawing | None:
    """Error against the batch size, where that varied."""
    setting = next((name for name in BATCH_SIZES if name in comparison.varied), None)
    if setting is None:
        return None
    what = "images of a step for each worker" if setting.endswith("rank_batch_size") else "images of a step"
    caption = f"One minus the final {metric_words(comparison)}, mean over seeds; bars are one standard deviation."
    points = [point._replace(mean=1 - point.mean) for point in _points(comparison, setting)]
    return _drawing("batch_size", "Error against batch size", caption, "error", points, what)


def depth(comparison: Comparison) -> Drawing | None:
    """Accuracy against the depth of the network, where that varied."""
    if "model.depth" not in comparison.varied:
        return None
    caption = f"Final {metric_words(comparison)}, mean over seeds; bars are one sample standard deviation."
    points = _points(comparison, "model.depth")
    return _drawing("depth", "Accuracy against depth", caption, "accuracy", points, "depth")


def _points(comparison: Comparison, setting: str) -> list[SizePoint]:
    """Line by line, from the smallest size to the largest."""
    points = []
    for arm in comparison.arms:
        line = values_words({name: value for name, value in arm.values.items() if name != setting})
        size = arm.values[setting]
        if isinstance(size, (int, float)):
            accuracy = (arm.score_mean, arm.score_std)
            points.append(SizePoint(line or _ALL, size, *accuracy, arm.n, arm.diverged))
    lines = list(dict.fromkeys(point.line for point in points))
    return sorted(points, key=lambda point: (lines.index(point.line), point.size))


def _drawing(
    name: str, title: str, caption: str, value: str, points: list[SizePoint], what: str
) -> Drawing | None:  # fmt: skip
    """One line for each combination of the other settings; None of fewer than two sizes."""
    if len({point.size for point in points}) < 2:
        return None
    lines = list(dict.fromkeys(point.line for point in points))
    styles = line_styles({line: {"line": line} for line in lines})
    styles = {line: style._replace(label=line, panel="") for line, style in styles.items()}
    if any(point.diverged for point in points):
        caption += " A cross: some of the runs diverged."
    columns = ("line", name, f"{value}_mean", f"{value}_std", "n", "diverged")
    paint = partial(_paint, points=points, styles=styles, value=value, what=what, powers=name == "batch_size")
    return Drawing(name, title, caption, columns, points, size_of(styles.values()), paint)


def _paint(
    figure: Figure, points: list[SizePoint], styles: Mapping[str, LineStyle], value: str, what: str, *, powers: bool
) -> None:  # fmt: skip
    """powers : sizes are powers of two"""
    axes = figure.add_subplot()
    for line, curve in by(points, lambda point: point.line).items():
        style = styles[line]
        sizes, means = [point.size for point in curve], [point.mean for point in curve]
        axes.errorbar(sizes, means, [point.std or 0 for point in curve], color=style.color, linestyle=style.dash,
                      marker=style.marker, markersize=5, linewidth=1.8, capsize=3, elinewidth=1)  # fmt: skip
        if diverged := [(point.size, point.mean) for point in curve if point.diverged]:
            axes.plot(*zip(*diverged, strict=True), "x", color=style.color, markersize=11, markeredgewidth=2)
    if powers:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted({point.size for point in points})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel=what, ylabel=value)
    if list(styles) != [_ALL]:
        legend(figure, styles.values())
