"""The gap and the geometry behind it, on clouds whose answer is known."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from hauberk.analysis.gap import (
    AT_LEAST,
    NEGLIGIBLE,
    auroc,
    cosines,
    fit_axis,
    fit_plane,
    halves,
    mean,
    verdict,
)
from hauberk.errors import BadData
from hauberk.evaluation.statistics import Estimate

BLOCKS, SIZE, APART = 3, 12, 2.0


def clouds(n, seed=0):
    """Harmless states about 0 and harmful ones ``APART`` away, in a direction of each block."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(BLOCKS, SIZE))
    direction *= APART / np.linalg.norm(direction, axis=-1, keepdims=True)
    harmless, noise = rng.normal(size=(2, n, BLOCKS, SIZE))
    return noise + direction, harmless, direction


def test_the_auroc_of_two_clouds_is_what_their_distance_says():
    harmful, harmless, _ = clouds(1000)
    axis = fit_axis(halves(harmful)[0], halves(harmless)[0])
    scores = (axis.score(halves(states)[1]) for states in (harmful, harmless))
    for found in auroc(*scores, seed=0):
        # Two normal clouds with one spread: the chance that a difference of two draws is positive.
        assert found.value == pytest.approx(norm.cdf(APART / np.sqrt(2)), abs=0.03)
        assert found.low < found.value < found.high
        assert found.n == 500


def test_the_part_of_the_way_that_requests_are_moved_is_found_in_every_block():
    harmful, harmless, direction = clouds(400)
    axis = fit_axis(harmful[::2], harmless[::2])
    text, picture = (axis.score(s[1::2]) for s in (harmful, harmful - 0.6 * direction))
    for found in mean(text - picture, seed=0):
        assert found.value == pytest.approx(0.6, abs=0.05)


def test_a_move_across_the_axis_changes_no_score():
    harmful, harmless, _ = clouds(30)
    axis = fit_axis(harmful, harmless)
    across = np.random.default_rng(1).normal(size=(BLOCKS, SIZE))
    along = (across * axis.direction).sum(-1) / (axis.direction**2).sum(-1)
    across -= along[:, None] * axis.direction
    np.testing.assert_allclose(axis.score(harmful + 9 * across), axis.score(harmful), atol=1e-9)


def test_the_means_of_what_an_axis_was_fitted_on_lie_at_0_and_1():
    harmful, harmless, _ = clouds(20)
    axis = fit_axis(harmful, harmless)
    np.testing.assert_allclose(axis.score(harmless).mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(axis.score(harmful).mean(0), 1, atol=1e-12)


def test_turning_moving_and_scaling_all_states_changes_neither_scores_nor_shares():
    harmful, harmless, _ = clouds(40)
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(SIZE, SIZE)))
    other = [3 * states @ turn + 5 for states in (harmful, harmless)]
    before, after = (fit_axis(*pair).score(pair[0]) for pair in ((harmful, harmless), other))
    np.testing.assert_allclose(after, before, atol=1e-9)
    np.testing.assert_allclose(
        fit_plane(*other).explained, fit_plane(harmful, harmless).explained, atol=1e-9
    )
    np.testing.assert_allclose(
        fit_plane(*other).project(other[1]) / 3,
        fit_plane(harmful, harmless).project(harmless),
        atol=1e-9,
    )


def test_two_texts_of_the_same_mean_have_no_axis():
    harmful, harmless, _ = clouds(8)
    harmful[:, 1] = harmless[:, 1]
    with pytest.raises(BadData, match=r"same mean state in blocks \[1\]"):
        fit_axis(harmful, harmless)


def test_the_plane_is_that_of_the_largest_eigenvalues_of_the_covariance():
    harmful, harmless, _ = clouds(50)
    plane = fit_plane(harmful, harmless)
    together = np.concatenate([harmful, harmless])
    for block in range(BLOCKS):
        values, vectors = np.linalg.eigh(np.cov(together[:, block].T))
        np.testing.assert_allclose(plane.explained[block], values[[-1, -2]] / values.sum())
        overlap = abs(plane.components[block] @ vectors[:, [-1, -2]])
        np.testing.assert_allclose(overlap, np.eye(2), atol=1e-7)


