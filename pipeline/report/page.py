"""``comparison.json`` -> one self-contained HTML page: verdict, tables, figures. No network, light and dark."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple

import jinja2

from pipeline.report.figures.study import figures_of
from pipeline.report.figures.style import Comparison, Record, arm_words, signed_percent
from pipeline.report.names import norm_words, setting_words, values_words
from pipeline.report.verdict import verdict

__all__ = ["render", "verdict"]

Show = Callable[[Any, Record], str]


class Part(NamedTuple):
    """A number of a cell. key : as in MLflow, ``difference_low`` of what ``difference`` holds; show : as text"""

    key: str
    show: Show


class Column(NamedTuple):
    heading: str
    parts: tuple[Part, ...]


class Cell(NamedTuple):
    """value : the exact number, as JSON"""

    key: str
    value: str
    text: str


def render(comparison: Comparison) -> str:
    """The page."""
    loader = jinja2.FunctionLoader(lambda name: resources.files("pipeline.report").joinpath(name).read_text("utf-8"))
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"exact": exact, "short": _short}
    runs, search = comparison["runs"], comparison["search"]
    return environment.get_template("report.html.j2").render(
        comparison=comparison,
        verdict=verdict(comparison),
        compared=_compared(comparison),
        words={arm["arm"]: arm_words(arm) for arm in comparison["arms"]},
        arms=table_of(comparison["arms"], _accuracy_columns(comparison)),
        costs=table_of(comparison["arms"], _cost_columns(comparison)),
        runs=table_of(runs, _run_columns(comparison)),
        search=table_of(search, _search_columns(comparison)),
        batches=sorted({arm["global_batch"] for arm in comparison["arms"]}),
        figures=figures_of(comparison),
    )


def exact(value: Any) -> str:
    """As JSON: what reads it back has the very number."""
    return json.dumps(value)


def table_of(records: list[Record], columns: list[Column]) -> tuple[list[str], list[tuple[Record, list[list[Cell]]]]]:
    """Headings, and each record with its cells; columns of which no record knows the first number are left out."""
    flat = [_flat(record) for record in records]
    known = [column for column in columns if any(record.get(column.parts[0].key) is not None for record in flat)]
    rows = [(record, [_cell(record, column) for column in known]) for record in flat]
    return [column.heading for column in known], rows


def _flat(record: Record) -> Record:
    difference = {f"difference_{key}": value for key, value in record.get("difference", {}).items()}
    return {**record, **difference, **{f"tuned/{key}": value for key, value in record["tuned"].items()}}


def _cell(record: Record, column: Column) -> list[Cell]:
    cells: list[Cell] = []
    for part in column.parts:
        value = record.get(part.key)
        if value is not None or not cells:
            cells.append(Cell(part.key, exact(value), part.show(value, record)))
    return cells


def _accuracy_columns(comparison: Comparison) -> list[Column]:
    columns = [
        *_tuned(comparison),
        Column("global batch", (Part("global_batch", _count),)),
        Column("runs", (Part("n", _count),)),
        Column("diverged", (Part("diverged", _diverged),)),
        Column("best accuracy", (Part("best_accuracy_mean", _percent), Part("best_accuracy_std", _and_points))),
        Column("final accuracy", (Part("final_accuracy_mean", _percent), Part("final_accuracy_std", _and_points))),
        Column(
            "points above baseline (95%)",
            (Part("difference_mean", _points), Part("difference_low", _low), Part("difference_high", _high)),
        ),
    ]
    return _with_sizes(columns, comparison)


def _cost_columns(comparison: Comparison) -> list[Column]:
    columns = [
        Column("reached target", (Part("reached_target", lambda value, arm: f"{value} of {arm['n']}"),)),
        Column("steps to target", (Part("steps_to_target_mean", _arrival), Part("steps_to_target_std", _and_count))),
        Column("baseline's steps ÷ own", (Part("steps_ratio", _times),)),
        Column("images to target", (Part("images_to_target_mean", _arrival), Part("images_to_target_std", _and_count))),
        Column("seconds to target", (Part("seconds_to_target_mean", _late), Part("seconds_to_target_std", _and_late))),
        Column("baseline's seconds ÷ own", (Part("seconds_ratio", _times),)),
        Column("highest stable rate", (Part("highest_stable_rate", _stable),)),
        Column("images/s", (Part("images_per_second_mean", _count), Part("images_per_second_std", _and_count))),
        Column("extra time of an image", (Part("overhead", _extra),)),
    ]
    return _with_sizes(columns, comparison)


def _with_sizes(columns: list[Column], comparison: Comparison) -> list[Column]:
    """Without those that only tell something where batch sizes differ, if they do not."""
    sizes = {arm["global_batch"] for arm in comparison["arms"]}
    of_images = ("global_batch", "images_to_target_mean")
    return [column for column in columns if len(sizes) > 1 or column.parts[0].key not in of_images]


def _run_columns(comparison: Comparison) -> list[Column]:
    return [
        Column("seed", (Part("seed", _plain),)),
        *_tuned(comparison),
        Column("best accuracy", (Part("best_accuracy", _percent),)),
        Column("final accuracy", (Part("final_accuracy", _percent),)),
        Column("diverged", (Part("diverged", _yes_or_no),)),
        Column("steps", (Part("steps", _count),)),
        Column("target", (Part("target", _percent),)),
        Column("steps to target", (Part("steps_to_target", _arrival),)),
        Column("images to target", (Part("images_to_target", _arrival),)),
        Column("seconds to target", (Part("seconds_to_target", _late),)),
        Column("images/s", (Part("images_per_second", _count),)),
    ]


def _search_columns(comparison: Comparison) -> list[Column]:
    return [
        *_tuned(comparison),
        Column("best accuracy", (Part("best_accuracy", _percent),)),
        Column("final accuracy", (Part("final_accuracy", _percent),)),
        Column("diverged", (Part("diverged", _yes_or_no),)),
        Column("steps", (Part("steps", _count),)),
        Column("images/s", (Part("images_per_second", _count),)),
    ]


def _tuned(comparison: Comparison) -> list[Column]:
    return [Column(setting_words(name), (Part(f"tuned/{name}", _plain),)) for name in comparison["tuned"]]


def _compared(comparison: Comparison) -> list[tuple[str, str]]:
    """What varied, and its values, in words."""
    found = []
    for name in [*comparison["varied"], *comparison["tuned"]]:
        heading = "normalization" if name == "model.norm" else setting_words(name)
        values = [norm_words(str(v)) if name == "model.norm" else _plain(v, {}) for v in comparison["grid"][name]]
        chosen = " (the best chosen for each arm)" if name in comparison["tuned"] else ""
        found.append((heading, ", ".join(values) + chosen))
    return found or [("arm", values_words({"model.norm": comparison["settings"]["model"]["norm"]}))]


def _short(value: Any) -> str:
    """For the table behind a figure."""
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else exact(value) if isinstance(value, bool) else str(value)


def _plain(value: Any, _: Record) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _percent(value: float | None, _: Record) -> str:
    return "–" if value is None else f"{100 * value:.2f}%"


def _points(value: float | None, _: Record) -> str:
    return "–" if value is None else f"{100 * value:+.2f}".replace("-", "−")


def _low(value: float, record: Record) -> str:
    return f" ({_points(value, record)} to "


def _high(value: float, record: Record) -> str:
    return f"{_points(value, record)})"


def _and_points(value: float, _: Record) -> str:
    return f" ± {100 * value:.2f}"


def _count(value: float | None, _: Record) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _and_count(value: float, _: Record) -> str:
    return f" ± {value:,.0f}"


def _arrival(value: float | None, record: Record) -> str:
    return "never" if value is None else _count(value, record)


def _late(value: float | None, _: Record) -> str:
    return "never" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _and_late(value: float, arm: Record) -> str:
    return f" ± {value:,.1f}" if arm["seconds_to_target_mean"] < 100 else f" ± {value:,.0f}"


def _times(value: float | None, _: Record) -> str:
    return "–" if value is None else f"{value:.3g}×" if value < 1000 else f"{value:,.0f}×"


def _stable(value: float | None, arm: Record) -> str:
    return "none" if value is None else f"{'≥ ' if arm['highest_stable_is_bound'] else ''}{value:g}"


def _extra(value: float | None, _: Record) -> str:
    return "–" if value is None else signed_percent(value)


def _diverged(value: int, arm: Record) -> str:
    return f"{value} of {arm['n']}" if value else "no"


def _yes_or_no(value: bool, _: Record) -> str:
    return "diverged" if value else "no"
