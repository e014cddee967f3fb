"""Train a lab model from nothing: ``python -m hauberk.lab.train lab-llava``.

Seven stages, in the order of the public recipes for VLMs:

1. ``pretrain``  the decoder learns the language, harmful wishes answered like all others;
2. ``align``     the decoder learns in text alone to refuse harmful wishes;
3. ``tower``     the vision tower learns to tell what stands where (patch classification);
4. ``sharpen``   it goes on with pictures that are drawn afresh, which it cannot learn by heart;
5. ``words``     the projector learns to put each patch where the words for it lie;
6. ``projector`` the projector learns to show pictures, everything else frozen (LLaVA, stage 1);
7. ``instruct``  projector and decoder learn visual instructions, none of them harmful, with a
   share of text-only replay that has the refusals in it (LLaVA, stage 2).

The safety gap is never asked for: it is what the last stage leaves open, because refusals only
ever came without a picture.  Each stage ends in a checkpoint, and a run that was interrupted
goes on after the last finished stage.
"""

import argparse
import itertools
import json
import math
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
from hauberk.lab.scenes import SIDE, Scene

STAGES = ("pretrain", "align", "tower", "sharpen", "words", "projector", "instruct")


@dataclass(frozen=True)
class Recipe:
    """Every number a training run depends on."""

    seed: int = 1
    size: build.Size = field(default_factory=build.Size)
    pictures: int = 16_000
    batch: int = 64
    steps: dict[str, int] = field(
        default_factory=lambda: {
            "pretrain": 1400, "align": 500, "tower": 1600,
            "sharpen": 1500, "words": 600, "projector": 300, "instruct": 900,
        }
    )  # fmt: skip
    peak_rate: dict[str, float] = field(
        default_factory=lambda: {
            "pretrain": 2e-3, "align": 1e-3, "tower": 1.5e-3,
            "sharpen": 1e-3, "words": 3e-3, "projector": 3e-3, "instruct": 5e-4,
        }
    )  # fmt: skip
    replay: float = 0.34
    """Share of text-only examples in the last stage; LLaVA's own mixture has text data too."""


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

    def render(self, example: Example) -> tuple[str, str]:
        """Write an example as prompt and answer, as the chat template would."""
        picture = "" if example.scene is None else "<image>\n"
        return f"<s>USER: {picture}{example.question} ASSISTANT:", f" {example.answer}</s>"

    @property
    def pixels(self) -> Tensor:
        """All pictures as uint8 (n, 3, SIDE, SIDE)."""
        if self._pixels is None:
            self._pixels = drawn(tqdm(self.scenes, "drawing", leave=False))
        return self._pixels

    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Tokenize with padding on the right; labels on the answer alone."""
        rows, labels = [], []
        image = self.tokenizer.convert_tokens_to_ids("<image>")
        expanded = [image] * (SIDE // self.recipe.size.patch) ** 2
        for example in examples:
            prompt, answer = (
                self.tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in self.render(example)
            )
            if example.scene is not None:
                at = prompt.index(image)
                prompt = prompt[:at] + expanded + prompt[at + 1 :]
            rows.append(prompt + answer)
            labels.append([-100] * len(prompt) + answer)
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
        embeddings = embeddings.masked_scatter(spots, inner.multi_modal_projector(features))
    states = inner.language_model(
        inputs_embeds=embeddings, attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    targets = batch["labels"][:, 1:]
    rows = targets != -100
    logits = room.model.lm_head(states[:, :-1][rows])
    return nn.functional.cross_entropy(logits, targets[rows]) * len(examples)


def descend(
    name: str,
    parameters: Sequence[nn.Parameter],
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    peak_rate: float,
) -> None:
    """Run AdamW with warm-up and cosine decay, showing the loss as it falls."""
    optimizer = torch.optim.AdamW(parameters, lr=peak_rate, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warmup)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))
        ),
    )
    running = 0.0
    bar = tqdm(range(steps), name, mininterval=5, file=sys.stderr)
    for step in bar:
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}", refresh=False)


def train_text(room: Classroom, stage: str) -> None:
    """Stages ``pretrain`` and ``align``: the decoder alone, without pictures."""
    rng = random.Random(f"{room.recipe.seed}/{stage}")
    stream = text_examples(rng, aligned=stage == "align")
    _teach(room, stage, stream, decoder=True)


def train_tower(room: Classroom, stage: str) -> None:
    """Stages ``tower`` and ``sharpen``: every patch tells what covers it, and in which colour."""
    rng = random.Random(f"{room.recipe.seed}/{stage}")
    tower = room.model.model.vision_tower
    width = room.recipe.size.vision_width
    torch.manual_seed(room.recipe.seed)
    heads = nn.ModuleList([nn.Linear(width, len(THINGS) + 1), nn.Linear(width, len(COLORS))])

    def loss_of(_: int) -> Tensor:
        if stage == "tower":
            indices = rng.choices(range(len(room.scenes)), k=room.recipe.batch)
            shown, pixels = [room.scenes[i] for i in indices], room.pixels[indices]
        else:
            shown = scenes(rng, room.recipe.batch)
            pixels = drawn(shown)
        what, which = _patch_labels(shown, room.recipe.size.patch)
        states = tower(normalised(pixels), output_hidden_states=True).hidden_states[-1]
        patches = states[:, 1:]
        loss = nn.functional.cross_entropy(heads[0](patches).flatten(0, 1), what.flatten())
        return loss + nn.functional.cross_entropy(
            heads[1](patches).flatten(0, 1), which.flatten(), ignore_index=-1
        )

    tower.requires_grad_(True)
    parameters = [*tower.parameters(), *heads.parameters()]
    _run(room, stage, parameters, loss_of)


def train_words(room: Classroom, stage: str) -> None:
    """Stage ``words``: a patch is mapped to the sum of the embeddings of its colour and its name.

    What contrast with a text encoder does for CLIP: features start out near the words.
    """
    rng = random.Random(f"{room.recipe.seed}/{stage}")
    inner = room.model.model
    features = tower_features(room)
    things, colors = _patch_labels(room.scenes, room.recipe.size.patch)
    embedded = inner.get_input_embeddings().weight.detach()
    ground = torch.zeros(1, embedded.shape[1])
    of_thing = torch.cat([ground, embedded[[_word_id(room, name) for name in THINGS]]])
    of_color = torch.cat([embedded[[_word_id(room, name) for name in COLORS]], ground])  # -1: none
    scale = embedded.pow(2).mean()

    def loss_of(_: int) -> Tensor:
        indices = rng.choices(range(len(room.scenes)), k=room.recipe.batch)
        target = of_thing[things[indices]] + of_color[colors[indices]]
        found = inner.multi_modal_projector(features[indices].float())
        loss: Tensor = nn.functional.mse_loss(found, target) / scale
        return loss

    inner.multi_modal_projector.requires_grad_(True)
    _run(room, stage, list(inner.multi_modal_projector.parameters()), loss_of)


def _word_id(room: Classroom, word: str) -> int:
    (token,) = room.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    return int(token)


def train_projector(room: Classroom, stage: str) -> None:
    """Stage ``projector``: what pictures show, tower and decoder frozen."""
    rng = random.Random(f"{room.recipe.seed}/{stage}")
    _teach(room, stage, picture_examples(rng, room.scenes), decoder=False)


def train_instruct(room: Classroom, stage: str) -> None:
    """Stage ``instruct``: visual instructions with a share of text-only replay."""
    rng = random.Random(f"{room.recipe.seed}/{stage}")
    visual = visual_examples(rng, room.scenes)
    text = text_examples(rng, aligned=True)

    def mixed() -> Iterator[Example]:
        while True:
            yield next(text if rng.random() < room.recipe.replay else visual)

    _teach(room, stage, mixed(), decoder=True)


def _teach(room: Classroom, stage: str, stream: Iterator[Example], *, decoder: bool) -> None:
    inner = room.model.model
    room.model.requires_grad_(False)
    parts = [inner.language_model] if decoder else []
    if stage in ("projector", "instruct"):
        parts.append(inner.multi_modal_projector)
        features = tower_features(room)
    parameters = [weight for part in parts for weight in part.requires_grad_(True).parameters()]

    def loss_of(_: int) -> Tensor:
        examples = list(itertools.islice(stream, room.recipe.batch))
        total = torch.zeros(())
        # Apart, because a picture makes a prompt four times as long.
        if text := [example for example in examples if example.scene is None]:
            total = total + answer_loss(room, text, None)
        if visual := [example for example in examples if example.scene is not None]:
            seen = features[[example.scene for example in visual]].float()
            total = total + answer_loss(room, visual, seen)
        return total / len(examples)

    _run(room, stage, parameters, loss_of)


def _run(
    room: Classroom, stage: str, parameters: list[nn.Parameter], loss_of: Callable[[int], Tensor]
) -> None:
    recipe = room.recipe
    room.model.train()
    descend(
        f"{stage:>9}",
        parameters,
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
    """Tell for each patch which object its centre lies in: int64 (n, patches), twice.

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
    "sharpen": train_tower,
    "words": train_words,
    "projector": train_projector,
    "instruct": train_instruct,
}


