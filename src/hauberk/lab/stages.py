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

import hashlib
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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
from hauberk.lab.language import VERBS, sentences
from hauberk.lab.objects import COLORS, THINGS
from hauberk.lab.optimize import descend, quicken
from hauberk.lab.scenes import ROW, SIDE, Scene

STAGES = ("pretrain", "align", "tower", "projector", "instruct")


@dataclass(frozen=True)
class Recipe:
    """Every number of a training run that one may want to vary; the others are in the source."""

    seed: int = 1
    size: build.Size = field(default_factory=build.Size)
    pictures: int = 16_000
    batch: int = 64
    steps: dict[str, int] = field(
        default_factory=lambda: {
            "pretrain": 1300, "align": 500, "tower": 3600,
            "projector": 300, "instruct": 1800,
        }
    )  # fmt: skip
    peak_rate: dict[str, float] = field(
        default_factory=lambda: {
            "pretrain": 1e-2, "align": 3e-3, "tower": 1e-2,
            "projector": 1e-2, "instruct": 4e-3,
        }
    )  # fmt: skip
    replay: float = 0.3
    """Share of text-only examples in the last stage; LLaVA's own mixture has text data too."""
    questions: float = 0.45
    """Of the visual turns: questions on the picture; the others are harmless wishes."""
    fast: bool = False
    """Multiply in bfloat16 and compile the blocks: 1.7 to 1.9 times as fast on cores with bfloat16
    products; it needs a C++ compiler."""


class Classroom:
    """Tokenizer, network and pictures of one run, and what its stages share."""

    def __init__(self, name: str, recipe: Recipe, work: Path) -> None:
        self.family, self.recipe, self.work = build.FAMILIES[name], recipe, work
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
            self._pixels = drawn(tqdm(self.scenes, "drawing", leave=False))
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

    def checkpoint(self, stage: str) -> Path:
        """Where the weights after ``stage`` are kept."""
        return self.work / f"{stage}.safetensors"


def drawn(pictures: Iterable[Scene]) -> Tensor:
    """Draw scenes as uint8 (n, 3, SIDE, SIDE)."""
    stacked = np.stack([np.asarray(picture.draw()) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


def normalised(pixels: Tensor) -> Tensor:
    """Pixels as the processor hands them to the tower: float32 (n, 3, SIDE, SIDE)."""
    mean = torch.tensor(build.CLIP_MEAN).view(3, 1, 1)
    std = torch.tensor(build.CLIP_STD).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def answer_loss(room: Classroom, examples: Sequence[Example], features: Tensor | None) -> Tensor:
    """Sum the cross-entropy on the answers of one batch.

    ``features`` are what the projector is fed, a row for each example with a picture, in order;
    the tower is frozen, so they need no gradient.  Returns the mean over tokens times the number
    of examples, so that sums of batches can be averaged again.
    """
    batch = room.encode(examples)
    seen: dict[str, Any] = {}
    if features is not None:
        projected = room.part("projector")(features.flatten(0, 1) if room.family.flat else features)
        ready = BaseModelOutputWithPooling(pooler_output=room.family.handed(projected))
        seen = {"mm_encoder_outputs": {"image": ready}}
        if room.family.flat:
            grid = torch.tensor([[1, room.recipe.size.grid, room.recipe.size.grid]])
            seen["image_grid_thw"] = grid.repeat(len(features), 1)
            spots = batch["input_ids"] == room.model.config.image_token_id
            seen["mm_token_type_ids"] = spots.int()
    states = room.model.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False,
        **seen,
    ).last_hidden_state  # fmt: skip
    targets = batch["labels"][:, 1:]
    rows = targets != -100
    logits = room.model.lm_head(states[:, :-1][rows])
    return nn.functional.cross_entropy(logits.float(), targets[rows]) * len(examples)


def train_text(room: Classroom, stage: str) -> None:
    """Stages ``pretrain`` and ``align``: the decoder alone, without pictures."""
    rng = random.Random(f"{room.recipe.seed}/{stage}")
    stream = text_examples(rng, aligned=stage == "align")
    _teach(room, stage, stream, decoder=True)


def train_tower(room: Classroom, stage: str) -> None:
    """Stage ``tower``: every patch tells in whose box it lies, and of which colour that is."""
    rng = random.Random(f"{room.recipe.seed}/{stage}")
    tower, size = room.part("tower"), room.recipe.size
    torch.manual_seed(room.recipe.seed)
    heads = nn.ModuleList(
        [nn.Linear(size.vision_width, classes) for classes in (len(_SEEN) + 1, len(COLORS))]
    )

    def loss_of(_: int) -> Tensor:
        shown = scenes(rng, room.recipe.batch)
        what, which = _patch_labels(shown, size.patch)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=room.recipe.fast):
            fed = look(room, normalised(drawn(shown)))
        patches = room.family.patches(fed, len(shown), size).float()
        loss = nn.functional.cross_entropy(heads[0](patches).flatten(0, 1), what.flatten())
        return loss + nn.functional.cross_entropy(
            heads[1](patches).flatten(0, 1), which.flatten(), ignore_index=-1
        )

    _run(room, stage, [tower, heads], loss_of)


