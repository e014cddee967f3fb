"""Training a frame: downhill, by whole pictures, on every request, and over a kill as if none."""

import copy
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hauberk.analysis.harmfulness import HarmAxis
from hauberk.anatomy import anatomy_of
from hauberk.defenses.safety_prompt import Geometry
from hauberk.defenses.safety_prompt_step import Case, FrameLoss, Goal, Measured
from hauberk.defenses.safety_prompt_training import Course, FrameSetting, as_bytes, train_frame
from hauberk.errors import Diverged

GEOMETRY = Geometry(96, 96, (12, 10, 16, 14))
ANSWERS = ["it .", "take some wood and shape it .", "first take some clay ."]
SHORT = FrameSetting(steps=5, batch=2, rate=0.05, validate_every=2, harmful_answered=0.5)
EVERY_STEP = replace(SHORT, steps=4, validate_every=1)


def goal_of(model, layer=1, **changes):
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(anatomy_of(model).hidden_size, generator=generator)
    return Goal(HarmAxis(layer, weights / weights.norm(), 0.0), high=4.0, low=-4.0, **changes)


def course_of(tiny, kind=FrameLoss, geometry=GEOMETRY, **changes):
    """Of six requests of each kind."""
    cases = [
        Case(request, harmful=index % 2 == 0, answer=ANSWERS[index % len(ANSWERS)])
        for index, request in enumerate(tiny.pictured)
    ]
    loss = kind(tiny.model, tiny.processor, geometry, goal_of(tiny.model, **changes))
    return Course(loss, loss.prepare(cases, tokens=4))


