"""Training that may be killed: steps, validation, the best so far, and going on after a kill.

What a step does follows from the state and the step's number alone, so that a run that was killed
goes on after its last validation as if it had not been: to the same values, bit for bit on a CPU.
What is kept is the best of what was validated, the earliest among equals.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

T = TypeVar("T")
_TENSORS = ("trained", "means", "squares", "best")


class Schedule(Protocol):
    """How long is trained, and how often validated."""

    @property
    def steps(self) -> int: ...  # noqa: D102
    @property
    def validate_every(self) -> int: ...  # noqa: D102


@dataclass
class State:
    """All that a step depends on, and the best so far."""

    trained: dict[str, Tensor]
    means: dict[str, Tensor]
    """Of gradients, fading, as Adam has them; those of ``squares`` likewise."""
    squares: dict[str, Tensor]
    best: dict[str, Tensor] = field(default_factory=dict)
    """What would be deployed; it is there once something was validated."""
    step: int = 0
    best_step: int = 0
    validated: dict[int, float] = field(default_factory=dict)
    """By step: how good it was; 0 is the start."""
    history: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def begun(cls, start: Mapping[str, Tensor]) -> "State":
        """Begin with copies of what is trained."""

        def zeros() -> dict[str, Tensor]:
            return {name: torch.zeros_like(value) for name, value in start.items()}

        return cls({name: value.clone() for name, value in start.items()}, zeros(), zeros())


@dataclass(frozen=True)
class Checkpoint:
    """Where a state is kept, complete or not at all, for the run that ``key`` identifies."""

    path: Path
    key: str
    writes: bool = True
    """False for all but one of several processes that share a file."""

    def keep(self, state: State) -> None:
        """Write a state in the place of the one before."""
        if not self.writes:
            return
        told = {n: getattr(state, n) for n in ("step", "best_step", "validated", "history")}
        tensors = {
            f"{kind}/{name}": value.contiguous().clone()
            for kind in _TENSORS
            for name, value in getattr(state, kind).items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        save_file(tensors, partial, metadata={"key": self.key, "state": json.dumps(told)})
        partial.replace(self.path)

    def resumed(self) -> State | None:
        """Read the state; None if there is none, it is another run's, or it was cut short."""
        if not self.path.is_file():
            return None
        tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in _TENSORS}
        try:
            with safe_open(self.path, "pt") as file:
                about = file.metadata() or {}
                if about.get("key") != self.key:
                    return None
                for found in file.keys():  # noqa: SIM118 - a handle is no mapping
                    kind, _, name = found.partition("/")
                    tensors[kind][name] = file.get_tensor(found)
        except (OSError, SafetensorError):  # cut short by a full disk, say: begin anew
            return None
        told: dict[str, Any] = json.loads(about["state"])
        told["validated"] = {int(step): score for step, score in told["validated"].items()}
        return State(**{**tensors, **told})


def train(
    start: Mapping[str, Tensor],
    move: Callable[[State], None],
    validate: Callable[[Mapping[str, Tensor]], tuple[dict[str, Tensor], float]],
    schedule: Schedule,
    checkpoint: Checkpoint | None,
    progress: Callable[[int], Any],
) -> State:
    """Train, and return the state after the last step.

    Parameters
    ----------
    start : what is trained, float32
    move : takes the step that the state says, from 1 on: moves what is trained, with means and
        squares, and tells the history.  Of anything that changes it may read the state alone
    validate : takes what is trained and gives what would be deployed, in tensors of its own, and
        how good that is, more is better; called at the start, every ``validate_every`` steps and at
        the end
    checkpoint : is gone on from, and written with every validation
    progress : called with the number of newly finished steps
    """
    state = (checkpoint and checkpoint.resumed()) or State.begun(start)
    progress(state.step)

    def judge() -> None:
        found, score = validate(state.trained)
        if all(score > before for before in state.validated.values()):
            state.best, state.best_step = found, state.step
        state.validated[state.step] = score
        if checkpoint:
            checkpoint.keep(state)

    if not state.validated:
        judge()
    while state.step < schedule.steps:
        state.step += 1
        move(state)
        if state.step % schedule.validate_every == 0 or state.step == schedule.steps:
            judge()
        progress(1)
    return state


def key_of(told: Any, tensors: Iterable[Tensor | None]) -> str:
    """Hash what a run depends on, so that no other run is gone on with.

    Parameters
    ----------
    told : plain data and dataclasses of it, whose repr says all
    tensors : of any dtype, read to the last bit; where one is missing, None
    """
    found = hashlib.sha256(repr(told).encode())
    for tensor in tensors:
        if tensor is None:
            found.update(b"none")
            continue
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().reshape(-1).view(torch.uint8)  # NumPy has no bfloat16
        found.update(plain.numpy().tobytes())
    return found.hexdigest()


class Deck(Generic[T]):
    """Deals items without end: every one once before any of them again, in an order of its own.

    Which ones stand at a place follows from seed and place alone.
    """

    def __init__(self, items: Sequence[T], seed: str) -> None:
        self.items, self.seed = items, seed
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def deal(self, first: int, count: int) -> list[T]:
        """Give as many as ``count`` from the place ``first`` on, counted from 0; [] of no items."""
        places = range(first, first + count) if self.items else ()
        return [self._at(place) for place in places]

    def _at(self, place: int) -> T:
        round_, index = divmod(place, len(self.items))
        return self.items[self._order(round_)[index]]

    def _shuffled(self, round_: int) -> list[int]:
        order = list(range(len(self.items)))
        random.Random(f"{self.seed}/{round_}").shuffle(order)
        return order
