"""What a comparison found, in plain sentences."""

from __future__ import annotations

from pipeline.report.figures.style import Comparison, Record, arm_words, panel_setting, signed_percent
from pipeline.report.names import LEARNING_RATE, values_words

# More arms than this are not given a sentence each.
MOST_SENTENCES = 8
# Arms that a sentence names; the others are counted.
_MOST_NAMES = 3


def verdict(comparison: Comparison) -> list[str]:
    """The most accurate arm first; then each other against the baseline or, of many arms, the best of each kind."""
    arms = comparison["arms"]
    healthy = [arm for arm in arms if arm["diverged"] < arm["n"]]
    few = len(arms) <= MOST_SENTENCES
    stable = _stable(comparison, few=few)
    if not healthy:
        return ["Every run of every arm diverged: the comparison says nothing about accuracy.", *stable]
    base = next(arm for arm in arms if arm["arm"] == comparison["baseline"])
    lines = [_best(comparison, healthy, base)]
    if base not in healthy and len(arms) > 1:
        lines.append(f"All runs of the baseline, {_name(base)}, diverged: differences from it are not given.")
    elif few:
        lines += [_against(comparison, arm, base) for arm in healthy if arm is not base]
    else:
        lines += _many(comparison, healthy, base)
    return [*lines, *stable, *_diverged(arms, few=few), *_cost(comparison, healthy, few=few)]


def _best(comparison: Comparison, healthy: list[Record], base: Record) -> str:
    best = max(healthy, key=lambda arm: arm["best_accuracy_mean"])
    name, result = _capital(_name(best)), f"{_accuracy(best)} on the {comparison['evaluated_on']} split"
    if len(comparison["arms"]) == 1:
        return f"{name}, the only arm, had {result}."
    shown = round(best["best_accuracy_mean"], 4)
    equal = [arm for arm in healthy if round(arm["best_accuracy_mean"], 4) == shown]
    if len(equal) > 1:
        names = " and ".join(_name(arm) for arm in equal) if len(equal) <= _MOST_NAMES else f"{len(equal)} arms"
        return f"{_capital(names)} were equally accurate, and no arm was more so: {result}."
    if best is base:
        return f"{name}, the baseline, was the most accurate: {result}."
    other = f"; the baseline, {_name(base)}, had {_accuracy(base)}" if base in healthy else ""
    return f"{name} was the most accurate: {result}{other}."


def _accuracy(arm: Record) -> str:
    spread = f" ± {100 * arm['best_accuracy_std']:.2f}" if arm["best_accuracy_std"] is not None else ""
    return f"{100 * arm['best_accuracy_mean']:.2f}%{spread} (n = {arm['n']})"


def _against(comparison: Comparison, arm: Record, base: Record) -> str:
    name, other, difference = _name(arm), _baseline(comparison), arm["difference"]
    points = 100 * difference["mean"]
    where = f"{abs(points):.2f} points {'above' if points >= 0 else 'below'} {other}"
    if difference["low"] is None:
        text = f"{_capital(name)} was {where} with a single seed, so nothing can be said about chance"
    elif _is_unclear(arm):
        text = f"Between {name} and {other} no difference could be seen: {_signed(points)} points, {_range(arm)}"
    else:
        text = f"{_capital(name)} was {where}, {_range(arm)}"
    return f"{text}; {_arrival(comparison, arm, base)}."


def _name(arm: Record) -> str:
    """In a sentence: batch norm with depth 20 and width 16."""
    first, *more = [values_words({name: value}) for name, value in arm["values"].items()] or [arm_words(arm)]
    return f"{first} with {' and '.join(more)}" if more else first


def _baseline(comparison: Comparison) -> str:
    """By its name where there are but two arms."""
    base = next(arm for arm in comparison["arms"] if arm["arm"] == comparison["baseline"])
    return _name(base) if len(comparison["arms"]) == 2 else "the baseline"


def _is_unclear(arm: Record) -> bool:
    difference = arm["difference"]
    return difference["low"] is not None and difference["low"] <= 0 <= difference["high"]


def _range(arm: Record) -> str:
    low, high = (_signed(100 * arm["difference"][end]) for end in ("low", "high"))
    return f"95% interval {low} to {high} (n = {arm['difference']['n']})"


def _signed(points: float) -> str:
    return f"{points:+.2f}".replace("-", "−")


def _target(comparison: Comparison) -> str:
    given = comparison["target_accuracy"]
    return f"the best accuracy of {_baseline(comparison)}" if given is None else f"{100 * given:g}%"


def _arrival(comparison: Comparison, arm: Record, base: Record) -> str:
    """How long it took to the target, with the baseline as the measure."""
    target = _target(comparison)
    if not arm["reached_target"]:
        too = ", and neither did the baseline" if not base["reached_target"] else ""
        return f"it never reached {target}{too}"
    partly = f" (in {arm['reached_target']} of {arm['n']} runs)" if arm["reached_target"] < arm["n"] else ""
    if arm["steps_ratio"] is None:
        alone = ", which the baseline never did" if not base["reached_target"] else ""
        return f"it reached {target} after {arm['steps_to_target_mean']:,.0f} steps{alone}{partly}"
    time = "" if arm["seconds_ratio"] is None else f" and {_share(arm['seconds_ratio'], 'training time', fewer='less')}"
    sizes = (arm["global_batch"], base["global_batch"])
    images = f", steps of {sizes[0]:,} images instead of {sizes[1]:,}," if sizes[0] != sizes[1] else ""
    return f"it needed {_share(arm['steps_ratio'], 'steps', fewer='fewer')}{time}{images} to reach {target}{partly}"


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


