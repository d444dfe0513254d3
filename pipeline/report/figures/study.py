"""A comparison -> figures, each drawn from a table of its own, where there is data for it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from pipeline.report.figures.rates import learning_rates
from pipeline.report.figures.style import (
    WIDTH,
    Comparison,
    Drawing,
    Look,
    Record,
    arm_words,
    by,
    legend,
    looks_of,
    name_rows,
    panels,
    row_height,
    seeds_of,
    signed_percent,
    size_of,
    words_of,
)
from pipeline.report.names import BATCH_SIZES, values_words

Looks = dict[str, Look]

# Highest value / lowest from which on a logarithmic axis shows more than a linear one.
_WIDE = 10
# And below this, powers of ten are too few to label the axis.
_FEW_POWERS = 1_000
# More layers than these are numbered, not named.
_MOST_NAMES = 32
# On a line; more hide it.
_MOST_MARKERS = 20


def figures_of(comparison: Comparison) -> list[Drawing]:
    """Those that there is data for, in the order in which a page shows them."""
    figures = (_learning_curves, _training_loss, learning_rates, _batch_size, _depth, _gradient_norms, _steps_to_target,
               _cost)  # fmt: skip
    return [drawing for figure in figures if (drawing := figure(comparison)) is not None]


def _learning_curves(comparison: Comparison) -> Drawing | None:
    rows = _curve_rows(comparison, lambda run: [point["accuracy"] for point in run["curve"]])
    target, given = statistics.fmean(run["target"] for run in comparison["runs"]), comparison["target_accuracy"]
    goal = f"the best accuracy of {words_of(comparison, comparison['baseline'])}" if given is None else "the target"
    seeds = "Mean over seeds, the band from the worst to the best of them. " if seeds_of(comparison) > 1 else ""
    caption = f"{seeds}Dashed: {goal}{', mean over seeds' if seeds and given is None else ''}."
    title, more = f"Accuracy on the {comparison['evaluated_on']} split", ("target_mean",)
    return _curves(comparison, "learning_curves", title, caption, "accuracy", [(*row, target) for row in rows], more)


def _training_loss(comparison: Comparison) -> Drawing | None:
    rows = _curve_rows(comparison, lambda run: run["train_loss"])
    seeds = ", over all seeds; the band goes from the lowest to the highest" if seeds_of(comparison) > 1 else ""
    caption = f"Mean over the steps since the evaluation before{seeds}."
    return _curves(comparison, "training_loss", "Training loss", caption, "loss", rows)


def _curves(
    comparison: Comparison, name: str, title: str, caption: str, value: str, rows: list[tuple[Any, ...]],
    more: tuple[str, ...] = (),
) -> Drawing | None:  # fmt: skip
    if not rows or all(len(run["curve"]) < 2 for run in comparison["runs"]):  # one point is no curve
        return None
    looks, along = looks_of(comparison["arms"]), _along(comparison)
    if along == "images":
        caption += " Steps of the arms differ in their number of images, so the axis counts images."
    if any(arm["diverged"] for arm in comparison["arms"]):
        caption += " Runs that diverged are left out where others of the arm did not; a cross ends an arm that did."
    columns = ("arm", along, f"{value}_mean", f"{value}_min", f"{value}_max", "n", "diverged", *more)
    paint = partial(_paint_curves, looks=looks, along=along, value=value)
    return Drawing(name, title, caption, columns, rows, size_of(looks.values(), len(more)), paint)


def _along(comparison: Comparison) -> str:
    return "steps" if len({arm["global_batch"] for arm in comparison["arms"]}) == 1 else "images"


def _curve_rows(comparison: Comparison, values: Callable[[Record], list[float | None]]) -> list[tuple[Any, ...]]:
    """Arm, place, mean, least, most, n, whether all of the arm's runs diverged."""
    images = _along(comparison) == "images"
    rows: list[tuple[Any, ...]] = []
    for arm, runs in by(comparison["runs"], "arm").items():
        healthy = [run for run in runs if not run["diverged"]]
        points: dict[int, list[float]] = {}
        for run in healthy or runs:
            for point, value in zip(run["curve"], values(run), strict=True):
                if value is not None and math.isfinite(value):
                    points.setdefault(point["step"] * (run["global_batch"] if images else 1), []).append(value)
        rows += [
            (arm, at, statistics.fmean(found), min(found), max(found), len(found), not healthy)
            for at, found in sorted(points.items())
        ]
    return rows


