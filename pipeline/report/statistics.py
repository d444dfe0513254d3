"""Results of trials -> what they show: spread, paired differences, steps to a target, stable learning rates, cost.

Everything that a report, MLflow or a person reads of a comparison is computed here, once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from scipy.special import stdtrit

from pipeline.report.names import BATCH_SIZES, LEARNING_RATE

Result = dict[str, Any]

CONFIDENCE = 0.95
# Arms that a sentence names; of more, the others are counted.
_MOST_NAMES = 3
# What a reader would like to know, and the settings that would have had to vary.
_QUESTIONS = {
    "other normalizations": ("model.norm",),
    "other learning rates": (LEARNING_RATE,),
    "other batch sizes": BATCH_SIZES,
    "other depths": ("model.depth",),
    "other networks": ("model.network",),
    "other numbers of workers": ("workers.count",),
}


def with_targets(runs: list[Result], baseline: str, target_accuracy: float | None) -> list[Result]:
    """Each run with ``target`` (an accuracy) and the ``steps``, ``images`` and training ``seconds`` to it.

    The target is ``target_accuracy`` or, where it is None, the best accuracy of the baseline's run of the same seed, as
    in figure 3 of Ioffe & Szegedy (2015). It counts as reached at the first evaluation that is at least as good; None
    where none is.
    """
    best = {run["seed"]: run["best_accuracy"] for run in runs if run["arm"] == baseline}
    found = []
    for run in runs:
        target = best[run["seed"]] if target_accuracy is None else target_accuracy
        at = next((n for n, point in enumerate(run["curve"]) if point["accuracy"] >= target), None)
        steps = None if at is None else run["curve"][at]["step"]
        found.append(
            {
                **run,
                "target": target,
                "steps_to_target": steps,
                "images_to_target": None if steps is None else steps * run["global_batch"],
                "seconds_to_target": None if at is None else run["train_seconds"][at],
            }
        )
    return found


def summary_of(runs: list[Result], base: list[Result], search: list[Result], chance: float) -> Result:
    """What the runs of one arm show, one for each seed.

    Parameters
    ----------
    runs, base : of the arm and of the baseline, as `with_targets` gives them
    search : the arm's trials of the learning rates
    chance : accuracy of guessing
    """
    first = runs[0]
    speeds = [run["images_per_second"] for run in runs if run["images_per_second"]]
    result = {
        **{key: first[key] for key in ("arm", "values", "tuned", "global_batch")},
        "n": len(runs),
        "diverged": sum(run["diverged"] for run in runs),
        **mean_and_std("best_accuracy", [run["best_accuracy"] for run in runs]),
        **mean_and_std("final_accuracy", [run["final_accuracy"] for run in runs]),
        "reached_target": sum(run["steps_to_target"] is not None for run in runs),
        **mean_and_std("images_per_second", speeds),
        **stable_rates(search or runs, chance),
    }
    for key in ("steps_to_target", "images_to_target", "seconds_to_target"):
        result |= mean_and_std(key, [run[key] for run in runs if run[key] is not None])
    if first["arm"] != base[0]["arm"]:
        result |= {
            "difference": paired_difference(runs, base, lambda run: run["best_accuracy"]),
            "steps_ratio": _ratio(base, runs, "steps_to_target"),
            "seconds_ratio": _ratio(base, runs, "seconds_to_target"),
            "overhead": _overhead(base, runs),
        }
    return result


def mean_and_std(name: str, values: list[float]) -> Result:
    """Mean and sample standard deviation; None where there are too few values for one."""
    return {
        f"{name}_mean": statistics.fmean(values) if values else None,
        f"{name}_std": statistics.stdev(values) if len(values) > 1 else None,
    }


def paired_difference(runs: list[Result], base: list[Result], value: Callable[[Result], float]) -> Result:
    """Mean over seeds of (run - baseline's run of that seed), with Student's 95% interval; bounds None for one seed.

    Runs of one seed share the order of rows and the initial weights, so pairs vary less than runs do. The interval is
    for one arm: it is not corrected for the number of arms.
    """
    of_base = {run["seed"]: value(run) for run in base}
    differences = [value(run) - of_base[run["seed"]] for run in runs]
    mean, n = statistics.fmean(differences), len(differences)
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "n": n}
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(differences) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def _ratio(base: list[Result], runs: list[Result], key: str) -> float | None:
    """Of the means over the seeds where both arrived: how many times as long the baseline took."""
    of_base = {run["seed"]: run[key] for run in base}
    pairs = [(of_base[run["seed"]], run[key]) for run in runs if run[key] and of_base[run["seed"]]]
    return sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs) if pairs else None


def _overhead(base: list[Result], runs: list[Result]) -> float | None:
    """Median over seeds of the extra time for an image: 0.1 is a tenth more than the baseline's."""
    of_base = {run["seed"]: run["images_per_second"] for run in base}
    ratios = [
        of_base[run["seed"]] / run["images_per_second"]
        for run in runs
        if run["images_per_second"] and of_base[run["seed"]]
    ]
    return statistics.median(ratios) - 1 if ratios else None


def stable_rates(trials: list[Result], chance: float) -> Result:
    """The highest learning rate up to which all rates of the grid were stable, and how the grid bounds that.

    A rate is stable if no trial with it diverged and each ended at least half way from chance to the best accuracy of
    all these trials: a network that has collapsed computes a finite loss.

    Returns
    -------
    dict
        highest_stable_rate : None if no rate was, or fewer than two were tried
        highest_stable_is_bound : whether it is the highest of the grid, so that the truth may lie above
    """
    rates = sorted({trial["learning_rate"] for trial in trials})
    if len(rates) < 2:
        return {"highest_stable_rate": None, "highest_stable_is_bound": False}
    best = max(trial["best_accuracy"] for trial in trials)
    enough = chance + (best - chance) / 2
    highest = None
    for rate in rates:
        ended = [trial for trial in trials if trial["learning_rate"] == rate]
        if any(trial["diverged"] or trial["final_accuracy"] < enough for trial in ended):
            break
        highest = rate
    return {"highest_stable_rate": highest, "highest_stable_is_bound": highest == rates[-1]}


def warnings_of(arms: list[Result], grid: dict[str, Any], tune: list[str]) -> list[str]:
    """What a reader should know before believing the comparison."""
    found = []
    if arms and arms[0]["diverged"]:
        found.append(
            f"{arms[0]['diverged']} of {arms[0]['n']} runs of the baseline diverged: differences from it include them."
        )
    for name in tune:
        values = [value for value in grid.get(name, ()) if isinstance(value, (int, float))]
        if len(values) < 2:
            continue
        for edge, where in ((min(values), "lowest"), (max(values), "highest")):
            names = [arm["arm"] for arm in arms if arm["tuned"][name] == edge]
            if names:
                found.append(
                    f"The best {name} of {_some(names)} is the {where} of the grid, {edge:g}: "
                    "a better one may lie beyond it."
                )
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} other arms" if len(names) > _MOST_NAMES + 1 else ""
    return "; ".join(names[:_MOST_NAMES] if more else names) + more


def not_measured(grid: dict[str, Any], seeds: int, *, gradient_norms: bool) -> list[str]:
    """What the study does not answer."""
    found = [question for question, settings in _QUESTIONS.items() if not any(name in grid for name in settings)]
    if seeds < 2:
        found.append("how much results vary with the seed (compare.seeds has one)")
    if not gradient_norms:
        found.append("gradient norms by layer (train.diagnostics.every_steps is off)")
    return found
