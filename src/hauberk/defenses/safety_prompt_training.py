"""Training a safety prompt: small steps of a picture frame, resumable after a kill.

Every step moves the pixels of the frame against the gradient of the loss of one batch
(:mod:`hauberk.defenses.safety_prompt_step`) and clamps them to [0, 1]:

    adam   frame <- frame - rate_t * m / (sqrt(v) + eps),  rate_t falling to 0 over the second half
    sign   frame <- frame - rate * sign(gradient), as the authors do, who take 1/255 and no clamp

Which requests make up the batch of a step follows from the seed and the step alone, so that a run
that was killed goes on after its last validation as if it had not been: to the same frame, bit for
bit on a CPU.  The frame that is kept is the best of those that were validated, on requests that are
not trained on.

Source: as :mod:`hauberk.defenses.safety_prompt`; Adam: Kingma and Ba, ICLR 2015, arXiv:1412.6980.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hauberk.defenses.safety_prompt_step import FrameLoss, Measured, Prepared
from hauberk.errors import Diverged
from hauberk.pixels import frozen

Optimizer = Literal["adam", "sign"]
Batches = Literal["both", "one"]

_FADING = (0.9, 0.99)
"""Of Adam's means; the second is shorter than its default of 0.999, whose memory of a thousand
steps is longer than our runs."""
_EPSILON = 1e-12
"""Gradients by single pixels are far below Adam's default of 1e-8."""


