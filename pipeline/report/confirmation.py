"""The best trials of a search, trained again with new seeds -> which of them is taken, and what can be said of it."""

from __future__ import annotations

import math
import statistics as numbers
from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.report import statistics
from pipeline.report.comparison import ComparedRun, Difference, Objective, StudyRun, by
from pipeline.report.differences import PredictionsOf, difference_of
from pipeline.report.learned import goodness
from pipeline.report.score_text import ScoreText
from pipeline.report.significance import holm
from pipeline.report.tuning import ConfirmedTrial, SeedScore, TestFigure, Tuning

# Two-sided level of what is called certain, after the correction for the number of comparisons.
LEVEL = 0.05


def confirmed_trials(
    runs: Sequence[StudyRun],
    searched: Mapping[int, float],
    predictions: PredictionsOf,
    judge: statistics.Judge[Objective],
) -> list[ConfirmedTrial]:
    """The trials with what their new seeds show, the one with the best mean first; the others are compared with it.

    Parameters
    ----------
    runs : every trial with every seed; the arm of a run is named after the number of its trial
    searched : metric of each trial in the search, by its number
    predictions : of these runs, by arm and seed
    """
    compared = by(statistics.with_targets(runs, runs[0].arm, None, judge), lambda run: run.arm)
    order = sorted(compared, key=lambda arm: _rank(compared[arm], judge.metric), reverse=True)
    winner = order[0]
    differences = {
        arm: difference_of(compared[arm], compared[winner], predictions, judge.metric, judge.smallest_difference)
        for arm in order[1:]
    }
    adjusted = _adjusted(differences)
    return [_confirmed(int(arm), compared[arm], searched[int(arm)], adjusted.get(arm)) for arm in order]


def _rank(runs: Sequence[ComparedRun], metric: Objective) -> tuple[int, float]:
    """Trials that diverge or do not learn with a seed come after those that never do."""
    scores = [run.score for run in runs if math.isfinite(run.score)]
    mean = numbers.fmean(scores) if scores else runs[0].score
    return -sum(not run.is_healthy for run in runs), goodness(mean, metric)


def _adjusted(differences: Mapping[str, Difference | None]) -> dict[str, Difference]:
    """The differences that are known, with p-values corrected for their number, after Holm (1979)."""
    known = {arm: each for arm, each in differences.items() if each is not None}
    tested = {arm: each.p_value for arm, each in known.items() if each.p_value is not None}
    p_values = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {arm: each.model_copy(update={"p_adjusted": p_values.get(arm)}) for arm, each in known.items()}


def _confirmed(
    number: int, runs: Sequence[ComparedRun], searched: float, difference: Difference | None
) -> ConfirmedTrial:
    scores = [seed_score(run, run.score, run.learned) for run in runs]
    return ConfirmedTrial(
        number=number,
        searched_score=searched,
        runs=tuple(scores),
        **_mean_and_std(scores),
        **({} if difference is None else {"difference": difference}),
    )


def seed_score(run: StudyRun, score: float, has_learned: bool) -> SeedScore:
    """A training with one seed, whose score may be infinite: then it counts as diverged, as in the search."""
    is_known = math.isfinite(score)
    return SeedScore(
        seed=run.seed,
        score=score if is_known else None,
        diverged=run.diverged or not is_known,
        learned=has_learned,
        run_id=run.run_id,
    )


def _mean_and_std(runs: Sequence[SeedScore]) -> dict[str, float | None]:
    scores = [run.score for run in runs if run.score is not None]
    mean, std = numbers.fmean(scores) if scores else None, numbers.stdev(scores) if len(scores) > 1 else None
    return {"mean": mean, "std": std}


def test_figure(split: str, runs: Sequence[SeedScore]) -> TestFigure:
    """The winner's runs on the split that judges, as one figure."""
    return TestFigure(split=split, runs=tuple(runs), **_mean_and_std(runs))


