"""Training a projector so that a picture does what its caption does; resumable after a kill.

Every step takes a batch of lessons with answers, so that what the model can do is kept, and one of
lessons with captions, and moves the trained weights by AdamW against the gradient of their loss
(:mod:`hauberk.defenses.projector_step`).  No refusal is among the answers that are trained on.

Which lessons make up a step follows from the seed and the step alone, so that a run that was killed
goes on after its last validation as if it had not been: to the same weights, bit for bit on a CPU.
The weights that are kept are the best of those that were validated, on requests that are not
trained on.  Between steps the model is as it was given; trained weights live beside it.

Source: as :mod:`hauberk.defenses.projector`; AdamW: Loshchilov and Hutter, ICLR 2019,
arXiv:1711.05101.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from hauberk.defenses.projector import FACTOR_A, FACTOR_B, Part, Projector
from hauberk.defenses.projector_step import Measured, Prepared, ProjectorLoss
from hauberk.defenses.training import Checkpoint, Deck, State, key_of, train
from hauberk.errors import Diverged
from hauberk.pixels import frozen

_ADAPTER = "tga"


@dataclass(frozen=True)
class ProjectorTraining:
    """How a projector is trained.

    Raises
    ------
    ValueError
        If a number is out of its range.
    """

    steps: int = 600
    batch: int = 32
    """Lessons with an answer in one step."""
    aligned: int = 32
    """Lessons with a caption alone in one step."""
    rate: float = 1e-3
    """Peak rate of what connects tower and decoder; the authors' first stage has 1e-3."""
    decoder_rate: float = 2e-4
    """Peak rate of low-rank changes and of the decoder; usual for the former, the authors' for a
    whole decoder of 7 billion weights is 2e-6."""
    warmup: float = 0.03
    """Share of the steps in which the rate rises; it falls along a cosine after them, to 0."""
    decay: float = 0.0
    """Of the weights, as the authors have it."""
    clip: float = 1.0
    """The gradient's norm is cut to this, as transformers' own trainer does."""
    accumulate: int = 1
    """Parts in which a batch is run, one after the other."""
    checkpointing: bool = False
    """Compute activations again for the backward pass instead of keeping them."""
    validate_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is wrong, 1 or more is right.")
        if min(self.batch, self.aligned) < 0 or self.batch + self.aligned == 0:
            raise ValueError(
                f"batch {self.batch} and aligned {self.aligned}: 0 or more, and not both 0, is "
                "right."
            )
        if min(self.rate, self.decoder_rate) <= 0 or self.decay < 0 or self.clip <= 0:
            raise ValueError(
                f"rate {self.rate}, decoder_rate {self.decoder_rate}, clip {self.clip}, decay "
                f"{self.decay}: above 0, and for decay 0 or more, is right."
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: {self.warmup} is wrong, a share below 1 is right.")

    def share(self, step: int) -> float:
        """The share of the peak rate at a step, counted from 1."""
        rising = max(1, round(self.warmup * self.steps))
        if step <= rising:
            return step / rising
        done = (step - rising) / max(1, self.steps - rising)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Processes(Protocol):
    """What is asked of several processes: ``accelerate.Accelerator`` has it."""

    process_index: int
    num_processes: int

    def reduce(self, tensor: Any, reduction: str) -> Any:
        """Combine a tensor over the processes."""
        ...


@dataclass(frozen=True)
class TrainedProjector:
    """What came out."""

    projector: Projector
    """The best of those that were validated."""
    step: int
    """Steps after which it was."""
    validated: dict[int, float]
    """By step: what ``validate`` said; 0 is the start."""
    history: list[dict[str, float]]
    """One row a step: losses, cosines, and the norm of the gradient."""
    last: Projector
    """The weights after the last step, whether they are the best or not."""


def train_projector(
    loss: ProjectorLoss,
    lessons: Sequence[Prepared],
    part: Part,
    setting: ProjectorTraining,
    validate: Callable[[Projector], float],
    *,
    checkpoint: Path | None = None,
    also: str = "",
    processes: Processes | None = None,
    progress: Callable[[int], Any] = lambda _: None,
) -> TrainedProjector:
    """Train one model's projector.

    Parameters
    ----------
    loss : of the model, which is given back as it was, also after an error
    lessons : prepared by ``loss``; those with an answer, and those with a caption alone
    part : which weights are trained
    validate : takes the weights so far, to be applied to the model as it was given, and says how
        good they are, more is better; called at the start, every ``validate_every`` steps and at
        the end
    checkpoint : file that a killed run goes on from; one of another start, setting or other lessons
        is not taken up.  It is written with every validation
    also : what else the run depends on, such as what ``validate`` asks; a checkpoint of another is
        not taken up either
    processes : an ``accelerate.Accelerator`` where several share the work: each runs its part of
        every batch, and gradients are averaged.  The same file may serve all as ``checkpoint``,
        which the first one writes
    progress : called with the number of newly finished steps

    Returns
    -------
    TrainedProjector

    Raises
    ------
    ValueError
        If there are no lessons of a kind that a batch is to have, or batches cannot be shared
        evenly.
    Diverged
        If a loss or gradient is not finite.
    """
    answered = [row for row in lessons if len(row.answer)]
    silent = [row for row in lessons if not len(row.answer) and row.caption is not None]
    _check(setting, len(answered), len(silent), loss, processes)
    about = {"alignment": asdict(loss.alignment), **asdict(setting)}
    decks = Deck(answered, f"{setting.seed}/answer"), Deck(silent, f"{setting.seed}/align")
    sizes = setting.batch, setting.aligned

    def judge(trained: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        now = {name: value.clone() for name, value in trained.items()}
        return now, validate(Projector(now, part, about))

    with _trainable(loss.model, part, setting) as student:

        def move(state: State) -> None:
            dealt = [
                deck.deal((state.step - 1) * size, size)
                for deck, size in zip(decks, sizes, strict=True)
            ]
            student.set(state.trained)
            with student.inside():
                found = _descended(loss, dealt, state.step, setting, student, processes)
            state.history.append(found)
            _move(state, student, setting)

        kept = None
        if checkpoint:
            key = _key(loss, lessons, part, setting, also, student.start)
            kept = Checkpoint(checkpoint, key, processes is None or processes.process_index == 0)
        state = train(student.start, move, judge, setting, kept, progress)
    best, last = (Projector(weights, part, about) for weights in (state.best, state.trained))
    return TrainedProjector(best, state.best_step, state.validated, state.history, last)


def _check(
    setting: ProjectorTraining,
    answered: int,
    silent: int,
    loss: ProjectorLoss,
    processes: Processes | None,
) -> None:
    if setting.batch and not answered:
        raise ValueError(f"batch {setting.batch}, but no lesson has an answer; give some.")
    if setting.aligned and not loss.alignment.off and not silent:
        raise ValueError(
            f"aligned {setting.aligned}, but no lesson has a caption alone; give some, or "
            "`aligned` 0 where captions stand with answers."
        )
    if setting.checkpointing and not loss.whole:
        raise ValueError("checkpointing needs whole passes; give the loss `whole`.")
    shared = 1 if processes is None else processes.num_processes
    parts = shared * setting.accumulate
    if setting.batch % parts or setting.aligned % parts:
        raise ValueError(
            f"batch {setting.batch} and aligned {setting.aligned} cannot be shared evenly by "
            f"{shared} processes in {setting.accumulate} parts each; give multiples of {parts}."
        )


# --- the trained weights ----------------------------------------------------------------------


class _Student:
    """The weights that are trained, as leaves of their own: the model has them inside alone."""

    def __init__(
        self,
        model: PreTrainedModel,
        whole: Mapping[str, nn.Parameter],
        factors: Mapping[str, nn.Parameter],
        adapters: Mapping[str, nn.Module],
        setting: ProjectorTraining,
    ) -> None:
        self.model, self.adapters, self.setting = model, adapters, setting
        self.places = dict(whole)
        self.factors = dict(factors)
        half = {weight.dtype for weight in whole.values()} - {torch.float32}
        if half:
            for weight in self.factors.values():
                weight.data = weight.data.float()
        self.start = {name: weight.detach().float().clone() for name, weight in self.leaves.items()}

    @property
    def leaves(self) -> dict[str, nn.Parameter]:
        """All that is trained, by name."""
        return self.places | self.factors

    def connects(self, name: str) -> bool:
        """Whether a weight is of what connects tower and decoder, and not of the decoder."""
        return name in self.connectors

    connectors: frozenset[str] = frozenset()

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Take over values of the trained weights."""
        self.values = dict(values)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Let the model compute with the trained weights, and take gradients of them alone."""
        leaves = self.leaves
        before = {name: (leaf.data, leaf.requires_grad) for name, leaf in leaves.items()}
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model))
            for path, layer in self.adapters.items():
                stack.enter_context(_in_place(self.model, path, layer))
            if self.setting.checkpointing:
                stack.enter_context(_checkpointing(self.model))
            try:
                for name, leaf in leaves.items():
                    leaf.data = self.values[name].to(leaf.device)
                    leaf.requires_grad_(True)
                    leaf.grad = None
                yield
            finally:
                self.gradients = {
                    name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None
                }
                for name, leaf in leaves.items():
                    leaf.data, required = before[name]
                    leaf.requires_grad_(required)
                    leaf.grad = None


