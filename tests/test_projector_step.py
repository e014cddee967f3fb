"""The loss of a projector: gradients in every family, spans, and features that are kept."""

from dataclasses import replace

import pytest
import torch

from hauberk.analysis.states import image_states, text_states
from hauberk.analysis.twins import last_states
from hauberk.anatomy import anatomy_of
from hauberk.defenses.alignment import AlignmentSetting
from hauberk.defenses.projector import Retrieved
from hauberk.defenses.projector_step import (
    Lesson,
    ProjectorLoss,
    image_span,
    prompt_span,
)
from hauberk.errors import LayerOutOfRange, UnsupportedRequest
from hauberk.pixels import frozen
from hauberk.requests import Request, encode

LAYERS = (1, 2)
CAPTIONS = ("there is a lamp red .", "there is a ball blue and a cup red .", "it says ball .")
BESIDE = "there is a knife green ."


@pytest.fixture
def lessons(any_tiny):
    pictured = any_tiny.pictured
    captioned = [
        Lesson(request, caption=caption, retrieved=BESIDE)
        for request, caption in zip(pictured, CAPTIONS, strict=False)
    ]
    return [
        *captioned,
        Lesson(pictured[3], answer="this is a lamp red ."),
        Lesson(pictured[4], answer="it says ball .", caption="it says ball ."),
        Lesson(any_tiny.plain[0], answer="take some steel and shape it ."),
    ]


def loss_of(tiny, *, retrieved=None, features=2**31, whole=False, **setting):
    alignment = AlignmentSetting(**{"layers": LAYERS, "decay": False} | setting)
    return ProjectorLoss(
        tiny.model, tiny.processor, alignment, retrieved, features=features, whole=whole
    )


def gradients(tiny, loss, rows, progress=0.0):
    """Loss, and gradients of what connects tower and decoder."""
    connectors = anatomy_of(tiny.model).connectors.values()
    weights = [weight for module in connectors for weight in module.parameters()]
    with frozen(tiny.model):
        for weight in weights:
            weight.requires_grad_(True)
        found = loss(rows, progress)
        return found, torch.autograd.grad(found.loss, weights)


@pytest.mark.parametrize("position", ["image", "decision", "question"])
@pytest.mark.parametrize("term", ["pair", "margin"])
def test_each_term_has_a_gradient_by_the_projector(any_tiny, lessons, term, position):
    weights = {"pair": 0.0, "margin": 0.0, term: 1.0}
    loss = loss_of(any_tiny, retrieved=Retrieved("before", "{}"), position=position, **weights)
    found, slopes = gradients(any_tiny, loss, loss.prepare(lessons[:3], 8))
    assert found.aligned is not None
    assert found.loss.item() == pytest.approx(getattr(found.aligned, term).item())
    assert all(slope.norm() > 0 for slope in slopes[:1])
    assert torch.stack([slope.norm() for slope in slopes]).norm() > 1e-6


