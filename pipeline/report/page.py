"""A comparison -> one self-contained HTML page: verdict, tables, figures. No network, light and dark."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2

from pipeline.report import tables
from pipeline.report.comparison import Comparison
from pipeline.report.figures.study import figures_of
from pipeline.report.formats import UNKNOWN, plain
from pipeline.report.names import norm_words, setting_words
from pipeline.report.sentences import metric_words
from pipeline.report.verdict import verdict


def render(comparison: Comparison) -> str:
    """The page of a comparison, as HTML."""
    environment = environment_of()
    return environment.get_template("report.html.j2").render(
        comparison=comparison,
        verdict=verdict(comparison),
        metric=metric_words(comparison),
        counted=f"each run's {'last' if comparison.selected_on is None else 'chosen'} evaluation",
        compared=_compared(comparison),
        words={arm.arm: arm.words for arm in comparison.arms},
        arms=tables.table_of(comparison.arms, tables.arm_columns(comparison)),
        certainty=tables.table_of(comparison.arms, tables.certainty_columns(comparison)),
        scores=tables.table_of(comparison.arms, tables.score_columns()),
        costs=tables.table_of(comparison.arms, tables.cost_columns(comparison)),
        runs=tables.table_of(comparison.runs, tables.run_columns(comparison)),
        search=tables.table_of(comparison.search, tables.search_columns(comparison)),
        batches=sorted({arm.global_batch for arm in comparison.arms}),
        figures=figures_of(comparison),
    )


def environment_of() -> jinja2.Environment:
    """How pages are made of the templates in this package."""
    loader = jinja2.FunctionLoader(lambda name: resources.files("pipeline.report").joinpath(name).read_text("utf-8"))
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"exact": tables.exact, "short": _short}
    return environment


def _compared(comparison: Comparison) -> list[tuple[str, str]]:
    """What varied, and its values, in words."""
    settings = []
    for name in (*comparison.varied, *comparison.tuned):
        is_norm = name == "model.norm"
        values = [norm_words(str(value)) if is_norm else plain(value) for value in comparison.grid[name]]
        how = "the best chosen for each arm" if comparison.search else "the middle one taken: no trial was long enough"
        chosen = f" ({how})" if name in comparison.tuned else ""
        settings.append(("normalization" if is_norm else setting_words(name), ", ".join(values) + chosen))
    return settings or [("arm", norm_words(comparison.settings["model"]["norm"]))]


def _short(value: Any) -> str:
    """A number of the table behind a figure."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return tables.exact(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
