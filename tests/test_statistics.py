"""Intervals and tests, against independent implementations and against their own promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, bootstrap, multinomial, norm, t
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from hauberk.evaluation.statistics import (
    Accuracy,
    area_under_roc,
    clustered_mean,
    corrected_proportion,
    holm,
    mean,
    noninferiority,
    paired_bootstrap,
    paired_difference,
    paired_mean_difference,
    pairs_needed,
    proportion,
    unpaired_difference,
)

flags = st.lists(st.booleans(), min_size=1, max_size=60)
pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def from_counts(count, n):
    return proportion(np.arange(n) < count)


def changed(better, worse, n):
    """Paired flags of n samples, of which some are only won and some only lost."""
    treated = np.arange(n) < better
    return treated, (np.arange(n) >= better) & (np.arange(n) < better + worse)


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


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((56, 70, 48, 80), 0.0524, 0.3339),
        ((9, 10, 3, 10), 0.1705, 0.8090),
        ((6, 7, 2, 7), 0.0582, 0.8062),
        ((5, 56, 0, 29), -0.0381, 0.1926),
        ((10, 10, 0, 10), 0.6075, 1.0),
    ],
)
def test_a_difference_of_two_groups_has_newcombe_s_interval(counts, low, high):
    """The published examples of his method 10."""
    positive, n, others, m = counts
    found = unpaired_difference(np.arange(n) < positive, np.arange(m) < others)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert found.n == n + m


@given(flags, flags)
def test_exchanging_two_groups_mirrors_the_interval_that_holds_their_difference(one, other):
    found, mirrored = unpaired_difference(one, other), unpaired_difference(other, one)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found.value == pytest.approx(np.mean(one) - np.mean(other))
    assert found.low == pytest.approx(-mirrored.high, abs=1e-12)


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


@pytest.mark.parametrize(("more", "fewer", "n"), [(9, 4, 40), (30, 2, 80), (0, 12, 300)])
def test_the_bootstrap_interval_is_the_one_that_resampling_approaches(more, fewer, n):
    treated, control = changed(more, fewer, n)
    drawn = bootstrap(
        (treated.astype(float), control.astype(float)), lambda a, b, axis: (a - b).mean(axis),
        paired=True, vectorized=True, method="percentile", n_resamples=20_000,
        rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    assert paired_bootstrap(more, fewer, n) == pytest.approx(tuple(drawn), abs=1.01 / n)


@given(pairs)
def test_the_bootstrap_interval_holds_the_difference_and_turns_with_it(drawn):
    treated, control = zip(*drawn, strict=True)
    found, swapped = paired_difference(treated, control), paired_difference(control, treated)
    assert -1 <= found.bootstrap_low <= found.value + 1e-9
    assert found.value - 1e-9 <= found.bootstrap_high <= 1
    mirrored = (-swapped.bootstrap_high, -swapped.bootstrap_low)
    assert (found.bootstrap_low, found.bootstrap_high) == pytest.approx(mirrored)


@pytest.mark.parametrize(("more", "fewer"), [(0.15, 0.05), (0.1, 0.1), (0.02, 0.3), (0.4, 0.3)])
def test_the_bootstrap_interval_covers_the_truth_where_discordant_pairs_are_not_few(more, fewer):
    rng, n, truth = np.random.default_rng(4), 200, more - fewer
    drawn = rng.multinomial(n, [more, fewer, 1 - more - fewer], size=1500)
    ends = np.array([paired_bootstrap(int(b), int(c), n) for b, c, _ in drawn])
    covered = (ends[:, 0] <= truth + 1e-9) & (truth - 1e-9 <= ends[:, 1])
    assert covered.mean() >= 0.93


def test_the_bootstrap_knows_no_doubt_where_no_pair_is_discordant_and_the_other_interval_does():
    same = paired_difference([True] * 40, [True] * 40)
    assert (same.bootstrap_low, same.bootstrap_high) == (0, 0)
    assert same.low < 0 < same.high


# --- many tests -------------------------------------------------------------------------------

p_values = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@settings(max_examples=10)
@given(p_values)
def test_p_values_are_adjusted_as_statsmodels_adjusts_them(drawn):
    assert holm(drawn) == pytest.approx(list(multipletests(drawn, method="holm")[1]))


def test_of_twenty_tests_of_nothing_holm_finds_something_in_one_family_of_twenty():
    drawn = np.random.default_rng(2).random((2000, 20))
    alarms = np.mean([min(holm(list(family))) < 0.05 for family in drawn])
    assert alarms == pytest.approx(0.05, abs=0.015)
    assert np.mean(drawn.min(1) < 0.05) > 0.6  # unadjusted


def test_no_test_needs_no_adjustment():
    assert holm([]) == []


def test_nothing_cannot_be_counted():
    with pytest.raises(ValueError, match="no samples"):
        proportion([])
    with pytest.raises(ValueError, match="0 treated and 0 control"):
        paired_difference([], [])


def test_sides_of_different_length_are_refused_with_both_lengths():
    with pytest.raises(ValueError, match="2 treated and 3 control"):
        paired_difference([True, False], [True, False, True])


# --- non-inferiority and sample size ----------------------------------------------------------


@given(pairs, st.floats(0.001, 0.6))
def test_non_inferiority_is_shown_exactly_when_the_interval_clears_the_margin(drawn, margin):
    treated, control = zip(*drawn, strict=True)
    found = noninferiority(treated, control, margin)
    assert found.difference == paired_difference(treated, control)
    clears = found.difference.low > -margin
    assert found.shown == clears or abs(found.difference.low + margin) < 1e-9


def test_a_wider_margin_is_easier_to_show_and_more_losses_are_harder():
    p_values = [noninferiority(*changed(5, 8, 300), margin).p_value for margin in (0.01, 0.03, 0.1)]
    assert p_values == sorted(p_values, reverse=True)
    p_values = [noninferiority(*changed(5, worse, 300), 0.03).p_value for worse in (2, 8, 20)]
    assert p_values == sorted(p_values)


def test_two_points_at_five_percent_discordant_need_773_pairs():
    assert pairs_needed(0.02, discordant=0.05) == 773


def test_the_sample_size_gives_the_power_it_promises_and_spares_the_false_alarm():
    rng = np.random.default_rng(3)
    margin, discordant, repeats = 0.04, 0.08, 600
    n = pairs_needed(margin, discordant=discordant, alpha=0.025)

    def shown(loss):
        """How often non-inferiority is shown where the true loss is this."""
        better, worse = (discordant - loss) / 2, (discordant + loss) / 2
        drawn = rng.multinomial(n, [better, worse, 1 - discordant], size=repeats)
        return np.mean([noninferiority(*changed(b, w, n), margin).shown for b, w, _ in drawn])

    assert shown(0.0) == pytest.approx(0.8, abs=0.06)
    assert shown(margin) < 0.04


@pytest.mark.parametrize("n", [60, 100, 200, 500, 1100])
@pytest.mark.parametrize(("better", "margin"), [(0.0, 0.02), (0.01, 0.02), (0.0, 0.1)])
def test_a_true_loss_of_the_margin_is_hardly_ever_shown_to_be_less(n, better, margin):
    """Exactly, by summing over the tables, where few pairs are discordant."""
    worse, found = better + margin, 0.0
    for more in range(int(n * better) + 15 if better else 1):
        for fewer in range(int(n * worse) + 1):  # more of them never show it
            if noninferiority(*changed(more, fewer, n), margin).shown:
                counts = [more, fewer, n - more - fewer]
                found += multinomial.pmf(counts, n, [better, worse, 1 - better - worse])
    assert found < 0.03


def test_pairs_that_agree_do_not_exclude_a_loss_where_they_are_few():
    assert not noninferiority(*changed(0, 0, 100), 0.02).shown
    assert noninferiority(*changed(0, 0, 200), 0.02).shown
    assert pairs_needed(0.02, discordant=0.001, alpha=0.025) in range(180, 200)


@pytest.mark.parametrize("margin", [0.0, -0.1, 1.0])
def test_a_margin_that_is_no_share_is_refused(margin):
    with pytest.raises(ValueError, match="between 0 and 1"):
        noninferiority([True], [True], margin)
    with pytest.raises(ValueError, match="between 0 and 1"):
        pairs_needed(margin, discordant=0.1)


# --- the errors of a judge --------------------------------------------------------------------


@given(flags)
def test_a_judge_without_errors_needs_no_correction(drawn):
    """The value is the plain one; the interval, Agresti's and Coull's then, holds Wilson's."""
    found, plain = corrected_proportion(drawn, Accuracy(1.0, 1.0)), proportion(drawn)
    assert found.value == pytest.approx(plain.value)
    assert found.low <= plain.low + 1e-12
    assert plain.high <= found.high + 1e-12
    assert found.high - found.low < 1.3 * (plain.high - plain.low)