def test_in_the_plane_texts_lie_about_0_with_the_harmful_ones_ahead():
    harmful, harmless, _ = clouds(50)
    plane = fit_plane(harmful, harmless)
    ahead, behind = plane.project(harmful).mean(0), plane.project(harmless).mean(0)
    np.testing.assert_allclose(ahead + behind, 0, atol=1e-9)
    assert (ahead > behind).all()


def test_the_cosine_is_1_for_equal_states_and_does_not_see_their_length():
    states = np.random.default_rng(3).normal(size=(5, BLOCKS, SIZE)).astype("float32")
    np.testing.assert_allclose(cosines(states, states), 1)
    np.testing.assert_allclose(cosines(states, 7 * states), 1)
    np.testing.assert_allclose(cosines(states, -states), -1)
    one, other = np.eye(SIZE)[:2, None]
    np.testing.assert_array_equal(cosines(one[None], other[None]), 0)


numbers = st.lists(st.integers(0, 6), min_size=2, max_size=12)


@given(numbers, numbers)
def test_the_auroc_is_the_share_of_pairs_in_which_harmful_scores_higher_ties_by_half(one, other):
    (found,) = auroc(np.array(one)[:, None], np.array(other)[:, None], seed=0)
    won = [(a > b) + (a == b) / 2 for a, b in product(one, other)]
    assert found.value == pytest.approx(sum(won) / len(won))
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_the_interval_of_a_mean_is_as_wide_as_its_standard_error_says():
    values = np.random.default_rng(4).normal(size=(200, 2)) * [1, 5]
    for column, found in enumerate(mean(values, seed=0)):
        error = values[:, column].std() / np.sqrt(200)
        assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_the_same_seed_gives_the_same_interval_and_another_another():
    values = np.random.default_rng(5).normal(size=(30, 1))
    assert mean(values, seed=1) == mean(values, seed=1)
    assert mean(values, seed=1) != mean(values, seed=2)


@given(st.integers(AT_LEAST, 40))
def test_halves_hold_every_request_once_and_are_as_large(count):
    fit, measured = halves(np.arange(count))
    assert sorted([*fit, *measured]) == list(range(count))
    assert len(fit) - len(measured) in (0, 1)


def test_too_few_requests_are_refused():
    with pytest.raises(BadData, match=r"7 requests are too few.*8 or more.*gap\.requests"):
        halves(np.zeros((AT_LEAST - 1, BLOCKS, SIZE)))


@pytest.mark.parametrize(
    ("value", "low", "high", "says"),
    [
        (0.49, 0.41, 0.57, "gap of 49 points: there is something to fix"),
        (0.49, 0.0, 0.98, "no gap could be shown"),
        (0.0, -0.02, 0.02, "no gap could be shown"),
        (-0.3, -0.4, -0.2, "no gap could be shown"),
        (0.03, 0.01, 0.05, "gap of 3 points: too small to matter"),
        (0.04, 0.01, 0.14, "gap of 4 points, 1 to 14: too few requests to say if it matters"),
        (0.06, 0.01, 0.14, "gap of 6 points: there is something to fix"),
    ],
)
def test_the_verdict_follows_the_interval_and_the_size_of_the_gap(value, low, high, says):
    assert verdict(Estimate(value, 100, low, high)) == says


def test_what_is_no_gap_here_is_none_in_the_report_and_so_many_requests_are_right_in_params():
    from tasks.params import GapParams
    from tasks.report.verdict import REST

    assert NEGLIGIBLE == REST
    (bound,) = GapParams.__annotations__["requests"].__metadata__[0].metadata
    assert bound.ge == AT_LEAST
