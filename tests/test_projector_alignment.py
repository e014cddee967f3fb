"""The alignment terms: their values, their fading, and above all that they have a gradient."""

from math import e

import pytest
import torch

from hauberk.defenses.alignment import (
    AlignmentSetting,
    TextGuidedAlignmentLoss,
    authors_layers,
    pooled,
)


def states(seed=0, samples=3, layers=2, width=8):
    return torch.randn(samples, layers, width, generator=torch.Generator().manual_seed(seed))


def loss_of(**setting):
    return TextGuidedAlignmentLoss(AlignmentSetting((0, 1), **setting))


def test_the_pair_term_is_least_where_picture_and_caption_agree():
    same = states()
    found = loss_of(pair=0.25)(same, 3 * same)
    torch.testing.assert_close(found.loss, torch.tensor(0.25 / e))
    assert loss_of(pair=0.25)(states(1), same).loss > found.loss


def test_the_margin_term_is_one_where_the_retrieved_text_is_as_near_as_the_picture():
    same = states()
    found = loss_of(pair=0.0, margin=0.1)(same, same, same)
    torch.testing.assert_close(found.loss, torch.tensor(0.1))
    torch.testing.assert_close(found.margin, torch.tensor(1.0))


def test_the_margin_term_is_least_where_the_retrieved_text_points_away():
    same = states()
    found = loss_of(pair=0.0, margin=0.1)(same, same, -same)
    torch.testing.assert_close(found.loss, torch.tensor(0.1 / e**2))


def test_the_terms_are_those_of_the_formula():
    image, caption, retrieved = states(1), states(2), states(3)
    cos = torch.nn.functional.cosine_similarity
    near, rival = cos(image, caption, dim=-1), cos(retrieved, caption, dim=-1)
    found = loss_of(pair=0.25, margin=0.1)(image, caption, retrieved, progress=0.2)
    wanted = 0.8 * 0.25 * torch.exp(-near).mean() + 0.8**2 * 0.1 * torch.exp(rival - near).mean()
    torch.testing.assert_close(found.loss, wanted)
    torch.testing.assert_close(found.image_caption, near.mean(0))
    torch.testing.assert_close(found.retrieved_caption, rival.mean(0))


def test_the_pair_term_fades_in_the_first_order_and_the_margin_term_in_the_second():
    fading = loss_of(pair=0.25, margin=0.1)
    assert fading.weights(0.0) == (0.25, 0.1)
    assert fading.weights(0.5) == pytest.approx((0.125, 0.025))
    assert fading.weights(1.0) == (0.0, 0.0)
    assert loss_of(pair=0.25, margin=0.1, decay=False).weights(0.9) == (0.25, 0.1)


def test_the_form_of_the_logarithm():
    image, caption = states(1), states(1) + 0.5 * states(2)
    near = torch.nn.functional.cosine_similarity(image, caption, dim=-1)
    assert near.min() > 0
    found = loss_of(pair=1.0, margin=1.0, form="log")(image, caption, caption)
    wanted = (-near.log()).mean() + torch.log1p(torch.exp(1 - near)).mean()
    torch.testing.assert_close(found.loss, wanted)


def test_a_cosine_below_zero_has_a_finite_logarithm():
    found = loss_of(form="log")(states(1), -states(1))
    assert found.loss.isfinite()


@pytest.mark.parametrize("form", ["exp", "log"])
@pytest.mark.parametrize("term", ["pair", "margin"])
def test_each_term_has_a_gradient(term, form):
    image = (states(2) + 0.1 * states(1)).requires_grad_()
    weights = {"pair": 0.0, "margin": 0.0, term: 1.0}
    loss_of(form=form, **weights)(image, states(2), states(3)).loss.backward()
    assert image.grad.norm() > 0


def test_centring_takes_away_what_all_states_share():
    shared = 100 * torch.ones(2, 8)
    image, caption = states(1) + shared, states(2) + shared
    setting = AlignmentSetting((0, 1), centred=True)
    plain = loss_of()(image, caption)
    centred = TextGuidedAlignmentLoss(setting, shared)(image, caption)
    assert plain.image_caption.min() > 0.99
    torch.testing.assert_close(
        centred.image_caption, loss_of()(states(1), states(2)).image_caption, atol=1e-4, rtol=0
    )


