"""What a comparison found, in plain sentences."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.report.comparison import ArmSummary, Comparison, Difference, by
from pipeline.report.formats import signed, signed_percent
from pipeline.report.names import LEARNING_RATE, MANY_ARMS, group_setting, values_words

# Arms that a sentence names; the others are counted.
_MOST_NAMES = 3


def verdict(comparison: Comparison) -> list[str]:
    """A comparison in sentences.

    The most accurate arm comes first; then each other against the baseline or, of many arms, the best of each kind;
    learning rates that are stable; arms that diverged; what the arms cost.
    """
    arms = comparison.arms
    healthy = [arm for arm in arms if not arm.all_diverged]
    few = len(arms) <= MANY_ARMS
    stable = _stable(comparison, few=few)
    if not healthy:
        return ["Every run of every arm diverged: the comparison says nothing about accuracy.", *stable]
    base = comparison.baseline_arm
    lines = [_best(comparison, healthy, base)]
    if base not in healthy and len(arms) > 1:
        lines.append(f"All runs of the baseline, {_name(base)}, diverged: differences from it are not given.")
    elif few:
        lines += [_against(comparison, arm, arm.difference, base) for arm in healthy if arm.difference]
    else:
        lines += _many(comparison, healthy)
    return [*lines, *stable, *_diverged(arms, few=few), *_cost(comparison, healthy, few=few)]


def _best(comparison: Comparison, healthy: Sequence[ArmSummary], base: ArmSummary) -> str:
    best = max(healthy, key=lambda arm: arm.best_accuracy_mean)
    name, result = _capital(_name(best)), f"{_accuracy(best)} on the {comparison.evaluated_on} split"
    if len(comparison.arms) == 1:
        return f"{name}, the only arm, had {result}."
    shown = round(best.best_accuracy_mean, 4)
    equal = [arm for arm in healthy if round(arm.best_accuracy_mean, 4) == shown]
    if len(equal) > 1:
        names = " and ".join(_name(arm) for arm in equal) if len(equal) <= _MOST_NAMES else f"{len(equal)} arms"
        return f"{_capital(names)} were equally accurate, and no arm was more so: {result}."
    if best is base:
        return f"{name}, the baseline, was the most accurate: {result}."
    other = f"; the baseline, {_name(base)}, had {_accuracy(base)}" if base in healthy else ""
    return f"{name} was the most accurate: {result}{other}."


def _accuracy(arm: ArmSummary) -> str:
    spread = f" ± {100 * arm.best_accuracy_std:.2f}" if arm.best_accuracy_std is not None else ""
    return f"{100 * arm.best_accuracy_mean:.2f}%{spread} (n = {arm.n})"


def _against(comparison: Comparison, arm: ArmSummary, difference: Difference, base: ArmSummary) -> str:
    name, other = _name(arm), _baseline(comparison)
    points = 100 * difference.mean
    where = f"{abs(points):.2f} points {'above' if points >= 0 else 'below'} {other}"
    if difference.low is None:
        text = f"{_capital(name)} was {where} with a single seed, so nothing can be said about chance"
    elif difference.is_unclear:
        text = f"Between {name} and {other} no difference could be seen: {signed(points)} points{_range(difference)}"
    else:
        text = f"{_capital(name)} was {where}{_range(difference)}"
    return f"{text}; {_arrival(comparison, arm, base)}."


def _name(arm: ArmSummary) -> str:
    """In a sentence: batch norm with depth 20 and width 16."""
    first, *more = [values_words({name: value}) for name, value in arm.values.items()] or [arm.words]
    return f"{first} with {' and '.join(more)}" if more else first


def _baseline(comparison: Comparison) -> str:
    """By its name where there are but two arms."""
    return _name(comparison.baseline_arm) if len(comparison.arms) == 2 else "the baseline"


def _range(difference: Difference) -> str:
    """The interval, after a comma; nothing for a single seed."""
    if difference.low is None or difference.high is None:
        return ""
    low, high = signed(100 * difference.low), signed(100 * difference.high)
    return f", 95% interval {low} to {high} (n = {difference.n})"


def _target(comparison: Comparison) -> str:
    given = comparison.target_accuracy
    return f"the best accuracy of {_baseline(comparison)}" if given is None else f"{100 * given:g}%"


def _arrival(comparison: Comparison, arm: ArmSummary, base: ArmSummary) -> str:
    """How long it took to the target, with the baseline as the measure."""
    target = _target(comparison)
    if not arm.reached_target:
        too = ", and neither did the baseline" if not base.reached_target else ""
        return f"it never reached {target}{too}"
    partly = f" (in {arm.reached_target} of {arm.n} runs)" if arm.reached_target < arm.n else ""
    if arm.steps_ratio is None:
        alone = ", which the baseline never did" if not base.reached_target else ""
        return f"it reached {target} after {arm.steps_to_target_mean:,.0f} steps{alone}{partly}"
    time = "" if arm.seconds_ratio is None else f" and {_share(arm.seconds_ratio, 'training time', fewer='less')}"
    sizes = (arm.global_batch, base.global_batch)
    images = f", steps of {sizes[0]:,} images instead of {sizes[1]:,}," if sizes[0] != sizes[1] else ""
    return f"it needed {_share(arm.steps_ratio, 'steps', fewer='fewer')}{time}{images} to reach {target}{partly}"


def _share(ratio: float, what: str, *, fewer: str) -> str:
    """Of what the baseline needed, which is ``ratio`` times as much."""
    if ratio >= 1.95:
        return f"1/{_round(ratio)} of the {what}"
    if ratio <= 1 / 1.95:
        return f"{_round(1 / ratio)} times the {what}"
    percent = round(100 * (1 - 1 / ratio) if ratio > 1 else 100 * (1 / ratio - 1))
    if percent == 0:
        return f"as {'many' if fewer == 'fewer' else 'much'} {what}"
    return f"{percent}% {fewer if ratio > 1 else 'more'} {what}"


def _round(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 9.95 else f"{ratio:.1f}".removesuffix(".0")


def _many(comparison: Comparison, healthy: Sequence[ArmSummary]) -> list[str]:
    """The best arm of each value of the first setting, and how many arms were above and below the baseline."""
    lines = []
    if setting := group_setting([arm.values for arm in comparison.arms]):
        for group in _groups(healthy, setting):
            best = max(group, key=lambda arm: arm.best_accuracy_mean)
            kind = values_words({setting: best.values[setting]})
            rest = values_words({name: value for name, value in best.values.items() if name != setting})
            lines.append(f"Best of {kind}: {rest}, {_accuracy(best)}{_gap(best.difference)}.")
    differences = [arm.difference for arm in healthy if arm.difference]
    unclear = sum(difference.is_unclear for difference in differences)
    above = sum(difference.mean > 0 for difference in differences if not difference.is_unclear)
    text = f"Of {len(differences)} other arms, {above} were above the baseline"
    if all(difference.low is None for difference in differences):
        lines.append(f"{text}; with a single seed, nothing can be said about chance.")
    else:
        below = len(differences) - above - unclear
        seen = f"for {unclear} no difference could be seen"
        lines.append(f"{text}, {below} below, and {seen} (95% intervals, not corrected for the number of arms).")
    if late := [arm for arm in healthy if not arm.reached_target]:
        lines.append(f"{len(late)} of {len(comparison.arms)} arms never reached {_target(comparison)}: {_some(late)}.")
    return lines


def _gap(difference: Difference | None) -> str:
    """What the baseline differs by is nothing: it is called by its name."""
    if difference is None:
        return ", the baseline"
    return f", {signed(100 * difference.mean)} points against the baseline{_range(difference)}"


def _groups(arms: Sequence[ArmSummary], setting: str) -> list[list[ArmSummary]]:
    """The arms by their value of a setting."""
    return list(by(arms, lambda arm: repr(arm.values[setting])).values())


def _stable(comparison: Comparison, *, few: bool) -> list[str]:
    """The highest stable learning rates, where the grid could show them."""
    if LEARNING_RATE not in comparison.tuned or len(comparison.grid[LEARNING_RATE]) < 2:
        return []
    arms = comparison.arms
    setting = None if few else group_setting([arm.values for arm in arms])
    if setting:
        phrases = [
            f"{_rates(group)} for {values_words({setting: group[0].values[setting]})}"
            for group in _groups(arms, setting)
        ]
    else:
        rates = {_rate(arm): [other for other in arms if _rate(other) == _rate(arm)] for arm in arms}
        phrases = [f"{rate} for {_some(group) if len(group) < len(arms) else 'all'}" for rate, group in rates.items()]
    return [f"Highest stable learning rate of those tried: {'; '.join(phrases)}."]


def _rate(arm: ArmSummary) -> str:
    rate = arm.highest_stable_rate
    return "none" if rate is None else f"{'at least ' if arm.highest_stable_is_bound else ''}{rate:g}"


def _rates(arms: Sequence[ArmSummary]) -> str:
    """From the lowest to the highest."""
    ordered = sorted(arms, key=lambda arm: arm.highest_stable_rate or 0)
    low, high = _rate(ordered[0]), _rate(ordered[-1])
    return low if low == high else f"{low} to {high}"


def _diverged(arms: Sequence[ArmSummary], *, few: bool) -> list[str]:
    diverged = [arm for arm in arms if arm.diverged]
    if few:
        return [f"{_capital(_name(arm))} diverged in {arm.diverged} of {arm.n} runs." for arm in diverged]
    return [f"{len(diverged)} of {len(arms)} arms had runs that diverged: {_some(diverged)}."] if diverged else []


def _cost(comparison: Comparison, healthy: Sequence[ArmSummary], *, few: bool) -> list[str]:
    costs = [(arm.overhead, _name(arm)) for arm in healthy if arm.overhead is not None]
    if not costs:
        return []
    if few:
        text = "; ".join(f"{name} {signed_percent(overhead)}" for overhead, name in costs)
    else:
        (least, cheapest), (most, dearest) = (kind(costs, key=lambda cost: cost[0]) for kind in (min, max))
        text = f"from {signed_percent(least)} ({cheapest}) to {signed_percent(most)} ({dearest})"
    at_once = comparison.side_by_side
    shared = f", measured while {at_once} trials ran at once" if at_once > 1 else ""
    return [f"Training time for an image against {_baseline(comparison)}: {text}{shared}."]


def _some(arms: Sequence[ArmSummary]) -> str:
    names = [_name(arm) for arm in arms[:_MOST_NAMES]]
    more = [f"and {len(arms) - _MOST_NAMES} more"] if len(arms) > _MOST_NAMES else []
    return ", ".join([*names, *more])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