@contextmanager
def _trainable(
    model: PreTrainedModel, part: Part, setting: ProjectorTraining
) -> Iterator[_Student]:
    """Find the weights to train; the low-rank layers are made by peft and stand beside."""
    whole = part.whole(model)
    linear = part.adapted(model)
    required = [(weight, weight.requires_grad) for weight in model.parameters()]
    layers: dict[str, nn.Module] = {}
    factors: dict[str, nn.Parameter] = {}
    if linear:
        box = nn.ModuleDict({str(index): layer for index, layer in enumerate(linear.values())})
        config = LoraConfig(
            r=part.rank, lora_alpha=part.alpha, lora_dropout=0.0, target_modules=list(box)
        )
        with torch.random.fork_rng(devices=_devices(model)):
            torch.manual_seed(setting.seed)
            inject_adapter_in_model(config, box, adapter_name=_ADAPTER)
        for weight, before in required:  # peft freezes what it stands on
            weight.requires_grad_(before)
        for name, made in zip(linear, box.values(), strict=True):
            held: Any = made
            layers[name] = made
            factors[f"{name}.weight{FACTOR_A}"] = held.lora_A[_ADAPTER].weight
            factors[f"{name}.weight{FACTOR_B}"] = held.lora_B[_ADAPTER].weight
    student = _Student(model, whole, factors, layers, setting)
    student.connectors = frozenset(Part("projector").whole(model))
    yield student


