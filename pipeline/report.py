"""``comparison.json`` -> one self-contained HTML page: verdict, table, plots. No network, light and dark."""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib import resources
from typing import Any

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Comparison = dict[str, Any]

# Distinguishable with every common colour blindness (Okabe & Ito 2008), one for each arm in order.
COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
# Drawn in this colour, replaced by the page's own text colour, so that plots follow light and dark.
_INK = "#123456"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sparknorm",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "figure.figsize": (7.0, 3.6),
    "figure.constrained_layout.use": True,
}
_NAMES = {"none": "no normalization", "batch": "batch norm", "group": "group norm", "layer": "layer norm"}


def render(comparison: Comparison) -> str:
    """The page."""
    loader = jinja2.FunctionLoader(lambda name: resources.files("pipeline").joinpath(name).read_text())
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"percent": _percent, "number": _number, "norm_name": norm_name}
    return environment.get_template("report.html.j2").render(
        comparison=comparison,
        verdict=verdict(comparison),
        plots=[(title, caption, draw_svg(draw, comparison)) for title, caption, draw in plots_of(comparison)],
    )


def norm_name(norm: str) -> str:
    """The norm in words."""
    return _NAMES.get(norm, norm)


def verdict(comparison: Comparison) -> list[str]:
    """What the comparison found, in plain sentences, the most accurate arm first."""
    summary = comparison["summary"]
    base = next(arm for arm in summary if arm["norm"] == comparison["baseline"])
    best = max(summary, key=lambda arm: arm["best_accuracy_mean"])
    lines = [
        f"{norm_name(best['norm']).capitalize()} was the most accurate: {_accuracy(best)} on the "
        f"{comparison['evaluated_on']} split."
    ]
    lines += [_against(arm, base) for arm in summary if arm is not base]
    lines += [
        f"{norm_name(arm['norm']).capitalize()} diverged in {arm['diverged']} of {arm['n']} runs."
        for arm in summary
        if arm["diverged"]
    ]
    return lines


def _accuracy(arm: dict[str, Any]) -> str:
    spread = f" ± {100 * arm['best_accuracy_std']:.2f}" if arm["best_accuracy_std"] is not None else ""
    return f"{_percent(arm['best_accuracy_mean'])}{spread} (n = {arm['n']})"


def _against(arm: dict[str, Any], base: dict[str, Any]) -> str:
    points = 100 * (arm["best_accuracy_mean"] - base["best_accuracy_mean"])
    name, other = norm_name(arm["norm"]), norm_name(base["norm"])
    text = f"{name.capitalize()} was {abs(points):.2f} points {'above' if points >= 0 else 'below'} {other}"
    if arm["reached_baseline_best"] == 0:
        return f"{text} and never reached its best accuracy."
    ratio = base["steps_to_baseline_best_mean"] / arm["steps_to_baseline_best_mean"]
    partly = f" in {arm['reached_baseline_best']} of {arm['n']} runs" if arm["reached_baseline_best"] < arm["n"] else ""
    return (
        f"{text}; it reached the best accuracy of {other} after {arm['steps_to_baseline_best_mean']:,.0f} steps"
        f"{partly}, where {other} took {base['steps_to_baseline_best_mean']:,.0f} ({ratio:.1f} times as many)."
    )


def plots_of(comparison: Comparison) -> list[tuple[str, str, Callable[[Axes, Comparison], None]]]:
    """(title, caption, drawing function) of every plot there is data for."""
    plots: list[tuple[str, str, Callable[[Axes, Comparison], None]]] = [
        (
            f"Accuracy on the {comparison['evaluated_on']} split",
            "Thin lines are single seeds, thick lines their mean; dashed: the best that the baseline reached.",
            _draw_accuracy,
        ),
        ("Training loss", "Mean over the steps since the evaluation before, over all seeds.", _draw_loss),
    ]
    if comparison["search"]:
        plots.append(
            (
                "Choice of the learning rate",
                "Validation accuracy of short trials; each arm then trained with its own best. "
                "A cross marks a trial that diverged.",
                _draw_search,
            )
        )
    plots.append(("Speed", "Training images per second over all workers, without evaluation.", _draw_speed))
    return plots


