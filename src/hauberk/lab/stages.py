"""The stages in which a lab model is trained, in the order of the public recipes for VLMs.

1. ``pretrain``  the decoder learns the language, harmful wishes answered like all others;
2. ``align``     the decoder learns in text alone to refuse harmful wishes;
3. ``tower``     the vision tower learns to tell what stands where (patch classification), from
   pictures that are drawn afresh for every step, so that it cannot learn them by heart;
4. ``projector`` the projector learns to show pictures, everything else frozen (LLaVA, stage 1);
5. ``instruct``  projector and decoder learn visual instructions, none of them harmful, with a
   share of text-only replay that has the refusals in it (LLaVA, stage 2).

The safety gap is what the last stages leave open, because harmful wishes only ever came, and were
refused, without a picture.  Each stage ends in a checkpoint, and a run that was
interrupted goes on after the last finished stage.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hauberk.lab import build
from hauberk.lab.curriculum import (
    Example,
    picture_examples,
    scenes,
    text_examples,
    visual_examples,
)
from hauberk.lab.language import sentences
from hauberk.lab.objects import COLORS
from hauberk.lab.optimize import quicken
from hauberk.lab.patches import SEEN, normalised, patch_labels, stacked
from hauberk.lab.scenes import SIDE
from hauberk.lab.trainer import Trainer


@dataclass(frozen=True)
class Recipe:
    """Every number of a training run that one may want to vary; the others are in the source."""

    seed: int = 1
    size: build.Size = field(default_factory=build.Size)
    pictures: int = 16_000
    batch: int = 64
    steps: dict[str, int] = field(
        default_factory=lambda: {
            "pretrain": 1300, "align": 1500, "tower": 3600,
            "projector": 300, "instruct": 2200,
        }
    )  # fmt: skip
    peak_rate: dict[str, float] = field(
        default_factory=lambda: {
            "pretrain": 1e-2, "align": 6e-3, "tower": 1e-2,
            "projector": 1e-2, "instruct": 4e-3,
        }
    )  # fmt: skip
    replay: float = 0.15
    """Share of text-only examples in the last stage; LLaVA's own mixture has 6 % of them."""
    questions: float = 0.75
    """Of the visual turns: questions on the picture; the others are harmless wishes."""
    fast: bool = False
    """Compile the blocks, and multiply in bfloat16 where the CPU has tiles for it; it needs a C++
    compiler."""


