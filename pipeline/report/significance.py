"""Tests of two arms and of many: McNemar's exact test, and Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import bdtr


def mcnemar(correct: np.ndarray, others: np.ndarray) -> float:
    """Two-sided p-value of the exact test of McNemar (1947), Note on the sampling error of the difference between
    correlated proportions or percentages, for two networks on the same images.

    Of the images that one network alone has right, each is the first network's or the second's with the same
    probability if the two are equally accurate; so the smaller count is binomial.

    Parameters
    ----------
    correct, others : (images,) bool, whether the first and the second network have an image right, in the same order
    """
    first = int(np.count_nonzero(correct & ~others))
    second = int(np.count_nonzero(others & ~correct))
    if first == second:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(first, second), first + second, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of Holm (1979), A simple sequentially rejective multiple test procedure, in the given order.

    Differences whose adjusted p-value is at most a level are told apart from zero together: the probability that any of
    them is truly zero is at most that level, whatever the dependence between them.
    """
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(np.argsort(p_values, kind="stable")):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = floor
    return adjusted
