"""Phrases that sentences of a verdict are made of, and the values that they rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.report.comparison import ArmSummary, Comparison, Difference, Grade, VerdictSentence
from pipeline.report.formats import signed
from pipeline.report.names import SettingValue, values_words

# Arms that a sentence names; the others are counted.
MOST_NAMES = 3
_FIELDS = ("mean", "low", "high", "n", "covers", "p_value", "p_adjusted", "seeds_needed")


def sentence(
    comparison: Comparison,
    name: str,
    text: str,
    evidence: Sequence[str],
    *,
    arm: ArmSummary | None = None,
    grade: Grade | None = None,
) -> VerdictSentence:
    """A sentence of the verdict, with the values that it rests on.

    Parameters
    ----------
    name : of the sentence; one about a single arm gets the arm's number
    evidence : JSON pointers of these values; those that are absent are left out
    """
    number = "" if arm is None else f"-{_number(comparison, arm)}"
    values = {pointer: _value(comparison, pointer) for pointer in evidence}
    optional = {"grade": grade, "arm": arm and arm.arm}
    return VerdictSentence(
        id=f"verdict-{name}{number}",
        text=text,
        evidence={pointer: value for pointer, value in values.items() if value is not None},
        **{key: value for key, value in optional.items() if value is not None},
    )


def pointers(comparison: Comparison, arms: Sequence[ArmSummary], *fields: str) -> list[str]:
    """JSON pointers (RFC 6901) of fields of arms."""
    return [f"/arms/{_number(comparison, arm)}/{field}" for arm in arms for field in fields]


def difference_pointers(comparison: Comparison, *arms: ArmSummary) -> list[str]:
    """JSON pointers of what a sentence says of the differences of arms."""
    return pointers(comparison, arms, *(f"difference/{field}" for field in _FIELDS))


def _number(comparison: Comparison, arm: ArmSummary) -> int:
    return next(number for number, other in enumerate(comparison.arms) if other.arm == arm.arm)


def _value(comparison: Comparison, pointer: str) -> SettingValue:
    found: object = comparison
    for part in pointer.split("/")[1:]:
        if isinstance(found, tuple):
            found = found[int(part)] if int(part) < len(found) else None
        elif isinstance(found, Mapping):
            found = found.get(part)
        else:
            found = getattr(found, part, None)
    return found if isinstance(found, (str, int, float, bool)) else None


def score(arm: ArmSummary) -> str:
    """Mean and deviation over the sound runs: ``89.15% ± 0.20 (n = 3)``."""
    spread = f" ± {100 * arm.score_std:.2f}" if arm.score_std is not None else ""
    return f"{100 * arm.score_mean:.2f}%{spread} (n = {arm.healthy or arm.n})"


def metric_words(comparison: Comparison) -> str:
    """``accuracy`` or ``balanced accuracy``."""
    return comparison.metric.replace("_", " ")


def name_of(arm: ArmSummary) -> str:
    """In a sentence: batch norm with depth 20 and width 16."""
    first, *more = [values_words({name: value}) for name, value in arm.values.items()] or [arm.words]
    return f"{first} with {' and '.join(more)}" if more else first


def baseline_name(comparison: Comparison) -> str:
    """By its name where there are but two arms."""
    return name_of(comparison.baseline_arm) if len(comparison.arms) == 2 else "the baseline"


def some(arms: Sequence[ArmSummary]) -> str:
    """The names of the first arms, and how many more there are."""
    names = [name_of(arm) for arm in arms[:MOST_NAMES]]
    more = [f"and {len(arms) - MOST_NAMES} more"] if len(arms) > MOST_NAMES else []
    return ", ".join([*names, *more])


def where(difference: Difference, other: str) -> str:
    """``2.31 points above the baseline, 95% interval ...``."""
    points = 100 * difference.mean
    return f"{abs(points):.2f} points {'above' if points >= 0 else 'below'} {other}{interval(difference)}"


def interval(difference: Difference) -> str:
    """The headline interval and what it covers, after a comma; nothing where there is none."""
    if difference.low is None or difference.high is None:
        return ""
    low, high = signed(100 * difference.low), signed(100 * difference.high)
    return f", 95% interval {low} to {high} over {difference.covers} (n = {difference.n})"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
