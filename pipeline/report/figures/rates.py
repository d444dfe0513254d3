"""A comparison -> the heat map of its learning rates: what each arm made of each rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline.report.comparison import Comparison, SearchTrial, by
from pipeline.report.figures.style import WIDTH, Drawing, heat, name_rows, row_height
from pipeline.report.names import LEARNING_RATE, arm_name, norm_words, values_words

# Errors below this have one colour.
_LEAST_ERROR = 1e-4
# More columns than these leave room for shorter words.
_MOST_WORDS = 7


class RateCell(NamedTuple):
    """What an arm made of one learning rate.

    diverged, trials : how many trials with it diverged, of how many
    chosen : whether it is the arm's, or the best of an arm's runs
    """

    arm: str
    rate: float
    accuracy: float
    diverged: int
    trials: int
    chosen: bool


def learning_rates(comparison: Comparison) -> Drawing | None:
    """The trials of the search, or, where the learning rate makes arms, the runs; None of fewer than two rates."""
    varied = LEARNING_RATE in comparison.varied
    cells = _cells_of_runs(comparison) if varied else _cells_of_search(comparison)
    if len({cell.rate for cell in cells}) < 2:
        return None
    words = {cell.arm: cell.arm if varied else comparison.arm(cell.arm).words for cell in cells}
    search_on = comparison.settings["compare"]["search_on"]
    seeds = f", mean of {comparison.seeds} seeds" if comparison.seeds > 1 else ""
    what = f"the {comparison.evaluated_on} split{seeds}" if varied else f"the {search_on} split"
    caption = f"Accuracy in percent on {what}, darker is worse; framed: {'the best' if varied else 'chosen'}. "
    caption += "Hatched: diverged (div.)."
    columns = ("arm", "learning_rate", "accuracy", "diverged", "trials", "chosen")
    size = (WIDTH, 1.1 + row_height(list(words.values()), 0.36) * len(words))
    title = "Learning rates" if varied else "Choice of the learning rate"
    return Drawing("learning_rates", title, caption, columns, cells, size, partial(_paint, cells=cells, words=words))


def _cells_of_search(comparison: Comparison) -> list[RateCell]:
    """The mean over seeds counts, of the trials that came furthest; of other tuned settings with one rate, the best."""
    cells = []
    for arm, trials in by(comparison.search, lambda trial: trial.arm).items():
        chosen = comparison.arm(arm).tuned.get(LEARNING_RATE)
        for rate, tried in sorted(by(trials, lambda trial: trial.learning_rate).items()):
            of_values = by(tried, lambda trial: arm_name(trial.tuned)).values()
            accuracy, all_diverged = max(
                (_mean_of_seeds(seeds) for seeds in of_values), key=lambda found: (not found[1], found[0])
            )
            diverged = sum(trial.diverged for trial in tried) if all_diverged else 0
            cells.append(RateCell(arm, rate, accuracy, diverged, len(tried), rate == chosen))
    return cells


def _mean_of_seeds(trials: Sequence[SearchTrial]) -> tuple[float, bool]:
    """Mean accuracy of those that did not diverge, or of all that did, at the last rung; whether all diverged."""
    sound = [trial for trial in trials if not trial.diverged]
    furthest = max(trial.rungs for trial in sound or trials)
    return fmean(trial.best_accuracy for trial in sound or trials if trial.rungs == furthest), not sound


def _cells_of_runs(comparison: Comparison) -> list[RateCell]:
    """Arms that differ in the rate alone are one row, called after their other values."""
    alone = norm_words(str(comparison.settings["model"]["norm"]))
    rows = by(
        comparison.arms,
        lambda arm: values_words({name: value for name, value in arm.values.items() if name != LEARNING_RATE}) or alone,
    )
    cells = []
    for row, arms in rows.items():
        best = max(arms, key=lambda arm: (not arm.all_diverged, arm.score_mean))
        rated = [(rate, arm) for arm in arms if isinstance(rate := arm.values[LEARNING_RATE], (int, float))]
        cells += [
            RateCell(row, rate, arm.score_mean, arm.diverged, arm.n, arm is best)
            for rate, arm in sorted(rated, key=lambda pair: pair[0])
        ]
    return cells


def _paint(figure: Figure, cells: list[RateCell], words: Mapping[str, str]) -> None:
    axes = figure.add_subplot()
    arms, rates = list(words), sorted({cell.rate for cell in cells})
    shown = [cell.accuracy for cell in cells if cell.diverged < cell.trials]
    best, worst = max(shown, default=1.0), min(shown, default=0.0)
    for cell in cells:
        colors = _heat(cell.accuracy, best=best, worst=worst)
        _draw_cell(axes, rates.index(cell.rate), arms.index(cell.arm), cell, colors, narrow=len(rates) > _MOST_WORDS)
    axes.set(xlim=(-0.5, len(rates) - 0.5), xlabel="peak learning rate")
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    name_rows(axes, list(words.values()))
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _draw_cell(axes: Axes, x: int, y: int, cell: RateCell, colors: tuple[str, str], *, narrow: bool) -> None:
    none_left = cell.diverged == cell.trials
    back, ink = ("#b8bec5", "#000000") if none_left else colors
    hatch = "//" if cell.diverged else None
    # Hatching has the colour of the edge; it is light, since the cell's text lies on it.
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=back, edgecolor="#8f98a1", hatch=hatch, linewidth=0))
    if cell.chosen:
        axes.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, edgecolor=ink, linewidth=2))
    word = "div." if narrow else "diverged"
    some = f"\n{cell.diverged} of {cell.trials} {word}" if cell.diverged else ""
    text = word if none_left else f"{100 * cell.accuracy:.1f}{some}"
    axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=7 if some or narrow else 9,
              fontweight="bold" if cell.chosen else "normal", linespacing=1)  # fmt: skip


def _heat(accuracy: float, *, best: float, worst: float) -> tuple[str, str]:
    """Colours of a cell and of its text. By the logarithm of the error: good rates differ by little."""
    least, most, error = (math.log(max(_LEAST_ERROR, 1 - value)) for value in (best, worst, accuracy))
    return heat(1.0 if most == least else min(1.0, max(0.0, (most - error) / (most - least))))