def start_of(geometry=GEOMETRY, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = 3, geometry.height, geometry.width
    frame = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return frame.masked_fill(~geometry.rim, 0)


def goodness(course):
    """Minus the loss on some requests."""
    rows = course.cases[:4]
    return lambda frame: -course.loss(frame / 255, rows, [True] * len(rows)).loss


def train(course, setting=SHORT, **options):
    return train_frame([course], start_of(), setting, goodness(course), **options)


def equal(one, other):
    return torch.equal(one.frame, other.frame) and (one.step, one.validated, one.history) == (
        other.step,
        other.validated,
        other.history,
    )


@pytest.fixture(scope="module")
def course(tiny):
    return course_of(tiny)


class Killed(Exception):
    """Stands for a signal."""


def dying(after):
    """Take part in a run until so many steps are finished."""
    finished = []

    def progress(steps):
        finished.append(steps)
        if sum(finished) >= after:
            raise Killed

    return progress


# --- what a step does -------------------------------------------------------------------------


def loss_of(course, frame):
    return course.loss(frame / 255, course.cases, [True] * len(course.cases)).loss


@pytest.mark.parametrize("setting", [
    FrameSetting(steps=8, batch=4, rate=0.05, validate_every=8),
    FrameSetting(steps=8, batch=4, rate=8 / 255, validate_every=8, optimizer="sign"),
])  # fmt: skip
def test_training_reduces_the_loss_of_every_model(any_tiny, setting):
    course = course_of(any_tiny)
    found = train_frame([course], start_of(), setting, lambda frame: -loss_of(course, frame))
    assert found.step == 8
    assert loss_of(course, found.frame) < 0.97 * loss_of(course, start_of())
    assert found.validated == {0: pytest.approx(-loss_of(course, start_of())),
                               8: pytest.approx(-loss_of(course, found.frame))}  # fmt: skip
    assert found.history[-1]["loss"] < found.history[0]["loss"]


@pytest.mark.parametrize("optimizer", ["adam", "sign"])
def test_a_frame_stays_a_picture_and_is_not_written_to_inside(course, optimizer):
    """At such a rate most pixels reach an end of the scale."""
    setting = replace(EVERY_STEP, optimizer=optimizer, rate=0.9)
    seen = []
    train_frame([course], start_of(), setting, lambda frame: seen.append(frame.clone()) or 0.0)
    assert len(seen) == setting.steps + 1
    for frame in seen:
        assert (frame.dtype, frame.shape) == (torch.uint8, (3, 96, 96))
        assert not frame[:, ~GEOMETRY.rim].any()
    ends = (seen[-1] == 0) | (seen[-1] == 255)
    assert ends[:, GEOMETRY.rim].float().mean() > 0.5
    inside = start_of() | torch.where(GEOMETRY.rim, 0, 77).byte()
    found = train_frame([course], inside, setting, lambda _: 0.0)
    assert (found.frame[:, ~GEOMETRY.rim] == 77).all()


def test_a_signed_step_moves_a_pixel_by_one_level_or_none(course):
    setting = replace(EVERY_STEP, optimizer="sign", rate=1 / 255)
    seen = []
    train_frame([course], start_of(), setting, lambda frame: seen.append(frame.int()) or 0.0)
    for before, after in pairwise(seen):
        moved = (after - before)[:, GEOMETRY.rim]
        assert set(moved.unique().tolist()) == {-1, 0, 1}
        at_an_end = (before[:, GEOMETRY.rim] % 255 == 0) & (moved == 0)
        assert ((moved == 0) & ~at_an_end).float().mean() < 0.01


def test_the_first_step_goes_against_the_mean_gradient_of_all_models(any_tiny, tiny):
    """Of two models one frame; both optimizers begin with the sign of the gradient."""
    one, other = course_of(tiny), course_of(any_tiny, layer=2)
    courses = [Course(each.loss, each.cases[:2]) for each in (one, other)]
    setting = FrameSetting(steps=1, batch=1, rate=0.02, optimizer="sign", validate_every=1)
    frame = start_of() / 255
    found = [each.loss(frame, each.cases, [True, True]) for each in courses]
    mean = (found[0].gradient + found[1].gradient) / 2
    expected = as_bytes((frame - 0.02 * mean.sign()).clamp(0, 1))

    def moved(frame):
        return float(not torch.equal(frame, start_of()))

    for optimizer, apart in (("sign", 0.001), ("adam", 0.01)):
        trained = train_frame(courses, start_of(), replace(setting, optimizer=optimizer), moved)
        assert trained.step == 1
        assert (trained.frame != expected).float().mean() < apart
        assert [(row["step"], row["course"]) for row in trained.history] == [(1, 0), (1, 1)]
        losses = [row["loss"] for row in trained.history]
        assert losses == pytest.approx([each.loss for each in found], rel=1e-5)


def test_a_history_tells_each_step_without_what_was_not_measured(course):
    both = train(course, replace(SHORT, harmful_answered=0.0)).history
    assert [row["step"] for row in both] == [1, 2, 3, 4, 5]
    assert all(row["hinge_harmful"] >= 0 and row["answer"] > 0 for row in both)
    one = train(course, replace(SHORT, steps=8, batches="one", harmful_answered=0.0)).history
    kinds = [("hinge_harmful" in row, "hinge_harmless" in row, "answer" in row) for row in one]
    assert set(kinds) == {(True, False, False), (False, True, True)}


def test_weights_and_their_flags_are_as_they_were_also_after_an_error(tiny, course):
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    weights = list(tiny.model.parameters())
    flags = [weight.requires_grad for weight in weights]
    with pytest.raises(Killed):
        train(course, progress=dying(2))
    assert all(torch.equal(value, before[name]) for name, value in tiny.model.state_dict().items())
    assert [weight.requires_grad for weight in weights] == flags
    assert all(weight.grad is None for weight in weights)


# --- which frame is kept ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0], 4),
        ([1.0, 3.0, 3.0, 2.0, 3.0], 1),
        ([5.0, 1.0, 5.0, 4.0, 4.0], 0),
        ([0.0, 0.0, 0.0, 0.0, 0.0], 0),
    ],
)
def test_the_best_validated_frame_is_kept_and_of_equals_the_first(course, scores, best):
    seen, told = [], iter(scores)

    def validate(frame):
        seen.append(frame.clone())
        return next(told)

    found = train_frame([course], start_of(), EVERY_STEP, validate)
    assert found.step == best
    assert torch.equal(found.frame, seen[best])
    assert found.validated == dict(enumerate(scores))
    assert torch.equal(seen[0], start_of())
    assert len({frame.numpy().tobytes() for frame in seen}) == len(seen)


