"""What a benchmark leaves: a table for people, a plot, and ``runs/bench/PART.json``.

A result is ``{"name", "value", "unit", "against", "ratio", "passes"}``: the median of the passes, and its ratio to the
median of another result of the same run.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

FOLDER = Path("runs/bench")


@dataclass
class Result:
    name: str
    unit: str
    passes: list[float]
    against: str | None = None
    ratio: float | None = None
    value: float = field(init=False)

    def __post_init__(self) -> None:
        self.value = statistics.median(self.passes)


def compare(results: list[Result], name: str, against: str) -> Result:
    """A result with its ratio to another of the run."""
    found = {result.name: result for result in results}
    ratio = found[name].value / found[against].value
    return Result(name, found[name].unit, found[name].passes, against, ratio)


def leave(part: str, results: list[Result], title: str) -> None:
    """Print the table, write JSON and plot."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    order = ("name", "value", "unit", "against", "ratio", "passes")
    rows = [{key: asdict(result)[key] for key in order} for result in results]
    (FOLDER / f"{part}.json").write_text(json.dumps(rows, indent=1))
    try:
        _print_table(results, title)
        _plot(part, results, title)
    except ModuleNotFoundError as error:  # a bare GPU machine has neither rich nor matplotlib
        print(f"{title} (no table or plot without {error.name})", *map(_line, results), sep="\n")
    print(f"{FOLDER / part}.json, {FOLDER / part}.png")


def _print_table(results: list[Result], title: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title)
    for heading in ("what", "median", "unit", "least", "most", "n", "ratio", "to"):
        table.add_column(heading, justify="right" if heading in ("median", "least", "most", "n", "ratio") else "left")
    for result in results:
        name, against = escape(result.name), escape(result.against or "")
        table.add_row(
            name, _number(result.value), result.unit, _number(min(result.passes)), _number(max(result.passes)),
            str(len(result.passes)), f"{result.ratio:.2f}" if result.ratio else "", against,
        )  # fmt: skip
    Console(width=140).print(table)


def _line(result: Result) -> str:
    ratio = f", {result.ratio:.2f} of {result.against}" if result.ratio else ""
    spread = f"{_number(min(result.passes))} to {_number(max(result.passes))}, n = {len(result.passes)}"
    return f"{result.name}: {_number(result.value)} {result.unit} ({spread}){ratio}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _plot(part: str, results: list[Result], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    units = list(dict.fromkeys(result.unit for result in results))
    groups = [list({r.name: r for r in results if r.unit == unit}.values()) for unit in units]
    heights = [len(group) + 1.5 for group in groups]
    size = (9, 0.36 * sum(heights) + 0.6)
    figure, axes = plt.subplots(len(units), 1, figsize=size, squeeze=False, height_ratios=heights, layout="constrained")
    for axis, unit, group in zip(axes[:, 0], units, groups, strict=True):
        names = [result.name for result in group]
        low = [result.value - min(result.passes) for result in group]
        high = [max(result.passes) - result.value for result in group]
        spread = {"xerr": [low, high], "ecolor": "#2b2d42", "capsize": 2}
        colours = ["#c8553d" if name.startswith("sparknorm") else "#8d99ae" for name in names]
        axis.barh(names, [result.value for result in group], color=colours, **spread)
        axis.invert_yaxis()
        axis.set_xlabel(unit)
        if unit == "images/s":
            axis.set_xscale("log")
    figure.suptitle(title, fontsize=10)
    figure.savefig(FOLDER / f"{part}.png", dpi=110)
