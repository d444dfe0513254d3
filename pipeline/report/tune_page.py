"""A search -> one self-contained HTML page: verdict, confirmation, figures, trials. No network, light and dark."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.report.comparison import Difference
from pipeline.report.figures.tune import figures_of
from pipeline.report.formats import UNKNOWN, plain, signed
from pipeline.report.names import Values, setting_words
from pipeline.report.page import environment_of
from pipeline.report.tuning import Tuning

__all__ = ["figures_of", "render"]


class Row(NamedTuple):
    """A row of a table: its heading, and its cells."""

    name: str
    cells: list[str]
    marked: bool = False


def render(tuning: Tuning) -> str:
    """The page of a search, as HTML."""
    shown = [setting_words(name) for name in tuning.space]
    return (
        environment_of()
        .get_template("tune.html.j2")
        .render(
            tuning=tuning,
            metric=tuning.metric.replace("_", " "),
            values={name: _short(value) for name, value in tuning.values.items()},
            confirmed=[_confirmed(tuning, number) for number in range(len(tuning.confirmed))],
            seeds=[run.seed for run in tuning.confirmed[0].runs] if tuning.confirmed else [],
            confirmed_headings=["in the search", "mean", *_seed_headings(tuning), "against the winner, points"],
            trial_headings=["state", tuning.metric.replace("_", " "), "images", *shown],
            trials=[_trial(tuning, number) for number in range(len(tuning.trials))],
            states=_states(tuning),
            figures=figures_of(tuning),
        )
    )


def _seed_headings(tuning: Tuning) -> list[str]:
    return [f"seed {run.seed}" for run in tuning.confirmed[0].runs] if tuning.confirmed else []


def _states(tuning: Tuning) -> str:
    """``20 complete, 11 pruned, 1 diverged``"""
    counts = {state: sum(trial.state == state for trial in tuning.trials) for state in
              ("complete", "pruned", "diverged", "failed")}  # fmt: skip
    text = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    same = sum(trial.same_as is not None for trial in tuning.trials)
    return text + (f"; {same} had the values of an earlier one and were not trained again" if same else "")


def _confirmed(tuning: Tuning, place: int) -> Row:
    trial = tuning.confirmed[place]
    spread = f" ± {100 * trial.std:.2f}" if trial.std is not None else ""
    cells = [
        f"{trial.searched_score:.2%}",
        f"{trial.mean:.2%}{spread}",
        *(f"{run.score:.2%}{' (diverged)' if run.diverged else ''}" for run in trial.runs),
        _difference(trial.difference) if place else UNKNOWN,
    ]
    return Row(f"trial {trial.number}", cells, marked=place == 0)


def _difference(found: Difference | None) -> str:
    if found is None:
        return "not known"
    ends = f" [{signed(100 * found.low)}, {signed(100 * found.high)}]" if None not in (found.low, found.high) else ""  # type: ignore[operator]
    return f"{signed(100 * found.mean)}{ends}"


def _trial(tuning: Tuning, number: int) -> Row:
    trial = tuning.trial(number)
    at = f" at {trial.curve[-1].evaluation}" if trial.state == "pruned" and trial.curve else ""
    same = f" (as {trial.same_as})" if trial.same_as is not None else ""
    score = trial.score if trial.score is not None else trial.curve[-1].score if trial.curve else None
    cells = [
        f"{trial.state}{at}{same}",
        UNKNOWN if score is None else f"{score:.2%}",
        f"{trial.images:,}",
        *_cells(tuning, trial.values),
    ]
    return Row(f"{number}", cells, marked=number == tuning.winner)


def _cells(tuning: Tuning, values: Values) -> list[str]:
    return [_short(values[name]) if name in values else "" for name in tuning.space]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else plain(value)