def test_the_start_every_so_many_steps_and_the_end_are_validated(course):
    for steps, every, at in ((5, 2, [0, 2, 4, 5]), (4, 2, [0, 2, 4]), (2, 9, [0, 2])):
        found = train(course, replace(SHORT, steps=steps, validate_every=every))
        assert list(found.validated) == at


# --- which requests are dealt -----------------------------------------------------------------


class Idle(FrameLoss):
    """Measures nothing, and remembers what it was given."""

    def __call__(self, frame, rows, answered):
        self.dealt = [*getattr(self, "dealt", []), (list(rows), list(answered))]
        return Measured(1.0, torch.zeros_like(frame), 1.0, 1.0, 1.0, torch.ones(len(rows)), 0)


def dealt(tiny, setting, cases=None):
    course = course_of(tiny, Idle)
    cases = course.cases if cases is None else [course.cases[place] for place in cases]
    train_frame([Course(course.loss, cases)], start_of(), setting, lambda _: 0.0)
    names = {id(case): place for place, case in enumerate(course.cases)}
    return [
        ([(names[id(row)], row.harmful) for row in rows], answered)
        for rows, answered in course.loss.dealt
    ]


@pytest.mark.parametrize("batches", ["both", "one"])
@pytest.mark.parametrize("batch", [1, 4, 9])
def test_every_request_of_a_kind_is_dealt_once_before_any_is_dealt_again(tiny, batch, batches):
    """Of seven requests five are harmful; also where the coin passes a kind over for a while."""
    setting = FrameSetting(steps=60 // batch, batch=batch, batches=batches, seed=4)
    steps = dealt(tiny, setting, [0, 1, 2, 3, 4, 6, 8])
    orders = set()
    for kind, number in ((True, 5), (False, 2)):
        order = [name for rows, _ in steps for name, harmful in rows if harmful is kind]
        rounds = [order[start : start + number] for start in range(0, len(order), number)]
        assert len(rounds) > 2
        assert all(len(set(each)) == len(each) for each in rounds)
        assert all(len(each) == number for each in rounds[:-1])
        orders |= {tuple(each) for each in rounds if kind}
    assert len(orders) > 2  # anew in every round


def test_batches_are_of_both_kinds_or_of_one_by_a_fair_coin(tiny):
    setting = FrameSetting(steps=60, batch=3)
    for rows, _ in dealt(tiny, setting):
        assert Counter(harmful for _, harmful in rows) == {True: 3, False: 3}
    steps = dealt(tiny, replace(setting, batches="one"))
    kinds = [{harmful for _, harmful in rows} for rows, _ in steps]
    assert all(len(rows) == 3 for rows, _ in steps)
    assert all(len(kind) == 1 for kind in kinds)
    assert 18 <= kinds.count({True}) <= 42


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.3, 8, 28), (1.0, 60, 60)])
def test_answers_to_harmless_requests_always_count_and_to_harmful_ones_by_batch(
    tiny, share, least, most
):
    steps = dealt(tiny, FrameSetting(steps=60, batch=2, harmful_answered=share))
    counted = []
    for rows, answered in steps:
        assert [bool(counts) for (_, harmful), counts in zip(rows, answered, strict=True)
                if not harmful] == [True, True]  # fmt: skip
        (harmful,) = {bool(counts) for (_, is_), counts in zip(rows, answered, strict=True) if is_}
        counted.append(harmful)
    assert least <= sum(counted) <= most


def test_the_seed_alone_decides_what_is_dealt(tiny):
    setting = FrameSetting(steps=10, batch=2)
    torch.manual_seed(1)
    first = dealt(tiny, setting)
    torch.manual_seed(2)
    assert dealt(tiny, setting) == first
    assert dealt(tiny, replace(setting, seed=1)) != first


# --- going on after a kill --------------------------------------------------------------------


