"""The loss of a safety prompt: that of the authors' step, with less work, and nothing left behind.

The authors' step is written out here: a loop of batches of one without padding, every block of
every pass, and two passes for a request whose answer counts.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from hauberk.analysis.harmfulness import HarmAxis
from hauberk.analysis.twins import last_states
from hauberk.anatomy import anatomy_of
from hauberk.defenses.safety_prompt import Geometry, SafetyPrompt
from hauberk.defenses.safety_prompt_step import Case, FrameLoss, Goal
from hauberk.errors import LayerOutOfRange, ResampledPicture, UnsupportedRequest
from hauberk.hooks import recording
from hauberk.lab import build
from hauberk.pixels import frozen, pixel_input
from hauberk.requests import encode, encode_answered

GEOMETRY = Geometry(96, 96, (12, 10, 16, 14))
ANSWERS = ["it .", "take some wood and shape it .", "first take some clay .", "draw a lamp ."]
TOKENS = 5
EVERY = (True, True, True, True, True, True)
NONE = (False, False, False, False, False, False)
SOME = (True, False, False, True, False, True)


@dataclass(frozen=True)
class Subject:
    """A model, its processor, and six requests to it, of which every second is called harmful."""

    model: Any
    processor: Any
    cases: list[Case]
    layer: int


def subject_of(model, processor, requests, layer):
    cases = [
        Case(request, harmful=index % 2 == 0, answer=ANSWERS[index % len(ANSWERS)])
        for index, request in enumerate(requests[:6])
    ]
    return Subject(model, processor, cases, layer)


@pytest.fixture(scope="module")
def small(any_tiny):
    """In float64, where two ways of computing the same differ by less than they may."""
    model = copy.deepcopy(any_tiny.model).double()
    return subject_of(model, any_tiny.processor, any_tiny.pictured, layer=1)


@pytest.fixture(scope="module")
def llava(tiny):
    return subject_of(tiny.model, tiny.processor, tiny.pictured, layer=1)


@pytest.fixture(scope="module")
def deep(tiny):
    """A LLaVA of 24 blocks, of which the twelfth is scored."""
    size = build.Size(
        vision_width=32, vision_layers=5, patch=24, text_width=32, text_layers=24, vocabulary=400
    )
    model = build.network_of(
        build.FAMILIES["lab-llava"], tiny.processor.tokenizer, size, seed=1
    ).eval()
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.08)
    return subject_of(model, tiny.processor, tiny.pictured, layer=11)


def axis_of(subject, layer=None):
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(anatomy_of(subject.model).hidden_size, generator=generator)
    return HarmAxis(subject.layer if layer is None else layer, weights / weights.norm(), 0.25)


def goal_of(subject, **changes):
    """One of which every hinge is far from satisfied."""
    return replace(Goal(axis_of(subject), high=40.0, low=-40.0, answer_weight=0.3), **changes)


def frame_of(subject, geometry=GEOMETRY):
    generator = torch.Generator().manual_seed(0)
    frame = torch.rand(3, geometry.height, geometry.width, generator=generator)
    return frame.to(subject.model.dtype)


def measured(subject, goal, answered=SOME, cases=None, geometry=GEOMETRY, **options):
    loss = FrameLoss(subject.model, subject.processor, geometry, goal, **options)
    rows = loss.prepare(subject.cases if cases is None else cases, TOKENS)
    return loss(frame_of(subject, geometry), rows, answered[: len(rows)])


def plain(subject, goal, answered=SOME, cases=None, prefix="", geometry=GEOMETRY):
    """The same as the authors do it: the loss, its gradient, and the score of every request."""
    model, processor = subject.model, subject.processor
    cases = subject.cases if cases is None else cases
    kinds, answered = [case.harmful for case in cases], answered[: len(cases)]
    frame = frame_of(subject, geometry).requires_grad_()
    total, scores = torch.zeros(()), []
    for case, counts in zip(cases, answered, strict=True):
        request = replace(case.request, text=prefix + case.request.text)
        inside = geometry.place(request.images[0]) / 255
        blank = SafetyPrompt(torch.zeros_like(inside).byte(), geometry)
        canvas = torch.where(geometry.rim, as_if_rounded(frame), inside)
        fed = pixel_input(processor, canvas[None])
        score = score_of(model, {**encode(processor, [blank.rewrite(request)]), **fed}, goal)
        hinge = goal.high - score if case.harmful else score - goal.low
        total = total + hinge.clamp(min=0) / kinds.count(case.harmful)
        if counts:
            inputs, labels = encode_answered(
                processor, [blank.rewrite(request)], [case.answer], TOKENS
            )
            logits = model(**{**inputs, **fed}).logits[0, -labels.shape[1] - 1 : -1]
            total = total + goal.answer_weight * cross_entropy(logits, labels[0]) / sum(answered)
        if goal.clean_weight:
            clean = encode(processor, [request])
            away = seen_of(model, fed) - seen_of(model, clean).detach()
            total = total + goal.clean_weight * away.norm() / len(cases)
        scores.append(score)
    (gradient,) = torch.autograd.grad(total, frame)
    return total.item(), gradient, torch.stack(scores).detach()


def as_if_rounded(frame):
    return frame + ((frame * 255).round() / 255 - frame).detach()


def score_of(model, inputs, goal):
    with recording(anatomy_of(model).blocks, torch.clone) as states:
        model(**inputs)
    (state,) = states[goal.axis.layer]
    return goal.axis.score(state[0, -1])


def seen_of(model, inputs):
    """The mean of what the projector is given of one picture: not the tower's class token."""
    known = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    known["pixel_values"] = known["pixel_values"].to(model.dtype)
    found = model.model.get_image_features(**known, return_dict=True, output_hidden_states=True)
    if model.config.model_type == "llava":
        return found.hidden_states[model.config.vision_feature_layer][0, 1:].mean(0)
    patches = found.last_hidden_state
    if model.config.model_type == "internvl":
        side = int((patches.shape[1] - 1) ** 0.5)
        square = patches[:, 1:].unflatten(1, (side, side))
        patches = model.model.pixel_shuffle(square, model.config.downsample_ratio)
    return patches.flatten(0, -2).mean(0)


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_same(found, expected, of_largest=1e-6):
    loss, gradient, scores = expected
    largest = gradient.abs().max().item()
    assert largest > 0
    assert found.loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(found.gradient, gradient, atol=of_largest * largest, rtol=0)
    torch.testing.assert_close(found.scores, scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("answered", [NONE, SOME, EVERY])
def test_loss_and_gradient_of_24_blocks_are_those_of_the_authors_step(deep, answered):
    """In float32, whose rounding of the gradient is up to 1.5e-6 of its largest entry here."""
    goal = goal_of(deep)
    assert_same(measured(deep, goal, answered), plain(deep, goal, answered), of_largest=4e-6)


@pytest.mark.parametrize(("layer", "answered"), [(0, NONE), (1, SOME), (3, SOME), (3, EVERY)])
def test_loss_and_gradient_are_those_of_the_authors_step_in_every_family(small, answered, layer):
    goal = goal_of(small, axis=axis_of(small, layer))
    assert_same(measured(small, goal, answered), plain(small, goal, answered))


@pytest.mark.parametrize("harmful", [True, False])
@pytest.mark.parametrize("answered", [NONE, SOME])
def test_a_batch_of_one_kind_counts_that_kind_alone(small, harmful, answered):
    cases = [case for case in small.cases if case.harmful is harmful]
    goal = goal_of(small)
    found = measured(small, goal, answered, cases)
    assert_same(found, plain(small, goal, answered, cases))
    there, absent = found.hinge_harmful, found.hinge_harmless
    there, absent = (there, absent) if harmful else (absent, there)
    assert there > 0
    assert absent != absent
    assert (found.answer > 0) == (answered is SOME)


def test_the_mean_patch_and_a_prefix_count_where_they_are_asked_for(small):
    goal = goal_of(small, clean_weight=0.7)
    found = measured(small, goal, prefix="what is this ? ")
    assert_same(found, plain(small, goal, prefix="what is this ? "))
    assert found.loss > measured(small, goal_of(small), prefix="what is this ? ").loss
    assert found.loss != measured(small, goal).loss


def test_hinges_that_are_satisfied_add_neither_loss_nor_gradient(small):
    scores = measured(small, goal_of(small)).scores
    of_kind = [scores[k::2].sort().values for k in (0, 1)]  # harmful, harmless
    high, low = (0.9 * values[1] + 0.1 * values[2] for values in of_kind)
    goal = goal_of(small, high=high.item(), low=low.item())
    found = measured(small, goal)
    assert_same(found, plain(small, goal))
    short, over = (high - of_kind[0]).clamp(min=0), (of_kind[1] - low).clamp(min=0)
    assert found.hinge_harmful == pytest.approx(short.mean().item(), rel=1e-3)
    assert found.hinge_harmless == pytest.approx(over.mean().item(), rel=1e-3)


def test_where_nothing_is_to_be_gained_there_is_no_backward_pass(small):
    done = goal_of(small, high=-1000.0, low=1000.0)
    found = measured(small, done, NONE)
    assert (found.loss, found.backward, found.answer == found.answer) == (0, 0, False)
    assert (found.hinge_harmful, found.hinge_harmless) == (0, 0)
    assert not found.gradient.any()
    assert measured(small, done, SOME).backward == 1  # of those answered
    assert measured(small, replace(done, answer_weight=0.0), SOME).backward == 0
    undone = goal_of(small)
    backward = [measured(small, undone, answered).backward for answered in (NONE, SOME, EVERY)]
    assert backward == [1, 2, 1]


def test_a_canvas_of_another_size_is_measured_where_the_processor_feeds_it(small):
    """In tiles and a thumbnail, or in more patches; LLaVA reads at one size alone."""
    geometry = Geometry(96, 192, (12, 10, 16, 14))
    if small.model.config.model_type == "llava":
        with pytest.raises(ResampledPicture, match="96 x 192 pixels"):
            measured(small, goal_of(small), geometry=geometry)
        return
    goal = goal_of(small)
    expected = plain(small, goal, geometry=geometry)
    assert_same(measured(small, goal, geometry=geometry), expected)


def test_pixels_inside_of_the_frame_get_no_gradient_and_those_of_it_do(small):
    for answered in (NONE, SOME, EVERY):
        gradient = measured(small, goal_of(small, clean_weight=0.5), answered).gradient
        assert not gradient[:, ~GEOMETRY.rim].any()
        assert (gradient[:, GEOMETRY.rim] != 0).float().mean() > 0.99


def test_a_padded_batch_is_the_mean_of_its_rows_alone(small):
    """Of prompts and answers of several lengths."""
    cases = [replace(case, harmful=True) for case in small.cases]
    loss = FrameLoss(small.model, small.processor, GEOMETRY, goal_of(small))
    rows = loss.prepare(cases, TOKENS)
    assert len({len(row.answer) for row in rows}) > 1
    assert len({len(row.prompt["input_ids"]) for row in rows}) > 1
    for answered in (EVERY, NONE):
        whole = loss(frame_of(small), rows, answered)
        alone = [loss(frame_of(small), [row], answered[:1]) for row in rows]
        assert whole.loss == pytest.approx(sum(one.loss for one in alone) / len(rows), rel=1e-6)
        gradient = torch.stack([one.gradient for one in alone]).mean(0)
        largest = gradient.abs().max().item()
        torch.testing.assert_close(whole.gradient, gradient, atol=1e-6 * largest, rtol=0)
        torch.testing.assert_close(whole.scores, torch.cat([one.scores for one in alone]))


def test_a_score_is_that_of_the_last_prompt_position_of_the_framed_picture(llava):
    """Whatever is answered, and with the picture as it is deployed through the real processor."""
    loss = FrameLoss(llava.model, llava.processor, GEOMETRY, goal_of(llava))
    frame = frame_of(llava)
    prompt = SafetyPrompt((frame * 255).round().to(torch.uint8), GEOMETRY)
    requests = [prompt.rewrite(case.request) for case in llava.cases]
    states = last_states(llava.model, llava.processor, requests)[:, llava.layer]
    expected = loss.goal.axis.score(states)
    for answer in ("it .", "take some wood and shape it ."):
        rows = loss.prepare([replace(case, answer=answer) for case in llava.cases], TOKENS)
        for answered in (NONE, EVERY):
            scores = loss(frame, rows, answered).scores
            torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


def test_of_an_answer_no_more_than_so_many_tokens_count(llava):
    loss = FrameLoss(llava.model, llava.processor, GEOMETRY, goal_of(llava))
    whole = [row.answer.tolist() for row in loss.prepare(llava.cases, 100)]
    assert len(set(map(len, whole))) > 1
    for tokens in (1, 3):
        rows = loss.prepare(llava.cases, tokens)
        assert [row.answer.tolist() for row in rows] == [ids[:tokens] for ids in whole]


def test_a_frame_is_measured_as_the_8_bit_picture_that_is_deployed(llava):
    loss = FrameLoss(llava.model, llava.processor, GEOMETRY, goal_of(llava))
    rows, frame = loss.prepare(llava.cases, TOKENS), frame_of(llava)
    whole = loss(frame, rows, SOME)
    stored = loss((frame * 255).round() / 255, rows, SOME)
    assert whole.loss == pytest.approx(stored.loss, rel=1e-6)
    torch.testing.assert_close(whole.gradient, stored.gradient)
    canvas = loss.canvas(frame, rows) * 255
    torch.testing.assert_close(canvas, canvas.round(), atol=1e-4, rtol=0)


def calls_of(modules, work):
    """How often each module is run, and the shapes of what it is given first."""
    calls, shapes = [0] * len(modules), [[] for _ in modules]

    def count(index):
        def hook(_, given, *rest):
            calls[index] += 1
            shapes[index].append(tuple(given[0].shape) if given else ())

        return hook

    handles = [m.register_forward_pre_hook(count(i)) for i, m in enumerate(modules)]
    try:
        work()
    finally:
        for handle in handles:
            handle.remove()
    return calls, shapes


def test_no_block_is_run_that_does_not_count_and_the_head_sees_answers_alone(small):
    loss = FrameLoss(small.model, small.processor, GEOMETRY, goal_of(small))
    rows, frame = loss.prepare(small.cases, TOKENS), frame_of(small)
    blocks, head = anatomy_of(small.model).blocks, small.model.lm_head
    modules = [*blocks, head, anatomy_of(small.model).vision_tower]
    calls, _ = calls_of(modules, lambda: loss(frame, rows, NONE))
    assert calls == [1, 1, 0, 0, 0, 1]
    calls, shapes = calls_of(modules, lambda: loss(frame, rows, EVERY))
    assert calls == [1, 1, 1, 1, 1, 1]
    places = {
        len(row.prompt["input_ids"]) - 1 + place for row in rows for place in range(len(row.answer))
    }
    assert shapes[-2] == [(len(rows), len(places), anatomy_of(small.model).hidden_size)]
    calls, _ = calls_of(modules, lambda: loss(frame, rows, SOME))
    assert calls == [2, 2, 1, 1, 1, 2]


def test_weights_get_no_gradient_whether_they_are_frozen_or_not(llava):
    weights = list(llava.model.parameters())
    flags = [weight.requires_grad for weight in weights]
    free = measured(llava, goal_of(llava))
    with frozen(llava.model):
        held = measured(llava, goal_of(llava))
    torch.testing.assert_close(held.gradient, free.gradient)
    assert held.loss == free.loss
    assert all(weight.grad is None for weight in weights)
    assert [weight.requires_grad for weight in weights] == flags


def test_it_works_where_gradients_are_switched_off(llava):
    with torch.no_grad():
        found = measured(llava, goal_of(llava))
    assert torch.equal(found.gradient, measured(llava, goal_of(llava)).gradient)
    assert not found.gradient.requires_grad


@pytest.mark.parametrize("answered", [NONE, SOME])
@pytest.mark.parametrize("part", ["vision_tower", "projector", "decoder"])
def test_nothing_is_left_on_the_model_also_after_an_error(small, answered, part):
    inputs = encode(small.processor, [small.cases[0].request])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.no_grad():
        before, hooks = small.model(**inputs).logits, hooks_of(small.model)
    goal = goal_of(small, clean_weight=0.5)
    loss = FrameLoss(small.model, small.processor, GEOMETRY, goal)
    rows = loss.prepare(small.cases, TOKENS)
    loss(frame_of(small), rows, answered)
    assert hooks_of(small.model) == hooks

    def fail(*_):
        raise RuntimeError("on purpose")

    with getattr(anatomy_of(small.model), part).register_forward_hook(fail):
        with pytest.raises(RuntimeError, match="on purpose"):
            loss(frame_of(small), rows, EVERY)
        if part != "decoder":  # which a pass that stops in it does not finish
            with pytest.raises(RuntimeError, match="on purpose"):
                loss(frame_of(small), rows, NONE)
    assert hooks_of(small.model) == hooks
    with torch.no_grad():
        assert torch.equal(small.model(**inputs).logits, before)


def test_half_precision_measures_the_same_but_for_its_rounding(llava):
    goal, exact = goal_of(llava), measured(llava, goal_of(llava))
    cast = measured(llava, goal, autocast=torch.bfloat16)
    half = replace(llava, model=copy.deepcopy(llava.model).bfloat16())
    loss = FrameLoss(half.model, half.processor, GEOMETRY, goal)
    rows = loss.prepare(half.cases, TOKENS)
    for found in (cast, loss(frame_of(llava), rows, SOME)):
        assert found.gradient.dtype == found.scores.dtype == torch.float32
        assert found.loss == pytest.approx(exact.loss, rel=0.02)
        likeness = torch.cosine_similarity(found.gradient.flatten(), exact.gradient.flatten(), 0)
        assert likeness > 0.9


def test_cases_that_cannot_be_trained_on_are_refused_with_the_reason(llava):
    loss = FrameLoss(llava.model, llava.processor, GEOMETRY, goal_of(llava))
    case, image = llava.cases[0], llava.cases[0].request.images[0]
    for images in ((), (image, image)):
        wrong = replace(case, request=replace(case.request, images=images))
        with pytest.raises(UnsupportedRequest, match=f"has {len(images)} pictures"):
            loss.prepare([case, wrong], TOKENS)
    for cases in ([replace(case, answer="")], [case, replace(case, answer="")]):
        with pytest.raises(UnsupportedRequest, match=r"the answer '' to .* has no token"):
            loss.prepare(cases, TOKENS)
    other = FrameLoss(llava.model, llava.processor, Geometry(96, 100, (9, 9, 9, 9)), goal_of(llava))
    with pytest.raises(ResampledPicture, match="96 x 100 pixels"):
        other.prepare([case], TOKENS)
    with pytest.raises(LayerOutOfRange, match=r"\[4\] are outside 0..3"):
        FrameLoss(llava.model, llava.processor, GEOMETRY, goal_of(llava, axis=axis_of(llava, 4)))
    assert loss.prepare([], TOKENS) == []