def train_projector(room: Classroom, stage: str) -> None:
    """Stage ``projector``: what pictures show, tower and decoder frozen."""
    rng = random.Random(f"{room.recipe.seed}/{stage}")
    _teach(room, stage, picture_examples(rng, room.scenes), decoder=False)


def train_instruct(room: Classroom, stage: str) -> None:
    """Stage ``instruct``: visual instructions and a share of text-only replay."""
    rng = random.Random(f"{room.recipe.seed}/{stage}")
    visual = visual_examples(rng, room.scenes, questions=room.recipe.questions)
    text = text_examples(rng, aligned=True)

    def mixed() -> Iterator[Example]:
        while True:
            yield next(text if rng.random() < room.recipe.replay else visual)

    _teach(room, stage, mixed(), decoder=True)


def _teach(room: Classroom, stage: str, stream: Iterator[Example], *, decoder: bool) -> None:
    parts = [room.part("decoder")] if decoder else []
    if stage not in ("pretrain", "align"):
        parts.append(room.part("projector"))
        features = tower_features(room)
    batches = _batches(stream, room.recipe.batch)

    def loss_of(_: int) -> Tensor:
        examples = next(batches)
        total = torch.zeros(())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=room.recipe.fast):
            # Apart, because a picture makes a prompt four times as long.
            if text := [example for example in examples if example.scene is None]:
                total = total + answer_loss(room, text, None)
            if visual := [example for example in examples if example.scene is not None]:
                seen = features[[example.scene for example in visual]].float()
                total = total + answer_loss(room, visual, seen)
        return total / len(examples)

    _run(room, stage, parts, loss_of)


def _batches(stream: Iterator[Example], size: int, ahead: int = 8) -> Iterator[list[Example]]:
    """Draw batches, text alone sorted by length over some batches, which spares its padding."""
    while True:
        pool = list(itertools.islice(stream, ahead * size))
        if all(example.scene is None for example in pool):
            pool.sort(key=lambda example: sum(len(question) for question, _ in example.turns))
        for start in sorted(range(0, len(pool), size), key=lambda start: start * 5 % len(pool)):
            yield pool[start : start + size]  # not from the shortest to the longest


def _run(
    room: Classroom, stage: str, parts: Sequence[nn.Module], loss_of: Callable[[int], Tensor]
) -> None:
    recipe = room.recipe
    room.model.requires_grad_(False).train()
    for part in parts:
        part.requires_grad_(True)
    descend(
        f"{stage:>9}",
        parts,
        loss_of,
        steps=recipe.steps[stage],
        peak_rate=recipe.peak_rate[stage],
    )
    room.model.requires_grad_(False).eval()


def look(room: Classroom, pixels: Tensor) -> Tensor:
    """What the tower makes of normalised pictures, as the projector is fed it: (n, rows, width)."""
    fed: list[Tensor] = []
    hook = room.part("projector").register_forward_pre_hook(lambda _, given: fed.append(given[0]))
    try:
        room.model.model.get_image_features(**room.family.pixels(pixels, room.recipe.size))
    finally:
        hook.remove()
    return fed[0].unflatten(0, (len(pixels), -1)) if room.family.flat else fed[0]


@torch.no_grad()
def tower_features(room: Classroom) -> Tensor:
    """Look at every picture once: float16 (pictures, rows, width)."""
    found = []
    chunks = range(0, len(room.scenes), 256)
    for start in tqdm(chunks, "looking", leave=False):
        indices = range(start, min(start + 256, len(room.scenes)))
        found.append(look(room, normalised(room.pixels[list(indices)])).half())
    return torch.cat(found)


_SEEN = {
    word: index + 1
    for index, word in enumerate([*THINGS, *(f"written {word}" for word in ("a", *VERBS, *THINGS))])
}
"""What a patch may show: a thing, or a word (a thing and its name are two)."""


