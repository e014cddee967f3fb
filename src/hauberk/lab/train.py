"""Train a lab model from nothing: ``python -m hauberk.lab.train lab-llava``.

Five stages, in the order of the public recipes for VLMs:

1. ``pretrain``  the decoder learns the language, harmful wishes answered like all others;
2. ``align``     the decoder learns in text alone to refuse harmful wishes;
3. ``tower``     the vision tower learns to tell what stands where (patch classification), from
   pictures that are drawn afresh for every step, so that it cannot learn them by heart;
4. ``projector`` the projector learns to show pictures, everything else frozen (LLaVA, stage 1);
5. ``instruct``  projector and decoder learn visual instructions, none of them harmful, with a
   share of text-only replay that has the refusals in it (LLaVA, stage 2).

The safety gap is what the last stages leave open, because harmful wishes only ever came, and were
refused, without a picture.  Each stage ends in a checkpoint, and a run
that was interrupted goes on after the last finished stage.
"""

import argparse
import hashlib
import itertools
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from hauberk.lab import build
from hauberk.lab.curriculum import (
    Example,
    picture_examples,
    scenes,
    text_examples,
    visual_examples,
)
from hauberk.lab.language import sentences
from hauberk.lab.objects import COLORS, THINGS
from hauberk.lab.optimize import descend, quicken
from hauberk.lab.scenes import SIDE, Scene

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
    """Multiply in bfloat16 and compile the decoder: 1.8 times as fast on two cores with
    bfloat16 products; it needs a C++ compiler."""


RECIPES = {"lab-llava": Recipe()}


