"""A comparison -> the heat map of its learning rates: what each arm made of each rate."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline.report.figures.style import (
    WIDTH,
    Comparison,
    Drawing,
    Record,
    by,
    name_rows,
    row_height,
    seeds_of,
    words_of,
)
from pipeline.report.names import LEARNING_RATE, norm_words, values_words

# Errors below this have one colour.
_LEAST_ERROR = 1e-4
# More columns than these leave room for shorter words.
_MOST_WORDS = 7


def learning_rates(comparison: Comparison) -> Drawing | None:
    """The trials of the search, or, where the learning rate makes arms, the runs; None of fewer than two rates."""
    varied = LEARNING_RATE in comparison["varied"]
    rows = _rates_of_runs(comparison) if varied else _rates_of_search(comparison)
    rates = {row[1] for row in rows}
    if len(rates) < 2:
        return None
    words = {row[0]: row[0] if varied else words_of(comparison, row[0]) for row in rows}
    options = comparison["settings"]["compare"]
    seeds = f", mean of {seeds_of(comparison)} seeds" if seeds_of(comparison) > 1 else ""
    what = f"the {comparison['evaluated_on']} split{seeds}" if varied else f"the {options['search_on']} split"
    caption = f"Accuracy in percent on {what}, darker is worse; framed: {'the best' if varied else 'chosen'}. "
    caption += "Hatched: diverged (div.)."
    columns = ("arm", "learning_rate", "accuracy", "diverged", "trials", "chosen")
    size = (WIDTH, 1.1 + row_height(list(words.values()), 0.36) * len(words))
    title = "Learning rates" if varied else "Choice of the learning rate"
    return Drawing("learning_rates", title, caption, columns, rows, size, partial(_paint_rates, words=words))


def _rates_of_search(comparison: Comparison) -> list[tuple[Any, ...]]:
    """Of several trials with one rate, which differ in other tuned settings, the best."""
    rows = []
    tuned = {arm["arm"]: arm["tuned"].get(LEARNING_RATE) for arm in comparison["arms"]}
    for arm, trials in by(comparison["search"], "arm").items():
        for rate, found in sorted(by(trials, "learning_rate").items()):
            best = max(found, key=lambda trial: (not trial["diverged"], trial["best_accuracy"]))
            fallen = sum(trial["diverged"] for trial in found) if best["diverged"] else 0
            rows.append((arm, rate, best["best_accuracy"], fallen, len(found), rate == tuned.get(arm)))
    return rows


def _rates_of_runs(comparison: Comparison) -> list[tuple[Any, ...]]:
    rows = []
    others = {
        a["arm"]: values_words({k: v for k, v in a["values"].items() if k != LEARNING_RATE}) for a in comparison["arms"]
    }
    fixed = norm_words(str(comparison["settings"].get("model", {}).get("norm", "all arms")))
    for other in dict.fromkeys(others.values()):
        arms = [arm for arm in comparison["arms"] if others[arm["arm"]] == other]
        best = max(arms, key=lambda arm: (arm["diverged"] < arm["n"], arm["best_accuracy_mean"]))
        rows += [
            (other or fixed, a["values"][LEARNING_RATE], a["best_accuracy_mean"], a["diverged"], a["n"], a is best)
            for a in sorted(arms, key=lambda arm: arm["values"][LEARNING_RATE])
        ]
    return rows


def _paint_rates(figure: Figure, records: list[Record], *, words: dict[str, str]) -> None:
    axes = figure.add_subplot()
    arms, rates = list(words), sorted({record["learning_rate"] for record in records})
    shown = [record["accuracy"] for record in records if record["diverged"] < record["trials"]]
    heat = partial(_heat, best=max(shown, default=1.0), worst=min(shown, default=0.0))
    for record in records:
        x, y = rates.index(record["learning_rate"]), arms.index(record["arm"])
        fallen = record["diverged"] == record["trials"]
        back, ink = ("#b8bec5", "#000000") if fallen else heat(record["accuracy"])
        hatch = "//" if record["diverged"] else None
        # Hatching has the colour of the edge; it is light, since the cell's text lies on it.
        axes.add_patch(
            Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=back, edgecolor="#8f98a1", hatch=hatch, linewidth=0)
        )
        if record["chosen"]:
            axes.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, edgecolor=ink, linewidth=2))
        word = "diverged" if len(rates) <= _MOST_WORDS else "div."
        some = f"\n{record['diverged']} of {record['trials']} {word}" if record["diverged"] else ""
        text = word if fallen else f"{100 * record['accuracy']:.1f}{some}"
        size = 7 if some or len(rates) > _MOST_WORDS else 9
        axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=size,
                  fontweight="bold" if record["chosen"] else "normal", linespacing=1)  # fmt: skip
    axes.set(xlim=(-0.5, len(rates) - 0.5), xlabel="peak learning rate")
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    name_rows(axes, list(words.values()))
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _heat(accuracy: float, *, best: float, worst: float) -> tuple[str, str]:
    """Colours of a cell and of its text. By the logarithm of the error: good rates differ by little."""
    low, high, own = (math.log(max(_LEAST_ERROR, 1 - value)) for value in (best, worst, accuracy))
    share = 1.0 if high == low else min(1.0, max(0.0, (high - own) / (high - low)))
    red, green, blue, _ = matplotlib.colormaps["viridis"](0.05 + 0.9 * share)
    light = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.18
    return matplotlib.colors.to_hex((red, green, blue)), "#000000" if light else "#ffffff"