def test_centring_needs_a_centre():
    with pytest.raises(ValueError, match="`centre`"):
        TextGuidedAlignmentLoss(AlignmentSetting((0,), centred=True))


def test_samples_with_an_empty_span_are_dropped():
    image, caption = states(1), states(2)
    there = torch.tensor([True, False, True])
    image[1] = torch.nan
    found = loss_of()(image, caption, there=there)
    torch.testing.assert_close(found.loss, loss_of()(image[there], caption[there]).loss)


def test_a_batch_with_nothing_to_align_costs_nothing_and_is_not_nan():
    image = states(1).requires_grad_()
    none = torch.zeros(3, dtype=torch.bool)
    found = loss_of()(image, states(2), states(3), there=none)
    found.loss.backward()
    assert found.loss == 0
    assert not image.grad.any()
    assert found.pair.isnan()


def test_the_margin_counts_where_a_text_was_retrieved():
    image, caption, retrieved = states(1), states(2), states(3)
    told = torch.tensor([False, True, False])
    found = loss_of(pair=0.0, margin=1.0)(image, caption, retrieved, retrieved_there=told)
    one = loss_of(pair=0.0, margin=1.0)(image[1:2], caption[1:2], retrieved[1:2])
    torch.testing.assert_close(found.loss, one.loss)


def test_samples_count_by_their_weight():
    image, caption = states(1), states(2)
    found = loss_of()(image, caption, weights=torch.tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(found.loss, loss_of()(image[:2], caption[:2]).loss)


def test_half_precision_is_summed_in_float32():
    image, caption = states(1).bfloat16(), states(2).bfloat16()
    found = loss_of()(image, caption)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, loss_of()(image.float(), caption.float()).loss)


def test_states_are_averaged_over_their_span_alone():
    h = torch.arange(12.0).view(2, 3, 2)
    span = torch.tensor([[True, False, True], [False, False, False]])
    assert torch.equal(pooled(h, span), torch.tensor([[2.0, 3.0], [0.0, 0.0]]))


def test_the_authors_layers_of_32_blocks_are_those_of_their_code():
    assert authors_layers(32) == tuple(range(9, 18))  # outputs of blocks 10..18, counted from 1
    assert authors_layers(6) == (1, 2)
    assert authors_layers(1) == (0,)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"position": "middle"}, "'middle' is not one of image, decision, question"),
        ({"form": "sin"}, "'sin' is not one of exp, log"),
        ({"target": "x"}, "'x' is not one of reference, current"),
        ({"pair": -1}, "pair -1"),
        ({"layers": ()}, "give one block"),
    ],
)
def test_a_wrong_setting_is_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        AlignmentSetting(**{"layers": (0,)} | wrong)


def test_the_divergence_is_nothing_where_both_say_the_same_and_is_that_of_the_formula():
    head = states(5)[0, 0].new_tensor(torch.randn(11, states().shape[-1]).tolist())
    loss = TextGuidedAlignmentLoss(
        AlignmentSetting((1,), form="kl", pair=1.0, margin=0.0, decay=False),
        read=lambda found: found @ head.T,
    )
    image, caption = states(1)[:, :1], states(2)[:, :1]
    assert loss(caption, caption).loss.item() == pytest.approx(0, abs=1e-6)
    wanted, said = ((each[:, 0] @ head.T).log_softmax(-1) for each in (caption, image))
    apart = (wanted.exp() * (wanted - said)).sum(-1).mean()
    torch.testing.assert_close(loss(image, caption).loss, apart)


def test_the_divergence_needs_a_position_of_words_and_a_reading():
    with pytest.raises(ValueError, match="no word follows an image's position"):
        AlignmentSetting((1,), form="kl", position="image")
    with pytest.raises(ValueError, match="give `read`"):
        TextGuidedAlignmentLoss(AlignmentSetting((1,), form="kl"))
