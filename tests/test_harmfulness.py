"""The harmfulness vector: means over everything, scores between them, and the block that tells."""

import pytest
import torch

from hauberk.analysis.harmfulness import HarmAxis, HarmVectors, fit_harm_vectors, separation
from hauberk.analysis.twins import last_states
from hauberk.errors import BadData

BLOCKS, WIDTH = 5, 16


def states_of(number, seed=0):
    return torch.randn(number, BLOCKS, WIDTH, generator=torch.Generator().manual_seed(seed))


def vectors_of(harmful, harmless):
    return HarmVectors(harmful.mean(0), harmless.mean(0))


@pytest.fixture
def vectors():
    return vectors_of(3 * states_of(9, seed=1), 3 * states_of(9, seed=2))


def planted(block, shift, harmful=40, harmless=30):
    """States of both kinds that differ after one block, by so much of their spread."""
    states = states_of(harmful, seed=3), states_of(harmless, seed=4)
    states[0][:, block] += shift * torch.ones(WIDTH) / WIDTH**0.5
    return states


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_two_means_are_plain_ones_whatever_the_batches(any_tiny, batch_size):
    model, processor = any_tiny.model, any_tiny.processor
    harmful, harmless = any_tiny.pictured[:7], any_tiny.plain[:3] + any_tiny.varied
    found = fit_harm_vectors(model, processor, harmful, harmless, batch_size)
    for mean, requests in ((found.harmful, harmful), (found.harmless, harmless)):
        states = torch.cat([last_states(model, processor, [request]) for request in requests])
        assert mean.dtype == torch.float32
        assert mean.shape == states.shape[1:]
        torch.testing.assert_close(mean, states.double().mean(0).float(), atol=1e-5, rtol=1e-4)
    assert torch.equal(found.direction(2), found.harmful[2] - found.harmless[2])


def test_a_mean_without_requests_is_refused_with_their_kind(tiny):
    for kinds, name in ((([], tiny.plain), "harmful"), ((tiny.plain, []), "harmless")):
        with pytest.raises(BadData, match=f"no {name} request to fit a harmfulness vector on"):
            fit_harm_vectors(tiny.model, tiny.processor, *kinds)


@pytest.mark.parametrize("layer", range(BLOCKS))
def test_a_span_is_0_at_the_harmless_mean_and_1_at_the_harmful_one(vectors, layer):
    axis = vectors.axis(layer)
    assert axis.layer == layer
    ends = torch.stack([vectors.harmless[layer], vectors.harmful[layer]])
    middle = ends.mean(0)
    torch.testing.assert_close(axis.score(ends), torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0)
    assert axis.score(middle).item() == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("layer", range(BLOCKS))
def test_a_raw_score_is_the_projection_on_the_unit_vector(vectors, layer):
    states, along = states_of(6)[:, layer], vectors.direction(layer)
    expected = states @ (along / along.norm())
    torch.testing.assert_close(vectors.axis(layer, "raw").score(states), expected)


def test_both_scores_rank_states_alike_and_what_is_aside_does_not_count(vectors):
    states = states_of(20)[:, 2]
    span, raw = vectors.axis(2).score(states), vectors.axis(2, "raw").score(states)
    assert torch.equal(span.argsort(), raw.argsort())
    along = vectors.direction(2)
    aside = states_of(1, seed=9)[0, 2]
    aside = aside - along * (aside @ along) / (along @ along)
    torch.testing.assert_close(vectors.axis(2).score(states + 5 * aside), span, atol=1e-4, rtol=0)


def test_states_of_any_shape_and_type_are_scored_in_float32(vectors):
    axis, states = vectors.axis(1), states_of(6)
    whole = axis.score(states)
    assert whole.shape == (6, BLOCKS)
    for kind, apart in ((torch.float64, 1e-6), (torch.bfloat16, 0.05)):
        scores = axis.score(states.to(kind))
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, whole, atol=apart, rtol=apart)


def test_an_axis_is_refused_where_there_is_no_direction_or_no_such_score(vectors):
    with pytest.raises(ValueError, match="'cosine' is not one of span, raw"):
        vectors.axis(0, "cosine")
    same = HarmVectors(vectors.harmful, vectors.harmful.clone())
    for score in ("span", "raw"):
        with pytest.raises(BadData, match="same mean state in layer=3"):
            same.axis(3, score)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_the_separation_finds_the_block_in_which_states_differ(block):
    """On requests that the vectors were not fitted on."""
    vectors = vectors_of(*(states.clone() for states in planted(block, 4.0)))
    held_out = states_of(50, seed=5), states_of(60, seed=6)
    held_out[0][:, block] += 4.0 * torch.ones(WIDTH) / WIDTH**0.5
    found = separation(vectors, tuple(held_out))
    assert found.layer == block
    assert len(found.auroc) == len(found.distance) == BLOCKS
    assert found.auroc[block] > 0.97
    assert all(0.2 < area < 0.8 for at, area in enumerate(found.auroc) if at != block)
    axis = vectors.axis(block)
    one, other = (axis.score(states[:, block]) for states in held_out)
    assert found.auroc[block] == pytest.approx((one[:, None] > other).float().mean().item())
    spread = ((one.var(correction=0) + other.var(correction=0)) / 2).sqrt()
    assert found.distance[block] == pytest.approx(((one.mean() - other.mean()) / spread).item())


def test_of_blocks_that_are_perfect_the_one_of_the_largest_distance_is_taken():
    harmful, harmless = states_of(40, seed=3), states_of(30, seed=4)
    for block, shift in ((1, 12.0), (3, 24.0), (4, 12.0)):
        harmful[:, block] += shift * torch.ones(WIDTH) / WIDTH**0.5
    found = separation(vectors_of(harmful, harmless), (harmful, harmless))
    assert [found.auroc[block] for block in (1, 3, 4)] == [1, 1, 1]
    assert found.layer == 3


def test_a_direction_that_points_the_wrong_way_on_held_out_requests_is_seen():
    harmful, harmless = planted(2, 6.0)
    found = separation(vectors_of(harmful, harmless), (harmless, harmful))
    assert found.auroc[2] < 0.05
    assert found.distance[2] < -2
    assert found.layer != 2


def test_nothing_is_told_apart_without_requests_of_both_kinds_or_a_direction(vectors):
    some, none = states_of(3), states_of(0)
    for kinds in ((some, none), (none, some)):
        with pytest.raises(BadData, match=r"harmful and \d harmless requests to tell apart; give"):
            separation(vectors, tuple(kinds))
    with pytest.raises(BadData, match="same mean state in layer=0"):
        separation(HarmVectors(vectors.harmful, vectors.harmful), (some, some))


def test_states_that_do_not_spread_are_told_apart_without_a_division_by_zero():
    harmful, harmless = torch.ones(3, BLOCKS, WIDTH), torch.zeros(4, BLOCKS, WIDTH)
    found = separation(vectors_of(harmful, harmless), (harmful, harmless))
    assert found.auroc == (1,) * BLOCKS
    assert min(found.distance) > 1e6
    assert isinstance(vectors_of(harmful, harmless).axis(found.layer), HarmAxis)


def test_groups_are_told_apart_within_their_pair_and_never_across_pairs():
    pair = planted(2, 4.0)
    moved = tuple(states + 50 for states in planted(3, 2.0))
    vectors = vectors_of(*pair)
    one, other, both = (separation(vectors, *told) for told in ([pair], [moved], [pair, moved]))
    for name in ("auroc", "distance"):
        mean = torch.tensor([getattr(one, name), getattr(other, name)]).double().mean(0)
        assert list(getattr(both, name)) == pytest.approx(mean.tolist())
