"""The tables of a report: which columns each has, and how its numbers are shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.report.comparison import ArmSummary, ComparedRun, Comparison, SearchTrial
from pipeline.report.formats import UNKNOWN, plain, signed, signed_percent
from pipeline.report.names import setting_words

# A record's numbers by key, those of what it holds too: ``difference_low``, ``tuned/train.learning_rate``.
Numbers = Mapping[str, Any]

_SHARE, _COUNT, _AND_COUNT = "{:.2%}", "{:,.0f}", " ± {:,.0f}"


class Part(NamedTuple):
    """A number of a cell.

    key : as in MLflow
    text : a format of the value, which may name other numbers of the record, or a function of both
    """

    key: str
    text: str | Callable[[Any, Numbers], str]


class Column(NamedTuple):
    """heading, what it shows, and the text where the first number is not known, or a function of the record"""

    heading: str
    parts: tuple[Part, ...]
    unknown: str | Callable[[Numbers], str] = UNKNOWN


class Cell(NamedTuple):
    """value : the exact number, as JSON"""

    key: str
    value: str
    text: str


class Table(NamedTuple):
    """rows : each record's numbers with its cells, which have one or several parts"""

    headings: list[str]
    rows: list[tuple[Numbers, list[list[Cell]]]]


def table_of(records: Sequence[ArmSummary | ComparedRun | SearchTrial], columns: Sequence[Column]) -> Table:
    """The records with their cells; columns of which no record knows the first number are left out."""
    rows = [_numbers(record) for record in records]
    known = [column for column in columns if any(row.get(column.parts[0].key) is not None for row in rows)]
    return Table(
        [column.heading for column in known], [(row, [_cells(row, column) for column in known]) for row in rows]
    )


def exact(value: Any) -> str:
    """As JSON: what reads it back has the very number."""
    return json.dumps(value)


def _numbers(record: ArmSummary | ComparedRun | SearchTrial) -> Numbers:
    difference = record.difference if isinstance(record, ArmSummary) else None
    return {
        **dict(record),
        **{f"difference_{key}": value for key, value in difference or ()},
        **{f"tuned/{key}": value for key, value in record.tuned.items()},
    }


def _cells(row: Numbers, column: Column) -> list[Cell]:
    first, *more = column.parts
    known = [first, *(part for part in more if row.get(part.key) is not None)]
    return [Cell(part.key, exact(row.get(part.key)), _text(row, part, column.unknown)) for part in known]


def _text(row: Numbers, part: Part, unknown: str | Callable[[Numbers], str]) -> str:
    value = row.get(part.key)
    if value is None:
        return unknown if isinstance(unknown, str) else unknown(row)
    return part.text.format(value, **row) if isinstance(part.text, str) else part.text(value, row)


def arm_columns(comparison: Comparison) -> list[Column]:
    """How accurate the arms were."""
    columns = [
        *_tuned(comparison),
        Column("global batch", (Part("global_batch", _COUNT),)),
        Column("runs", (Part("n", _COUNT),)),
        Column("diverged", (Part("diverged", lambda value, arm: f"{value} of {arm['n']}" if value else "no"),)),
        Column("did not learn", (Part("not_learned", lambda value, arm: f"{value} of {arm['n']}" if value else "no"),)),
        Column(f"final {comparison.metric.replace('_', ' ')}, sound runs", _mean_and_std("score")),
        Column("points above baseline", (Part("difference_mean", _points),)),
        Column("95% interval", _ends("")),
        Column("grade", (Part("grade", "{}"),)),
    ]
    return _without_sizes(columns, comparison)


def certainty_columns(comparison: Comparison) -> list[Column]:
    """What the interval of a difference is made of, tests, and figures that nothing is computed from."""
    return [
        Column("95% interval over", (Part("difference_covers", "{}"),)),
        Column("over seeds alone", _ends("seeds_")),
        Column("over images alone", _ends("images_")),
        Column("p, after Holm", (Part("difference_p_adjusted", _p_value),)),
        Column("McNemar's p, first seed", (Part("difference_mcnemar_p", _p_value),)),
        Column(f"best of the {comparison.evaluated_on} evaluations*", _mean_and_std("best_accuracy")),
    ]


def _mean_and_std(key: str) -> tuple[Part, ...]:
    return (Part(f"{key}_mean", _SHARE), Part(f"{key}_std", _and_points))


def _ends(part: str) -> tuple[Part, ...]:
    """Both ends of an interval of the difference."""
    low = Part(f"difference_{part}low", _points)
    high = Part(f"difference_{part}high", lambda value, _: f" to {signed(100 * value)}")
    return low, high


def score_columns() -> list[Column]:
    """What the evaluations that count say beyond accuracy."""
    scores = {
        "accuracy, all runs": "accuracy",
        "balanced accuracy": "balanced_accuracy",
        "macro F1": "macro_f1",
        "loss": "loss",
        "calibration error": "calibration_error",
    }
    return [
        Column(
            heading,
            (
                Part(f"final_{score}_mean", "{:.4f}" if score == "loss" else _SHARE),
                Part(f"final_{score}_std", " ± {:.4f}" if score == "loss" else _and_points),
            ),
        )
        for heading, score in scores.items()
    ]