def verdict_of(tuning: Tuning) -> list[str]:
    """What a search has found and how sure that is, as sentences."""
    unit = ScoreText(tuning.metric)
    searched = tuning.trial(tuning.winner).score
    if not tuning.confirmed:
        return [
            f"Trial {tuning.winner} was the best of {len(tuning.trials)}: {unit.name} {unit.text(searched)} on the "
            f"{tuning.search_on} split. It was not confirmed with other seeds (tune.confirm is 0): chance may have "
            "chosen it, and the figure flatters it."
        ]
    winner, *others = tuning.confirmed
    first = (
        f"Trial {winner.number} is taken: {unit.name} {unit.with_std(winner.mean, winner.std)} on the "
        f"{tuning.search_on} split with {seeds_in_words(winner.runs)}."
    )
    gap = winner.searched_score - winner.mean if winner.mean is not None else 0.0
    flattered = f"In the search it had {unit.text(winner.searched_score)}"
    if goodness(gap, tuning.metric) > 0:
        flattered += f", {unit.difference(gap)} {unit.points}: the best of {len(tuning.trials)} figures flatters"
    flattered += "."
    sentences = [first, *_against(tuning, others), flattered]
    if tuning.test is not None:
        sentences.append(
            f"On the {tuning.test.split} split, by which nothing was chosen, it has "
            f"{unit.with_std(tuning.test.mean, tuning.test.std)} ({seeds_in_words(tuning.test.runs)})."
        )
    return sentences


def _against(tuning: Tuning, others: Sequence[ConfirmedTrial]) -> list[str]:
    """How sure it is that the winner is better than the other trials that were trained again."""
    if not others:
        return ["No other trial was trained again: whether it is better than the next cannot be told."]
    winner = tuning.confirmed[0]
    behind = [each for each in others if _is_behind(each, winner, tuning.metric)]
    if len(behind) == len(others):
        return [f"It is better than {_named(others)}, the next best{_by_what(others)}."]
    tied, unit = [each for each in others if each not in behind], ScoreText(tuning.metric)
    differences = "difference from it is" if len(tied) == 1 else "differences from it are"
    sentences = [
        f"It was chosen among noise: it cannot be told from {_named(tied)}, whose {differences} "
        f"{'; '.join(_difference(each, unit) for each in tied)}."
    ]
    if behind:
        sentences.append(f"It is better than {_named(behind)}.")
    return sentences


def _by_what(behind: Sequence[ConfirmedTrial]) -> str:
    """What chance has been counted; of trials that have learned with no seed, that."""
    kinds = {each.difference.covers for each in behind if each.difference}
    if not kinds:
        return ", which learned with no seed"
    if "images" in kinds:
        return ", beyond what the choice of images explains; a single seed says nothing about chance between seeds"
    return f", beyond what {'seeds' if kinds == {'seeds'} else 'seeds and images'} explain"


def _is_behind(trial: ConfirmedTrial, winner: ConfirmedTrial, metric: Objective) -> bool:
    difference = trial.difference
    if difference is None:  # no seed has two sound runs
        return all(run.fallen for run in trial.runs) and not all(run.fallen for run in winner.runs)
    is_worse = goodness(difference.mean, metric) < 0
    return is_worse and difference.p_adjusted is not None and difference.p_adjusted <= LEVEL


def _named(trials: Sequence[ConfirmedTrial]) -> str:
    names = [str(each.number) for each in trials]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"trial{'s' if len(names) != 1 else ''} {listed}"


def seeds_in_words(runs: Sequence[SeedScore]) -> str:
    """``3 new seeds``, with how many of them the mean is over where it lacks some, and how many are not sound."""
    known = sum(run.score is not None for run in runs)
    over = f", mean over {known} of them" if 0 < known < len(runs) else ""
    return f"{len(runs)} new seed{'s' if len(runs) != 1 else ''}{over}{_fallen(runs)}"


def _fallen(runs: Sequence[SeedScore]) -> str:
    """With how many seeds a trial diverged or did not learn; nothing where it is sound with each."""
    counts = Counter(run.fallen for run in runs if run.fallen)
    return "".join(f", {how} with {count} of {len(runs)} seeds" for how, count in sorted(counts.items()))


def _difference(trial: ConfirmedTrial, unit: ScoreText) -> str:
    found, fallen = trial.difference, _fallen(trial.runs)
    if found is None:
        return f"not known, since with no seed both have learned{fallen}"
    ends, seeds = "", ""
    if found.n < len(trial.runs):
        seeds = f" over {found.n} of {len(trial.runs)} seeds, with which both have learned"
    if found.low is not None and found.high is not None:
        ends = f" [{unit.difference(found.low)}, {unit.difference(found.high)}]"
    return f"{unit.difference(found.mean)} {unit.points}{ends}{seeds}{fallen}"
