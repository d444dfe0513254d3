"""What the figures of a comparison share: styles of lines, panels, a legend, and one drawing in three formats."""

from __future__ import annotations

import csv
import html
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter

from pipeline.report.names import Values, arm_words, group_setting, values_words

# Distinguishable with every common colour blindness (Okabe & Ito 2008), on white and on black.
COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#9a6324")
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (2, 1)), (0, (6, 1.5, 1, 1.5)))
# Between them all colours are about as light: they can be told from a white and from a black page.
_RAMP = LinearSegmentedColormap.from_list("sparknorm", ["#2a7fc9", "#a04fb0", "#d55e00"])
WIDTH = 7.0
# Letters on one line of a row's name; a longer name takes several lines.
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
    paint : draws the rows on an empty figure
    """

    name: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]
    size: tuple[float, float]
    paint: Callable[[Figure], None] = field(repr=False)

    def svg(self) -> str:
        """The drawing for a page: ink is the page's text colour, and no identifier is that of another figure."""
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
        """The drawing on white."""
        return self._save("png", _PAPER_INK, dpi=_DPI, facecolor="white", metadata={"Software": None})

    def csv(self) -> str:
        """The numbers; a value that is not known is empty."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return buffer.getvalue()

    def _save(self, kind: str, ink: str, **options: Any) -> bytes:
        with matplotlib.rc_context(STYLE | dict.fromkeys(_INKED, ink) | {"svg.hashsalt": self.name}):
            figure = Figure(figsize=self.size)
            self.paint(figure)
            _show_dollars(figure)
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, **options)
        return buffer.getvalue()


def _show_dollars(figure: Figure) -> None:
    """Names are shown as they are: between two dollars matplotlib reads formulas. Its own powers of ten are some."""
    axes = [axis for each in figure.axes for axis in (each.xaxis, each.yaxis)]
    powers = [axis for axis in axes if isinstance(axis.get_major_formatter(), LogFormatter)]
    formulas = {id(text) for axis in powers for text in axis.get_ticklabels(which="both")}
    for text in figure.findobj(Text):
        if id(text) not in formulas:
            text.set_parse_math(False)


class LineStyle(NamedTuple):
    """How an arm is drawn.

    label : the arm in words, without what the title of its panel says
    color : as #rrggbb
    marker, dash : as matplotlib takes them
    panel : title of the panel; empty where there is but one
    """

    label: str
    color: str
    marker: str
    dash: Any
    panel: str = ""


def line_styles(arms: Mapping[str, Values]) -> dict[str, LineStyle]:
    """The style of each arm's line, by the arm's name. Arms of one panel differ in colour and in marker or dashes.

    Parameters
    ----------
    arms : name -> values
    """
    setting = group_setting(list(arms.values()))
    rests = {name: {k: v for k, v in values.items() if k != setting} for name, values in arms.items()}
    labels = {name: values_words(rests[name]) or arm_words(name, values) for name, values in arms.items()}
    kinds = list(dict.fromkeys(labels.values()))
    colors = _colors(len(kinds), ordered=_is_ordered(list(rests.values())))
    styles = {}
    for name, values in arms.items():
        number = kinds.index(labels[name])
        panel = values_words({setting: values[setting]}) if setting else ""
        marker, dash = MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)]
        styles[name] = LineStyle(labels[name], colors[number], marker, dash, panel)
    return styles


def _is_ordered(rests: list[Values]) -> bool:
    """Whether a single setting with numbers is all that tells the lines of a panel apart."""
    return all(len(rest) == 1 and all(isinstance(v, (int, float)) for v in rest.values()) for rest in rests)


def _colors(count: int, *, ordered: bool) -> list[str]:
    if ordered or count > len(COLORS):
        return [to_hex(_RAMP(number / max(1, count - 1))) for number in range(count)]
    return list(COLORS[:count])


def heat(share: float) -> tuple[str, str]:
    """Colours of a heat map's cell, darkest at 0 and lightest at 1, and of the text on it, as #rrggbb."""
    red, green, blue, _ = matplotlib.colormaps["viridis"](0.05 + 0.9 * share)
    light = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.18
    return to_hex((red, green, blue)), "#000000" if light else "#ffffff"


def size_of(styles: Iterable[LineStyle], extra_entries: int = 0) -> tuple[float, float]:
    """Width and height in inches of a figure of `panels` with its `legend` above."""
    styles = list(styles)
    rows, _ = _grid(len({style.panel for style in styles}))
    labels = list(dict.fromkeys(style.label for style in styles))
    lines = -(-(len(labels) + extra_entries) // _legend_columns(labels))
    return WIDTH, (3.3 if rows == 1 else 2.3 * rows) + 0.2 * lines + 0.15


def panels(figure: Figure, styles: Iterable[LineStyle]) -> dict[str, Axes]:
    """Axes by the name of their panel, with common scales."""
    names = list(dict.fromkeys(style.panel for style in styles))
    rows, columns = _grid(len(names))
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for number, (axes, name) in enumerate(zip(grid, names, strict=False)):
        axes.set_title(name, loc="left")
        if number + columns >= len(names):  # the last of its column, not always the last row
            axes.tick_params(labelbottom=True)
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    return dict(zip(names, grid, strict=False))


def legend(figure: Figure, styles: Iterable[LineStyle], *more: Line2D) -> None:
    """One legend above the figure for all panels, each label once."""
    entries = {style.label: style for style in styles}
    lines = [
        Line2D([], [], color=style.color, marker=style.marker, linestyle=style.dash, markersize=4, label=label)
        for label, style in entries.items()
    ]
    figure.legend(handles=[*lines, *more], loc="outside upper left", ncols=_legend_columns(list(entries)), fontsize=9)


def _grid(count: int) -> tuple[int, int]:
    columns = 1 if count == 1 else 2 if count in (2, 4) else 3
    return -(-count // columns), columns


def _legend_columns(labels: list[str]) -> int:
    """As many columns as the width has room for: about 95 letters, five of them for the line."""
    return max(1, min(5, 95 // (max(map(len, labels)) + 5)))


def name_rows(axes: Axes, names: list[str]) -> None:
    """Name the rows of a figure, from the top down."""
    lines = [textwrap.fill(name, _ROW_LETTERS) for name in names]
    axes.set_yticks(range(len(names)), lines, fontsize=8 if any("\n" in line for line in lines) else 10)
    axes.set_ylim(len(names) - 0.5, -0.5)


def row_height(names: list[str], least: float) -> float:
    """Height of a row in inches, at least ``least``, so that the longest name has room."""
    return max(least, 0.06 + 0.15 * max(len(textwrap.wrap(name, _ROW_LETTERS)) for name in names))