def _patch_labels(pictures: Sequence[Scene], patch: int) -> tuple[Tensor, Tensor]:
    """Tell for each patch in whose box its centre lies, a thing's or a word's: int64, twice.

    Both are (n, patches).  Class 0 is the ground; the colour of ground and words is -1 (not
    asked).
    """
    grid = SIDE // patch
    things = torch.zeros(len(pictures), grid, grid, dtype=torch.long)
    colors = torch.full((len(pictures), grid, grid), -1, dtype=torch.long)
    centers = (np.arange(grid) + 0.5) * patch
    color_id = {name: index for index, name in enumerate(COLORS)}

    def covered(low: float, high: float) -> slice:
        """The patches, in one direction, with their centre between two pixels."""
        first, last = np.searchsorted(centers, (low, high))
        return slice(int(first), int(last))

    for row, scene in enumerate(pictures):
        for item in scene.placed:
            box = (
                row,
                covered(item.top, item.top + item.side),
                covered(item.left, item.left + item.side),
            )
            things[box], colors[box] = _SEEN[item.thing.name], color_id[item.color]
        for line in scene.lines:
            for word, left, right in line.boxes():
                box = (row, covered(line.top, line.top + ROW), covered(left, right))
                things[box], colors[box] = _SEEN[f"written {word}"], -1
    return things.flatten(1), colors.flatten(1)


_TRAIN: dict[str, Callable[[Classroom, str], None]] = {
    "pretrain": train_text,
    "align": train_text,
    "tower": train_tower,
    "projector": train_projector,
    "instruct": train_instruct,
}


def run_stages(name: str, recipe: Recipe, work: Path, until: str = STAGES[-1]) -> Classroom:
    """Run the stages that have no checkpoint yet; return the room with the trained network.

    Raises
    ------
    ValueError
        If a checkpoint was made by another recipe.
    """
    work.mkdir(parents=True, exist_ok=True)
    room = Classroom(name, recipe, work)
    stages = STAGES[: STAGES.index(until) + 1]
    for stage in stages:
        if room.checkpoint(stage).exists():
            _assert_of(recipe, stage, room.checkpoint(stage))
    for stage in stages:
        saved = room.checkpoint(stage)
        part = _part_of(room, stage)
        if saved.exists():
            part.load_state_dict(load_file(saved))
            continue
        started = time.monotonic()
        _TRAIN[stage](room, stage)
        seconds = round(time.monotonic() - started)
        unfinished = saved.with_suffix(".part")
        weights = {key: value.contiguous() for key, value in part.state_dict().items()}
        save_file(
            weights, unfinished, metadata=_metadata(recipe, stage) | {"seconds": str(seconds)}
        )
        unfinished.rename(saved)
        tqdm.write(f"{name}: {stage} took {seconds} s", file=sys.stderr)
    return room


def _metadata(recipe: Recipe, stage: str) -> dict[str, str]:
    """Say what the weights after a stage depend on, and how they were multiplied."""
    earlier = STAGES[: STAGES.index(stage) + 1]
    terms = asdict(recipe)
    for key in ("steps", "peak_rate"):
        terms[key] = {name: terms[key][name] for name in earlier}
    for key in ("fast",) if stage == "instruct" else ("fast", "replay", "questions"):
        del terms[key]
    terms["source"] = source_hash()
    return {"recipe": json.dumps(terms, sort_keys=True), "fast": json.dumps(recipe.fast)}


_SOURCES = ("build", "curriculum", "language", "objects", "optimize", "scenes", "stages")


def source_hash() -> str:
    """Hash the source of the world and of the stages, on which a training run depends too."""
    files = [Path(__file__).with_name(f"{name}.py") for name in _SOURCES]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def kept(saved: Path) -> dict[str, str]:
    """Read what a checkpoint says of itself: see :func:`_metadata`."""
    with safe_open(saved, "pt") as file:
        return file.metadata() or {}


def _assert_of(recipe: Recipe, stage: str, saved: Path) -> None:
    found, expected = kept(saved).get("recipe"), _metadata(recipe, stage)["recipe"]
    if found != expected:
        raise ValueError(
            f"{saved} was trained by another recipe: {found}, expected {expected}. "
            "Remove it to train the stage again, or choose another folder with --work."
        )


def _part_of(room: Classroom, stage: str) -> nn.Module:
    """The part of the network that a stage changes, so that stages can be redone one by one."""
    if stage == "instruct":
        return nn.ModuleDict({name: room.part(name) for name in ("projector", "decoder")})
    part: nn.Module = room.part(stage if stage in ("tower", "projector") else "decoder")
    return part