class Classroom:
    """Tokenizer, network and pictures of one run, and what its stages share."""

    def __init__(self, recipe: Recipe, work: Path) -> None:
        self.recipe, self.work = recipe, work
        rng = random.Random(recipe.seed)
        self.scenes = scenes(rng, recipe.pictures)
        self.tokenizer = build.build_tokenizer(sentences("train"), recipe.size)
        self.processor = build.build_llava_processor(self.tokenizer, recipe.size)
        self.model = build.build_llava(self.tokenizer, recipe.size, recipe.seed)
        self._pixels: Tensor | None = None
        if recipe.fast:
            quicken(self.model.model.language_model)

    def render(self, example: Example) -> list[tuple[str, str]]:
        """Write each turn as prompt and answer, as the chat template would."""
        picture = "" if example.scene is None else "<image>\n"
        starts = [f"<s>USER: {picture}"] + ["USER: "] * (len(example.turns) - 1)
        return [
            (f"{start}{question} ASSISTANT:", f" {answer}</s>")
            for start, (question, answer) in zip(starts, example.turns, strict=True)
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
        image = self.tokenizer.convert_tokens_to_ids("<image>")
        expanded = [image] * (SIDE // self.recipe.size.patch) ** 2
        for example in examples:
            row: list[int] = []
            label: list[int] = []
            for part in itertools.chain.from_iterable(self.render(example)):
                ids = self.tokenizer(part, add_special_tokens=False)["input_ids"]
                if image in ids:
                    at = ids.index(image)
                    ids = ids[:at] + expanded + ids[at + 1 :]
                row += ids
                label += ids if part.endswith("</s>") else [-100] * len(ids)
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

    ``features`` are the tower's outputs (pictures, patches, width) for the examples with a
    picture, in order; the tower is frozen, so they need no gradient.  Returns the mean over
    tokens times the number of examples, so that sums of batches can be averaged again.
    """
    batch = room.encode(examples)
    inner = room.model.model
    embeddings = inner.get_input_embeddings()(batch["input_ids"])
    if features is not None:
        spots = (batch["input_ids"] == room.model.config.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(
            spots, inner.multi_modal_projector(features).to(embeddings.dtype)
        )
    states = inner.language_model(
        inputs_embeds=embeddings, attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
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
    tower = room.model.model.vision_tower
    width = room.recipe.size.vision_width
    torch.manual_seed(room.recipe.seed)
    heads = nn.ModuleList([nn.Linear(width, len(THINGS) + 1), nn.Linear(width, len(COLORS))])

    def loss_of(_: int) -> Tensor:
        shown = scenes(rng, room.recipe.batch)
        what, which = _patch_labels(shown, room.recipe.size.patch)
        states = tower(normalised(drawn(shown)), output_hidden_states=True).hidden_states[-1]
        patches = states[:, 1:]
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
    inner = room.model.model
    parts = [inner.language_model] if decoder else []
    if stage not in ("pretrain", "align"):
        parts.append(inner.multi_modal_projector)
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
            pool.sort(key=lambda example: sum(map(len, itertools.chain(*example.turns))))
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


@torch.no_grad()
def tower_features(room: Classroom) -> Tensor:
    """Look at every picture once: float16 (pictures, patches, width), class token dropped."""
    tower, found = room.model.model.vision_tower, []
    chunks = range(0, len(room.scenes), 256)
    for start in tqdm(chunks, "looking", leave=False):
        indices = range(start, min(start + 256, len(room.scenes)))
        states = tower(
            normalised(room.pixels[list(indices)]), output_hidden_states=True
        ).hidden_states[-1]
        found.append(states[:, 1:].half())
    return torch.cat(found)


def _patch_labels(pictures: Sequence[Scene], patch: int) -> tuple[Tensor, Tensor]:
    """Tell for each patch in which object's box its centre lies: int64 (n, patches), twice.

    Class 0 is the ground; the colour of the ground is -1 (not asked).
    """
    grid = SIDE // patch
    things = torch.zeros(len(pictures), grid, grid, dtype=torch.long)
    colors = torch.full((len(pictures), grid, grid), -1, dtype=torch.long)
    centers = (np.arange(grid) + 0.5) * patch
    thing_id = {name: index + 1 for index, name in enumerate(THINGS)}
    color_id = {name: index for index, name in enumerate(COLORS)}
    for row, scene in enumerate(pictures):
        for item in scene.placed:
            x = np.flatnonzero((centers >= item.left) & (centers < item.left + item.side))
            y = np.flatnonzero((centers >= item.top) & (centers < item.top + item.side))
            if len(x) and len(y):
                box = (row, slice(y[0], y[-1] + 1), slice(x[0], x[-1] + 1))
                things[box], colors[box] = thing_id[item.thing.name], color_id[item.color]
    return things.flatten(1), colors.flatten(1)


_TRAIN: dict[str, Callable[[Classroom, str], None]] = {
    "pretrain": train_text,
    "align": train_text,
    "tower": train_tower,
    "projector": train_projector,
    "instruct": train_instruct,
}


def train(name: str, recipe: Recipe, work: Path, until: str = STAGES[-1]) -> Classroom:
    """Run the stages that have no checkpoint yet; return the room with the trained network.

    Raises
    ------
    ValueError
        If a checkpoint was made by another recipe.
    """
    work.mkdir(parents=True, exist_ok=True)
    room = Classroom(recipe, work)
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
        unfinished = saved.with_suffix(".part")
        weights = {key: value.contiguous() for key, value in part.state_dict().items()}
        save_file(weights, unfinished, metadata=_metadata(recipe, stage))
        unfinished.rename(saved)
        tqdm.write(f"{name}: {stage} took {time.monotonic() - started:.0f} s", file=sys.stderr)
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


def source_hash() -> str:
    """Hash all that a training run depends on besides its recipe: the source of the lab."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _kept(saved: Path) -> dict[str, str]:
    with safe_open(saved, "pt") as file:
        return file.metadata() or {}


def _assert_of(recipe: Recipe, stage: str, saved: Path) -> None:
    found, expected = _kept(saved).get("recipe"), _metadata(recipe, stage)["recipe"]
    if found != expected:
        raise ValueError(
            f"{saved} was trained by another recipe: {found}, expected {expected}. "
            "Remove it to train the stage again, or choose another folder with --work."
        )


def _part_of(room: Classroom, stage: str) -> nn.Module:
    """The part of the network that a stage changes, so that stages can be redone one by one."""
    inner = room.model.model
    projector: nn.Module = inner.multi_modal_projector
    tower: nn.Module = inner.vision_tower
    decoder: nn.Module = inner.language_model
    parts = {
        "tower": tower,
        "projector": projector,
        "instruct": nn.ModuleDict({"projector": projector, "decoder": decoder}),
    }
    return parts.get(stage, decoder)


def save(room: Classroom, name: str, out: Path) -> None:
    """Write model (float16 on disk, float32 when loaded), processor and recipe card."""
    partial = out.with_name(out.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    room.model.half().save_pretrained(partial)
    room.processor.save_pretrained(partial)
    config = json.loads((partial / "config.json").read_text())
    _set_dtype(config, "float32")  # half the size on disk, full precision in use
    (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    card = {
        "name": name,
        "recipe": asdict(room.recipe)
        | {"fast": {s: json.loads(_kept(room.checkpoint(s))["fast"]) for s in STAGES}},
        "parameters": room.model.num_parameters(),
        "source": json.loads(_kept(room.checkpoint(STAGES[-1]))["recipe"])["source"],
    }
    (partial / "recipe.json").write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = dtype
        elif isinstance(value, dict):
            _set_dtype(value, dtype)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m hauberk.lab.train", description=__doc__)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, help="model folder (default: lab/NAME)")
    parser.add_argument("--work", type=Path, help="checkpoints (default: .lab/NAME)")
    parser.add_argument("--seed", type=int, help="another seed than the recipe's")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage")
    parser.add_argument("--fast", action="store_true", help="bfloat16 products, compiled decoder")
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = replace(RECIPES[options.name], fast=options.fast)
    if options.seed is not None:
        recipe = replace(recipe, seed=options.seed)
    try:
        room = train(
            options.name, recipe, options.work or Path(".lab", options.name), options.until
        )
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    if options.until == STAGES[-1]:
        out = options.out or Path("lab", options.name)
        save(room, options.name, out)
        # As a process of its own: the lab knows nothing of how its models are measured.
        measure = "hauberk.evaluation.lab_card"
        subprocess.run([sys.executable, "-m", measure, options.name, "--folder", out], check=True)


if __name__ == "__main__":
    main()
