"""What a comparison found, in plain sentences, each with a grade and the values that it rests on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from pipeline.report import speed
from pipeline.report.comparison import ArmSummary, Comparison, Difference, Grade, VerdictSentence
from pipeline.report.formats import signed
from pipeline.report.names import MANY_ARMS, arm_name, group_setting, values_words
from pipeline.report.sentences import (
    MOST_NAMES,
    baseline_name,
    capital,
    difference_pointers,
    interval,
    metric_words,
    name_of,
    pointers,
    score,
    sentence,
    some,
    where,
)

_WORST_FIRST: tuple[Grade, ...] = get_args(Grade)


def verdict(comparison: Comparison) -> list[VerdictSentence]:
    """A comparison in sentences, the worst news first.

    Arms of which a run diverged or did not learn, and those whose search could not decide; the best arm; each other
    against the baseline or, of many arms, the best of each kind, the least sure first; then how fast the arms reached
    the target, learning rates that are stable, and what the arms cost.
    """
    arms, base = comparison.arms, comparison.baseline_arm
    sound = [arm for arm in arms if arm.healthy]
    few = len(arms) <= MANY_ARMS
    stable = speed.stable_rates(comparison, few=few)
    if not sound:
        text = (
            f"Every run of every arm diverged or did not learn: the comparison says nothing about "
            f"{metric_words(comparison)}."
        )
        grade: Grade = "did not learn" if any(arm.not_learned for arm in arms) else "diverged"
        evidence = pointers(comparison, arms, "n", "diverged", "not_learned")
        return [sentence(comparison, "nothing", text, evidence, grade=grade), *stable]
    lines = [*_unsound(comparison, few=few), *_undecided(comparison, few=few), _best(comparison, sound, base)]
    if not base.healthy:
        text = (
            f"All runs of the baseline, {name_of(base)}, diverged or did not learn: differences from it are not given."
        )
        lines.insert(0, sentence(comparison, "baseline", text, pointers(comparison, [base], "n", "diverged",
                                 "not_learned"), arm=base, grade=base.grade))  # fmt: skip
    elif few:
        compared = [arm for arm in sound if arm.difference]
        graded = [arm for arm in compared if arm.grade not in ("diverged", "did not learn")]
        lines += [_against(comparison, arm) for arm in sorted(graded, key=_badness)]
        lines += [speed.arrival(comparison, arm, base) for arm in compared]
    else:
        lines += _many(comparison, sound)
    return [*lines, *stable, *speed.cost(comparison, sound, few=few)]


def _badness(arm: ArmSummary) -> int:
    return len(_WORST_FIRST) if arm.grade is None else _WORST_FIRST.index(arm.grade)


def _unsound(comparison: Comparison, *, few: bool) -> list[VerdictSentence]:
    """Arms of which a run diverged or did not learn."""
    lines = []
    kinds: list[tuple[Grade, str, str]] = [
        ("diverged", "diverged", "diverged"),
        ("did not learn", "not_learned", f"did not learn: no better than {_constant(comparison)}, beyond chance"),
    ]
    for grade, field, words in kinds:
        fallen = [arm for arm in comparison.arms if getattr(arm, field)]
        name = field.replace("_", "-")
        if few:
            lines += [_fallen(comparison, arm, grade, field, words) for arm in fallen]
        elif fallen:
            text = f"{len(fallen)} of {len(comparison.arms)} arms had runs that {words}: {some(fallen)}."
            lines.append(sentence(comparison, name, text, pointers(comparison, fallen, field, "n"), grade=grade))
    return lines


def _fallen(comparison: Comparison, arm: ArmSummary, grade: Grade, field: str, words: str) -> VerdictSentence:
    text = f"{getattr(arm, field)} of {arm.n} runs of {name_of(arm)} {words}"  # "no normalization diverged" is a riddle
    evidence = pointers(comparison, [arm], field, "n")
    if arm.difference and arm.grade == grade:
        other = baseline_name(comparison)
        text += f"; over the other seeds alone it was {where(arm.difference, other)}"
        evidence += difference_pointers(comparison, arm)
    return sentence(comparison, field.replace("_", "-"), f"{text}.", evidence, arm=arm, grade=grade)


def _constant(comparison: Comparison) -> str:
    return f"the best constant answer, {100 * comparison.constant_score:.2f}%"


def _undecided(comparison: Comparison, *, few: bool) -> list[VerdictSentence]:
    """Arms whose search could not decide."""
    arms = [arm for arm in comparison.arms if arm.search_undecided]
    if not few and arms:
        text = f"The search of {len(arms)} of {len(comparison.arms)} arms could not decide: {some(arms)}."
        evidence = pointers(comparison, arms, "search_undecided")
        return [sentence(comparison, "undecided", text, evidence, grade="search undecided")]
    lines = []
    for arm in arms:
        text = f"The search of {name_of(arm)} {_indecision(arm)}; {arm_name(arm.tuned)} was taken{_reason(arm)}."
        tied = [f"search_tied/{number}/{name}" for number, values in enumerate(arm.search_tied) for name in values]
        evidence = pointers(comparison, [arm], "search_undecided", *tied)
        if arm.search_seeds > 1:
            evidence += pointers(comparison, [arm], "search_seeds")
        lines.append(sentence(comparison, "undecided", text, evidence, arm=arm, grade="search undecided"))
    return lines


def _indecision(arm: ArmSummary) -> str:
    tied = " and ".join(arm_name(values) for values in arm.search_tied)
    seeds = f" with {arm.search_seeds} seeds" if arm.search_seeds > 1 else ""
    words = {
        "tied": f"could not tell {tied} apart{seeds}",
        "not_learned": "saw none of its trials learn more than the best constant answer",
        "diverged": "saw all of its values diverge",
        "no_budget": "had no trials, since compare.search_budget holds none that is long enough",
    }
    return words[arm.search_undecided or "tied"]


def _reason(arm: ArmSummary) -> str:
    """Why these values were taken, of several that are tied."""
    if len(arm.search_tied) < 2:
        return ""
    if arm.search_undecided == "diverged":
        return ", the lowest" if len(arm.tuned) == 1 else ", the first"
    if arm.search_seeds > 1:
        return ", the middle one of those near the best mean"
    return ", the middle one"


def _best(comparison: Comparison, sound: Sequence[ArmSummary], base: ArmSummary) -> VerdictSentence:
    evidence = pointers(comparison, sound, "score_mean", "score_std")
    return sentence(comparison, "best", _best_words(comparison, sound, base), evidence)


def best_arm(comparison: Comparison) -> ArmSummary | None:
    """The arm that the verdict calls the best, by the mean of the metric; None where no run of any arm is sound."""
    sound = [arm for arm in comparison.arms if arm.healthy]
    return _best_of(sound) if sound else None


def _best_of(sound: Sequence[ArmSummary]) -> ArmSummary:
    return max(sound, key=lambda arm: arm.score_mean)


def _best_words(comparison: Comparison, sound: Sequence[ArmSummary], base: ArmSummary) -> str:
    best = _best_of(sound)
    result = f"{score(best)} on the {comparison.evaluated_on} split"
    balanced = comparison.metric == "balanced_accuracy"
    most = "had the highest balanced accuracy" if balanced else "was the most accurate"
    if len(comparison.arms) == 1:
        words = f" {metric_words(comparison)}" if balanced else ""
        return f"{capital(name_of(best))}, the only arm, had {result.replace(' (', f'{words} (', 1)}."
    shown = round(best.score_mean, 4)
    equal = [arm for arm in sound if round(arm.score_mean, 4) == shown]
    if len(equal) > 1:
        names = " and ".join(name_of(arm) for arm in equal) if len(equal) <= MOST_NAMES else f"{len(equal)} arms"
        alike = "had the same balanced accuracy" if balanced else "were equally accurate"
        return f"{capital(names)} {alike}, and no arm was better: {result}."
    if best is base:
        return f"{capital(name_of(best))}, the baseline, {most}: {result}."
    other = f"; the baseline, {name_of(base)}, had {score(base)}" if base.healthy else ""
    return f"{capital(name_of(best))} {most}: {result}{other}."


def _against(comparison: Comparison, arm: ArmSummary) -> VerdictSentence:
    """An arm against the baseline, with its grade."""
    difference, grade = arm.difference, arm.grade
    assert difference is not None and grade is not None  # `verdict` takes no others
    other = baseline_name(comparison)
    if grade == "equivalent":
        least = 100 * comparison.smallest_difference
        points = f"{signed(100 * difference.mean)} points{interval(difference)}"
        text = f"{name_of(arm)} and {other} differ by less than {least:g} points: {points}"
    else:
        text = f"{name_of(arm)} was {where(difference, other)}"
    if grade == "likely":
        text += _doubt(comparison, difference)
    if grade == "cannot be told":
        text += _remedy(difference)
    evidence = [*difference_pointers(comparison, arm), "/smallest_difference"]
    return sentence(comparison, "difference", f"{capital(grade)}: {text}.", evidence, arm=arm, grade=grade)


def _doubt(comparison: Comparison, difference: Difference) -> str:
    """Why a difference is not clear."""
    base = comparison.baseline_arm
    if difference.n == 1:
        return "; a single seed says nothing about chance between seeds"
    if base.healthy < base.n:
        return f"; {base.n - base.healthy} of {base.n} runs of the baseline are left out"
    several = sum(other.difference is not None for other in comparison.arms)
    corrected = f", {difference.p_adjusted:.2g} after Holm's correction for {several} arms" if several > 1 else ""
    return f"; chance alone gives as much with p = {difference.p_value:.2g}{corrected}"


def _remedy(difference: Difference) -> str:
    """What would tell."""
    if difference.n == 1:
        return "; a single seed says nothing about chance between seeds, three or more would"
    if difference.seeds_needed is not None and difference.seeds_needed > difference.n:
        return f"; about {difference.seeds_needed} seeds would tell, were mean and spread to stay"
    if difference.seeds_needed is not None:  # but for looks at fewer seeds before, or other arms beside it
        return "; more seeds may tell"
    if difference.covers == "seeds and images":
        return "; no number of seeds would tell, since the test images alone leave it open: it takes more of them"
    return "; not even a thousand seeds would tell"


def _many(comparison: Comparison, sound: Sequence[ArmSummary]) -> list[VerdictSentence]:
    """The best arm of each value of the first setting, and how many arms have which grade."""
    lines = []
    if setting := group_setting([arm.values for arm in comparison.arms]):
        for group in speed.groups(sound, setting):
            best = max(group, key=lambda arm: arm.score_mean)
            kind = values_words({setting: best.values[setting]})
            rest = values_words({name: value for name, value in best.values.items() if name != setting})
            text = f"Best of {kind}: {rest}, {score(best)}{_gap(best)}."
            evidence = [*pointers(comparison, group, "score_mean"), *difference_pointers(comparison, best)]
            lines.append(sentence(comparison, "best-of-kind", text, evidence, arm=best, grade=best.grade))
    lines.append(_counted(comparison, [arm for arm in sound if arm.difference]))
    if late := [arm for arm in sound if not arm.reached_target]:
        target = speed.target_words(comparison)
        text = f"{len(late)} of {len(comparison.arms)} arms never reached {target}: {some(late)}."
        lines.append(sentence(comparison, "late", text, pointers(comparison, late, "reached_target")))
    return lines


def _counted(comparison: Comparison, arms: Sequence[ArmSummary]) -> VerdictSentence:
    """How many arms have which grade."""
    signs = [(arm.grade, (arm.difference.mean > 0) if arm.difference else False) for arm in arms]
    counts = Counter(
        (f"{grade} {'above' if above else 'below'} the baseline" if grade in ("clear", "likely") else f"{grade}")
        for grade, above in signs
    )
    words = {"cannot be told": "for {} it cannot be told", "equivalent": "{} equivalent to it"}
    phrases = [words.get(kind, "{} " + kind).format(number) for kind, number in sorted(counts.items())]
    text = f"Of {len(arms)} other arms: {', '.join(phrases)} (95% intervals, Holm's correction for the number of arms)."
    return sentence(comparison, "grades", text, pointers(comparison, arms, "grade"))


def _gap(arm: ArmSummary) -> str:
    """What the baseline differs by is nothing: it is called by its name."""
    if arm.difference is None:
        return ", the baseline"
    sure = f" ({arm.grade})" if arm.grade else ""
    return f", {signed(100 * arm.difference.mean)} points against the baseline{interval(arm.difference)}{sure}"