def _many(comparison: Comparison, healthy: list[Record], base: Record) -> list[str]:
    """The best arm of each value of the first setting, and how many arms were above and below the baseline."""
    lines = []
    if setting := panel_setting(comparison["arms"]):
        for group in _groups(healthy, setting):
            best = max(group, key=lambda arm: arm["best_accuracy_mean"])
            kind = values_words({setting: best["values"][setting]})
            rest = values_words({name: value for name, value in best["values"].items() if name != setting})
            lines.append(f"Best of {kind}: {rest}, {_accuracy(best)}{_gap(best)}.")
    others = [arm for arm in healthy if arm is not base]
    unclear = [arm for arm in others if _is_unclear(arm)]
    above = [arm for arm in others if arm not in unclear and arm["difference"]["mean"] > 0]
    text = f"Of {len(others)} other arms, {len(above)} were above the baseline"
    if all(arm["difference"]["low"] is None for arm in others):
        lines.append(f"{text}; with a single seed, nothing can be said about chance.")
    else:
        below = len(others) - len(above) - len(unclear)
        seen = f"for {len(unclear)} no difference could be seen"
        lines.append(f"{text}, {below} below, and {seen} (95% intervals, not corrected for the number of arms).")
    if late := [arm for arm in healthy if not arm["reached_target"]]:
        lines.append(
            f"{len(late)} of {len(comparison['arms'])} arms never reached {_target(comparison)}: {_some(late)}."
        )
    return lines


def _gap(arm: Record) -> str:
    """Against the baseline, if it is not the baseline itself."""
    if "difference" not in arm:
        return ", the baseline"
    chance = "" if arm["difference"]["low"] is None else f", {_range(arm)}"
    return f", {_signed(100 * arm['difference']['mean'])} points against the baseline{chance}"


def _groups(arms: list[Record], setting: str) -> list[list[Record]]:
    found: dict[str, list[Record]] = {}
    for arm in arms:
        found.setdefault(repr(arm["values"][setting]), []).append(arm)
    return list(found.values())


def _stable(comparison: Comparison, *, few: bool) -> list[str]:
    """The highest stable learning rates, where the grid could show them."""
    if LEARNING_RATE not in comparison["tuned"] or len(comparison["grid"][LEARNING_RATE]) < 2:
        return []
    arms = comparison["arms"]
    setting = None if few else panel_setting(arms)
    if setting:
        groups = [(values_words({setting: group[0]["values"][setting]}), group) for group in _groups(arms, setting)]
        found = [f"{_rates(group)} for {name}" for name, group in groups]
    else:
        rates = {_rate(arm): [other for other in arms if _rate(other) == _rate(arm)] for arm in arms}
        found = [f"{rate} for {_some(group) if len(group) < len(arms) else 'all'}" for rate, group in rates.items()]
    return [f"Highest stable learning rate of those tried: {'; '.join(found)}."]


def _rate(arm: Record) -> str:
    rate = arm["highest_stable_rate"]
    return "none" if rate is None else f"{'at least ' if arm['highest_stable_is_bound'] else ''}{rate:g}"


def _rates(arms: list[Record]) -> str:
    """From the lowest to the highest."""
    ordered = sorted(arms, key=lambda arm: arm["highest_stable_rate"] or 0)
    low, high = _rate(ordered[0]), _rate(ordered[-1])
    return low if low == high else f"{low} to {high}"


def _diverged(arms: list[Record], *, few: bool) -> list[str]:
    fallen = [arm for arm in arms if arm["diverged"]]
    if few:
        return [f"{_capital(_name(arm))} diverged in {arm['diverged']} of {arm['n']} runs." for arm in fallen]
    return [f"{len(fallen)} of {len(arms)} arms had runs that diverged: {_some(fallen)}."] if fallen else []


def _cost(comparison: Comparison, healthy: list[Record], *, few: bool) -> list[str]:
    known = [arm for arm in healthy if arm.get("overhead") is not None]
    if not known:
        return []
    if few:
        text = "; ".join(f"{_name(arm)} {signed_percent(arm['overhead'])}" for arm in known)
    else:
        least, most = (kind(known, key=lambda arm: arm["overhead"]) for kind in (min, max))
        low, high = (f"{signed_percent(arm['overhead'])} ({_name(arm)})" for arm in (least, most))
        text = f"from {low} to {high}"
    at_once = comparison["side_by_side"]
    shared = f", measured while {at_once} trials ran at once" if at_once > 1 else ""
    return [f"Training time for an image against {_baseline(comparison)}: {text}{shared}."]


def _some(arms: list[Record]) -> str:
    names = [_name(arm) for arm in arms[:_MOST_NAMES]]
    more = [f"and {len(arms) - _MOST_NAMES} more"] if len(arms) > _MOST_NAMES else []
    return ", ".join([*names, *more])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