@given(flags, st.floats(0.6, 1), st.floats(0.6, 1), st.integers(10, 500))
def test_a_corrected_rate_lies_in_its_interval_and_a_judge_less_known_widens_it(
    drawn, sensitivity, specificity, n
):
    known = corrected_proportion(drawn, Accuracy(sensitivity, specificity))
    measured = corrected_proportion(drawn, Accuracy(sensitivity, specificity, n, n))
    for found in (known, measured):
        assert 0 <= found.low <= found.value <= found.high <= 1
    assert measured.value == known.value


WRONG_JUDGES = pytest.mark.parametrize(
    ("sensitivity", "specificity"), [(0.8, 0.95), (0.95, 0.8), (0.7, 0.7)]
)


@WRONG_JUDGES
def test_corrected_intervals_of_a_judge_known_exactly_cover_the_truth(sensitivity, specificity):
    """Exactly, by summing over all counts, on a grid of truths."""
    n = 200
    judge = Accuracy(sensitivity, specificity)
    found = [corrected_proportion(np.arange(n) < count, judge) for count in range(n + 1)]
    low, high = np.array([f.low for f in found]), np.array([f.high for f in found])
    truths = np.linspace(0.01, 0.99, 99)[:, None]
    called = truths * sensitivity + (1 - truths) * (1 - specificity)
    covered = (binom.pmf(np.arange(n + 1), n, called) * ((low <= truths) & (truths <= high))).sum(1)
    assert covered.mean() == pytest.approx(0.95, abs=0.01)
    assert covered.min() > 0.93