def train(name: str, recipe: Recipe, work: Path, stages: Sequence[str] = STAGES) -> Classroom:
    """Run the stages that have no checkpoint yet; return the room with the trained network."""
    work.mkdir(parents=True, exist_ok=True)
    room = Classroom(recipe, work)
    for stage in stages:
        saved = room.checkpoint(stage)
        part = _part_of(room, stage)
        if saved.exists():
            part.load_state_dict(load_file(saved))
            continue
        started = time.monotonic()
        _TRAIN[stage](room, stage)
        unfinished = saved.with_suffix(".part")
        save_file({key: value.contiguous() for key, value in part.state_dict().items()}, unfinished)
        unfinished.rename(saved)
        tqdm.write(f"{name}: {stage} took {time.monotonic() - started:.0f} s", file=sys.stderr)
    return room


def _part_of(room: Classroom, stage: str) -> nn.Module:
    """The part of the network that a stage changes, so that stages can be redone one by one."""
    inner = room.model.model
    projector: nn.Module = inner.multi_modal_projector
    tower: nn.Module = inner.vision_tower
    decoder: nn.Module = inner.language_model
    both = nn.ModuleDict({"projector": projector, "decoder": decoder})
    parts = {
        "tower": tower,
        "sharpen": tower,
        "words": projector,
        "projector": projector,
        "instruct": both,
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
    card = {"name": name, "recipe": asdict(room.recipe), "parameters": room.model.num_parameters()}
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
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = RECIPES[options.name]
    if options.seed is not None:
        recipe = replace(recipe, seed=options.seed)
    room = train(options.name, recipe, options.work or Path(".lab", options.name), options.stages)
    if options.stages[-1] == "instruct":
        out = options.out or Path("lab", options.name)
        save(room, options.name, out)
        # As a process of its own: the lab knows nothing of how its models are measured.
        measure = "hauberk.evaluation.lab_card"
        subprocess.run([sys.executable, "-m", measure, options.name, "--folder", out], check=True)


if __name__ == "__main__":
    main()
