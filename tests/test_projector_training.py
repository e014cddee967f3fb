"""Training a projector: it goes down, resumes bit by bit, and leaves the model as it was."""

import itertools
import threading
from copy import deepcopy
from dataclasses import asdict, replace

import pytest
import torch

from hauberk.anatomy import anatomy_of
from hauberk.defenses import projector_training
from hauberk.defenses.alignment import AlignmentSetting
from hauberk.defenses.projector import Part, Retrieved
from hauberk.defenses.projector_step import Lesson, ProjectorLoss
from hauberk.defenses.projector_training import ProjectorTraining, train_projector
from hauberk.errors import Diverged

PARTS = (Part("projector"), Part("lora", last=1, rank=2, alpha=4), Part("decoder"))
SETTING = ProjectorTraining(
    steps=6, batch=2, aligned=4, rate=1e-2, decoder_rate=1e-2, validate_every=2
)
CAPTIONS = ("there is a lamp red .", "there is a ball blue .", "it says ball .")


def lessons_of(tiny):
    silent = [
        Lesson(request, caption=CAPTIONS[index % 3], retrieved=CAPTIONS[(index + 1) % 3])
        for index, request in enumerate(tiny.pictured[:6])
    ]
    return [*silent, *(Lesson(request, answer="a lamp .") for request in tiny.pictured[6:10])]


def loss_of(tiny, whole=False, retrieved=None, **setting):
    alignment = AlignmentSetting(**{"layers": (0, 1), "pair": 4.0} | setting)
    return ProjectorLoss(tiny.model, tiny.processor, alignment, retrieved, whole=whole)


def trained(tiny, part=PARTS[0], setting=SETTING, validate=None, loss=None, **more):
    loss = loss or loss_of(tiny)
    rows = loss.prepare(lessons_of(tiny), 8)
    return train_projector(loss, rows, part, setting, validate or later(), **more)


def later():
    """Says that every projector is better than the one before."""
    count = itertools.count()
    return lambda _: float(next(count))