def _paint_curves(figure: Figure, records: list[Record], *, looks: Looks, along: str, value: str) -> None:
    grid = panels(figure, looks.values())
    first = next(iter(grid.values()))
    _limits(first, records, value)
    low, high = first.get_ylim()
    for arm, found in by(records, "arm").items():
        look, axes = looks[arm], grid[looks[arm].panel]
        at, mean = [r[along] for r in found], [r[f"{value}_mean"] for r in found]
        axes.plot(at, mean, color=look.color, linestyle=look.dash, marker=look.marker, markersize=3, linewidth=1.6,
                  markevery=-(-len(at) // _MOST_MARKERS))  # fmt: skip
        if max(r["n"] for r in found) > 1:
            least, most = ([r[f"{value}_{end}"] for r in found] for end in ("min", "max"))
            axes.fill_between(at, least, most, color=look.color, alpha=0.2, linewidth=0)
        if found[-1]["diverged"]:
            axes.plot(at[-1], min(max(mean[-1], low), high), "x", color=look.color, markersize=10,
                      markeredgewidth=2, clip_on=False)  # fmt: skip
    more = []
    if "target_mean" in records[0]:
        style: dict[str, Any] = {"color": matplotlib.rcParams["text.color"], "linestyle": "--", "linewidth": 1}
        for axes in grid.values():
            axes.axhline(records[0]["target_mean"], zorder=1.5, **style)
        more = [Line2D([], [], label="target", **style)]
    first.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    first.xaxis.set_major_formatter("{x:,.0f}")
    figure.supxlabel("training images seen" if along == "images" else "step", fontsize=10)
    figure.supylabel("accuracy" if value == "accuracy" else "cross-entropy (nats)", fontsize=10)
    legend(figure, looks.values(), *more)


def _limits(axes: Axes, records: list[Record], value: str) -> None:
    """Room for what matters: a run that diverged, or the first points of a curve, may be far from the rest."""
    shown = [record for record in records if not record["diverged"]] or records
    least, most = min(r[f"{value}_min"] for r in shown), max(r[f"{value}_max"] for r in shown)
    if value == "accuracy":
        means = sorted(record["accuracy_mean"] for record in shown)
        ends = min(found[-1]["accuracy_min"] for found in by(shown, "arm").values())
        low = min(means[len(means) // 10], ends, records[0]["target_mean"])
        axes.set_ylim(max(0.0, low - 0.02), min(1.0, max(most, records[0]["target_mean"]) + 0.01))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    elif least > 0 and most > _WIDE * least:
        axes.set_yscale("log")
        axes.set_ylim(0.8 * least, 1.25 * most)
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(0.9 * min(0.0, least), 1.05 * most or 1.0)


def _batch_size(comparison: Comparison) -> Drawing | None:
    setting = next((name for name in BATCH_SIZES if name in comparison["varied"]), None)
    if setting is None:
        return None
    what = "images of a step for each worker" if setting.endswith("rank_batch_size") else "images of a step"
    caption = "Error where the accuracy was best, mean over seeds; bars are one sample standard deviation."
    return _against(comparison, setting, "batch_size", "Error against batch size", caption, what)


def _depth(comparison: Comparison) -> Drawing | None:
    if "model.depth" not in comparison["varied"]:
        return None
    caption = "Best accuracy, mean over seeds; bars are one sample standard deviation."
    return _against(comparison, "model.depth", "depth", "Accuracy against depth", caption, "depth")


def _against(comparison: Comparison, setting: str, name: str, title: str, caption: str, what: str) -> Drawing | None:
    """Best accuracy, or of the batch size its complement, against one setting; a line for each of the others."""
    value, rows = "error" if name == "batch_size" else "accuracy", []
    for arm in comparison["arms"]:
        line = values_words({k: v for k, v in arm["values"].items() if k != setting})
        at, mean = arm["values"][setting], arm["best_accuracy_mean"]
        if isinstance(at, (int, float)):
            mean = 1 - mean if value == "error" else mean
            rows.append((line or "all", at, mean, arm["best_accuracy_std"], arm["n"], arm["diverged"]))
    if len({row[1] for row in rows}) < 2:
        return None
    lines = list(dict.fromkeys(row[0] for row in rows))
    rows.sort(key=lambda row: (lines.index(row[0]), row[1]))
    looks = looks_of([{"arm": line, "values": {"line": line}} for line in lines])
    looks = {line: look._replace(label=line, panel="") for line, look in looks.items()}
    if any(row[5] for row in rows):
        caption += " A cross: some of the runs diverged."
    columns = ("line", name, f"{value}_mean", f"{value}_std", "n", "diverged")
    paint = partial(_paint_against, looks=looks, at=name, value=value, what=what)
    return Drawing(name, title, caption, columns, rows, size_of(looks.values()), paint)


def _paint_against(
    figure: Figure, records: list[Record], *, looks: Looks, at: str, value: str, what: str
) -> None:  # fmt: skip
    axes = figure.add_subplot()
    for line, found in by(records, "line").items():
        look = looks[line]
        x, y = [record[at] for record in found], [record[f"{value}_mean"] for record in found]
        axes.errorbar(x, y, [record[f"{value}_std"] or 0 for record in found], color=look.color, linestyle=look.dash,
                      marker=look.marker, markersize=5, linewidth=1.8, capsize=3, elinewidth=1)  # fmt: skip
        fallen = [(record[at], record[f"{value}_mean"]) for record in found if record["diverged"]]
        axes.plot(*zip(*fallen, strict=True), "x", color=look.color, markersize=11, markeredgewidth=2) if fallen else ()
    ticks = sorted({record[at] for record in records})
    if at == "batch_size":
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel=what, ylabel=value)
    if list(looks) != ["all"]:
        legend(figure, looks.values())


def _gradient_norms(comparison: Comparison) -> Drawing | None:
    """Where the layers of an arm are some of those of another (without norm layers), equal layers share their place."""
    measured = {
        arm: found
        for arm, runs in by(comparison["runs"], "arm").items()
        if (found := [run["gradient_norms"] for run in runs if run.get("gradient_norms")])
    }
    if not measured:
        return None
    names = {arm: [layer["layer"] for layer in found[0]] for arm, found in measured.items()}
    longest = max(names.values(), key=len)
    rows = []
    for arm, found in measured.items():
        order = longest if set(names[arm]) <= set(longest) else names[arm]
        for layer in names[arm]:
            norms = [entry["median"] for run in found for entry in run if entry["layer"] == layer]
            norms = [norm for norm in norms if norm is not None]
            if norms:
                mean = statistics.geometric_mean(norms) if min(norms) > 0 else 0.0
                rows.append((arm, order.index(layer) + 1, layer, mean))
    columns = ("arm", "layer_number", "layer", "gradient_norm")
    caption = (
        "L2 norm of the gradient by all parameters of a layer: median over the steps looked at, geometric mean over "
        "seeds. A triangle at the bottom edge is a norm of zero."
    )
    ticks = [*enumerate(longest, 1)] if all(set(own) <= set(longest) for own in names.values()) else []
    looks = looks_of(comparison["arms"])
    shown = [looks[arm] for arm in measured]
    width, height = size_of(shown)
    size = (width, height + (0.5 if 0 < len(ticks) <= _MOST_NAMES else 0))
    paint = partial(_paint_gradients, looks=looks, ticks=ticks)
    return Drawing("gradient_norms", "Gradient norms by layer", caption, columns, rows, size, paint)


def _paint_gradients(figure: Figure, records: list[Record], *, looks: Looks, ticks: list[tuple[int, str]]) -> None:
    shown = {arm: looks[arm] for arm in by(records, "arm")}
    grid = panels(figure, shown.values())
    norms = [record["gradient_norm"] for record in records]
    least, most = min((norm for norm in norms if norm > 0), default=1e-8), max(norms)
    bottom = least / (3 if 0 in norms else 1.3)  # a zero has no place on the axis, but one below it
    for arm, found in by(records, "arm").items():
        look, axes = shown[arm], grid[shown[arm].panel]
        layers, shown_norms = [r["layer_number"] for r in found], [max(r["gradient_norm"], bottom) for r in found]
        axes.plot(layers, shown_norms, color=look.color, linestyle=look.dash, marker=look.marker, markersize=3.5)
        zeros = [r["layer_number"] for r in found if r["gradient_norm"] == 0]
        if zeros:  # an empty line that is not clipped has no place, and the layout would look for it
            axes.plot(zeros, [bottom] * len(zeros), "v", color=look.color, markersize=9, clip_on=False)
    first = next(iter(grid.values()))
    first.set_yscale("log")
    first.set_ylim(bottom, 1.3 * max(most, least))
    first.yaxis.set_major_formatter("{x:g}")
    # Few powers of ten need labels between them: at 2 and 5, or everywhere.
    first.yaxis.set_minor_locator(LogLocator(subs=(2, 5) if most > _WIDE * least else range(2, 10)))
    first.yaxis.set_minor_formatter("{x:g}" if most < _FEW_POWERS * least else "")
    if 0 < len(ticks) <= _MOST_NAMES and len(grid) == 1:
        first.set_xticks([number for number, _ in ticks], [name for _, name in ticks], rotation=90, fontsize=8)
    else:
        first.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.supxlabel("layer, from the images to the output", fontsize=10)
    figure.supylabel("median norm of the gradient", fontsize=10)
    legend(figure, shown.values())


def _steps_to_target(comparison: Comparison) -> Drawing | None:
    """Of images, where steps differ in their number of images."""
    arms, along = comparison["arms"], _along(comparison)
    if not any(arm["reached_target"] for arm in arms):
        return None
    base = words_of(comparison, comparison["baseline"])
    target = comparison["target_accuracy"]
    goal = f"the best accuracy of {base}, seed by seed" if target is None else f"an accuracy of {100 * target:g}%"
    caption = (
        f"Up to the first evaluation at which a run had {goal}; mean over the seeds that did, bars are one deviation."
    )
    rows = [
        (arm["arm"], arm[f"{along}_to_target_mean"], arm[f"{along}_to_target_std"], arm["reached_target"], arm["n"])
        for arm in arms
    ]
    columns = ("arm", f"{along}_mean", f"{along}_std", "reached", "n")
    title = "Steps to the target" if along == "steps" else "Training images to the target"
    paint = partial(_paint_steps, along=along, colors=_bar_colors(comparison))
    return Drawing("steps_to_target", title, caption, columns, rows, _bar_size(arms), paint)


def _paint_steps(figure: Figure, records: list[Record], *, along: str, colors: dict[str, tuple[str, str]]) -> None:
    def text(record: Record) -> str:
        if not record["reached"]:
            return "never"
        some = "" if record["reached"] == record["n"] else f" ({record['reached']} of {record['n']} runs)"
        return f"{record[f'{along}_mean']:,.0f}{some}"

    axes = figure.add_subplot()
    _bars(axes, records, along, colors, text)
    axes.set_xlabel(along)


def _cost(comparison: Comparison) -> Drawing | None:
    arms = comparison["arms"]
    if not any(arm["images_per_second_mean"] for arm in arms):
        return None
    base = words_of(comparison, comparison["baseline"])
    caption = (
        f"Training images per second over all workers, without evaluation; extra time for an image against {base}."
    )
    if comparison["side_by_side"] > 1:
        caption += f" {comparison['side_by_side']} trials ran at once and shared the machine."
    rows = [
        (a["arm"], a["images_per_second_mean"], a["images_per_second_std"], a.get("overhead"), a["n"]) for a in arms
    ]
    columns = ("arm", "images_per_second_mean", "images_per_second_std", "overhead_mean", "n")
    paint = partial(_paint_cost, colors=_bar_colors(comparison), baseline=comparison["baseline"])
    return Drawing("cost", "Speed", caption, columns, rows, _bar_size(arms), paint)


def _paint_cost(
    figure: Figure, records: list[Record], *, colors: dict[str, tuple[str, str]], baseline: str
) -> None:  # fmt: skip
    def extra(record: Record) -> str:
        if record["arm"] == baseline:
            return "baseline"
        return "unknown" if record["overhead_mean"] is None else signed_percent(record["overhead_mean"])

    def speed(record: Record) -> str:
        mean = record["images_per_second_mean"]
        return f"{mean:,.0f}" if mean else "unknown"

    known = any(record["overhead_mean"] is not None for record in records)
    left, *right = figure.subplots(1, 2 if known else 1, squeeze=False)[0]
    _bars(left, records, "images_per_second", colors, speed)
    left.set_xlabel("images per second")
    for axes in right:
        _bars(axes, records, "overhead", colors, extra)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.tick_params(labelleft=False)
        axes.set_xlabel("extra time for an image")


def _bars(
    axes: Axes, records: list[Record], value: str, colors: dict[str, tuple[str, str]], text: Callable[[Record], str]
) -> None:
    """Horizontal bars, the first record at the top. One without a value has its text alone."""
    ink = matplotlib.rcParams["text.color"]
    for y, record in enumerate(records):
        _, color = colors[record["arm"]]
        mean, std = record[f"{value}_mean"] or 0, record.get(f"{value}_std") or 0
        axes.barh(y, mean, xerr=std or None, color=color, ecolor=ink, height=0.6, capsize=2)
        axes.annotate(text(record), (max(0, mean + std), y), xytext=(5, 0), textcoords="offset points", va="center",
                      fontsize=9)  # fmt: skip
    name_rows(axes, [colors[record["arm"]][0] for record in records])
    longest, beside = max(len(text(record)) for record in records), len(axes.figure.axes) > 1
    axes.margins(x=0.1 + 0.02 * longest * (2 if beside else 1))
    axes.xaxis.set_major_locator(MaxNLocator(3 if beside else 5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(visible=False, axis="y")


def _bar_colors(comparison: Comparison) -> dict[str, tuple[str, str]]:
    """Words and colour of each arm."""
    looks = looks_of(comparison["arms"])
    return {arm["arm"]: (arm_words(arm), looks[arm["arm"]].color) for arm in comparison["arms"]}


def _bar_size(arms: list[Record]) -> tuple[float, float]:
    return WIDTH, 0.9 + row_height([arm_words(arm) for arm in arms], 0.3) * len(arms)
