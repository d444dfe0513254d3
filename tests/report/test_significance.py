from math import comb

import numpy as np
import pytest

from pipeline.report.significance import holm, mcnemar


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 9), (12, 12), (40, 21), (300, 355)])
def test_mcnemar_is_the_sum_of_binomials(first, second):
    both = [(True, True)] * 50 + [(False, False)] * 7 + [(True, False)] * first + [(False, True)] * second
    correct, others = np.array(both).T
    n, smaller = first + second, min(first, second)
    tail = sum(comb(n, k) for k in range(smaller + 1)) / 2**n
    assert mcnemar(correct, others) == pytest.approx(min(1, 2 * tail), rel=1e-12)
    assert mcnemar(others, correct) == mcnemar(correct, others)


def test_holm_multiplies_by_the_number_of_hypotheses_that_are_left():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_holm_keeps_the_error_of_the_whole_family():
    p_values = np.random.default_rng(0).random((4_000, 5))
    assert np.mean([min(holm(row)) <= 0.05 for row in p_values]) == pytest.approx(0.05, abs=0.012)
