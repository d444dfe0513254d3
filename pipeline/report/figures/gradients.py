"""A comparison -> the norm of the gradient by layer, of each arm."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from pipeline.report.comparison import ComparedRun, Comparison, by
from pipeline.report.figures.style import Drawing, LineStyle, legend, line_styles, panels, size_of

# Highest value / lowest from which on powers of ten label an axis well enough with 2 and 5 between them.
_WIDE = 10
# And from which on they do alone.
_FEW_POWERS = 1_000
# More layers than these are numbered, not named.
_MOST_NAMES = 32


class LayerNorm(NamedTuple):
    """The gradient of one layer of an arm.

    number : of the layer, from 1
    norm : median over steps, geometric mean over seeds
    """

    arm: str
    number: int
    layer: str
    norm: float


def gradient_norms(comparison: Comparison) -> Drawing | None:
    """Where the layers of an arm are some of those of another (without norm layers), equal layers share their place;
    None where diagnostics did not look."""
    measured = {
        arm: looked_at
        for arm, runs in by(comparison.runs, lambda run: run.arm).items()
        if (looked_at := [run for run in runs if run.gradient_norms])
    }
    if not measured:
        return None
    layers = {arm: [entry.layer for entry in runs[0].gradient_norms] for arm, runs in measured.items()}
    longest = max(layers.values(), key=len)
    norms = [
        LayerNorm(arm, order.index(layer) + 1, layer, norm)
        for arm, runs in measured.items()
        for order in [longest if set(layers[arm]) <= set(longest) else layers[arm]]
        for layer in layers[arm]
        if (norm := _norm_of(runs, layer)) is not None
    ]
    caption = (
        "L2 norm of the gradient by all parameters of a layer: median over the steps looked at, geometric mean over "
        "seeds. A triangle at the bottom edge is a norm of zero."
    )
    same = all(set(names) <= set(longest) for names in layers.values())
    names = longest if same and len(longest) <= _MOST_NAMES else []
    all_styles = line_styles({arm.arm: arm.values for arm in comparison.arms})
    styles = {arm: all_styles[arm] for arm in measured}
    width, height = size_of(styles.values())
    paint = partial(_paint, norms=norms, styles=styles, names=names)
    columns = ("arm", "layer_number", "layer", "gradient_norm")
    size = (width, height + (0.5 if names else 0))
    return Drawing("gradient_norms", "Gradient norms by layer", caption, columns, norms, size, paint)


def _norm_of(runs: list[ComparedRun], layer: str) -> float | None:
    """Geometric mean over the runs that know the layer's norm; a single zero makes it zero."""
    norms = [
        entry.median
        for run in runs
        for entry in run.gradient_norms
        if entry.layer == layer and entry.median is not None
    ]
    if not norms:
        return None
    return statistics.geometric_mean(norms) if min(norms) > 0 else 0.0


def _paint(figure: Figure, norms: list[LayerNorm], styles: Mapping[str, LineStyle], names: list[str]) -> None:
    """names : of the layers, if they are few"""
    drawn = by(norms, lambda entry: entry.arm)
    styles = {arm: styles[arm] for arm in drawn}
    grid = panels(figure, styles.values())
    first = next(iter(grid.values()))
    bottom = _limit(first, [entry.norm for entry in norms])
    for arm, layers in drawn.items():
        style, axes = styles[arm], grid[styles[arm].panel]
        shown = [max(entry.norm, bottom) for entry in layers]
        axes.plot([entry.number for entry in layers], shown, color=style.color, linestyle=style.dash,
                  marker=style.marker, markersize=3.5)  # fmt: skip
        zeros = [entry.number for entry in layers if entry.norm == 0]
        if zeros:  # an empty line that is not clipped has no place, and the layout would look for it
            axes.plot(zeros, [bottom] * len(zeros), "v", color=style.color, markersize=9, clip_on=False)
    if names and len(grid) == 1:
        first.set_xticks(range(1, len(names) + 1), names, rotation=90, fontsize=8)
    else:
        first.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.supxlabel("layer, from the images to the output", fontsize=10)
    figure.supylabel("median norm of the gradient", fontsize=10)
    legend(figure, styles.values())


def _limit(axes: Axes, norms: list[float]) -> float:
    """A logarithmic axis; returns its lower end, where zeros are drawn."""
    least, most = min((norm for norm in norms if norm > 0), default=1e-8), max(norms)
    bottom = least / (3 if 0 in norms else 1.3)  # a zero has no place on the axis, but one below it
    axes.set_yscale("log")
    axes.set_ylim(bottom, 1.3 * max(most, least))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5) if most > _WIDE * least else range(2, 10)))
    axes.yaxis.set_minor_formatter("{x:g}" if most < _FEW_POWERS * least else "")
    return bottom
