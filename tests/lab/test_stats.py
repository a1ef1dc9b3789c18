import pytest
import scipy.stats

from steppe.lab.stats import Difference, Estimate, difference, estimate


def test_interval_is_student_t():
    values = [0.91, 0.93, 0.92, 0.96]
    mean, half, n = estimate(values)
    low, high = scipy.stats.t.interval(0.95, 3, loc=mean, scale=scipy.stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-12)
    assert n == 4


def test_one_value_has_no_interval():
    assert estimate([0.5]) == Estimate(0.5, None, 1)
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_difference_is_paired_by_seed():
    ours = {0: 0.9, 1: 0.8, 2: 0.95, 7: 0.1}
    theirs = {2: 0.9, 1: 0.79, 0: 0.88, 5: 0.99}
    found = difference(ours, theirs)
    expected = scipy.stats.ttest_rel([0.9, 0.8, 0.95], [0.88, 0.79, 0.9])
    low, high = expected.confidence_interval(0.95)
    assert found.n == 3
    assert found.p == pytest.approx(expected.pvalue, rel=1e-10)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-10)


def test_difference_without_spread_or_without_pairs():
    assert difference({0: 0.5, 1: 0.75}, {0: 0.5, 1: 0.75}) == Difference(0.0, 0.0, 1.0, 2)
    assert difference({0: 0.75, 1: 1.0}, {0: 0.5, 1: 0.75}) == Difference(0.25, 0.0, None, 2)
    rounding = difference({0: 0.8, 1: 0.9, 2: 0.4}, {0: 0.7, 1: 0.8, 2: 0.3})
    assert rounding.half > 0
    assert rounding.p is None
    assert difference({0: 0.75}, {0: 0.5}) == Difference(0.25, None, None, 1)
    assert difference({0: 0.75}, {1: 0.5}) is None
