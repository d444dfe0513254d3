"""How sure a comparison is of an arm: the grades of a verdict."""

from __future__ import annotations

from pipeline.report.comparison import ArmSummary, Grade
from pipeline.report.intervals import LEVEL

# From this adjusted p-value on, chance alone explains a difference too easily to call it likely.
_LIKELY = 0.2


def grade_of(arm: ArmSummary, baseline: ArmSummary, smallest_difference: float) -> Grade | None:
    """How sure the difference of an arm from the baseline is, or why there is none.

    - ``diverged``, ``did not learn``: a run of the arm did; a difference over the others would flatter it
    - ``equivalent``: the 95% interval lies within plus and minus ``smallest_difference``
    - ``clear``: it excludes zero after Holm's correction for the number of arms (adjusted p-value at most 0.05)
    - ``likely``: it excludes zero before the correction, or the 80% interval does after it (adjusted p-value at most
      0.2); also what would be clear, had it more than one seed and a sound baseline
    - ``cannot be told``: all else

    Parameters
    ----------
    arm : with adjusted p-values, where there is more than one
    smallest_difference : of interest, from 0 to 1

    Returns
    -------
    None for the baseline, unless one of its runs diverged or did not learn.
    """
    if arm.diverged:
        return "diverged"
    if arm.not_learned:
        return "did not learn"
    if arm.arm == baseline.arm:
        return None
    difference = arm.difference
    if difference is None or difference.low is None or difference.high is None or difference.p_value is None:
        return "cannot be told"
    p_adjusted = difference.p_value if difference.p_adjusted is None else difference.p_adjusted
    is_equivalent = -smallest_difference < difference.low and difference.high < smallest_difference
    if difference.n == 1 or baseline.healthy < baseline.n:
        return "likely" if p_adjusted <= LEVEL else "cannot be told"
    if is_equivalent:
        return "equivalent"
    if p_adjusted <= LEVEL:
        return "clear"
    return "likely" if difference.p_value <= LEVEL or p_adjusted <= _LIKELY else "cannot be told"
