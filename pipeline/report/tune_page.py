"""A search -> one self-contained HTML page: verdict, confirmation, figures, trials. No network, light and dark."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.report.comparison import Difference
from pipeline.report.confirmation import seeds_in_words
from pipeline.report.figures.tune import figures_of
from pipeline.report.formats import UNKNOWN, plain
from pipeline.report.names import Values, setting_words
from pipeline.report.page import environment_of
from pipeline.report.score_text import ScoreText
from pipeline.report.tuning import Tuning

__all__ = ["figures_of", "render"]


class Row(NamedTuple):
    """A row of a table: its heading, and its cells."""

    name: str
    cells: list[str]
    marked: bool = False


def render(tuning: Tuning) -> str:
    """The page of a search, as HTML."""
    shown, unit = [setting_words(name) for name in tuning.space], ScoreText(tuning.metric)
    return (
        environment_of()
        .get_template("tune.html.j2")
        .render(
            tuning=tuning,
            metric=unit.name,
            best="best" if unit.is_share else "lowest",
            test_mean=f"{unit.text(tuning.test.mean)} ({seeds_in_words(tuning.test.runs)})" if tuning.test else "",
            values={name: _short(value) for name, value in tuning.values.items()},
            confirmed=[_confirmed(tuning, number) for number in range(len(tuning.confirmed))],
            seeds=[run.seed for run in tuning.confirmed[0].runs] if tuning.confirmed else [],
            confirmed_headings=["in the search", "mean", *_seed_headings(tuning), f"against the winner, {unit.points}"],
            trial_headings=["state", unit.name, "images", *shown],
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
    trial, unit = tuning.confirmed[place], ScoreText(tuning.metric)
    cells = [
        unit.text(trial.searched_score),
        unit.with_std(trial.mean, trial.std),
        *(f"{unit.text(run.score)}{f' ({run.fallen})' if run.fallen else ''}" for run in trial.runs),
        _difference(trial.difference, unit) if place else UNKNOWN,
    ]
    return Row(f"trial {trial.number}", cells, marked=place == 0)


def _difference(found: Difference | None, unit: ScoreText) -> str:
    if found is None:
        return "not known"
    ends = ""
    if found.low is not None and found.high is not None:
        ends = f" [{unit.difference(found.low)}, {unit.difference(found.high)}]"
    return f"{unit.difference(found.mean)}{ends}"


def _trial(tuning: Tuning, number: int) -> Row:
    trial = tuning.trial(number)
    at = f" at {trial.curve[-1].evaluation}" if trial.state == "pruned" and trial.curve else ""
    same = f" (as {trial.same_as})" if trial.same_as is not None else ""
    score = trial.score if trial.score is not None else trial.curve[-1].score if trial.curve else None
    cells = [
        f"{trial.state}{at}{same}",
        UNKNOWN if score is None else ScoreText(tuning.metric).text(score),
        f"{trial.images:,}",
        *_cells(tuning, trial.values),
    ]
    return Row(f"{number}", cells, marked=number == tuning.winner)


def _cells(tuning: Tuning, values: Values) -> list[str]:
    return [_short(values[name]) if name in values else "" for name in tuning.space]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else plain(value)
