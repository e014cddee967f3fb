"""What the training of every lab model shares: stages that end in checkpoints."""

import hashlib
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from hauberk.lab.optimize import descend, fast_products


class Trainer(ABC):
    """A network, and the stages in which it is trained.

    A run that was interrupted goes on after the last finished stage.
    """

    STAGES: ClassVar[tuple[str, ...]]
    SOURCES: ClassVar[tuple[str, ...]]
    """The modules of the lab on which the weights depend."""
    LATE: ClassVar[Mapping[str, str]] = {}
    """Terms of the recipe that no stage before the named one depends on."""

    model: Any
    processor: Any

    def __init__(self, name: str, recipe: Any, work: Path) -> None:
        self.name, self.recipe, self.work = name, recipe, work

    @abstractmethod
    def train(self, stage: str) -> None:
        """Train the stage, from where the last one ended."""

    @abstractmethod
    def trained(self, stage: str) -> nn.Module:
        """Give the part of the network that a stage changes; stages can be redone one by one."""

    def run(self, until: str | None = None) -> Self:
        """Run the stages that have no checkpoint yet; ``until`` is the last one (default: all).

        Raises
        ------
        ValueError
            If a checkpoint was made by another recipe.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        stages = self.STAGES[: self.STAGES.index(until or self.STAGES[-1]) + 1]
        for stage in stages:
            if self.checkpoint(stage).exists():
                self._assert_mine(stage)
        for stage in stages:
            saved, part = self.checkpoint(stage), self.trained(stage)
            if saved.exists():
                part.load_state_dict(load_file(saved))
                continue
            started = time.monotonic()
            self.train(stage)
            seconds = round(time.monotonic() - started)
            unfinished = saved.with_suffix(".part")
            weights = {key: value.contiguous() for key, value in part.state_dict().items()}
            save_file(weights, unfinished, metadata=self.terms(stage) | {"seconds": str(seconds)})
            unfinished.rename(saved)
            tqdm.write(f"{self.name}: {stage} took {seconds} s", file=sys.stderr)
        return self

    def checkpoint(self, stage: str) -> Path:
        """Where the weights after ``stage`` are kept."""
        return self.work / f"{stage}.safetensors"

    def terms(self, stage: str) -> dict[str, str]:
        """Say what the weights after a stage depend on, and how they were multiplied."""
        done = self.STAGES[: self.STAGES.index(stage) + 1]
        terms = asdict(self.recipe)
        for key in ("steps", "peak_rate"):
            terms[key] = {name: terms[key][name] for name in done}
        for key in ("fast", *(key for key, first in self.LATE.items() if first not in done)):
            del terms[key]
        terms["source"] = self.source_hash()
        return {
            "recipe": json.dumps(terms, sort_keys=True),
            "products": str(self.products).removeprefix("torch."),
        }

    @classmethod
    def source_hash(cls) -> str:
        """Hash the source of the world and of the stages, on which a training run depends too."""
        files = [Path(__file__).with_name(f"{name}.py") for name in cls.SOURCES]
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    @property
    def products(self) -> torch.dtype:
        """What matrices are multiplied in."""
        return fast_products() if self.recipe.fast else torch.float32

    def autocast(self) -> torch.autocast:
        """The arithmetic of the run."""
        bfloat16 = self.products == torch.bfloat16
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16)

    def descend(
        self, stage: str, parts: Sequence[nn.Module], loss_of: Callable[[int], Tensor]
    ) -> None:
        """Take the steps of a stage, in which ``parts`` alone change."""
        self.model.requires_grad_(False).train()
        for part in parts:
            part.requires_grad_(True)
        steps, peak_rate = self.recipe.steps[stage], self.recipe.peak_rate[stage]
        descend(f"{stage:>9}", parts, loss_of, steps=steps, peak_rate=peak_rate)
        self.model.requires_grad_(False).eval()

    def _assert_mine(self, stage: str) -> None:
        saved = self.checkpoint(stage)
        found, expected = kept(saved).get("recipe"), self.terms(stage)["recipe"]
        if found != expected:
            raise ValueError(
                f"{saved} was trained by another recipe: {found}, expected {expected}. "
                "Remove it to train the stage again, or choose another folder with --work."
            )


def kept(saved: Path) -> dict[str, str]:
    """Read what a checkpoint says of itself: see :meth:`Trainer.terms`."""
    with safe_open(saved, "pt") as file:
        return file.metadata() or {}