@WRONG_JUDGES
@pytest.mark.parametrize("truth", [0.01, 0.4, 0.8])
def test_corrected_intervals_of_a_judge_that_was_measured_cover_the_truth(
    sensitivity, specificity, truth
):
    """A judge made wrong on purpose, measured on 100 responses a side, in 500 simulations."""
    rng, n, repeats, covered = np.random.default_rng(11), 300, 500, 0
    widths = []
    for _ in range(repeats):
        unsafe = rng.random(n) < truth
        called = np.where(unsafe, rng.random(n) < sensitivity, rng.random(n) >= specificity)
        hits, passes = rng.binomial(100, [sensitivity, specificity])
        found = corrected_proportion(called, Accuracy(hits / 100, passes / 100, 100, 100))
        covered += found.low <= truth <= found.high
        widths.append(found.high - found.low)
    assert covered / repeats >= 0.93
    assert np.mean(widths) < 0.5  # it says something


@given(flags, st.integers(0, 14), st.integers(0, 14), st.integers(0, 14), st.integers(0, 14))
def test_a_judge_that_was_hardly_measured_gives_an_interval_all_the_same(drawn, a, b, c, d):
    """Right on a of a + b + 1 positives and on c of c + d + 1 negatives."""
    judge = Accuracy((a + 1) / (a + b + 1), (c + 1) / (c + d + 1), a + b + 1, c + d + 1)
    if judge.sensitivity + judge.specificity > 1:
        found = corrected_proportion(drawn, judge)
        assert 0 <= found.low <= found.value <= found.high <= 1