@pytest.fixture(scope="module", params=["adam", "sign"])
def whole(request, course):
    """A run that nothing stopped, and its setting."""
    setting = replace(SHORT, optimizer=request.param)
    return setting, train(course, setting)


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_killed_run_goes_on_to_the_same_bits(course, whole, tmp_path, after):
    setting, expected = whole
    kept = tmp_path / "new" / "run.safetensors"
    with pytest.raises(Killed):
        train(course, setting, checkpoint=kept, progress=dying(after))
    finished = []
    found = train(course, setting, checkpoint=kept, progress=finished.append)
    assert equal(found, expected)
    assert finished[0] == after // 2 * 2  # what the last validation kept
    assert sum(finished) == setting.steps
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_a_run_that_dies_while_it_validates_goes_on_from_the_validation_before(
    course, whole, tmp_path
):
    setting, expected = whole
    calls = []

    def validate(frame):
        calls.append(frame)
        if len(calls) == 3:
            raise Killed
        return goodness(course)(frame)

    kept = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        train_frame([course], start_of(), setting, validate, checkpoint=kept)
    finished = []
    assert equal(train(course, setting, checkpoint=kept, progress=finished.append), expected)
    assert finished[0] == 2


def test_a_finished_run_is_not_run_again(course, whole, tmp_path):
    setting, expected = whole
    kept = tmp_path / "run.safetensors"
    train(course, setting, checkpoint=kept)

    def never(_):
        raise AssertionError("validated again")

    finished = []
    again = train_frame(
        [course], start_of(), setting, never, checkpoint=kept, progress=finished.append
    )
    assert equal(again, expected)
    assert finished == [setting.steps]


@pytest.fixture(scope="module")
def kept(course, tmp_path_factory):
    """The checkpoint of a finished run of one step."""
    path = tmp_path_factory.mktemp("kept") / "run.safetensors"
    train(course, replace(SHORT, steps=1), checkpoint=path)
    return path


def begun_at(courses, kept, folder, setting=None, start=None):
    """After which step a run goes on, if it is given a checkpoint; it stops there."""
    path = Path(folder) / "run.safetensors"
    path.write_bytes(kept.read_bytes())
    finished = []

    def stop(steps):
        finished.append(steps)
        raise Killed

    with pytest.raises(Killed):
        train_frame(courses, start_of() if start is None else start,
                    setting or replace(SHORT, steps=1), lambda _: 0.0,
                    checkpoint=path, progress=stop)  # fmt: skip
    return finished[0]


def test_the_checkpoint_of_another_run_is_not_gone_on_with(tiny, course, kept, tmp_path):
    one, setting = tmp_path, replace(SHORT, steps=1)
    assert begun_at([course], kept, one) == 1
    for changes in ({"seed": 1}, {"rate": 0.06}, {"batch": 3}, {"optimizer": "sign"},
                    {"steps": 2}, {"batches": "one"}, {"harmful_answered": 0.6}):  # fmt: skip
        assert begun_at([course], kept, one, replace(setting, **changes)) == 0
    assert begun_at([course], kept, one, start=start_of(seed=1)) == 0
    cases, other = course.cases, course_of(tiny, layer=2)
    flipped = [replace(case, harmful=not case.harmful) for case in cases]
    reanswered = [replace(case, answer=case.answer.flip(0) + 1) for case in cases]
    for courses in (
        [course, course],
        [other],
        [course_of(tiny, answer_weight=0.5)],
        [course_of(tiny, geometry=replace(GEOMETRY, ground=(0, 0, 0)))],
        *([Course(course.loss, changed)] for changed in (cases[:-1], cases[::-1], flipped)),
        [Course(course.loss, reanswered)],
        [Course(FrameLoss(tiny.model, tiny.processor, GEOMETRY, course.loss.goal,
                          autocast=torch.bfloat16), cases)],
    ):  # fmt: skip
        assert begun_at(courses, kept, one) == 0
    assert begun_at([course], kept, one) == 1


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_checkpoint_that_was_cut_short_is_begun_anew(course, kept, tmp_path, share):
    cut = tmp_path / "cut"
    content = kept.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    assert begun_at([course], cut, tmp_path) == 0
    found = train(course, replace(SHORT, steps=1), checkpoint=cut)
    assert equal(found, train(course, replace(SHORT, steps=1)))
    assert begun_at([course], cut, tmp_path) == 1  # it was replaced


