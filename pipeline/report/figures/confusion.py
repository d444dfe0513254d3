"""A comparison -> a picture for each arm: which classes it takes for which, and how many of each it recognizes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from pipeline.report.comparison import ArmSummary, Comparison
from pipeline.report.figures.style import COLORS, WIDTH, Drawing, heat

# Up to so many classes there is room for large numbers in the cells.
_ROOMY = 12
# Letters of a class's name; of a longer one the end is cut off.
_LETTERS = 18


class ConfusionCell(NamedTuple):
    """How often one class was taken for one.

    images : of the class ``label`` with this prediction, over all runs
    share : of the images of the class; None where it has none
    """

    arm: str
    label: str
    prediction: str
    images: int
    share: float | None


def confusion_matrices(comparison: Comparison) -> list[Drawing]:
    """One figure for each arm whose predictions were kept; none for more classes than a picture can show."""
    classes = comparison.dataset.class_names
    return [
        _drawing(number, arm, arm.confusion, classes)
        for number, arm in enumerate(comparison.arms, start=1)
        if arm.confusion is not None
    ]


def _drawing(number: int, arm: ArmSummary, matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Drawing:
    counted = arm.n if arm.all_diverged else arm.n - arm.diverged
    of_runs = f"over {counted} runs" if counted > 1 else "of one run"
    caption = (
        f"Percent of the images of each class (row) that were taken for each class (column), {of_runs}; empty: none. "
        "Bars: recall, the share of a class's images that were recognized."
    )
    if 0 < arm.diverged < arm.n:
        caption += " Runs that diverged are left out."
    cells = [
        ConfusionCell(arm.arm, classes[label], classes[guess], images, images / sum(row) if any(row) else None)
        for label, row in enumerate(matrix)
        for guess, images in enumerate(row)
        if images or label == guess
    ]
    name = f"confusion_{number}_{re.sub(r'[^a-zA-Z0-9_.=-]+', '-', arm.arm)[:60]}"
    height = 1.7 + (0.3 if len(classes) <= _ROOMY else 0.2) * len(classes)
    paint = partial(_paint, matrix=matrix, classes=classes)
    return Drawing(name, f"Confusion: {arm.words}", caption, ConfusionCell._fields, cells, (WIDTH, height), paint)


def _paint(figure: Figure, matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> None:
    cells, bars = figure.subplots(1, 2, width_ratios=[3, 1])
    names = [name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…" for name in classes]
    size = 8 if len(classes) <= _ROOMY else 6
    for label, row in enumerate(matrix):
        for guess, images in enumerate(row):
            if images:
                _draw_cell(cells, guess, label, images / sum(row), 8 if len(classes) <= _ROOMY else 5)
    cells.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    cells.set_yticks(range(len(names)), names, fontsize=size)
    cells.set(xlim=(-0.5, len(names) - 0.5), xlabel="prediction", ylabel="label")
    _draw_recall(bars, matrix, size)
    for axes in (cells, bars):
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(length=0)
        axes.grid(visible=False, axis="both" if axes is cells else "y")


def _draw_cell(axes: Axes, x: int, y: int, share: float, size: int) -> None:
    # By the square root: a class is mistaken for another in a few percent of its images.
    back, ink = heat(math.sqrt(share))
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=back, linewidth=0))
    text = f"{100 * share:.0f}" if share >= 0.005 else "<1"
    axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=size)


def _draw_recall(axes: Axes, matrix: Sequence[Sequence[int]], size: int) -> None:
    for label, row in enumerate(matrix):
        recall = row[label] / sum(row) if any(row) else None
        axes.barh(label, recall or 0, color=COLORS[1], height=0.6)
        text = "no images" if recall is None else f"{recall:.1%}"
        axes.annotate(text, (recall or 0, label), xytext=(3, 0), textcoords="offset points", va="center", fontsize=size)
    axes.set(xlim=(0, 1.5), xlabel="recall", xticks=(0, 0.5, 1))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.tick_params(labelleft=False)