def cost_columns(comparison: Comparison) -> list[Column]:
    """How fast the arms learned, and what they cost."""
    to_target = [
        (Part(f"{kind}_to_target_mean", _COUNT), Part(f"{kind}_to_target_std", _AND_COUNT))
        for kind in ("steps", "images")
    ]
    seconds = (Part("seconds_to_target_mean", _seconds), Part("seconds_to_target_std", _and_seconds))
    columns = [
        Column("reached target", (Part("reached_target", _reached),)),
        Column("steps to target", to_target[0], unknown=_never),
        Column("baseline's steps ÷ own", (Part("steps_ratio", _times),)),
        Column("images to target", to_target[1], unknown=_never),
        Column("seconds to target", seconds, unknown=_never),
        Column("baseline's seconds ÷ own", (Part("seconds_ratio", _times),)),
        Column("highest stable rate", (Part("highest_stable_rate", _stable),), unknown="none"),
        Column("images/s", (Part("images_per_second_mean", _COUNT), Part("images_per_second_std", _AND_COUNT))),
        Column(
            "extra time of an image",
            (
                Part("overhead", lambda value, _: signed_percent(value)),
                Part("overhead_low", lambda value, _: f" ({signed_percent(value)}"),
                Part("overhead_high", lambda value, _: f" to {signed_percent(value)})"),
            ),
        ),
    ]
    return _without_sizes(columns, comparison)


def run_columns(comparison: Comparison) -> list[Column]:
    """Every run."""
    return [
        Column("seed", (Part("seed", "{}"),)),
        *_tuned(comparison),
        Column("final accuracy", (Part("final_accuracy", _SHARE),)),
        Column("best accuracy*", (Part("best_accuracy", _SHARE),)),
        Column("balanced accuracy", (Part("final_balanced_accuracy", _SHARE),)),
        Column("loss", (Part("final_loss", "{:.4f}"),)),
        Column("diverged", (Part("diverged", _yes_or_no),)),
        Column("learned", (Part("learned", lambda learned, _: "yes" if learned else "no"),)),
        Column("steps", (Part("steps", _COUNT),)),
        Column("network of step", (Part("selected_step", _COUNT),), unknown="the last"),
        Column("target", (Part("target", _SHARE),)),
        Column("steps to target", (Part("steps_to_target", _COUNT),), unknown=_never),
        Column("images to target", (Part("images_to_target", _COUNT),), unknown=_never),
        Column("seconds to target", (Part("seconds_to_target", _seconds),), unknown=_never),
        Column("images/s", (Part("images_per_second", _COUNT),)),
    ]


def search_columns(comparison: Comparison) -> list[Column]:
    """Every trial of the search."""
    keys = {"final_accuracy", "final_loss", "diverged", "steps", "images_per_second"}
    columns = [column for column in run_columns(comparison) if column.parts[0].key in keys]
    rungs = [Column("rungs", (Part("rungs", _COUNT),)), Column("learned", (Part("learned", _learned),))]
    seed = [Column("seed", (Part("seed", "{}"),))]
    return [
        *_tuned(comparison),
        *(seed if len({trial.seed for trial in comparison.search}) > 1 else []),
        *rungs,
        *columns,
    ]


def _tuned(comparison: Comparison) -> list[Column]:
    return [
        Column(setting_words(name), (Part(f"tuned/{name}", lambda value, _: plain(value)),))
        for name in comparison.tuned
    ]


def _without_sizes(columns: list[Column], comparison: Comparison) -> list[Column]:
    """Where batch sizes do not differ, without the columns that only tell something where they do."""
    sizes = {arm.global_batch for arm in comparison.arms}
    of_images = ("global_batch", "images_to_target_mean")
    return [column for column in columns if len(sizes) > 1 or column.parts[0].key not in of_images]


def _never(row: Numbers) -> str:
    """Of an arm or a run that did not reach its target, or had none since the baseline's run was not sound."""
    has_target = row["had_target"] if "had_target" in row else row.get("target") is not None
    return "never" if has_target else UNKNOWN


def _reached(count: int, arm: Numbers) -> str:
    return f"{count} of {arm['had_target']}" if arm["had_target"] else UNKNOWN


def _points(share: float, _: Numbers) -> str:
    return signed(100 * share)


def _p_value(p_value: float, _: Numbers) -> str:
    return f"{p_value:.2g}" if p_value >= 0.001 else "< 0.001"


def _and_points(share: float, _: Numbers) -> str:
    return f" ± {100 * share:.2f}"


def _seconds(value: float, _: Numbers) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _and_seconds(value: float, arm: Numbers) -> str:
    return f" ± {value:,.1f}" if arm["seconds_to_target_mean"] < 100 else f" ± {value:,.0f}"


def _times(ratio: float, _: Numbers) -> str:
    return f"{ratio:.3g}×" if ratio < 1000 else f"{ratio:,.0f}×"


def _stable(rate: float, arm: Numbers) -> str:
    return f"{'≥ ' if arm['highest_stable_is_bound'] else ''}{rate:g}"


def _learned(learned: bool, _: Numbers) -> str:
    return "yes" if learned else "no"


def _yes_or_no(diverged: bool, _: Numbers) -> str:
    return "diverged" if diverged else "no"
