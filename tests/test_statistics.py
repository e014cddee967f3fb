"""Intervals and tests, against independent implementations and against their own promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, multinomial, norm
from statsmodels.stats.contingency_tables import mcnemar

from hauberk.evaluation.statistics import area_under_roc, paired_difference, proportion

flags = st.lists(st.booleans(), min_size=1, max_size=60)
pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def from_counts(count, n):
    return proportion(np.arange(n) < count)


@given(flags)
def test_a_proportion_has_wilson_s_interval(drawn):
    found = proportion(drawn)
    expected = binomtest(sum(drawn), len(drawn)).proportion_ci(0.95, method="wilson")
    assert found.value == sum(drawn) / len(drawn)
    assert found.n == len(drawn)
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)


@given(flags)
def test_an_interval_of_a_proportion_lies_in_0_to_1_and_holds_the_value(drawn):
    found = proportion(drawn)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high


@given(flags)
def test_counting_the_opposite_mirrors_the_interval(drawn):
    found, mirrored = proportion(drawn), proportion([not flag for flag in drawn])
    assert mirrored.value == pytest.approx(1 - found.value)
    assert mirrored.low == pytest.approx(1 - found.high, abs=1e-12)


def test_the_interval_of_a_proportion_covers_the_truth_about_95_times_in_100():
    """Exactly, by summing over all counts, on a grid of truths."""
    for n in (20, 80, 300):
        estimates = [from_counts(count, n) for count in range(n + 1)]
        truths = np.linspace(0.01, 0.99, 197)[:, None]
        low = np.array([e.low for e in estimates])
        high = np.array([e.high for e in estimates])
        chance = binom.pmf(np.arange(n + 1), n, truths)
        covered = (chance * ((low <= truths) & (truths <= high))).sum(1)
        assert covered.mean() == pytest.approx(0.95, abs=0.01)
        assert covered.min() > 0.83


@given(pairs)
def test_the_p_value_is_mcnemar_s_exact_one(drawn):
    found = paired_difference(*zip(*drawn, strict=True))
    table = np.zeros((2, 2))
    for treated, control in drawn:
        table[int(treated), int(control)] += 1
    expected = mcnemar(table, exact=True).pvalue if table[0, 1] + table[1, 0] else 1.0
    assert found.p_value == pytest.approx(expected, abs=1e-12)
    assert (found.more, found.fewer) == (table[1, 0], table[0, 1])


@given(pairs)
def test_a_paired_difference_is_the_difference_of_the_proportions_inside_its_interval(drawn):
    treated, control = zip(*drawn, strict=True)
    found = paired_difference(treated, control)
    assert found.value == pytest.approx(proportion(treated).value - proportion(control).value)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high
    assert 0 <= found.p_value <= 1


@given(pairs)
def test_swapping_the_sides_swaps_the_sign(drawn):
    treated, control = zip(*drawn, strict=True)
    found, swapped = paired_difference(treated, control), paired_difference(control, treated)
    assert swapped.value == -found.value
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))
    assert (swapped.more, swapped.fewer) == (found.fewer, found.more)
    assert swapped.p_value == pytest.approx(found.p_value)


@given(pairs, st.randoms(use_true_random=False))
def test_the_order_of_the_pairs_does_not_matter(drawn, rng):
    shuffled = list(drawn)
    rng.shuffle(shuffled)
    assert paired_difference(*zip(*drawn, strict=True)) == paired_difference(
        *zip(*shuffled, strict=True)
    )


def test_the_interval_of_a_difference_covers_the_truth_about_95_times_in_100():
    """Exactly, by summing over all 2 x 2 tables, also where discordant pairs are few."""
    n = 30
    tables = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    found = []
    for b, c in tables:
        treated = np.arange(n) < b
        control = (np.arange(n) >= b) & (np.arange(n) < b + c)
        found.append(paired_difference(treated, control))
    low, high = np.array([f.low for f in found]), np.array([f.high for f in found])
    counts = np.array([(b, c, n - b - c) for b, c in tables])
    covered = []
    for more in (0.01, 0.05, 0.15, 0.3, 0.5):
        for fewer in (0.01, 0.05, 0.15, 0.3):
            chance = multinomial.pmf(counts, n, [more, fewer, 1 - more - fewer])
            truth = more - fewer
            covered.append((chance * ((low <= truth) & (truth <= high))).sum())
    assert np.mean(covered) == pytest.approx(0.955, abs=0.015)
    assert min(covered) > 0.92


def test_nothing_cannot_be_counted():
    with pytest.raises(ValueError, match="no samples"):
        proportion([])
    with pytest.raises(ValueError, match="0 treated and 0 control"):
        paired_difference([], [])


def test_sides_of_different_length_are_refused_with_both_lengths():
    with pytest.raises(ValueError, match="2 treated and 3 control"):
        paired_difference([True, False], [True, False, True])


scores = st.lists(st.integers(-5, 5), min_size=1, max_size=30)


@given(scores, scores)
def test_the_area_under_roc_is_the_share_of_pairs_in_the_right_order(above, below):
    found, turned = area_under_roc(above, below), area_under_roc(below, above)
    pairs = [(a > b) + (a == b) / 2 for a in above for b in below]
    assert found.value == pytest.approx(np.mean(pairs))
    assert found.n == len(above) + len(below)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high
    assert (1 - turned.low, 1 - turned.high) == pytest.approx((found.high, found.low), abs=1e-6)


def test_the_interval_of_an_area_under_roc_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth = norm.cdf(1 / np.sqrt(2))  # of normal scores that lie one deviation apart
    found = [area_under_roc(rng.normal(1, 1, 40), rng.normal(0, 1, 60)) for _ in range(200)]
    assert 0.9 <= np.mean([one.low <= truth <= one.high for one in found]) <= 0.99


def test_an_area_under_roc_needs_both_sides():
    with pytest.raises(ValueError, match="0 positive and 2 negative"):
        area_under_roc([], [1, 2])