def weights(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(params=PARTS, ids=lambda part: part.mode)
def part(request):
    return request.param


def test_the_loss_falls(any_tiny, part):
    setting = replace(SETTING, steps=12, validate_every=12, aligned=6, batch=4)
    history = trained(any_tiny, part, setting, loss=loss_of(any_tiny, decay=False)).history
    assert history[-1]["loss"] < 0.97 * history[0]["loss"]
    assert history[-1]["image_caption"] > history[0]["image_caption"]
    assert all(row["gradient"] > 0 for row in history)


def test_the_model_is_given_back_as_it_was(any_tiny, part):
    model = any_tiny.model
    before, modules = weights(model), dict(model.named_modules())
    required = [weight.requires_grad for weight in model.parameters()]
    trained(any_tiny, part)
    assert same(weights(model), before)
    assert dict(model.named_modules()) == modules
    assert [weight.requires_grad for weight in model.parameters()] == required
    assert all(weight.grad is None for weight in model.parameters())
    assert not model.training


def test_it_is_given_back_after_an_error(tiny, part, monkeypatch):
    before = weights(tiny.model)
    monkeypatch.setattr(projector_training, "_row", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained(tiny, part)
    assert same(weights(tiny.model), before)


def test_only_the_part_is_trained_and_all_of_it(any_tiny, part):
    found = trained(any_tiny, part).projector
    new = found.weights(any_tiny.model)
    old = dict(any_tiny.model.named_parameters())
    expected = set(part.whole(any_tiny.model))
    expected |= {f"{name}.weight" for name in part.adapted(any_tiny.model)}
    assert set(new) == expected
    assert all(not torch.equal(new[name], old[name]) for name in new if new[name].ndim > 1)


def test_what_was_trained_unmerged_answers_as_merged_but_for_rounding(tiny):
    loss = loss_of(tiny)
    rows = loss.prepare(lessons_of(tiny), 8)
    result = trained(tiny, PARTS[1], loss=loss)
    found = result.projector
    with torch.no_grad(), found.applied(tiny.model):
        merged = loss(rows, 0.0).loss
    with projector_training._trainable(tiny.model, PARTS[1], SETTING) as student:
        student.set(found.tensors)
        with student.inside():
            unmerged = loss(rows, 0.0).loss
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-5)


def test_a_killed_run_goes_on_to_the_same_weights_in_every_family(any_tiny, tmp_path):
    killed_and_resumed(any_tiny, PARTS[0], tmp_path, kill_after=2)


@pytest.mark.parametrize("kill_after", [1, 3])
def test_a_killed_run_goes_on_to_the_same_weights(tiny, part, tmp_path, kill_after):
    killed_and_resumed(tiny, part, tmp_path, kill_after)


def killed_and_resumed(any_tiny, part, tmp_path, kill_after):
    whole = trained(any_tiny, part)
    calls = 0

    def killed(_):
        nonlocal calls
        calls += 1
        if calls > kill_after:
            raise KeyboardInterrupt
        return float(calls)

    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        trained(any_tiny, part, validate=killed, checkpoint=file)
    steps = []

    def better(_):
        nonlocal calls
        calls += 1
        return float(calls)

    again = trained(any_tiny, part, validate=better, checkpoint=file, progress=steps.append)
    assert steps[0] == 2 * (kill_after - 1)
    assert sum(steps) == SETTING.steps
    assert same(again.projector.tensors, whole.projector.tensors)
    assert again.history == whole.history
    assert again.step == whole.step == SETTING.steps


@pytest.mark.parametrize("other", ["setting", "part", "alignment", "lessons", "also"])
def test_a_checkpoint_of_another_run_is_not_taken_up(tiny, tmp_path, other):
    file = tmp_path / "checkpoint.safetensors"
    trained(tiny, PARTS[1], checkpoint=file)
    loss, steps = loss_of(tiny), []
    more = {"checkpoint": file, "progress": steps.append, "loss": loss, "part": PARTS[1]}
    if other == "setting":
        more["setting"] = replace(SETTING, rate=2e-2)
    if other == "part":
        more["part"] = replace(PARTS[1], alpha=8)
    if other == "alignment":
        more["loss"] = loss_of(tiny, pair=5.0)
    if other == "lessons":
        more["loss"] = loss_of(tiny, retrieved=Retrieved("after", "{}"))
    if other == "also":
        more["also"] = "other weights"
    trained(tiny, **more)
    assert steps[0] == 0


def test_a_broken_checkpoint_is_begun_anew(tiny, tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(b"half")
    steps = []
    trained(tiny, checkpoint=file, progress=steps.append)
    assert steps[0] == 0


def test_the_best_of_those_that_were_validated_is_kept(tiny):
    scores = iter([0.1, 0.5, 0.9, 0.2])
    seen = []

    def validate(projector):
        seen.append(projector.tensors)
        return next(scores)

    found = trained(tiny, validate=validate)
    assert (found.step, found.validated) == (4, {0: 0.1, 2: 0.5, 4: 0.9, 6: 0.2})
    assert same(found.projector.tensors, seen[2])
    assert same(found.last.tensors, seen[-1])


def test_what_is_validated_can_be_applied(tiny):
    plain = weights(tiny.model)

    def validate(projector):
        assert same(weights(tiny.model), plain)
        with projector.applied(tiny.model):
            return 0.0

    assert trained(tiny, PARTS[1], validate=validate).step == 0  # the earliest among equals


def test_a_batch_in_parts_gives_the_same_step(tiny, part):
    setting = replace(SETTING, steps=1, validate_every=1)
    one = trained(tiny, part, setting)
    two = trained(tiny, part, replace(setting, accumulate=2))
    for name, tensor in one.projector.tensors.items():
        torch.testing.assert_close(two.projector.tensors[name], tensor, atol=2e-3, rtol=0)
    assert one.history[0]["loss"] == pytest.approx(two.history[0]["loss"], rel=1e-4)
    assert one.history[0]["gradient"] == pytest.approx(two.history[0]["gradient"], rel=1e-3)


def test_recomputed_activations_give_the_same_gradient(any_tiny):
    setting = replace(SETTING, steps=1, validate_every=1)
    plain = trained(any_tiny, PARTS[2], setting)
    again = trained(
        any_tiny, PARTS[2], replace(setting, checkpointing=True), loss=loss_of(any_tiny, whole=True)
    )
    wanted = plain.history[0]
    assert again.history[0]["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    assert again.history[0]["gradient"] == pytest.approx(wanted["gradient"], rel=1e-3)
    assert not any_tiny.model.training


def test_the_control_without_alignment_is_a_plain_setting(tiny):
    loss = loss_of(tiny, retrieved=Retrieved("before", "{}"), pair=0.0, margin=0.0)
    lessons = [
        replace(lesson, retrieved=CAPTIONS[0]) for lesson in lessons_of(tiny) if lesson.answer
    ]
    rows = loss.prepare(lessons, 8)
    found = train_projector(loss, rows, PARTS[0], replace(SETTING, aligned=0), lambda _: 0.0)
    assert all("pair" not in row for row in found.history)
    assert all(row.retrieved.any() for row in rows)


class Pair:
    """Two processes in one: each waits for the other's gradient, as accelerate lets them."""

    def __init__(self, index, shared):
        self.process_index, self.num_processes = index, 2
        self.shared, self.barrier = shared

    def reduce(self, tensor, reduction):
        assert reduction == "mean"
        self.shared[self.process_index] = tensor
        self.barrier.wait()
        mean = (self.shared[0] + self.shared[1]) / 2
        self.barrier.wait()
        return mean


def test_two_processes_take_the_step_of_one(tiny):
    setting = replace(SETTING, steps=2, validate_every=2)
    alone = trained(tiny, setting=setting)
    models = [replace(tiny, model=deepcopy(tiny.model)) for _ in range(2)]
    shared = ({}, threading.Barrier(2, timeout=60))
    losses = [loss_of(model) for model in models]
    rows = [loss.prepare(lessons_of(tiny), 8) for loss in losses]  # tokenizers serve one thread
    found = {}

    def run(index):
        pair = Pair(index, shared)
        found[index] = train_projector(
            losses[index], rows[index], PARTS[0], setting, later(), processes=pair
        )

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        for name, tensor in alone.projector.tensors.items():
            got = found[index].projector.tensors[name]
            torch.testing.assert_close(got, tensor, atol=2e-3, rtol=0)


def test_weights_in_half_precision_are_trained_in_float32(tiny, lab_folder):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(lab_folder, dtype=torch.bfloat16).eval()
    half = replace(tiny, model=model)
    for part in PARTS[:2]:
        found = trained(half, part).projector
        assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}
        assert {w.dtype for w in model.parameters()} == {torch.bfloat16}
        with found.applied(model):
            assert {w.dtype for w in model.parameters()} == {torch.bfloat16}


def test_a_loss_that_is_not_finite_ends_the_training(tiny, monkeypatch):
    connector = anatomy_of(tiny.model).projector
    weight = next(connector.parameters())
    before = weight.data.clone()
    weight.data.fill_(torch.nan)
    try:
        with pytest.raises(Diverged, match="step 1"):
            trained(tiny)
    finally:
        weight.data = before


def test_the_rate_rises_and_falls_along_a_cosine():
    setting = ProjectorTraining(steps=100, warmup=0.1)
    shares = [setting.share(step) for step in range(1, 101)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == 1.0
    assert shares[54] == pytest.approx(0.5)
    assert shares[-1] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps: 0"),
        ({"batch": 0, "aligned": 0}, "not both 0"),
        ({"rate": 0.0}, "rate 0.0"),
        ({"warmup": 1.0}, "warmup: 1.0"),
    ],
)
def test_a_wrong_setting_is_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        ProjectorTraining(**asdict(SETTING) | wrong)


def test_lessons_that_are_missing_are_named(tiny):
    loss = loss_of(tiny)
    rows = loss.prepare(lessons_of(tiny), 8)
    silent = [row for row in rows if not len(row.answer)]
    answered = [row for row in rows if len(row.answer)]
    for given, said in ((silent, "has an answer"), (answered, "caption alone")):
        with pytest.raises(ValueError, match=said):
            train_projector(loss, given, PARTS[0], SETTING, lambda _: 0.0)
    with pytest.raises(ValueError, match="multiples of 4"):
        train_projector(loss, rows, PARTS[0], replace(SETTING, accumulate=4), lambda _: 0.0)
    with pytest.raises(ValueError, match="whole"):
        setting = replace(SETTING, checkpointing=True)
        train_projector(loss, rows, PARTS[0], setting, lambda _: 0.0)
