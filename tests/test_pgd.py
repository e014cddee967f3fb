"""Attacked pictures: near the clean ones, never worse, and what is stored is what was measured."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from hauberk.attacks.pgd import Pgd, attack
from hauberk.errors import ResampledPicture, UnknownFamily
from hauberk.pixels import pixel_input
from hauberk.requests import Request, encode, encode_answered, respond

ANSWERS = [
    "take some wood and shape it .",
    "to draw a lamp , take some glass and sketch it .",
    "first take some clay .",
    "it .",
]
WEAK = Pgd(epsilon=8, step_size=4, steps=3, tokens=5)


@pytest.fixture(scope="module")
def asked(any_tiny):
    """Requests whose prompts differ in length, each with the answer wanted to it."""
    requests = any_tiny.pictured[: len(ANSWERS)]
    assert len({len(request.text) for request in requests}) > 1
    return requests, ANSWERS


@pytest.fixture(scope="module")
def run(any_tiny, asked):
    def go(setting=WEAK, requests=asked[0], answers=asked[1], **options):
        return attack(any_tiny.model, any_tiny.processor, requests, answers, setting, **options)

    return go


@pytest.fixture(scope="module")
def found(run):
    return run()


def values(image):
    return np.asarray(image).astype(int)


def moved(attacked, requests):
    """How far each picture is from its clean one, at most and on average."""
    pairs = zip(attacked, requests, strict=True)
    apart = [abs(values(each.image) - values(request.images[0])) for each, request in pairs]
    return max(map(np.max, apart)), np.mean(apart)


@torch.no_grad()
def losses_of(tiny, requests, answers, tokens):
    """The loss of each row alone, through the real processor."""
    losses = []
    for request, answer in zip(requests, answers, strict=True):
        inputs, labels = encode_answered(tiny.processor, [request], [answer], tokens)
        logits = tiny.model(**inputs).logits[:, -labels.shape[1] - 1 : -1]
        losses.append(cross_entropy(logits[0], labels[0]).item())
    return losses


@torch.no_grad()
def runner_up(tiny, request):
    """The likeliest word of one token that the model does not begin its answer with anyway."""
    ranked = tiny.model(**encode(tiny.processor, [request])).logits[0, -1].argsort().flip(0)
    for token in ranked[1:].tolist():
        word = tiny.processor.tokenizer.decode([token]).strip()
        if word.isalpha() and word.isascii():
            _, labels = encode_answered(tiny.processor, [request], [word], 2)
            if labels.tolist() == [[token]]:
                return word
    raise AssertionError("no word of one token")


@torch.no_grad()
def judgements(tiny, request, images, answer):
    """For each picture whether the first wanted token is the likeliest, and how likely it is."""
    shown = [replace(request, images=[image]) for image in images]
    inputs, labels = encode_answered(tiny.processor, shown, [answer] * len(shown), 1)
    logits = tiny.model(**inputs).logits[:, -2]
    likely = logits.softmax(-1).gather(1, labels)[:, 0]
    return list(zip((logits.argmax(-1) == labels[:, 0]).tolist(), likely.tolist(), strict=True))


def with_pictures(requests, attacked):
    return [replace(r, images=[each.image]) for r, each in zip(requests, attacked, strict=True)]


@pytest.mark.parametrize("epsilon", [1, 8, 255])
def test_a_picture_stays_within_the_ball_and_moves(run, asked, epsilon):
    attacked = run(replace(WEAK, epsilon=epsilon, step_size=max(1, epsilon // 2)))
    farthest, mean = moved(attacked, asked[0])
    assert farthest <= epsilon
    assert mean > 0
    assert all(each.image.mode == "RGB" for each in attacked)


def test_a_picture_at_the_ends_of_the_scale_does_not_leave_it(run, asked):
    """Values beyond 255 would wrap around when they are stored in 8 bits."""
    ends = Image.fromarray(np.indices((96, 96)).sum(0).astype(np.uint8) % 2 * 255).convert("RGB")
    requests = [replace(request, images=[ends]) for request in asked[0]]
    farthest, mean = moved(run(requests=requests), requests)
    assert 0 < farthest <= WEAK.epsilon
    assert mean > 0


def test_no_loss_rises_but_where_a_picture_is_followed_instead_and_some_fall(found):
    assert all(e.loss_after <= e.loss_before or e.followed > e.followed_before for e in found)
    assert sum(each.loss_after < each.loss_before for each in found) > len(found) / 2


@pytest.mark.parametrize("confidence", [0.0, 0.02, 1.0])
def test_once_a_picture_is_followed_or_done_the_one_kept_is(any_tiny, run, monkeypatch, confidence):
    """Replayed: every picture of a descent in strides is judged through the real processor."""
    strides = Pgd(epsilon=64, step_size=32, steps=8, tokens=1, confidence=confidence)
    reached = 0
    for request in any_tiny.pictured[:4]:
        answer = runner_up(any_tiny, request)
        seen = []

        def spy(processor, pixels, seen=seen):
            seen.append((255 * pixels.detach()[0]).round().to(torch.uint8).permute(1, 2, 0))
            return pixel_input(processor, pixels)

        monkeypatch.setattr("hauberk.attacks.pgd.pixel_input", spy)
        (found,) = run(strides, [request], [answer])
        images = [Image.fromarray(each.numpy()) for each in seen]
        judged = judgements(any_tiny, request, images, answer)
        followed = [follows for follows, _ in judged]
        done = [follows and likely >= confidence for follows, likely in judged]
        kept = [image.tobytes() for image in images].index(found.image.tobytes())
        assert found.followed == followed[kept] == any(followed)
        assert done[kept] == any(done)
        assert not any(done[:-1])  # there it ends
        reached += any(followed)
    assert reached


def test_gradients_reach_a_lower_loss_than_as_many_draws_of_noise(run, found):
    """A gradient that were zero, or that stopped at the processor, would leave noise alone."""
    drawn = [run(replace(WEAK, steps=0, seed=seed)) for seed in range(WEAK.steps + 1)]
    noise = [min(each.loss_after for each in row) for row in zip(*drawn, strict=True)]
    assert sum(each.loss_after for each in found) < sum(noise)


def test_more_steps_reach_a_lower_loss(run, found):
    more = run(replace(WEAK, steps=WEAK.steps + 6))
    assert all(m.loss_after <= f.loss_after for m, f in zip(more, found, strict=True))
    assert sum(each.loss_after for each in more) < sum(each.loss_after for each in found)


def test_the_losses_are_those_of_the_stored_pictures_through_the_real_processor(
    any_tiny, asked, found
):
    requests, answers = asked
    before = losses_of(any_tiny, requests, answers, WEAK.tokens)
    after = losses_of(any_tiny, with_pictures(requests, found), answers, WEAK.tokens)
    assert [each.loss_before for each in found] == pytest.approx(before, abs=1e-3)
    assert [each.loss_after for each in found] == pytest.approx(after, abs=1e-3)


def test_without_a_ball_the_picture_is_untouched(run, asked):
    attacked = run(replace(WEAK, epsilon=0))
    assert moved(attacked, asked[0]) == (0, 0)
    for each in attacked:
        assert each.loss_after == pytest.approx(each.loss_before, abs=1e-4)


def test_the_same_seed_gives_the_same_pictures_and_another_seed_others(run, found):
    def bytes_of(attacked):
        return [each.image.tobytes() for each in attacked]

    assert run() == found
    assert not set(bytes_of(run(replace(WEAK, seed=1)))) & set(bytes_of(found))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_row_does_not_depend_on_its_batch(run, asked, found, batch_size):
    """But for rounding, which turns the sign of a gradient that is almost zero."""
    done = []
    again = run(batch_size=batch_size, progress=done.append)
    assert (sum(done), max(done)) == (len(found), batch_size)
    for one, other in zip(again, found, strict=True):
        assert one.loss_before == pytest.approx(other.loss_before, abs=1e-3)
        assert one.loss_after == pytest.approx(other.loss_after, abs=0.05)
        assert (values(one.image) == values(other.image)).mean() > 0.95


def test_what_the_model_says_anyway_is_done_at_once_and_left_as_it_was(any_tiny, run, asked):
    requests = asked[0]
    said = respond(any_tiny.model, any_tiny.processor, requests, max_new_tokens=8)
    wanted = [(r, a.text) for r, a in zip(requests, said, strict=True) if a.text]
    assert wanted
    requests, answers = zip(*wanted, strict=True)
    attacked = run(replace(WEAK, tokens=1), requests, answers)
    follows = [each.followed_before for each in attacked]
    assert any(follows)
    for request, each in zip(requests, attacked, strict=True):
        if each.followed_before:
            assert each.followed
            assert each.loss_after == each.loss_before
            assert values(each.image).tolist() == values(request.images[0]).tolist()


def test_a_model_that_follows_says_the_wanted_token_and_surely_where_that_is_asked(
    any_tiny, run, asked
):
    requests, answers = asked
    _, labels = encode_answered(any_tiny.processor, requests, answers, 1)
    wanted = [text.strip() for text in any_tiny.processor.batch_decode(labels)]
    strong, likely = Pgd(epsilon=255, step_size=16, steps=25, tokens=1), {}
    for confidence in (0.0, 0.9):
        attacked = run(replace(strong, confidence=confidence))
        shown = with_pictures(requests, attacked)
        said = respond(any_tiny.model, any_tiny.processor, shown, max_new_tokens=1)
        followed = [each.followed for each in attacked]
        assert followed == [a.text == text for a, text in zip(said, wanted, strict=True)]
        likely[confidence] = max(np.exp(-e.loss_after) for e in attacked if e.followed)
    assert likely[0.9] > likely[0.0]


def test_weights_and_their_flags_are_as_they_were_also_after_an_error(any_tiny, run, asked):
    before = {name: value.clone() for name, value in any_tiny.model.state_dict().items()}
    flags = [weight.requires_grad for weight in any_tiny.model.parameters()]

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(batch_size=1, progress=stop)
    small = [Request("what ?", [Image.new("RGB", (30, 50))])]
    with pytest.raises(ResampledPicture, match="50 x 30 pixels"):
        run(requests=small, answers=["it ."])
    for name, value in any_tiny.model.state_dict().items():
        assert torch.equal(value, before[name])
    weights = list(any_tiny.model.parameters())
    assert [weight.requires_grad for weight in weights] == flags
    assert all(weight.grad is None for weight in weights)
    assert not any_tiny.model.training


def test_it_works_where_gradients_are_switched_off(run, found):
    with torch.no_grad():
        assert run() == found


def test_requests_without_exactly_one_picture_of_one_size_are_refused(tiny):
    red, small = Image.new("RGB", (96, 96), "red"), Image.new("RGB", (48, 48))
    for pictures in ([[]], [[red, red]], [[red], [small]]):
        requests = [Request("what ?", images) for images in pictures]
        with pytest.raises(ValueError, match="needs one picture, and all pictures one size"):
            attack(tiny.model, tiny.processor, requests, ["it ."] * len(requests), WEAK)
    with pytest.raises(ValueError, match="zip"):
        attack(tiny.model, tiny.processor, tiny.pictured[:2], ["it ."], WEAK)


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("epsilon", -1, "a whole number from 0 to 255"),
        ("epsilon", 256, "a whole number from 0 to 255"),
        ("epsilon", 8.5, "a whole number from 0 to 255"),
        ("step_size", 0, "a whole number from 1 to 255"),
        ("steps", -3, "a whole number of 0 or more"),
        ("tokens", 0, "a whole number of 1 or more"),
        ("confidence", 2.0, "a number from 0 to 1"),
        ("confidence", float("nan"), "a number from 0 to 1"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_what_is_right(name, wrong, right):
    with pytest.raises(ValueError, match=f"{name}: {wrong} is wrong; give {right}"):
        replace(WEAK, **{name: wrong})


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_answer_is_refused_before_anything_is_attacked(tiny, empty):
    with pytest.raises(ValueError, match=r"the answers at \[1\] are empty.*give each request"):
        attack(tiny.model, tiny.processor, tiny.pictured[:2], ["it .", empty], WEAK, batch_size=1)


def test_a_processor_whose_inputs_the_attack_cannot_repeat_is_refused(tiny):
    processor = deepcopy(tiny.processor)
    processor.image_processor.do_pad = True
    processor.image_processor.pad_size = {"height": 120, "width": 120}
    with pytest.raises(UnknownFamily, match=r"of shape .* instead of"):
        attack(tiny.model, processor, tiny.pictured[:1], ["it ."], WEAK)


def test_nothing_is_attacked_in_nothing(tiny):
    assert attack(tiny.model, tiny.processor, [], [], WEAK) == []
