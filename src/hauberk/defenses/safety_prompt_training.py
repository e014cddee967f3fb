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

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hauberk.defenses.safety_prompt_step import FrameLoss, Measured, Prepared
from hauberk.defenses.training import Checkpoint, Deck, State, key_of, train
from hauberk.errors import Diverged
from hauberk.pixels import frozen

Optimizer = Literal["adam", "sign"]
Batches = Literal["both", "one"]

_FADING = (0.9, 0.99)
"""Of Adam's means; the second is shorter than its default of 0.999, whose memory of a thousand
steps is longer than a short run."""
_EPSILON = 1e-12
"""Gradients by single pixels are far below Adam's default of 1e-8."""
_FRAME = "frame"


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
    rim = courses[0].loss.geometry.rim
    dealers = [_Dealer(course.cases, setting, index) for index, course in enumerate(courses)]

    def move(state: State) -> None:
        frame = state.trained[_FRAME]
        gradient = torch.zeros_like(frame)
        for index, (course, dealer) in enumerate(zip(courses, dealers, strict=True)):
            rows, answered = dealer.deal(state.step)
            with frozen(course.loss.model):
                found = course.loss(frame, rows, answered)
            if not (isfinite(found.loss) and bool(found.gradient.isfinite().all())):
                raise Diverged(
                    f"step {state.step}: the loss is {found.loss} and its gradient not finite; "
                    "load the model in bfloat16 or float32, whose range is wide enough."
                )
            gradient += found.gradient.cpu() / len(courses)
            state.history.append(_row(state.step, index, found))
        _descend(state, gradient * rim, setting)

    def judge(trained: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        frame = as_bytes(trained[_FRAME])
        return {_FRAME: frame}, validate(frame)

    kept = Checkpoint(checkpoint, _key(courses, start, setting, also)) if checkpoint else None
    state = train({_FRAME: start.float() / 255}, move, judge, setting, kept, progress)
    return TrainedFrame(state.best[_FRAME], state.best_step, state.validated, state.history)


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


def _descend(state: State, gradient: Tensor, setting: FrameSetting) -> None:
    if setting.optimizer == "sign":
        step = setting.rate * gradient.sign()
    else:
        first, second = _FADING
        mean = state.means[_FRAME] = first * state.means[_FRAME] + (1 - first) * gradient
        square = second * state.squares[_FRAME] + (1 - second) * gradient**2
        state.squares[_FRAME] = square
        left = (setting.steps - state.step + 1) / setting.steps
        size = (square / (1 - second**state.step)).sqrt() + _EPSILON
        step = setting.rate * min(1.0, 2 * left) * (mean / (1 - first**state.step)) / size
    state.trained[_FRAME] = (state.trained[_FRAME] - step).clamp(0, 1)


def _row(step: int, course: int, found: Measured) -> dict[str, float]:
    names = ("loss", "hinge_harmful", "hinge_harmless", "answer", "backward")
    values = {name: getattr(found, name) for name in names}
    there = {name: value for name, value in values.items() if isfinite(value)}
    return {"step": step, "course": course, **there}


class _Dealer:
    """Deals requests of both kinds: every one of a kind once before any of them again."""

    def __init__(self, cases: Sequence[Prepared], setting: FrameSetting, course: int) -> None:
        self.setting, self.seed = setting, f"{setting.seed}/{course}"
        self.decks = {
            kind: Deck([case for case in cases if case.harmful is kind], f"{self.seed}/{kind}")
            for kind in (True, False)
        }
        self._toss = lru_cache(maxsize=None)(self._tossed)

    def deal(self, step: int) -> tuple[list[Prepared], list[bool]]:
        """The requests of a step, counted from 1, and of which the answer counts."""
        kinds, counts = self._of_step(step)
        rows = []
        for kind in kinds:
            before = sum(kind in self._of_step(earlier)[0] for earlier in range(1, step))
            rows += self.decks[kind].deal(before * self.setting.batch, self.setting.batch)
        return rows, [counts or not row.harmful for row in rows]

    def _of_step(self, step: int) -> tuple[tuple[bool, ...], bool]:
        """The kinds of a step, and whether the answers to harmful requests count."""
        kind, share = self._toss(step)
        kinds = (True, False) if self.setting.batches == "both" else (kind,)
        return kinds, share < self.setting.harmful_answered

    def _tossed(self, step: int) -> tuple[bool, float]:
        toss = random.Random(f"{self.seed}/{step}")
        return toss.random() < 0.5, toss.random()


def _key(courses: Sequence[Course], start: Tensor, setting: FrameSetting, also: str) -> str:
    told: list[Any] = [also, setting]
    tensors = [start]
    for course in courses:
        goal, cases = course.loss.goal, course.cases
        told.append((goal.axis.layer, goal.axis.offset, goal.high, goal.low, goal.answer_weight,
                     goal.clean_weight, course.loss.geometry, course.loss.autocast,
                     [case.harmful for case in cases]))  # fmt: skip
        tensors.append(goal.axis.weights)
        for case in cases:
            tensors += [case.inside, case.prompt["input_ids"], case.answer]
    return key_of(told, tensors)
