"""A comparison -> bars: how long each arm took to the target, and how fast it trained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.report.comparison import ArmSummary, Comparison
from pipeline.report.figures.curves import steps_or_images
from pipeline.report.figures.style import WIDTH, Drawing, line_styles, name_rows, row_height
from pipeline.report.formats import signed_percent
from pipeline.report.sentences import metric_words


class Bar(NamedTuple):
    """One arm's bar.

    name : the arm in words
    length : 0 where it is not known
    std : half the length of the error bar; 0 for none
    text : beside the bar
    """

    name: str
    color: str
    length: float
    std: float
    text: str


def steps_to_target(comparison: Comparison) -> Drawing | None:
    """Steps or, where these differ in their number of images, images to the target; None where no run reached it."""
    arms, along = comparison.arms, steps_or_images(comparison)
    if not any(arm.reached_target for arm in arms):
        return None
    target = comparison.target_accuracy
    metric = metric_words(comparison)
    end = f"the final {metric} of {comparison.baseline_arm.words}, seed by seed"
    goal = end if target is None else f"a {metric} of {100 * target:g}%".replace("a a", "an a")
    caption = (
        f"Up to the first evaluation at which a run had {goal}; mean over the seeds that did, bars are one deviation."
    )
    if along == "steps":
        title, spreads = "Steps to the target", [(arm.steps_to_target_mean, arm.steps_to_target_std) for arm in arms]
    else:
        title = "Training images to the target"
        spreads = [(arm.images_to_target_mean, arm.images_to_target_std) for arm in arms]
    rows = [(arm.arm, mean, std, arm.reached_target, arm.n) for arm, (mean, std) in zip(arms, spreads, strict=True)]
    columns = ("arm", f"{along}_mean", f"{along}_std", "reached", "n")
    texts = [_arrival(arm, mean) for arm, (mean, _) in zip(arms, spreads, strict=True)]
    paint = partial(_paint_steps, bars=_bars_of(arms, spreads, texts), along=along)
    return Drawing("steps_to_target", title, caption, columns, rows, _size(arms), paint)


def _arrival(arm: ArmSummary, mean: float | None) -> str:
    if mean is None:
        return "never" if arm.had_target else "no target"
    some = "" if arm.reached_target == arm.had_target else f" ({arm.reached_target} of {arm.had_target} runs)"
    return f"{mean:,.0f}{some}"


def _paint_steps(figure: Figure, bars: Sequence[Bar], along: str) -> None:
    axes = figure.add_subplot()
    _draw(axes, bars)
    axes.set_xlabel(along)


def cost(comparison: Comparison) -> Drawing | None:
    """Images per second, and the extra time of an image; None where no speed is known."""
    arms = comparison.arms
    if not any(arm.images_per_second_mean for arm in arms):
        return None
    caption = (
        "Training images per second over all workers, without evaluation; extra time for an image against "
        f"{comparison.baseline_arm.words}."
    )
    if comparison.side_by_side > 1:
        caption += f" {comparison.side_by_side} trials ran at once and shared the machine."
    speeds = [(arm.images_per_second_mean, arm.images_per_second_std) for arm in arms]
    rows = [(arm.arm, *speed, arm.overhead, arm.n) for arm, speed in zip(arms, speeds, strict=True)]
    columns = ("arm", "images_per_second_mean", "images_per_second_std", "overhead_mean", "n")
    speed_bars = _bars_of(arms, speeds, [f"{mean:,.0f}" if mean else "unknown" for mean, _ in speeds])
    extras = ["baseline" if arm.arm == comparison.baseline else _extra(arm.overhead) for arm in arms]
    known = any(arm.overhead is not None for arm in arms)
    extra_bars = _bars_of(arms, [(arm.overhead, None) for arm in arms], extras) if known else []
    paint = partial(_paint_cost, speeds=speed_bars, extras=extra_bars)
    return Drawing("cost", "Speed", caption, columns, rows, _size(arms), paint)


def _extra(overhead: float | None) -> str:
    return "unknown" if overhead is None else signed_percent(overhead)


def _paint_cost(figure: Figure, speeds: Sequence[Bar], extras: Sequence[Bar]) -> None:
    left, *right = figure.subplots(1, 2 if extras else 1, squeeze=False)[0]
    _draw(left, speeds)
    left.set_xlabel("images per second")
    for axes in right:
        _draw(axes, extras)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.tick_params(labelleft=False)
        axes.set_xlabel("extra time for an image")


def _bars_of(
    arms: Sequence[ArmSummary], spreads: Sequence[tuple[float | None, float | None]], texts: Sequence[str]
) -> list[Bar]:
    styles = line_styles({arm.arm: arm.values for arm in arms})
    return [
        Bar(arm.words, styles[arm.arm].color, mean or 0, std or 0, text)
        for arm, (mean, std), text in zip(arms, spreads, texts, strict=True)
    ]


def _draw(axes: Axes, bars: Sequence[Bar]) -> None:
    """Horizontal bars, the first at the top."""
    ink = matplotlib.rcParams["text.color"]
    for y, bar in enumerate(bars):
        axes.barh(y, bar.length, xerr=bar.std or None, color=bar.color, ecolor=ink, height=0.6, capsize=2)
        axes.annotate(bar.text, (max(0, bar.length + bar.std), y), xytext=(5, 0), textcoords="offset points",
                      va="center", fontsize=9)  # fmt: skip
    name_rows(axes, [bar.name for bar in bars])
    longest, beside = max(len(bar.text) for bar in bars), len(axes.figure.axes) > 1
    axes.margins(x=0.1 + 0.02 * longest * (2 if beside else 1))
    axes.xaxis.set_major_locator(MaxNLocator(3 if beside else 5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(visible=False, axis="y")


def _size(arms: Sequence[ArmSummary]) -> tuple[float, float]:
    """Width and height in inches."""
    return WIDTH, 0.9 + row_height([arm.words for arm in arms], 0.3) * len(arms)
