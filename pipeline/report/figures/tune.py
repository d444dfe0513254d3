"""A search -> its figures: history, curves, importance, slices, and the norms' settings beside rates and batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from pipeline.report.figures.score_scale import ScoreScale
from pipeline.report.figures.style import COLORS, WIDTH, Drawing, name_rows
from pipeline.report.formats import plain
from pipeline.report.names import BATCH_SIZES, LEARNING_RATE, SettingValue, setting_words
from pipeline.report.tuning import TunedTrial, Tuning

_COMPLETE, _ENDED, _BEST = COLORS[1], "#8a8f98", COLORS[0]
_COLUMNS, _MOST_PANELS = 3, 12
# Largest value / smallest from which on an axis is logarithmic.
_WIDE, _TWO_DECADES = 10, 100
# As many numbers as these are each named on their axis, at equal distances where each is about twice the one before.
_FEW, _STEPS = 4, 3


class ScorePoint(NamedTuple):
    """A trial at one value of a setting, or at its number.

    score : at its last evaluation
    """

    setting: str
    value: SettingValue
    trial: int
    state: str
    score: float


def figures_of(tuning: Tuning) -> list[Drawing]:
    """The figures that there is data for, in the order in which a page shows them."""
    figures: Sequence[Callable[[Tuning], Drawing | None]] = (history, curves, importance, slices, norm_settings)
    return [drawing for figure in figures if (drawing := figure(tuning)) is not None]


def history(tuning: Tuning) -> Drawing | None:
    """The score of each trial in the order of the search, and the best so far."""
    points = _points(tuning, ["trial"], lambda trial, _: trial.number)
    if not points:
        return None
    caption = (
        "Each trial at its last evaluation; crosses ended early, by a pruner or since they diverged. The line is the "
        f"best so far, on the {tuning.search_on} split: it flatters, the more trials the more."
    )
    scale = ScoreScale(tuning.metric, [point.score for point in points])
    caption += scale.beyond(points)
    columns, paint = (
        ("setting", "value", "trial", "state", "score"),
        partial(_paint_history, points=points, scale=scale),
    )
    return Drawing("history", "History", caption, columns, points, (WIDTH, 3.3), paint)


def curves(tuning: Tuning) -> Drawing | None:
    """The score at each evaluation of each trial; None where no trial was evaluated twice."""
    rows = [
        (trial.number, trial.state, point.evaluation, point.score)
        for trial in tuning.trials
        if trial.same_as is None
        for point in trial.curve
    ]
    if not any(evaluation > 1 for _, _, evaluation, _ in rows):
        return None
    ended = sum(trial.state in ("pruned", "diverged") for trial in tuning.trials if trial.curve)
    caption = f"On the {tuning.search_on} split. Grey, with a cross at the end: trials that were pruned or diverged "
    caption += f"({ended}). In colour: the trial whose values were taken."
    columns, paint = ("trial", "state", "evaluation", "score"), partial(_paint_curves, tuning=tuning)
    return Drawing("curves", "Evaluations of each trial", caption, columns, rows, (WIDTH, 3.5), paint)


def importance(tuning: Tuning) -> Drawing | None:
    """How much each setting matters; None where that is not known."""
    rows = sorted(tuning.importance.items(), key=lambda item: -item[1])
    if not rows:
        return None
    caption = (
        f"Share of a setting in what tells the best of {len(tuning.complete)} complete trials from the others "
        "(PED-ANOVA, Watanabe et al. 2023). It says nothing about values that were not tried, and little of few trials."
    )
    size = (WIDTH, 0.9 + 0.3 * len(rows))
    paint = partial(_paint_importance, rows=rows)
    return Drawing("importance", "Importance of the settings", caption, ("setting", "importance"), rows, size, paint)


def slices(tuning: Tuning) -> Drawing | None:
    """The score against the values of each setting."""
    names = list(tuning.space)[:_MOST_PANELS]
    points = _points(tuning, names, lambda trial, name: trial.values[name])
    if not points:
        return None
    names = [name for name in names if any(point.setting == name for point in points)]
    caption = "Each trial at its last evaluation; crosses ended early. Framed: the trial whose values were taken."
    scale = ScoreScale(tuning.metric, [point.score for point in points])
    caption += scale.beyond(points)
    rows = -(-len(names) // _COLUMNS)
    columns = ("setting", "value", "trial", "state", "score")
    paint = partial(_paint_slices, names=names, points=points, winner=tuning.winner, scale=scale)
    return Drawing("slices", "Values of each setting", caption, columns, points, (WIDTH, 0.4 + 2.3 * rows), paint)


def norm_settings(tuning: Tuning) -> Drawing | None:
    """The settings of the norms (scale, shift, momentum, eps) beside learning rate and batch size, if both vary."""
    norms = [name for name in tuning.space if name.startswith("model.norm")]
    beside = [name for name in tuning.space if name in (LEARNING_RATE, *BATCH_SIZES)]
    trials = [trial for trial in tuning.trials if _score(trial) is not None]
    rows = [
        (norm, trial.values[norm], other, trial.values[other], trial.number, trial.state, _score(trial))
        for norm in norms
        for other in beside
        for trial in trials
        if norm in trial.values and other in trial.values
    ]
    if not rows:
        return None
    caption = "Each dot is a trial where the setting applies: the lighter, the better; crosses ended early."
    columns = ("norm_setting", "norm_value", "setting", "value", "trial", "state", "score")
    size = (WIDTH, 0.5 + 2.0 * len(norms))
    scale = ScoreScale(tuning.metric, [_score(trial) or 0.0 for trial in trials])
    paint = partial(_paint_norms, norms=norms, beside=beside, trials=trials, scale=scale)
    title = "Settings of the norms beside rates and batch sizes"
    return Drawing("norm_settings", title, caption, columns, rows, size, paint)


def _score(trial: TunedTrial) -> float | None:
    """The score of a trial at its end, however it ended; None where it was not evaluated."""
    return trial.score if trial.score is not None else trial.curve[-1].score if trial.curve else None


def _points(tuning: Tuning, names: Sequence[str], value: Callable[[TunedTrial, str], SettingValue]) -> list[ScorePoint]:
    return [
        ScorePoint(name, value(trial, name), trial.number, trial.state, score)
        for name in names
        for trial in tuning.trials
        if (score := _score(trial)) is not None and (name not in tuning.space or name in trial.values)
    ]


def _draw_points(axes: Axes, xs: Sequence[float], points: Sequence[ScorePoint], scale: ScoreScale) -> None:
    for x, point in zip(xs, points, strict=True):
        is_complete, y = point.state == "complete", scale.place(point.score)
        axes.plot(
            x, y, "o" if is_complete else "x", color=_COMPLETE if is_complete else _ENDED, markersize=5,
            alpha=0.85, markeredgewidth=1 if is_complete else 1.4,
        )  # fmt: skip


def _paint_history(figure: Figure, points: Sequence[ScorePoint], scale: ScoreScale) -> None:
    axes = figure.add_subplot()
    _draw_points(axes, [point.trial for point in points], points, scale)
    best: list[tuple[int, float]] = []
    for point in points:
        if point.state == "complete":
            best.append((point.trial, scale.better(point.score, best[-1][1] if best else point.score)))
    if best:
        last = max(point.trial for point in points)
        axes.step(*zip(*best, (last, best[-1][1]), strict=True), where="post", color=_BEST, linewidth=1.6)
    scale.limit(axes)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set(xlabel="trial", ylabel=scale.name)
    _legend(figure, Line2D([], [], color=_BEST, label="best so far"))


def _legend(figure: Figure, *more: Line2D) -> None:
    lines = [
        Line2D([], [], color=_COMPLETE, marker="o", linestyle="", markersize=5, label="complete"),
        Line2D([], [], color=_ENDED, marker="x", linestyle="", markersize=5, label="ended early"),
    ]
    figure.legend(handles=[*lines, *more], loc="outside upper left", ncols=4, fontsize=9)


def _paint_curves(figure: Figure, tuning: Tuning) -> None:
    axes = figure.add_subplot()
    trials = [trial for trial in tuning.trials if trial.curve and trial.same_as is None]
    scale = ScoreScale(tuning.metric, [point.score for trial in trials for point in trial.curve])
    for trial in sorted(trials, key=lambda each: (each.number == tuning.winner, each.state == "complete")):
        xs, ys = [point.evaluation for point in trial.curve], [scale.place(point.score) for point in trial.curve]
        is_winner, is_complete = trial.number == tuning.winner, trial.state == "complete"
        color = _BEST if is_winner else _COMPLETE if is_complete else _ENDED
        axes.plot(xs, ys, color=color, linewidth=2.2 if is_winner else 1, alpha=1 if is_winner else 0.7)
        axes.plot(xs[-1], ys[-1], "o" if is_complete else "x", color=color, markersize=4)
    scale.limit(axes)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set(xlabel="evaluation", ylabel=scale.name)
    _legend(figure, Line2D([], [], color=_BEST, linewidth=2.2, label=f"trial {tuning.winner}, taken"))


def _paint_importance(figure: Figure, rows: Sequence[tuple[str, float]]) -> None:
    axes = figure.add_subplot()
    for y, (_, share) in enumerate(rows):
        axes.barh(y, share, color=_COMPLETE, height=0.6)
        axes.annotate(f"{share:.0%}", (share, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    name_rows(axes, [name for name, _ in rows])
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(visible=False, axis="y")


def _places(axes: Axes, values: Sequence[SettingValue], *, along: str = "x") -> list[float]:
    """Where values stand on an axis, which is made to show them: numbers at themselves, others in a row."""
    axis = axes.xaxis if along == "x" else axes.yaxis
    numbers = [float(value) for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) < len(values) or len(set(numbers)) < 2:
        kinds = sorted(set(values), key=lambda value: (isinstance(value, str), str(value)))
        axis.set_ticks(range(len(kinds)), [plain(kind) for kind in kinds])
        limits = (-0.5, len(kinds) - 0.5)
        axes.set_xlim(limits) if along == "x" else axes.set_ylim(limits)
        return [float(kinds.index(value)) for value in values]
    few = sorted(set(numbers))
    if len(few) <= _FEW:
        if min(few) > 0 and max(few) / min(few) >= _STEPS:
            axes.set_xscale("log") if along == "x" else axes.set_yscale("log")
        axis.set_major_locator(FixedLocator(few))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    elif min(numbers) > 0 and max(numbers) / min(numbers) >= _WIDE:
        axes.set_xscale("log") if along == "x" else axes.set_yscale("log")
        is_narrow = max(numbers) / min(numbers) < _TWO_DECADES
        axis.set_major_locator(LogLocator(10, subs=(1, 3) if is_narrow else (1,), numticks=6 if is_narrow else 5))
        axis.set_minor_locator(NullLocator())
        if is_narrow:
            axis.set_major_formatter("{x:g}")
    else:
        axis.set_major_locator(MaxNLocator(4))
    return numbers


def _paint_slices(
    figure: Figure, names: Sequence[str], points: Sequence[ScorePoint], winner: int, scale: ScoreScale
) -> None:
    rows = -(-len(names) // _COLUMNS)
    grid = list(figure.subplots(rows, min(_COLUMNS, len(names)), sharey=True, squeeze=False).flat)
    for number, (axes, name) in enumerate(zip(grid, names, strict=False)):
        own = [point for point in points if point.setting == name]
        places = _places(axes, [point.value for point in own])
        _draw_points(axes, places, own, scale)
        for x, point in zip(places, own, strict=True):
            if point.trial == winner:
                axes.plot(x, scale.place(point.score), "o", color="none", markeredgecolor=_BEST, markersize=10, mew=1.8)
        scale.limit(axes)
        axes.set_title(setting_words(name), loc="left")
        if number % _COLUMNS == 0:
            axes.set_ylabel(scale.name)
    for axes in grid[len(names) :]:
        axes.set_visible(False)


def _paint_norms(
    figure: Figure, norms: Sequence[str], beside: Sequence[str], trials: Sequence[TunedTrial], scale: ScoreScale
) -> None:
    grid = figure.subplots(len(norms), len(beside), squeeze=False)
    colors = matplotlib.colormaps["viridis"]
    for row, norm in zip(grid, norms, strict=True):
        for axes, other in zip(row, beside, strict=True):
            own = [trial for trial in trials if norm in trial.values and other in trial.values]
            if not own:
                axes.set_visible(False)
                continue
            xs = _places(axes, [trial.values[other] for trial in own])
            ys = _places(axes, [trial.values[norm] for trial in own], along="y")
            for x, y, trial in zip(xs, ys, own, strict=True):
                share = scale.share(_score(trial) or 0.0)
                marker = "o" if trial.state == "complete" else "x"
                axes.plot(x, y, marker, color=colors(0.05 + 0.85 * share), markersize=6, markeredgewidth=1.5)
            axes.set(xlabel=setting_words(other), ylabel=setting_words(norm))
    low, high = sorted([scale.edge, scale.best])
    lighter_is_better = "viridis" if high == scale.best else "viridis_r"
    shades = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(low, high), lighter_is_better)
    bar = figure.colorbar(shades, ax=list(grid.flat), shrink=0.6, aspect=30, format=scale.format)
    bar.set_label(scale.name)