@pytest.mark.slow
def test_a_process_that_was_killed_goes_on_to_the_same_bits_in_another(course, tmp_path):
    kept, setting = tmp_path / "run.safetensors", replace(SHORT, steps=20)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, __file__, str(kept)], env=environment, stdout=subprocess.PIPE, text=True
    )
    with process:
        for line in process.stdout:
            if line == "3\n":
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    finished = []
    found = train(course, setting, checkpoint=kept, progress=finished.append)
    assert 2 <= finished[0] < 20
    assert equal(found, train(course, setting))


# --- what is refused --------------------------------------------------------------------------


def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_and_names_the_step(tiny, course):
    broken = replace(tiny, model=copy.deepcopy(tiny.model))
    with torch.no_grad():
        next(iter(anatomy_of(broken.model).blocks[0].parameters())).fill_(torch.nan)
    with pytest.raises(Diverged, match=r"step 1: the loss is nan .*bfloat16 or float32"):
        train_frame([course_of(broken)], start_of(), SHORT, lambda _: 0.0)

    class Breaking(FrameLoss):
        def __call__(self, frame, rows, answered):
            found = super().__call__(frame, rows, answered)
            found.gradient[0, 0, 0] = torch.inf
            return found

    breaking = course_of(tiny, Breaking)
    with pytest.raises(Diverged, match=r"step 1: the loss is \d.* and its gradient not finite"):
        train_frame([course, breaking], start_of(), SHORT, lambda _: 0.0)


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("optimizer", "sgd", "optimizer: 'sgd' is not one of adam, sign"),
        ("batches", "two", "batches: 'two' is not one of both, one"),
        ("steps", 0, "steps: 0 is wrong, 1 or more is right"),
        ("batch", 0, "batch: 0 is wrong, 1 or more is right"),
        ("validate_every", -1, "validate_every: -1 is wrong, 1 or more is right"),
        ("rate", 0.0, "rate 0.0 and .* a rate above 0"),
        ("rate", 1.5, "rate 1.5 and .* neither above 1"),
        ("harmful_answered", -0.1, "harmful_answered -0.1: .* a share"),
        ("harmful_answered", float("nan"), "harmful_answered nan: .* a share"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_what_is_right(name, wrong, says):
    with pytest.raises(ValueError, match=says):
        FrameSetting(**{name: wrong})


def test_courses_that_give_no_frame_are_refused(tiny, course):
    wide = course_of(tiny, geometry=replace(GEOMETRY, margins=(12, 12, 12, 12)))
    harmful = Course(course.loss, [case for case in course.cases if case.harmful])
    for courses, start, says in (
        ([], start_of(), "no course"),
        ([course, wide], start_of(), "frames of 2 geometries; one frame has one"),
        ([course, harmful], start_of(), "harmful and harmless requests; give both"),
        ([Course(course.loss, [])], start_of(), "harmful and harmless requests; give both"),
        ([course], start_of() / 255, r"start: .* of torch.float32 is wrong, \(3, 96, 96\)"),
        ([course], start_of()[:, 1:], r"start: \(3, 95, 96\) of torch.uint8 is wrong"),
    ):
        with pytest.raises(ValueError, match=says):
            train_frame(courses, start, SHORT, lambda _: 0.0)


def main():
    """Train for so long that it can be killed meanwhile, and tell each finished step."""
    spec = spec_from_file_location("conftest", Path(__file__).with_name("conftest.py"))
    fixtures = module_from_spec(spec)
    sys.modules["conftest"] = fixtures
    spec.loader.exec_module(fixtures)
    finished = []

    def progress(steps):
        finished.append(steps)
        print(sum(finished), flush=True)

    course = course_of(fixtures.tiny_of("lab-llava"))
    train(course, replace(SHORT, steps=20), checkpoint=Path(sys.argv[1]), progress=progress)


if __name__ == "__main__":
    main()