def _devices(model: PreTrainedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


@contextmanager
def _in_place(model: nn.Module, path: str, layer: nn.Module) -> Iterator[None]:
    parent, _, name = path.rpartition(".")
    home: nn.Module = attrgetter(parent)(model) if parent else model
    before = getattr(home, name)
    setattr(home, name, layer)
    try:
        yield
    finally:
        setattr(home, name, before)


@contextmanager
def _checkpointing(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    # transformers gave it another name in the course of version 5
    new = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    getattr(model, f"{name}_enable")({"use_reentrant": False})
    model.train()  # activations are computed again only then
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()
        model.train(training)


# --- one step ---------------------------------------------------------------------------------


def _descended(
    loss: ProjectorLoss,
    kinds: Sequence[Sequence[Prepared]],
    step: int,
    setting: ProjectorTraining,
    student: _Student,
    processes: Processes | None,
) -> dict[str, float]:
    """Run a batch forwards and backwards; gradients are left in the trained weights."""
    first, shared = (0, 1) if processes is None else (
        processes.process_index, processes.num_processes)  # fmt: skip
    mine = [rows[first::shared] for rows in kinds]
    progress = (step - 1) / setting.steps
    total = 0.0
    seen: list[Measured] = []
    with torch.random.fork_rng(devices=_devices(loss.model)), torch.enable_grad():
        torch.manual_seed((setting.seed * 1_000_003 + step) * shared + first)
        for place in range(setting.accumulate):
            rows = [row for kind in mine for row in kind[place :: setting.accumulate]]
            found = loss(rows, progress)
            if found.loss.requires_grad:
                (found.loss / setting.accumulate).backward()
            total += found.loss.item() / setting.accumulate
            seen.append(found)
    if not isfinite(total):
        raise Diverged(
            f"step {step}: the loss is {total}; lower `rate`, or load the model in bfloat16 or "
            "float32, whose range is wide enough."
        )
    if processes is not None:
        for leaf in student.leaves.values():  # of every one, or the processes wait for each other
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            leaf.grad = processes.reduce(gradient, "mean")
    return _row(step, total, seen)


def _row(step: int, total: float, seen: Sequence[Measured]) -> dict[str, float]:
    aligned = [one.aligned for one in seen if one.aligned is not None]
    values = {
        "loss": [total],
        "answers": [one.answers for one in seen],
        "pair": [one.pair.item() for one in aligned],
        "margin": [one.margin.item() for one in aligned],
        "image_caption": [one.image_caption.mean().item() for one in aligned],
        "retrieved_caption": [one.retrieved_caption.mean().item() for one in aligned],
    }
    means = {name: sum(found) / len(found) for name, found in values.items() if found}
    return {"step": step, **{name: mean for name, mean in means.items() if isfinite(mean)}}


_FADING, _EPSILON = (0.9, 0.999), 1e-8
"""Of AdamW, as torch has them."""


def _move(state: State, student: _Student, setting: ProjectorTraining) -> None:
    """Take one step of AdamW in float32."""
    gradients = {name: gradient.float() for name, gradient in student.gradients.items()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()] or [torch.zeros(())])
    size = norm.norm().item()
    if not isfinite(size):
        raise Diverged(
            f"step {state.step}: the gradient's norm is {size}; lower `rate`, or load the model in "
            "bfloat16 or float32, whose range is wide enough."
        )
    state.history[-1]["gradient"] = size
    cut = min(1.0, setting.clip / (size + 1e-6))  # as torch.nn.utils.clip_grad_norm_
    share = setting.share(state.step)
    first, second = _FADING
    for name, gradient in gradients.items():
        rate = share * (setting.rate if student.connects(name) else setting.decoder_rate)
        weight, mean, square = state.trained[name], state.means[name], state.squares[name]
        gradient = gradient.to(weight.device) * cut
        mean.mul_(first).add_(gradient, alpha=1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size_ = (square / (1 - second**state.step)).sqrt_().add_(_EPSILON)
        weight.mul_(1 - rate * setting.decay)
        weight.addcdiv_(mean, size_, value=-rate / (1 - first**state.step))


def _key(
    loss: ProjectorLoss,
    lessons: Sequence[Prepared],
    part: Part,
    setting: ProjectorTraining,
    also: str,
    start: Mapping[str, Tensor],
) -> str:
    told = (also, part, setting, loss.alignment, loss.retrieved, loss.autocast, list(start),
            [list(row.pixels) for row in lessons])  # fmt: skip
    tensors: list[Tensor | None] = [*start.values()]
    for row in lessons:
        tensors += [row.prompt["input_ids"], row.answer, row.retrieved, row.caption, row.rival]
        tensors += row.pixels.values()
    return key_of(told, tensors)
