"""How the figures of a comparison look: an arm's name, colour, marker and dashes, and one drawing in three formats."""

from __future__ import annotations

import csv
import html
import io
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.report import names
from pipeline.report.names import Values, values_words

Record = dict[str, Any]
Comparison = dict[str, Any]

# Distinguishable with every common colour blindness (Okabe & Ito 2008), on white and on black.
COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#9a6324")
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (2, 1)), (0, (6, 1.5, 1, 1.5)))
# More arms than this are shown as small multiples, or in colours that follow their order.
MOST_LINES = 8
_MOST_PANELS = 9
# Between them all colours are about as light: they can be told from a white and from a black page.
_RAMP = LinearSegmentedColormap.from_list("sparknorm", ["#2a7fc9", "#a04fb0", "#d55e00"])
WIDTH = 7.0
# Of a line of the name of a row; a longer name takes several.
_ROW_LETTERS = 34
_DPI = 150
# Drawn in this colour, replaced by the page's own text colour, so that figures follow light and dark.
_PAGE_INK, _PAPER_INK = "#123456", "#1b1f24"
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
}
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")


@dataclass(frozen=True)
class Drawing:
    """One figure and the numbers it is drawn from.

    name : stem of a file
    title, caption : plain text
    columns, rows : the numbers that are drawn, as a table
    size : width and height in inches
    paint : called with an empty figure and the rows as dictionaries by column
    """

    name: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    size: tuple[float, float]
    paint: Callable[[Figure, list[Record]], None] = field(repr=False)

    def svg(self) -> str:
        """For a page: ink is the page's text colour, and no identifier is that of another figure."""
        text = self._save("svg", _PAGE_INK, transparent=True, metadata={"Date": None}).decode()
        text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text[text.index("<svg") :], flags=re.S)
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", text).replace(_PAGE_INK, "currentColor")
        title = html.escape(self.title)
        # matplotlib's style sheet, taken out above because it would hold for the whole page, said just this.
        opening = f'<svg role="img" aria-label="{title}" stroke-linejoin="round" stroke-linecap="butt" '
        text = text.replace("<svg ", opening, 1)
        end = text.index(">") + 1
        return f"{text[:end]}<title>{title}</title>{text[end:]}"

    def png(self) -> bytes:
        """On white."""
        return self._save("png", _PAPER_INK, dpi=_DPI, facecolor="white", metadata={"Software": None})

    def csv(self) -> str:
        """Columns and rows; a value that is not known is empty."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return buffer.getvalue()

    def _save(self, kind: str, ink: str, **options: Any) -> bytes:
        with matplotlib.rc_context(STYLE | dict.fromkeys(_INKED, ink) | {"svg.hashsalt": self.name}):
            figure = Figure(figsize=self.size)
            self.paint(figure, [dict(zip(self.columns, row, strict=True)) for row in self.rows])
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, **options)
        return buffer.getvalue()


class Look(NamedTuple):
    """label : the arm in words, without what the title of its panel says; panel : empty where there is but one"""

    label: str
    color: str
    marker: str
    dash: Any
    panel: str = ""


def arm_words(arm: Record) -> str:
    """The arm in words."""
    return names.arm_words(arm["arm"], arm["values"])


def words_of(comparison: Comparison, name: str) -> str:
    """The arm of that name in words."""
    return arm_words(next(arm for arm in comparison["arms"] if arm["arm"] == name))


def seeds_of(comparison: Comparison) -> int:
    """Runs of an arm."""
    return max(arm["n"] for arm in comparison["arms"])


def panel_setting(arms: list[Record]) -> str | None:
    """The first setting whose values cut many arms into few groups; None where the arms are few or no setting does."""
    if len(arms) <= MOST_LINES:
        return None
    for name in arms[0]["values"]:
        panels = {repr(arm["values"][name]) for arm in arms}
        if 1 < len(panels) <= min(_MOST_PANELS, len(arms) // 2):
            return name
    return None


def looks_of(arms: list[Record]) -> dict[str, Look]:
    """By the name of the arm."""
    setting = panel_setting(arms)
    rests = {arm["arm"]: {k: v for k, v in arm["values"].items() if k != setting} for arm in arms}
    labels = {arm["arm"]: values_words(rests[arm["arm"]]) or arm_words(arm) for arm in arms}
    kinds = list(dict.fromkeys(labels.values()))
    colors = _colors(len(kinds), ordered=_is_ordered(list(rests.values())))
    looks = {}
    for arm in arms:
        name, number = arm["arm"], kinds.index(labels[arm["arm"]])
        panel = values_words({setting: arm["values"][setting]}) if setting else ""
        marker, dash = MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)]
        looks[name] = Look(labels[name], colors[number], marker, dash, panel)
    return looks


def _is_ordered(rests: list[Values]) -> bool:
    """Whether a single setting with numbers is all that tells the lines of a panel apart."""
    return all(len(rest) == 1 and all(isinstance(v, (int, float)) for v in rest.values()) for rest in rests)


def _colors(count: int, *, ordered: bool) -> list[str]:
    if ordered or count > len(COLORS):
        return [to_hex(_RAMP(number / max(1, count - 1))) for number in range(count)]
    return list(COLORS[:count])


def size_of(looks: Iterable[Look], extra_entries: int = 0) -> tuple[float, float]:
    """Of a figure of `panels` with its `legend` above."""
    looks = list(looks)
    rows, _ = _grid(len({look.panel for look in looks}))
    labels = list(dict.fromkeys(look.label for look in looks))
    lines = -(-(len(labels) + extra_entries) // _legend_columns(labels))
    return WIDTH, (3.3 if rows == 1 else 2.3 * rows) + 0.2 * lines + 0.15


def panels(figure: Figure, looks: Iterable[Look]) -> dict[str, Axes]:
    """Axes by the name of their panel, with common scales."""
    names = list(dict.fromkeys(look.panel for look in looks))
    rows, columns = _grid(len(names))
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for number, (axes, name) in enumerate(zip(grid, names, strict=False)):
        axes.set_title(name, loc="left")
        if number + columns >= len(names):  # the last of its column, not always the last row
            axes.tick_params(labelbottom=True)
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    return dict(zip(names, grid, strict=False))


def legend(figure: Figure, looks: Iterable[Look], *more: Line2D) -> None:
    """One above the figure for all panels, each label once."""
    entries = {look.label: look for look in looks}
    lines = [
        Line2D([], [], color=look.color, marker=look.marker, linestyle=look.dash, markersize=4, label=label)
        for label, look in entries.items()
    ]
    figure.legend(handles=[*lines, *more], loc="outside upper left", ncols=_legend_columns(list(entries)), fontsize=9)


def _grid(count: int) -> tuple[int, int]:
    columns = 1 if count == 1 else 2 if count in (2, 4) else 3
    return -(-count // columns), columns


def _legend_columns(labels: list[str]) -> int:
    """As many as the width has room for: about 95 letters, five of them for the line."""
    return max(1, min(5, 95 // (max(map(len, labels)) + 5)))


def name_rows(axes: Axes, names: list[str]) -> None:
    """Rows from the top down, called so."""
    lines = [textwrap.fill(name, _ROW_LETTERS) for name in names]
    axes.set_yticks(range(len(names)), lines, fontsize=8 if any("\n" in line for line in lines) else 10)
    axes.set_ylim(len(names) - 0.5, -0.5)


def row_height(names: list[str], least: float) -> float:
    """In inches, so that the longest name has room."""
    return max(least, 0.06 + 0.15 * max(len(textwrap.wrap(name, _ROW_LETTERS)) for name in names))


def signed_percent(share: float) -> str:
    """0.1 is +10%."""
    return f"{round(100 * share):+d}%".replace("-", "−")


def by(records: list[Record], key: str) -> dict[Any, list[Record]]:
    """The records by one of their values, in their order."""
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault(record[key], []).append(record)
    return found