def test_a_judge_measured_on_five_answers_may_say_nothing():
    found = corrected_proportion([True, False, False], Accuracy(1.0, 0.25, 1, 4))
    assert (found.low, found.high) == (0.0, 1.0)


def test_a_judge_that_guesses_is_refused_with_its_numbers():
    with pytest.raises(ValueError, match=r"sensitivity 0\.4 and specificity 0\.5"):
        corrected_proportion([True, False], Accuracy(0.4, 0.5))


# --- the area under a ROC curve ---------------------------------------------------------------

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


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30))
def test_a_mean_has_the_interval_of_students_t(values):
    found, spread = mean(values), np.std(values, ddof=1)
    assert (found.value, found.n) == (pytest.approx(np.mean(values)), len(values))
    wanted = t.interval(
        0.95, len(values) - 1, found.value, max(spread, 1e-300) / len(values) ** 0.5
    )
    assert (found.low, found.high) == pytest.approx(wanted, abs=1e-9)


def test_one_number_has_no_interval():
    with pytest.raises(ValueError, match="1 numbers have no interval; give 2 or more"):
        mean([0.5])


booleans = st.lists(st.booleans(), min_size=1, max_size=40)


@given(booleans, st.integers(1, 4))
def test_a_mean_of_groups_that_are_all_or_nothing_is_a_proportion_of_groups(flags, size):
    groups = [index for index in range(len(flags)) for _ in range(size)]
    found = clustered_mean(np.repeat(flags, size), groups)
    alone = proportion(flags)
    assert (found.value, found.low, found.high) == pytest.approx(
        (alone.value, alone.low, alone.high)
    )
    assert found.n == size * len(flags)


scored = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 4), st.floats(0.5, 3)), min_size=1, max_size=25
)


@given(scored)
def test_a_clustered_mean_is_a_ratio_within_its_interval_and_the_interval_within_bounds(drawn):
    scores, groups, out_of = (list(column) for column in zip(*drawn, strict=True))
    scores = [score * most for score, most in zip(scores, out_of, strict=True)]
    found = clustered_mean(scores, groups, out_of)
    assert found.value == pytest.approx(sum(scores) / sum(out_of))
    assert -1e-9 <= found.low <= found.value <= found.high <= 1 + 1e-9
    assert found.low < found.high


def test_the_interval_of_a_clustered_mean_holds_the_truth():
    """60 pictures of 4 questions each that are alike in difficulty; the truth is 0.6."""
    held, plain, repeats = 0, 0, 200
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        easy = np.repeat(rng.beta(1.2, 0.8, 60), 4)
        right = rng.random(240) < easy
        found = clustered_mean(right, [index // 4 for index in range(240)])
        held += found.low <= 0.6 <= found.high
        alone = proportion(right)
        plain += alone.low <= 0.6 <= alone.high
    assert held / repeats >= 0.92
    assert plain / repeats < held / repeats


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a mean of no samples is undefined"):
        clustered_mean([], [])
    with pytest.raises(ValueError, match="pairs needed: 0 treated and 1 control"):
        paired_mean_difference([], [0.5], [])


@given(scored, scored)
def test_a_paired_difference_of_means_lies_in_its_interval_and_turns_its_sign(one, other):
    size = min(len(one), len(other))
    first, second = ([score for score, *_ in side[:size]] for side in (one, other))
    groups = [group for _, group, _ in one[:size]]
    found, p_noninferior = paired_mean_difference(first, second, groups, 0.05)
    turned, _ = paired_mean_difference(second, first, groups)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(np.mean(first) - np.mean(second))
    assert (turned.value, turned.low, turned.high) == pytest.approx(
        (-found.value, -found.high, -found.low)
    )
    assert (turned.more, turned.fewer) == (found.fewer, found.more)
    assert 0 <= found.p_value <= 1
    if abs(found.low + 0.05) > 1e-6:
        assert (p_noninferior < 0.025) == (found.low > -0.05)