@dataclass(frozen=True)
class FrameSetting:
    """How a frame is trained.

    Raises
    ------
    ValueError
        If a number is out of its range or a word is not one of those named.
    """

    steps: int = 600
    """The authors' are 1,200."""
    batch: int = 8
    """Requests of each kind in one step; of the only kind where ``batches`` is ``one``."""
    optimizer: Optimizer = "adam"
    rate: float = 0.03
    """Of a step, in pixels of [0, 1]; the authors' is 1/255."""
    batches: Batches = "both"
    """``both`` kinds in every batch, or ``one`` by the toss of a coin, as the authors do."""
    harmful_answered: float = 1.0
    """The share of batches in which the answers to harmful requests count; the authors' is 0.05.
    Those to harmless requests always do."""
    validate_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("optimizer", Optimizer), ("batches", Batches)):
            if getattr(self, name) not in get_args(known):
                right = ", ".join(get_args(known))
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {right}.")
        for name in ("steps", "batch", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is wrong, 1 or more is right.")
        if not (0 < self.rate <= 1 and 0 <= self.harmful_answered <= 1):
            raise ValueError(
                f"rate {self.rate} and harmful_answered {self.harmful_answered}: a rate above 0 "
                "and a share are right, neither above 1."
            )


@dataclass(frozen=True)
class Course:
    """One model to train a frame on: its loss, and requests of both kinds as tensors."""

    loss: FrameLoss
    cases: Sequence[Prepared]


@dataclass(frozen=True)
class TrainedFrame:
    """What came out."""

    frame: Tensor
    """(3, height, width) uint8: the best of those that were validated."""
    step: int
    """Steps after which it was."""
    validated: dict[int, float]
    """By step: what ``validate`` said; 0 is the start."""
    history: list[dict[str, float]]
    """One row a step and course: losses, and backward passes."""


@dataclass
class _State:
    """All that a step depends on, and the best so far."""

    frame: Tensor
    mean: Tensor
    square: Tensor
    best: Tensor
    step: int = 0
    best_step: int = 0
    validated: dict[int, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def train_frame(
    courses: Sequence[Course],
    start: Tensor,
    setting: FrameSetting,
    validate: Callable[[Tensor], float],
    *,
    checkpoint: Path | None = None,
    also: str = "",
    progress: Callable[[int], Any] = lambda _: None,
) -> TrainedFrame:
    """Train one frame on one model, or on several at once.

    Parameters
    ----------
    courses : of one geometry; what is descended is the mean of their losses
    start : (3, height, width) uint8
    validate : takes a frame like ``start`` and says how good it is, more is better; called at the
        start, every ``validate_every`` steps and at the end
    checkpoint : file that a killed run goes on from; one of another start, setting or other
        courses is not taken up.  It is written with every validation
    also : what else the run depends on, such as weights and what ``validate`` asks; a checkpoint of
        another is not taken up either
    progress : called with the number of newly finished steps

    Raises
    ------
    ValueError
        If there is no course, one has not both kinds of requests, or geometries differ.
    Diverged
        If a gradient is not finite.
    """
    _check(courses, start)
    geometry = courses[0].loss.geometry
    rim = geometry.rim
    key = _key(courses, start, setting, also)
    state = _resumed(checkpoint, key) or _begun(start)
    progress(state.step)
    if not state.validated:
        _validate(state, validate)
        if checkpoint:
            _keep(state, checkpoint, key)
    decks = [_Deck(course.cases, setting.seed, index) for index, course in enumerate(courses)]
    while state.step < setting.steps:
        state.step += 1
        gradient = torch.zeros_like(state.frame)
        for index, (course, deck) in enumerate(zip(courses, decks, strict=True)):
            rows, answered = deck.deal(state.step, setting)
            with frozen(course.loss.model):
                found = course.loss(state.frame, rows, answered)
            if not (isfinite(found.loss) and bool(found.gradient.isfinite().all())):
                raise Diverged(
                    f"step {state.step}: the loss is {found.loss} and its gradient not finite; "
                    "load the model in bfloat16 or float32, whose range is wide enough."
                )
            gradient += found.gradient.cpu() / len(courses)
            state.history.append(_row(state.step, index, found))
        _move(state, gradient * rim, setting)
        if state.step % setting.validate_every == 0 or state.step == setting.steps:
            _validate(state, validate)
            if checkpoint:
                _keep(state, checkpoint, key)
        progress(1)
    return TrainedFrame(state.best, state.best_step, state.validated, state.history)


def as_bytes(frame: Tensor) -> Tensor:
    """The 8-bit picture that a frame in [0, 1] stands for: what is deployed."""
    return (frame * 255).round().to(torch.uint8)


def _check(courses: Sequence[Course], start: Tensor) -> None:
    if not courses:
        raise ValueError("no course: there is nothing to train a frame on; give a model.")
    geometries = {course.loss.geometry for course in courses}
    if len(geometries) > 1:
        raise ValueError(f"frames of {len(geometries)} geometries; one frame has one: {geometries}")
    for course in courses:
        if {case.harmful for case in course.cases} != {True, False}:
            raise ValueError("a frame is trained on harmful and harmless requests; give both.")
    (geometry,) = geometries
    if start.dtype != torch.uint8 or start.shape != (3, geometry.height, geometry.width):
        raise ValueError(
            f"start: {tuple(start.shape)} of {start.dtype} is wrong, "
            f"{(3, geometry.height, geometry.width)} of torch.uint8 is right."
        )


def _begun(start: Tensor) -> _State:
    frame = start.float() / 255
    return _State(frame, torch.zeros_like(frame), torch.zeros_like(frame), start.clone())


def _move(state: _State, gradient: Tensor, setting: FrameSetting) -> None:
    if setting.optimizer == "sign":
        step = setting.rate * gradient.sign()
    else:
        first, second = _FADING
        state.mean = first * state.mean + (1 - first) * gradient
        state.square = second * state.square + (1 - second) * gradient**2
        mean = state.mean / (1 - first**state.step)
        square = state.square / (1 - second**state.step)
        left = (setting.steps - state.step + 1) / setting.steps
        step = setting.rate * min(1.0, 2 * left) * mean / (square.sqrt() + _EPSILON)
    state.frame = (state.frame - step).clamp(0, 1)


def _validate(state: _State, validate: Callable[[Tensor], float]) -> None:
    frame = as_bytes(state.frame)
    score = validate(frame)
    if all(score > before for before in state.validated.values()):
        state.best, state.best_step = frame, state.step
    state.validated[state.step] = score


def _row(step: int, course: int, found: Measured) -> dict[str, float]:
    names = ("loss", "hinge_harmful", "hinge_harmless", "answer", "backward")
    values = {name: getattr(found, name) for name in names}
    there = {name: value for name, value in values.items() if isfinite(value)}
    return {"step": step, "course": course, **there}


class _Deck:
    """Deals requests: every one of a kind once before any of them again, in an order of its own."""

    def __init__(self, cases: Sequence[Prepared], seed: int, course: int) -> None:
        self.kinds = {
            kind: [case for case in cases if case.harmful is kind] for kind in (True, False)
        }
        self.seed = f"{seed}/{course}"
        self._order = lru_cache(maxsize=4)(self._shuffled)
        self._toss = lru_cache(maxsize=None)(self._tossed)

    def deal(self, step: int, setting: FrameSetting) -> tuple[list[Prepared], list[bool]]:
        """The requests of a step, counted from 1, and of which the answer counts."""
        kinds, counts = self._of_step(step, setting)
        rows = []
        for kind in kinds:
            before = sum(kind in self._of_step(earlier, setting)[0] for earlier in range(1, step))
            first = before * setting.batch
            rows += [self._drawn(kind, first + place) for place in range(setting.batch)]
        return rows, [counts or not row.harmful for row in rows]

    def _of_step(self, step: int, setting: FrameSetting) -> tuple[tuple[bool, ...], bool]:
        """The kinds of a step, and whether the answers to harmful requests count."""
        kind, share = self._toss(step)
        kinds = (True, False) if setting.batches == "both" else (kind,)
        return kinds, share < setting.harmful_answered

    def _tossed(self, step: int) -> tuple[bool, float]:
        toss = random.Random(f"{self.seed}/{step}")
        return toss.random() < 0.5, toss.random()

    def _drawn(self, kind: bool, place: int) -> Prepared:
        round_, index = divmod(place, len(self.kinds[kind]))
        return self.kinds[kind][self._order(kind, round_)[index]]

    def _shuffled(self, kind: bool, round_: int) -> list[int]:
        order = list(range(len(self.kinds[kind])))
        random.Random(f"{self.seed}/{kind}/{round_}").shuffle(order)
        return order


# --- going on after a kill --------------------------------------------------------------------

_TENSORS = ("frame", "mean", "square", "best")


def _key(courses: Sequence[Course], start: Tensor, setting: FrameSetting, also: str) -> str:
    """Hash what a run depends on, so that no other run is gone on with."""
    found = hashlib.sha256(start.numpy().tobytes())
    found.update(also.encode())
    for course in courses:
        goal = course.loss.goal
        found.update(goal.axis.weights.numpy().tobytes())
        told = (goal.axis.layer, goal.axis.offset, goal.high, goal.low, goal.answer_weight,
                goal.clean_weight, course.loss.geometry, course.loss.autocast,
                [case.harmful for case in course.cases])  # fmt: skip
        found.update(repr(told).encode())
        for case in course.cases:
            for tensor in (case.inside, case.prompt["input_ids"], case.answer):
                found.update(tensor.cpu().numpy().tobytes())
    found.update(repr(asdict(setting)).encode())
    return found.hexdigest()


def _keep(state: _State, path: Path, key: str) -> None:
    told = {name: getattr(state, name) for name in ("step", "best_step", "validated", "history")}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    tensors = {name: getattr(state, name).contiguous().clone() for name in _TENSORS}
    save_file(tensors, partial, metadata={"key": key, "state": json.dumps(told)})
    partial.replace(path)


def _resumed(path: Path | None, key: str) -> _State | None:
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
    except (OSError, SafetensorError):  # cut short by a full disk, say: begin anew
        return None
    told = json.loads(about["state"])
    told["validated"] = {int(step): score for step, score in told["validated"].items()}
    return _State(**tensors, **told)