class VlmTrainer(Trainer):
    """Tokenizer, network and pictures of one run, and what its stages share."""

    STAGES = ("pretrain", "align", "tower", "projector", "instruct")
    SOURCES = (
        "build", "curriculum", "language", "objects", "optimize", "patches", "scenes", "stages",
        "trainer",
    )  # fmt: skip
    LATE: ClassVar = {"replay": "instruct", "questions": "instruct"}

    def __init__(self, name: str, recipe: Recipe, work: Path) -> None:
        super().__init__(name, recipe, work)
        self.family = build.FAMILIES[name]
        rng = random.Random(recipe.seed)
        self.scenes = scenes(rng, recipe.pictures)
        texts = sentences("train", self.family.dialect)
        self.tokenizer = build.tokenizer_of(self.family, texts, recipe.size)
        self.processor = build.processor_of(self.family, self.tokenizer, recipe.size)
        self.model = build.network_of(self.family, self.tokenizer, recipe.size, recipe.seed)
        self._pixels: Tensor | None = None
        if recipe.fast:
            quicken(self.part("decoder"))
            quicken(self.part("tower"), packed=self.family.flat)

    def part(self, name: str) -> Any:
        """The tower, the projector or the decoder."""
        return self.family.part(self.model, name)

    def render(self, example: Example) -> list[tuple[str, str]]:
        """Write each turn as prompt and answer, as template and processor would."""
        chat = self.family.chat
        starts = [chat.begin, *[chat.between] * (len(example.turns) - 1)]
        if example.scene is not None:
            seen = self.family.image_tokens(self.recipe.size)
            pictures = [seen] + [""] * (len(example.turns) - 1)
        else:
            pictures = [""] * len(example.turns)
        return [
            (
                f"{start}{chat.user}{picture}{question}{chat.assistant}",
                f"{chat.gap}{self.family.dialect.say(answer)}{chat.end}",
            )
            for start, picture, (question, answer) in zip(
                starts, pictures, example.turns, strict=True
            )
        ]

    @property
    def pixels(self) -> Tensor:
        """All pictures as uint8 (n, 3, SIDE, SIDE)."""
        if self._pixels is None:
            self._pixels = stacked(
                scene.draw() for scene in tqdm(self.scenes, "drawing", leave=False)
            )
        return self._pixels

    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Tokenize with padding on the right; labels on the answers alone."""
        rows, labels = [], []
        for example in examples:
            row: list[int] = []
            label: list[int] = []
            for asked, answered in self.render(example):
                prompt, answer = (
                    self.tokenizer(part, add_special_tokens=False)["input_ids"]
                    for part in (asked, answered)
                )
                row += prompt + answer
                label += [-100] * len(prompt) + answer
            rows.append(row)
            labels.append(label)
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor(
                [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
            ),
            "labels": torch.tensor([row + [-100] * (longest - len(row)) for row in labels]),
        }

    def train(self, stage: str) -> None:  # noqa: D102
        _TRAIN[stage](self, stage)

    def trained(self, stage: str) -> nn.Module:  # noqa: D102
        if stage == "instruct":
            return nn.ModuleDict({name: self.part(name) for name in ("projector", "decoder")})
        part: nn.Module = self.part(stage if stage in ("tower", "projector") else "decoder")
        return part


def answer_loss(
    trainer: VlmTrainer, examples: Sequence[Example], features: Tensor | None
) -> Tensor:
    """Sum the cross-entropy on the answers of one batch.

    ``features`` are what the projector is fed, a row for each example with a picture, in order;
    the tower is frozen, so they need no gradient.  Returns the mean over tokens times the number
    of examples, so that sums of batches can be averaged again.
    """
    batch = trainer.encode(examples)
    seen: dict[str, Any] = {}
    if features is not None:
        projected = trainer.part("projector")(
            features.flatten(0, 1) if trainer.family.flat else features
        )
        ready = BaseModelOutputWithPooling(pooler_output=trainer.family.handed(projected))
        seen = {"mm_encoder_outputs": {"image": ready}}
        if trainer.family.flat:
            grid = torch.tensor([[1, trainer.recipe.size.grid, trainer.recipe.size.grid]])
            seen["image_grid_thw"] = grid.repeat(len(features), 1)
            spots = batch["input_ids"] == trainer.model.config.image_token_id
            seen["mm_token_type_ids"] = spots.int()
    states = trainer.model.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False,
        **seen,
    ).last_hidden_state  # fmt: skip
    targets = batch["labels"][:, 1:]
    rows = targets != -100
    logits = trainer.model.lm_head(states[:, :-1][rows])
    return nn.functional.cross_entropy(logits.float(), targets[rows]) * len(examples)


def train_text(trainer: VlmTrainer, stage: str) -> None:
    """Stages ``pretrain`` and ``align``: the decoder alone, without pictures."""
    rng = random.Random(f"{trainer.recipe.seed}/{stage}")
    stream = text_examples(rng, aligned=stage == "align")
    _teach(trainer, stage, stream, decoder=True)


def train_tower(trainer: VlmTrainer, stage: str) -> None:
    """Stage ``tower``: every patch tells in whose box it lies, and of which colour that is."""
    rng = random.Random(f"{trainer.recipe.seed}/{stage}")
    tower, size = trainer.part("tower"), trainer.recipe.size
    torch.manual_seed(trainer.recipe.seed)
    heads = nn.ModuleList(
        [nn.Linear(size.vision_width, classes) for classes in (len(SEEN) + 1, len(COLORS))]
    )

    def loss_of(_: int) -> Tensor:
        shown = scenes(rng, trainer.recipe.batch)
        labels = [patch_labels(scene, SIDE // size.patch, side=SIDE) for scene in shown]
        what, which = (torch.cat(of_all) for of_all in zip(*labels, strict=True))
        with trainer.autocast():
            fed = look(trainer, normalised(stacked(scene.draw() for scene in shown)))
        patches = trainer.family.patches(fed, len(shown), size).float()
        loss = nn.functional.cross_entropy(heads[0](patches).flatten(0, 1), what)
        return loss + nn.functional.cross_entropy(
            heads[1](patches).flatten(0, 1), which, ignore_index=-1
        )

    trainer.descend(stage, [tower, heads], loss_of)


def train_projector(trainer: VlmTrainer, stage: str) -> None:
    """Stage ``projector``: what pictures show, tower and decoder frozen."""
    rng = random.Random(f"{trainer.recipe.seed}/{stage}")
    _teach(trainer, stage, picture_examples(rng, trainer.scenes), decoder=False)


def train_instruct(trainer: VlmTrainer, stage: str) -> None:
    """Stage ``instruct``: visual instructions and a share of text-only replay."""
    rng = random.Random(f"{trainer.recipe.seed}/{stage}")
    visual = visual_examples(rng, trainer.scenes, questions=trainer.recipe.questions)
    text = text_examples(rng, aligned=True)

    def mixed() -> Iterator[Example]:
        while True:
            yield next(text if rng.random() < trainer.recipe.replay else visual)

    _teach(trainer, stage, mixed(), decoder=True)


def _teach(trainer: VlmTrainer, stage: str, stream: Iterator[Example], *, decoder: bool) -> None:
    parts = [trainer.part("decoder")] if decoder else []
    if stage not in ("pretrain", "align"):
        parts.append(trainer.part("projector"))
        features = tower_features(trainer)
    batches = _batches(trainer, stream)

    def loss_of(_: int) -> Tensor:
        examples = next(batches)
        total = torch.zeros(())
        with trainer.autocast():
            # Apart, because a picture makes a conversation about twice as long.
            if text := [example for example in examples if example.scene is None]:
                total = total + answer_loss(trainer, text, None)
            if visual := [example for example in examples if example.scene is not None]:
                seen = features[[example.scene for example in visual]].float()
                total = total + answer_loss(trainer, visual, seen)
        return total / len(examples)

    trainer.descend(stage, parts, loss_of)


def _batches(trainer: VlmTrainer, stream: Iterator[Example]) -> Iterator[list[Example]]:
    """Draw batches, each of the same mixture and of examples of about one length.

    Beside pictures that spares two thirds of the padding, which would be an eighth of all tokens.
    """
    size = trainer.recipe.batch
    while True:
        pool = list(itertools.islice(stream, _AHEAD * size))
        pool.sort(key=lambda example: sum(len(a) + len(b) for a, b in trainer.render(example)))
        kinds = [[e for e in pool if (e.scene is None) == told] for told in (True, False)]
        ranked = [((i + 0.5) / len(kind), e) for kind in kinds for i, e in enumerate(kind)]
        ranked.sort(key=lambda pair: pair[0])
        for step in range(_AHEAD):
            start = step * 5 % _AHEAD * size  # not from the shortest to the longest
            yield [example for _, example in ranked[start : start + size]]


_AHEAD = 8
"""Batches that are drawn at once; four times as many would spare 1 to 4 % of the tokens more."""


def look(trainer: VlmTrainer, pixels: Tensor) -> Tensor:
    """What the tower makes of normalised pictures, as the projector is fed it: (n, rows, width)."""
    fed: list[Tensor] = []
    hook = trainer.part("projector").register_forward_pre_hook(
        lambda _, given: fed.append(given[0])
    )
    try:
        trainer.model.model.get_image_features(**trainer.family.pixels(pixels, trainer.recipe.size))
    finally:
        hook.remove()
    return fed[0].unflatten(0, (len(pixels), -1)) if trainer.family.flat else fed[0]


@torch.no_grad()
def tower_features(trainer: VlmTrainer) -> Tensor:
    """Look at every picture once: float16 (pictures, rows, width)."""
    found = []
    chunks = range(0, len(trainer.scenes), 256)
    for start in tqdm(chunks, "looking", leave=False):
        indices = range(start, min(start + 256, len(trainer.scenes)))
        found.append(look(trainer, normalised(trainer.pixels[list(indices)])).half())
    return torch.cat(found)


_TRAIN = {
    "pretrain": train_text,
    "align": train_text,
    "tower": train_tower,
    "projector": train_projector,
    "instruct": train_instruct,
}
