"""Events of kind ``diagnostics`` -> plots of what went on inside a network, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median
from typing import Any, Literal, NamedTuple

import matplotlib
import matplotlib.lines
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from pipeline.report.comparison import LayerGradient
from pipeline.report.figures.style import STYLE
from pipeline.telemetry.events import Event

# step -> the values seen there that are numbers, by name
Looks = dict[int, dict[str, float]]
# Steps and values of each layer, or of whatever a value's name ends with, in the order of the network.
Curves = dict[str, tuple[list[int], list[float]]]


class _Diagram(NamedTuple):
    """prefix : of the values; neutral : the value that says nothing happened"""

    prefix: str
    title: str
    scale: Literal["linear", "log", "percent"] = "linear"
    neutral: float | None = None


_BY_LAYER = {
    "gradient_norms.png": [_Diagram("gradient_norm", "Norm of the gradient, by layer", "log")],
    "activation_drift.png": [
        _Diagram("activation_drift", "Inputs of nonlinearities: change of means since the look before, in deviations"),
        _Diagram(
            "activation_variance_ratio", "Inputs of nonlinearities: variance / that of the look before", "log", 1.0
        ),
    ],
    "activations.png": [
        _Diagram("activation_mean", "Inputs of nonlinearities: mean", neutral=0.0),
        _Diagram("activation_variance", "Inputs of nonlinearities: variance", "log"),
    ],
    "dead_units.png": [_Diagram("dead_units", "Units that are dead or saturated for a whole batch (%)", "percent")],
    "statistics_gap.png": [
        _Diagram("statistics_gap_mean", "Evaluation: |mean of a batch − running mean| / running deviation"),
        _Diagram("statistics_gap_variance", "Evaluation: |log(variance of a batch / running variance)|"),
    ],
}

_STYLE = STYLE | {"grid.alpha": 0.25}
_WIDTH, _HEIGHT, _DPI = 8.0, 3.6, 120
# From dark to a yellow that can still be seen on white.
_MAP, _DARKEST, _LIGHTEST = "viridis", 0.0, 0.9
# More than these are not told apart by a legend.
_MOST_NAMES = 8
# Of the names beside a colour bar.
_MOST_TICKS = 9
# More points than these make a line of medians, over this part of all.
_MOST_POINTS, _PART = 60, 30
# Highest value / lowest of a logarithmic axis; below that it has nothing to show.
_WIDE = 10
# Less than this has few powers of ten to label.
_FEW_POWERS = 1_000


def draw(events: Iterable[Event]) -> dict[str, bytes]:
    """The plots that there are values for, as PNG files by name.

    Parameters
    ----------
    events : of a run, in the order written; those of other kinds are left out. Of a step that two attempts looked at,
        each value is that of the second, where it has one.
    """
    values = _by_step(events)
    drawn: dict[str, bytes] = {}
    for name, diagrams in _BY_LAYER.items():
        known = [diagram for diagram in diagrams if curves_of(values, diagram.prefix)]
        if known:
            drawn[name] = _png(len(known), partial(_draw_by_layer, values=values, diagrams=known))
    if curves_of(values, "smoothness"):
        drawn["smoothness.png"] = _png(3, partial(_draw_smoothness, values=values))
    if units := _percentiles(values):
        drawn["last_unit.png"] = _png(1, partial(_draw_unit, curves=units))
    return drawn


def gradient_norms(events: Iterable[Event]) -> tuple[LayerGradient, ...]:
    """The norms of the gradient of each layer, in the network's order, from the events of a run."""
    curves = curves_of(_by_step(events), "gradient_norm")
    return tuple(LayerGradient(layer=name, first=norms[0], median=median(norms)) for name, (_, norms) in curves.items())


def _by_step(events: Iterable[Event]) -> Looks:
    """The values that are numbers, in the order of steps; an event that lacks its step or its values has none."""
    looks: Looks = {}
    for event in events:
        values = event.get("values")
        if event["kind"] == "diagnostics" and "step" in event and isinstance(values, dict):
            numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
            looks.setdefault(event["step"], {}).update(numbers)
    return dict(sorted(looks.items()))


def curves_of(values: Looks, prefix: str) -> Curves:
    """The curves of the values whose names begin with ``prefix/``, by the rest of the name."""
    curves: Curves = {}
    for step, at_step in values.items():
        for name, value in at_step.items():
            kind, _, rest = name.partition("/")
            if kind == prefix:
                steps, numbers = curves.setdefault(rest, ([], []))
                steps.append(step)
                numbers.append(value)
    return curves


