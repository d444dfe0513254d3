"""How fast arms learned and trained, in sentences: steps to the target, stable learning rates, cost of an image."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.report.comparison import ArmSummary, Comparison, VerdictSentence, by
from pipeline.report.formats import signed_percent
from pipeline.report.names import LEARNING_RATE, group_setting, values_words
from pipeline.report.sentences import baseline_name, capital, metric_words, name_of, pointers, sentence, some

# Extra time of an image that is of no interest where it goes both ways.
_SMALL = 0.05


def arrival(comparison: Comparison, arm: ArmSummary, base: ArmSummary) -> VerdictSentence:
    """How long an arm took to the target, with the baseline as the measure."""
    fields = ("reached_target", "had_target", "steps_to_target_mean", "steps_ratio", "seconds_ratio", "global_batch")
    evidence = pointers(comparison, [arm, base], *fields)
    text = f"{capital(name_of(arm))} {_arrival(comparison, arm, base)}."
    return sentence(comparison, "target", text, evidence, arm=arm)


def target_words(comparison: Comparison) -> str:
    """``the final accuracy of no normalization``, or the target that was given."""
    given = comparison.target_accuracy
    if given is None:
        return f"the final {metric_words(comparison)} of {baseline_name(comparison)}"
    return f"{100 * given:g}%"


def _arrival(comparison: Comparison, arm: ArmSummary, base: ArmSummary) -> str:
    target = target_words(comparison)
    if not arm.reached_target:
        too = ", and neither did the baseline" if not base.reached_target else ""
        return f"never reached {target}{too}"
    partly = f" (in {arm.reached_target} of {arm.had_target} runs)" if arm.reached_target < arm.had_target else ""
    if arm.steps_ratio is None:
        alone = ", which the baseline never did" if not base.reached_target else ""
        return f"reached {target} after {arm.steps_to_target_mean:,.0f} steps{alone}{partly}"
    time = "" if arm.seconds_ratio is None else f" and {_share(arm.seconds_ratio, 'training time', fewer='less')}"
    sizes = (arm.global_batch, base.global_batch)
    images = f", steps of {sizes[0]:,} images instead of {sizes[1]:,}," if sizes[0] != sizes[1] else ""
    return f"needed {_share(arm.steps_ratio, 'steps', fewer='fewer')}{time}{images} to reach {target}{partly}"


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


def stable_rates(comparison: Comparison, *, few: bool) -> list[VerdictSentence]:
    """The highest stable learning rates, where the grid could show them."""
    if LEARNING_RATE not in comparison.tuned or len(comparison.grid[LEARNING_RATE]) < 2:
        return []
    arms = comparison.arms
    if not any(_was_searched(arm) for arm in arms):
        return []
    setting = None if few else group_setting([arm.values for arm in arms])
    if setting:
        phrases = [
            f"{_rates(group)} for {values_words({setting: group[0].values[setting]})}"
            for group in groups(arms, setting)
        ]
    else:
        rates = {_rate(arm): [other for other in arms if _rate(other) == _rate(arm)] for arm in arms}
        phrases = [f"{rate} for {some(group) if len(group) < len(arms) else 'all'}" for rate, group in rates.items()]
    text = f"Highest stable learning rate of those tried: {'; '.join(phrases)}."
    evidence = pointers(comparison, arms, "highest_stable_rate", "highest_stable_is_bound")
    return [sentence(comparison, "stable-rates", text, evidence)]


def _was_searched(arm: ArmSummary) -> bool:
    """Whether more than one rate was tried: a search without a budget takes one, which says nothing of the others."""
    return arm.search_undecided != "no_budget"


def groups(arms: Sequence[ArmSummary], setting: str) -> list[list[ArmSummary]]:
    """The arms by their value of a setting."""
    return list(by(arms, lambda arm: repr(arm.values[setting])).values())


def _rate(arm: ArmSummary) -> str:
    rate = arm.highest_stable_rate
    if not _was_searched(arm):
        return "not tried"
    return "none" if rate is None else f"{'at least ' if arm.highest_stable_is_bound else ''}{rate:g}"


def _rates(arms: Sequence[ArmSummary]) -> str:
    """From the lowest to the highest."""
    ordered = sorted(arms, key=lambda arm: arm.highest_stable_rate or 0)
    low, high = _rate(ordered[0]), _rate(ordered[-1])
    return low if low == high else f"{low} to {high}"


def cost(comparison: Comparison, healthy: Sequence[ArmSummary], *, few: bool) -> list[VerdictSentence]:
    """How much longer an image takes than the baseline's."""
    known = [arm for arm in healthy if arm.overhead is not None]
    if not known:
        return []
    if few:
        text = "; ".join(f"{name_of(arm)} {_extra(arm)}" for arm in known)
    else:
        ends = [kind(known, key=lambda arm: arm.overhead or 0.0) for kind in (min, max)]
        text = " to ".join(f"{signed_percent(arm.overhead or 0.0)} ({name_of(arm)})" for arm in ends)
        text = f"from {text}, medians over seeds" if comparison.seeds > 1 else f"from {text}"
    at_once = comparison.side_by_side
    shared = f", measured while {at_once} trials ran at once" if at_once > 1 else ""
    text = f"Training time for an image against {baseline_name(comparison)}: {text}{shared}."
    fields = ("overhead", "overhead_low", "overhead_high")
    evidence = [*pointers(comparison, healthy, *fields), "/side_by_side"]
    return [sentence(comparison, "cost", text, evidence)]


def _extra(arm: ArmSummary) -> str:
    """The extra time of an image, and how it varied over seeds, of which some may have found it faster."""
    assert arm.overhead is not None
    if arm.overhead_low is None or arm.overhead_high is None:
        return signed_percent(arm.overhead)
    seeds = f"{signed_percent(arm.overhead_low)} to {signed_percent(arm.overhead_high)} over seeds"
    if arm.overhead_low < 0 < arm.overhead_high:
        return f"cannot be told ({seeds})" if not _is_small(arm) else f"about the same ({seeds})"
    return f"{signed_percent(arm.overhead)} ({seeds})"


def _is_small(arm: ArmSummary) -> bool:
    """Whether no seed found a difference that matters."""
    return max(-(arm.overhead_low or 0.0), arm.overhead_high or 0.0) < _SMALL