@pytest.mark.parametrize("position", ["image", "decision", "question"])
def test_kept_features_give_the_loss_and_the_gradient_of_the_tower(any_tiny, lessons, position):
    found = []
    for features in (2**31, 0):
        loss = loss_of(any_tiny, features=features, position=position)
        rows = loss.prepare(lessons, 8)
        assert loss._features.split == bool(features)
        found.append(gradients(any_tiny, loss, rows))
    (kept, kept_slopes), (run, run_slopes) = found
    torch.testing.assert_close(kept.loss, run.loss)
    for one, other in zip(kept_slopes, run_slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_what_there_is_no_memory_for_changes_no_bit(any_tiny, lessons):
    sizes = (2**31, 1)  # one byte: nothing is kept, and projector and tower still run apart
    found = []
    for features in sizes:
        loss = loss_of(any_tiny, features=features)
        rows = loss.prepare(lessons, 8)
        loss(rows, 0.0)
        found.append(loss(rows, 0.0).loss)
    assert torch.equal(*found)


def test_pictures_are_looked_at_once(any_tiny, lessons, monkeypatch):
    loss = loss_of(any_tiny)
    rows = loss.prepare(lessons, 8)
    loss(rows, 0.0)
    monkeypatch.setattr(loss._features, "_look", lambda *_: pytest.fail("looked again"))
    loss(rows, 0.0)


def test_pictures_of_several_sizes_keep_their_features_apart(any_tiny):
    wide = any_tiny.varied[0]
    rows = [Lesson(request, answer="a lamp .") for request in (*any_tiny.pictured[:2], wide)]
    losses = []
    for features in (2**31, 0):
        loss = loss_of(any_tiny, features=features)
        losses.append(loss(loss.prepare(rows, 8), 0.0).loss)
    torch.testing.assert_close(*losses)


@torch.no_grad()
def test_the_states_of_a_decision_are_those_of_the_last_prompt_position(any_tiny, lessons):
    loss = loss_of(any_tiny)
    rows = loss.prepare(lessons, 8)
    model, processor = any_tiny.model, any_tiny.processor
    for group, found in ((rows[:3], loss._silent(rows[:3])), (rows[4:5], loss._answered(rows)[0])):
        for row, image in zip(group, found[0][-len(group) :], strict=True):
            wanted = last_states(model, processor, [row.lesson.request])[0, list(LAYERS)]
            torch.testing.assert_close(image, wanted, rtol=1e-3, atol=1e-4)
            twin = Request(f"{row.lesson.caption} {row.lesson.request.text}")
            said = last_states(model, processor, [twin])[0, list(LAYERS)]
            torch.testing.assert_close(row.caption[0], said, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_states_of_a_question_are_those_of_the_tokens_that_all_runs_share(any_tiny, lessons):
    loss = loss_of(any_tiny, position="question")
    rows = loss.prepare(lessons[:3], 8)
    image, _ = loss._silent(rows)
    ends = torch.tensor([row.places for row in rows]).cumsum(0) - 1
    decision = loss_of(any_tiny)
    last, _ = decision._silent(decision.prepare(lessons[:3], 8))
    torch.testing.assert_close(image[ends], last)
    for row in rows:
        assert row.caption.shape[0] == row.rival.shape[0] == row.places
        said = any_tiny.processor.tokenizer.decode(row.prompt["input_ids"][-row.places :])
        words = row.lesson.request.text.split()
        assert " ".join(words[1:]) in " ".join(said.split())  # the first may be joined to a space


@torch.no_grad()
def test_the_states_of_an_image_are_its_mean_and_those_of_its_caption(any_tiny, lessons):
    loss = loss_of(any_tiny, position="image")
    rows = loss.prepare(lessons[:3], 8)
    for row, image in zip(rows, loss._silent(rows)[0], strict=True):
        request, caption = row.lesson.request, row.lesson.caption
        wanted = image_states(any_tiny.model, any_tiny.processor, [request])
        torch.testing.assert_close(image, wanted[0, list(LAYERS)], rtol=1e-3, atol=1e-4)
        twin = Request(f"{caption} {request.text}")
        said = text_states(any_tiny.model, any_tiny.processor, [twin], [caption])
        torch.testing.assert_close(row.caption, said[:, list(LAYERS)])


@pytest.mark.parametrize("side", ["left", "right"])
def test_spans_of_images_are_right_whatever_the_padding(any_tiny, side):
    processor = any_tiny.processor
    requests = [any_tiny.pictured[0], replace(any_tiny.pictured[1], text="what is this ? " * 3)]
    token = anatomy_of(any_tiny.model).image_token_id
    alone = [encode(processor, [request])["input_ids"][0] for request in requests]
    rows = torch.nn.utils.rnn.pad_sequence(
        alone, batch_first=True, padding_value=processor.tokenizer.pad_token_id, padding_side=side
    )
    for row, ids in zip(image_span(rows, token), alone, strict=True):
        shift = len(row) - len(ids) if side == "left" else 0
        assert torch.equal(row.nonzero()[:, 0], (ids == token).nonzero()[:, 0] + shift)


@pytest.mark.parametrize("place", ["before", "after"])
def test_the_span_of_a_retrieved_text_is_its_tokens(any_tiny, place):
    retrieved = Retrieved(place, "note : {} !")
    request = retrieved.put(any_tiny.pictured[0], BESIDE)
    ids = encode(any_tiny.processor, [request])["input_ids"][0]
    span = prompt_span(any_tiny.processor, request, BESIDE, ids)
    said = any_tiny.processor.tokenizer.decode(ids[span], skip_special_tokens=True)
    assert said.split() == BESIDE.split()
    image = (ids == anatomy_of(any_tiny.model).image_token_id).nonzero()[:, 0]
    where = span.nonzero()[:, 0]
    assert where.max() < image.min() if place == "before" else where.min() > image.max()


def test_a_retrieved_text_stands_behind_what_the_system_says(any_tiny):
    request = replace(any_tiny.pictured[0], system="be kind .")
    assert Retrieved("before", "{}").put(request, BESIDE).system == f"be kind . {BESIDE}"
    assert Retrieved("after", "{}").put(request, BESIDE).text == f"{BESIDE} {request.text}"


def test_text_alone_is_no_nan(any_tiny):
    loss = loss_of(any_tiny)
    rows = loss.prepare([Lesson(one, answer="a lamp .") for one in any_tiny.plain[:2]], 8)
    found = loss(rows, 0.0)
    assert found.loss.isfinite()
    assert found.aligned is None


@pytest.mark.parametrize("position", ["image", "decision", "question"])
def test_an_empty_caption_is_aligned_with_nothing(any_tiny, position):
    loss = loss_of(any_tiny, position=position)
    rows = loss.prepare([Lesson(any_tiny.pictured[0], answer="a .", caption=" ")], 8)
    assert rows[0].caption is None
    assert loss(rows, 0.0).aligned is None


def test_without_alignment_there_is_the_loss_of_answers_alone(any_tiny, lessons):
    off = loss_of(any_tiny, retrieved=Retrieved("before", "{}"), pair=0.0, margin=0.0)
    rows = off.prepare(lessons, 8)
    found = off(rows, 0.0)
    assert found.aligned is None
    assert found.loss.item() == pytest.approx(found.answers)
    assert all(row.retrieved.any() for row in rows[:3])  # the text is in the prompt all the same


def test_the_loss_of_answers_is_that_of_transformers(any_tiny, lessons):
    loss = loss_of(any_tiny, pair=0.0, margin=0.0)
    (row,) = loss.prepare(lessons[3:4], 8)
    ids = torch.cat([row.prompt["input_ids"], row.answer])[None]
    labels = ids.clone()
    labels[:, : len(row.prompt["input_ids"])] = -100
    inputs = {"input_ids": ids, "labels": labels, **row.pixels}
    for name in row.prompt.keys() - {"input_ids", "attention_mask"}:
        more = torch.zeros_like(row.answer)
        inputs[name] = torch.cat([row.prompt[name], more])[None]
    with torch.no_grad():
        wanted = any_tiny.model(**inputs).loss
        torch.testing.assert_close(loss([row], 0.0).loss, wanted, rtol=1e-4, atol=1e-5)


def test_whole_passes_give_the_same(any_tiny, lessons):
    found = []
    for whole in (False, True):
        loss = loss_of(any_tiny, whole=whole)
        found.append(loss(loss.prepare(lessons, 8), 0.0).loss)
    torch.testing.assert_close(*found)


def test_requests_to_align_run_no_further_than_the_last_aligned_block(any_tiny, lessons):
    loss = loss_of(any_tiny)
    rows = loss.prepare(lessons[:3], 8)
    beyond = anatomy_of(any_tiny.model).blocks[max(LAYERS) + 1]
    with beyond.register_forward_hook(lambda *_: pytest.fail("ran further")):
        loss(rows, 0.0)


def test_the_current_target_is_the_reference_before_training(any_tiny, lessons):
    found = []
    for target in ("reference", "current"):
        loss = loss_of(any_tiny, target=target)
        found.append(loss(loss.prepare(lessons, 8), 0.0).loss)
    torch.testing.assert_close(*found)


def test_a_layer_that_is_not_there_is_named(tiny):
    with pytest.raises(LayerOutOfRange, match=r"\[9\]"):
        loss_of(tiny, layers=(9,))


@pytest.mark.parametrize("kind", ["nothing", "two pictures"])
def test_lessons_that_teach_nothing_are_refused(tiny, kind):
    loss = loss_of(tiny)
    with pytest.raises(UnsupportedRequest, match="teaches nothing" if kind == "nothing" else "one"):
        if kind == "nothing":
            loss.prepare([Lesson(tiny.pictured[0])], 8)
        else:
            loss.prepare([Lesson(tiny.plain[0], caption="there is a lamp .")], 8)


@pytest.mark.parametrize(
    ("wrong", "said"), [({"place": "left"}, "before, after"), ({"wording": "x"}, "one gap")]
)
def test_a_wrong_place_of_a_text_is_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        Retrieved(**wrong)


def last_of(tiny):
    return (len(anatomy_of(tiny.model).blocks) - 1,)


@pytest.mark.parametrize("term", ["pair", "margin"])
def test_what_is_said_next_has_a_gradient_by_the_projector(any_tiny, lessons, term):
    weights = {"pair": 0.0, "margin": 0.0, term: 1.0}
    loss = loss_of(any_tiny, form="kl", layers=last_of(any_tiny), **weights)
    found, slopes = gradients(any_tiny, loss, loss.prepare(lessons[:3], 8))
    assert found.loss.item() == pytest.approx(getattr(found.aligned, term).item())
    assert torch.stack([slope.norm() for slope in slopes]).norm() > 1e-6


def test_what_is_said_next_is_compared_as_the_model_itself_says_it(any_tiny, lessons):
    loss = loss_of(any_tiny, form="kl", layers=last_of(any_tiny), pair=1.0)
    with torch.no_grad():
        found = loss(loss.prepare(lessons[:3], 8), 0.0)

    def says(request):
        inputs = encode(any_tiny.processor, [request])
        with torch.no_grad():
            return any_tiny.model(**inputs).logits[0, -1].float().log_softmax(-1)

    apart = []
    for lesson in lessons[:3]:
        twin = Request(f"{lesson.caption} {lesson.request.text}", system=lesson.request.system)
        wanted, said = says(twin), says(lesson.request)
        apart.append((wanted.exp() * (wanted - said)).sum())
    torch.testing.assert_close(found.aligned.pair, torch.stack(apart).mean(), rtol=1e-3, atol=1e-5)


def test_what_is_said_next_is_read_after_the_last_block(tiny):
    with pytest.raises(ValueError, match=r"layers: \(0,\) is wrong for form 'kl'"):
        loss_of(tiny, form="kl", layers=(0,))