def _png(rows: int, fill: Callable[[Figure, list[Axes]], None]) -> bytes:
    """A picture of diagrams one above the other, over the same steps."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, _HEIGHT * (0.25 + 0.75 * rows)))
        axes = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
        fill(figure, axes)
        axes[-1].set_xlabel("step")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _draw_by_layer(figure: Figure, axes: list[Axes], values: Looks, diagrams: list[_Diagram]) -> None:
    layers: list[str] = []
    for axis, diagram in zip(axes, diagrams, strict=True):
        curves = curves_of(values, diagram.prefix)
        layers = list(curves)
        _draw_layers(axis, curves, diagram.scale)
        if diagram.neutral is not None:
            axis.axhline(diagram.neutral, color="0.4", linestyle="--", linewidth=1, zorder=1)
        axis.set_title(diagram.title, loc="left", fontsize=10)
    _name_layers(figure, axes, layers)


def _draw_layers(axis: Axes, curves: Curves, scale: str) -> None:
    """One line for each layer, coloured by depth."""
    colors = _colors(len(curves))
    for number, (steps, numbers) in enumerate(curves.values()):
        _line(axis, steps, [100 * value for value in numbers] if scale == "percent" else numbers, colors(number))
    everything = [value for _, numbers in curves.values() for value in numbers]
    if scale == "percent":
        axis.set_ylim(-0.03 * max(5, 100 * max(everything)), 1.05 * max(5, 100 * max(everything)))
    elif scale == "log":
        _log_where_wide(axis, everything)


def _line(axis: Axes, steps: list[int], numbers: list[float], color: Any) -> None:
    """A point for each look; of many looks a line of medians, and the looks themselves faint behind it."""
    if len(steps) <= _MOST_POINTS:
        axis.plot(steps, numbers, color=color, linewidth=1.4, marker="o", markersize=2.5)
        return
    half = max(1, len(steps) // _PART // 2)
    middle = [median(numbers[max(0, at - half) : at + half + 1]) for at in range(len(steps))]
    axis.plot(steps, numbers, color=color, linewidth=0.6, alpha=0.25, zorder=1.5)
    axis.plot(steps, middle, color=color, linewidth=1.6)


def _colors(count: int) -> ListedColormap:
    whole = matplotlib.colormaps[_MAP]
    steps = [_DARKEST + (_LIGHTEST - _DARKEST) * number / max(1, count - 1) for number in range(count)]
    return ListedColormap([whole(step) for step in steps])


def _name_layers(figure: Figure, axes: list[Axes], layers: list[str]) -> None:
    """Beside the diagrams: a legend of few layers, or a colour bar from the first of many to the last."""
    colors = _colors(len(layers))
    if len(layers) <= _MOST_NAMES:
        lines = [matplotlib.lines.Line2D([], [], color=colors(number)) for number in range(len(layers))]
        figure.legend(lines, layers, loc="outside right upper", title="layer, first to last", fontsize=8)
        return
    mappable = ScalarMappable(BoundaryNorm([number - 0.5 for number in range(len(layers) + 1)], len(layers)), colors)
    bar = figure.colorbar(mappable, ax=axes, aspect=25 * len(axes), pad=0.02)
    chosen = sorted({round(tick * (len(layers) - 1) / (_MOST_TICKS - 1)) for tick in range(_MOST_TICKS)})
    bar.set_ticks(chosen, labels=[layers[number] for number in chosen], fontsize=8)
    bar.minorticks_off()
    bar.ax.invert_yaxis()
    bar.set_label("layer, from the first at the top to the last")


def _draw_smoothness(figure: Figure, axes: list[Axes], values: Looks) -> None:
    """As in figure 4 of Santurkar et al. (2018): the ranges over the steps along the gradient, and beta."""
    curves = curves_of(values, "smoothness")
    titles = (
        "Loss along the gradient: range over steps from ½ to 4 learning rates",
        "Change of the gradient along it: range over the same steps",
        "Effective β-smoothness: the largest change of the gradient / distance",
    )
    for axis, prefix in zip(axes, ("loss_at", "gradient_change_at"), strict=False):
        steps, low, high = _range_of(values, f"smoothness/{prefix}")
        color = "#0072b2" if prefix == "loss_at" else "#009e73"
        axis.fill_between(steps, low, high, color=color, alpha=0.3, linewidth=0, label="lowest to highest")
        axis.plot(steps, low, color=color, linewidth=1)
        axis.plot(steps, high, color=color, linewidth=1)
        _log_where_wide(axis, [*low, *high])
    if "loss" in curves:
        axes[0].plot(*curves["loss"], color="#d55e00", linewidth=1.4, label="where the step begins")
    if "beta" in curves:
        _line(axes[2], *curves["beta"], color="#cc79a7")
        _log_where_wide(axes[2], curves["beta"][1])
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)


def _range_of(values: Looks, prefix: str) -> tuple[list[int], list[float], list[float]]:
    """Steps, and the least and largest of the values whose names begin so."""
    ranges = {
        step: numbers
        for step, at_step in values.items()
        if (numbers := [value for name, value in at_step.items() if name.startswith(prefix)])
    }
    return list(ranges), [min(numbers) for numbers in ranges.values()], [max(numbers) for numbers in ranges.values()]


def _log_where_wide(axis: Axes, numbers: list[float]) -> None:
    """A logarithmic axis where a linear one would flatten most of the values; a zero has no place on it."""
    numbers = [number for number in numbers if number > 0]
    if numbers and max(numbers) > _WIDE * min(numbers):
        axis.set_yscale("log", nonpositive="mask")
        axis.yaxis.set_major_formatter("{x:g}")
        few = max(numbers) < _FEW_POWERS * min(numbers)
        axis.yaxis.set_minor_formatter(_two_and_five if few else "")


def _two_and_five(value: float, _: float) -> str:
    """Labels between powers of ten."""
    text = f"{value:g}"
    return text if text.strip("0.") in ("2", "5") else ""


def _percentiles(values: Looks) -> Curves:
    """Percentile -> its curve, of the unit that was followed."""
    curves = {}
    for percent in ("15", "50", "85"):
        for layer, curve in curves_of(values, f"input_percentile_{percent}").items():
            curves[f"{percent}% of {layer}"] = curve
    return curves


def _draw_unit(figure: Figure, axes: list[Axes], curves: Curves) -> None:
    axis = axes[0]
    for (name, curve), style in zip(curves.items(), ("--", "-", "--"), strict=False):
        axis.plot(*curve, color="#0072b2", linestyle=style, linewidth=1.4)
        axis.annotate(name.partition(" ")[0], (curve[0][-1], curve[1][-1]), xytext=(5, 0), va="center",
                      textcoords="offset points", fontsize=8)  # fmt: skip
    layer = next(iter(curves)).partition(" of ")[2]
    axis.set_title(f"Inputs of one unit of the last nonlinearity, {layer}: percentiles", loc="left", fontsize=10)
