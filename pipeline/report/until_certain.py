"""Which arms need another seed: those whose difference from the baseline is not certain and that can still win."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.study import FIRST_LOOK
from pipeline.report.comparison import ComparedRun, Metric, by
from pipeline.report.differences import PredictionsOf, spread_between
from pipeline.report.intervals import LEVEL, Spread
from pipeline.report.sequential import decide, p_value_of, repeated_p_value
from pipeline.report.significance import holm


def open_arms(
    runs: Sequence[ComparedRun],
    predictions: PredictionsOf,
    metric: Metric,
    smallest_difference: float,
    max_seeds: int,
) -> list[str]:
    """The names of the arms that need another seed.

    An arm needs none once one of these holds:

    - its difference from the baseline excludes zero, by p-values that are corrected for the looks (`repeated_p_value`)
      and then for the number of arms after Holm (1979), which stays valid for such p-values (Ye, Li, Liu & Yao 2013, A
      group sequential Holm procedure with multiple primary endpoints)
    - its repeated interval lies within plus and minus ``smallest_difference``
    - it cannot win any more: it is below the best arm, and their repeated interval excludes zero
    - a run of it diverged or did not learn: its grade says so, whatever further seeds do

    Parameters
    ----------
    runs : every arm with its seeds so far, the baseline first
    predictions : of these runs
    max_seeds : of the study
    """
    runs_of = by(runs, lambda run: run.arm)
    baseline, *others = runs_of
    sound = [name for name in others if all(run.is_healthy for run in runs_of[name])]
    between = {name: spread_between(runs_of[name], runs_of[baseline], predictions, metric) for name in others}
    spreads = {name: spread for name, spread in between.items() if spread is not None}
    # The family of the report: an arm that diverged with one seed is in it, too.
    found = {name: p_value_of(spread, max_seeds) for name, spread in spreads.items()}
    known = {name: p_value for name, p_value in found.items() if p_value is not None}
    looked_at = {name: spread for name, spread in spreads.items() if spread.n >= FIRST_LOOK}
    adjusted = dict(zip(known, holm(list(known.values())), strict=True))
    certain = {name for name in looked_at if adjusted[name] <= LEVEL}
    certain |= {
        name
        for name, spread in looked_at.items()
        if decide(spread, max_seeds=max_seeds, smallest_difference=smallest_difference).state == "equivalent"
    }
    best = max(sound, key=lambda name: _mean_score(runs_of[name]), default=baseline)
    beaten = {
        name
        for name in sound
        if name != best and _is_beaten(spread_between(runs_of[name], runs_of[best], predictions, metric), max_seeds)
    }
    return [name for name in sound if name not in certain | beaten]


def _mean_score(runs: Sequence[ComparedRun]) -> float:
    return sum(run.score for run in runs) / len(runs)


def _is_beaten(spread: Spread | None, max_seeds: int) -> bool:
    if spread is None or spread.n < FIRST_LOOK or spread.mean >= 0:
        return False
    return repeated_p_value(spread, max_seeds) <= LEVEL