def draw_svg(draw: Callable[[Axes, Comparison], None], comparison: Comparison) -> str:
    """One plot as an inline SVG whose ink is the page's text colour."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure()
        draw(figure.add_subplot(), comparison)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _colors(comparison: Comparison) -> dict[str, str]:
    return {arm["norm"]: COLORS[number % len(COLORS)] for number, arm in enumerate(comparison["summary"])}


def _runs(comparison: Comparison, norm: str) -> list[dict[str, Any]]:
    return [arm for arm in comparison["arms"] if arm["norm"] == norm]


def _mean_curve(runs: list[dict[str, Any]], values: Callable[[dict[str, Any]], list[Any]]) -> tuple[list, list]:
    """Steps and mean values where every run has one (a run that diverged ends early)."""
    points: dict[int, list[float]] = {}
    for run in runs:
        for point, value in zip(run["curve"], values(run), strict=True):
            if value is not None:
                points.setdefault(point["step"], []).append(value)
    steps = [step for step, found in sorted(points.items()) if len(found) == len(runs)]
    return steps, [sum(points[step]) / len(runs) for step in steps]


def _draw_accuracy(axes: Axes, comparison: Comparison) -> None:
    for norm, color in _colors(comparison).items():
        runs = _runs(comparison, norm)
        for run in runs:
            axes.plot([p["step"] for p in run["curve"]], [100 * p["accuracy"] for p in run["curve"]], color=color,
                      linewidth=0.8, alpha=0.5)  # fmt: skip
        steps, values = _mean_curve(runs, lambda run: [100 * point["accuracy"] for point in run["curve"]])
        rate = runs[0]["learning_rate"]
        axes.plot(steps, values, color=color, linewidth=2, marker="o", markersize=3,
                  label=f"{norm_name(norm)}, learning rate {rate:g}")  # fmt: skip
    base = next(arm for arm in comparison["summary"] if arm["norm"] == comparison["baseline"])
    axes.axhline(100 * base["best_accuracy_mean"], color=_colors(comparison)[base["norm"]], linestyle="--", linewidth=1)
    # Room for what matters: the first points of a curve may be far below the rest.
    middle = sorted(100 * point["accuracy"] for arm in comparison["arms"] for point in arm["curve"])
    axes.set_ylim(max(0.0, middle[len(middle) // 10] - 2), min(100.0, middle[-1] + 1))
    axes.set(xlabel="step", ylabel="accuracy (%)")
    axes.legend(loc="lower right")


def _draw_loss(axes: Axes, comparison: Comparison) -> None:
    for norm, color in _colors(comparison).items():
        steps, values = _mean_curve(_runs(comparison, norm), lambda run: run["train_loss"])
        axes.plot(steps, values, color=color, linewidth=2, marker="o", markersize=3, label=norm_name(norm))
    axes.set(xlabel="step", ylabel="cross-entropy (nats)")
    axes.legend(loc="upper right")


def _draw_search(axes: Axes, comparison: Comparison) -> None:
    for norm, color in _colors(comparison).items():
        trials = sorted((t for t in comparison["search"] if t["norm"] == norm), key=lambda t: t["learning_rate"])
        rates, values = [t["learning_rate"] for t in trials], [100 * t["best_accuracy"] for t in trials]
        axes.plot(rates, values, color=color, marker="o", linewidth=2, markersize=4, label=norm_name(norm))
        fallen = [number for number, trial in enumerate(trials) if trial["diverged"]]
        axes.plot([rates[n] for n in fallen], [values[n] for n in fallen], "x", color=color, markersize=10)
    axes.set_xscale("log")
    tried = sorted({trial["learning_rate"] for trial in comparison["search"]})
    axes.set_xticks(tried, [f"{rate:g}" for rate in tried])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="peak learning rate", ylabel="accuracy (%)")
    axes.legend(loc="best")


def _draw_speed(axes: Axes, comparison: Comparison) -> None:
    colors = _colors(comparison)
    arms = [arm for arm in comparison["summary"] if arm["images_per_second_mean"]]
    bars = axes.barh([norm_name(arm["norm"]) for arm in arms], [arm["images_per_second_mean"] for arm in arms],
                     xerr=[arm["images_per_second_std"] or 0 for arm in arms],
                     color=[colors[arm["norm"]] for arm in arms], ecolor=_INK, height=0.5)  # fmt: skip
    axes.bar_label(bars, fmt="{:,.0f}", padding=6)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set(xlabel="images per second")
    axes.grid(visible=False, axis="y")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}%"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
