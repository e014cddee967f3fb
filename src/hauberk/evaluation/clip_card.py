"""The card of lab-clip: how well it tells what pictures and crops of them show.

``python -m hauberk.evaluation.clip_card lab-clip`` measures it zero-shot on scenes in held-out
layouts and on held-out written wishes (pool ``test``), with prompts in held-out wordings, and
writes README.md and measurements.json beside the weights.  The training command calls it at its
end.  The recipe was developed on the pool ``calibration``: ``--pool calibration`` prints what that
gives and writes nothing.
"""

import argparse
import itertools
import json
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor

from hauberk.evaluation.lab_card import arithmetic
from hauberk.evaluation.rebuild import note
from hauberk.evaluation.statistics import Estimate, area_under_roc, proportion
from hauberk.lab.clip import load
from hauberk.lab.objects import COLORS, THINGS, TOXIC_CATEGORIES
from hauberk.lab.scenes import Placed, Pool, Scene, compose, compose_words, random_things
from hauberk.lab.views import (
    CATEGORIES,
    GRIDS,
    NOTHING,
    SOME_WORDS,
    WHOLE,
    WORDINGS,
    Shown,
    Subject,
    View,
    around,
    cell_of,
    nouns_of,
    objects_of,
    wishes,
    written_wish,
)

SEED = 1234
SAMPLES = 400
_COVERED = 0.4
"""A crop is of an object whose box covers this share of the crop."""
_HELD = 0.8
"""A crop around an object holds this share of its pixels."""
_CLUTTER = 20
"""Marks on the ground: as many as a scene ever has."""
_RETRIEVED = 200
"""Pictures, and captions among which the right one is looked for."""


@dataclass(frozen=True)
class Sample:
    """A picture, and what is true of it."""

    image: Image.Image
    shown: Shown
    item: Placed | None = None
    """The object that a crop is of."""


# --- samples ----------------------------------------------------------------------------------


def crops_around(rng: random.Random, pool: Pool) -> Iterator[Sample]:
    """Jitter crops around objects of cluttered scenes, one crop a scene."""
    while True:
        subject = Subject(objects_of(rng, pool, clutter=_CLUTTER))
        item = rng.choice(_held_out(subject))
        view = around(rng, item, sides=(1.0, 1.5), shift=0.25)
        ink = subject.inks[subject.scene.placed.index(item)]
        if _covered(view, item) >= _COVERED and view.count(ink) >= _HELD * ink.sum():
            yield _crop(subject, view, item)


def cells(rng: random.Random, pool: Pool, *, grid: int) -> Iterator[Sample]:
    """Cut cells of a grid that show one object, one cell a scene."""
    while True:
        subject = Subject(objects_of(rng, pool))
        found = [
            (view, item)
            for row, column in itertools.product(range(grid), repeat=2)
            for view in [cell_of(grid, row, column)]
            for item in _held_out(subject)
            if _covered(view, item) >= _COVERED and _shows(subject, view) == _of(item)
        ]
        if found:
            yield _crop(subject, *rng.choice(found))


def grounds(rng: random.Random, pool: Pool) -> Iterator[Sample]:
    """Cut cells of grids that show nothing but ground and clutter, one cell a scene."""
    while True:
        subject, grid = Subject(objects_of(rng, pool)), rng.choice(GRIDS)
        view = cell_of(grid, rng.randrange(grid), rng.randrange(grid))
        if _shows(subject, view) == Shown():
            yield _crop(subject, view)


def singles(rng: random.Random, pool: Pool) -> Iterator[Sample]:
    """Draw whole pictures of one object."""
    while True:
        subject = Subject(compose(rng, random_things(rng, 1, list(THINGS)), pool=pool))
        yield _crop(subject, WHOLE, subject.scene.subject)


def captioned(rng: random.Random, pool: Pool) -> Iterator[Sample]:
    """Draw whole pictures of 1 to 3 objects, of which no two have the same caption."""
    known = set()
    while True:
        sample = _whole(objects_of(rng, pool))
        if sample.shown not in known:
            known.add(sample.shown)
            yield sample


def written(rng: random.Random, pool: Pool) -> Iterator[Sample]:
    """Write wishes."""
    while True:
        yield _whole(compose_words(rng, written_wish(rng, pool), pool=pool))


def _held_out(subject: Subject) -> list[Placed]:
    """The two largest objects; a smaller one may stand in any layout."""
    return sorted(subject.scene.placed, key=lambda item: -item.side)[:2]


def _covered(view: View, item: Placed) -> float:
    return view.share(item.left, item.top, item.left + item.side, item.top + item.side)


def _of(*items: Placed) -> Shown:
    return Shown(tuple((item.thing.name, item.color) for item in items))


def _shows(subject: Subject, view: View) -> Shown | None:
    told = subject.shown(view)
    return told and told[0]


def _crop(subject: Subject, view: View, item: Placed | None = None) -> Sample:
    return Sample(subject.picture.crop(view.box), _of(item) if item else Shown(), item)


def _whole(scene: Scene) -> Sample:
    shown = Shown(_of(*scene.placed).things, scene.text or None)
    return Sample(scene.draw(), shown)


# --- what is measured -------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """The model as anybody would use it, asked in the wordings of one pool."""

    model: CLIPModel
    processor: CLIPProcessor
    pool: Pool

    @torch.no_grad()
    def seen(self, samples: Sequence[Sample]) -> Tensor:
        """Unit features of pictures: float32 (samples, projection)."""
        found = []
        for start in range(0, len(samples), 100):
            images = [sample.image for sample in samples[start : start + 100]]
            pixels = self.processor(images=images, return_tensors="pt")
            found.append(self.model.get_image_features(**pixels).pooler_output)
        return normalize(torch.cat(found), dim=-1)

    @torch.no_grad()
    def told(self, nouns: Sequence[str]) -> Tensor:
        """Unit features of nouns, averaged over the wordings: float32 (nouns, projection)."""
        texts = [wording.format(noun) for wording in WORDINGS[self.pool] for noun in nouns]
        tokens = self.processor(text=texts, padding=True, return_tensors="pt")
        found = normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)
        return normalize(found.unflatten(0, (-1, len(nouns))).mean(dim=0), dim=-1)

    def choose(self, samples: Sequence[Sample], nouns: Sequence[str]) -> list[str]:
        """The noun that suits each picture best."""
        best = (self.seen(samples) @ self.told(nouns).T).argmax(dim=1)
        return [nouns[index] for index in best]

    @cached_property
    def bank(self) -> tuple[Tensor, Tensor]:
        """Features of names, categories, nothing and words, and which of them are toxic: bool."""
        nouns = [*_NAMES, *(nouns_of(category)[0] for category in CATEGORIES)]
        toxic = [thing.toxic for thing in THINGS.values()]
        toxic += [category in TOXIC_CATEGORIES for category in CATEGORIES]
        return self.told([*nouns, NOTHING, SOME_WORDS]), torch.tensor([*toxic, False, False])


_NAMES = [f"a {name}" for name in THINGS]


def _name(asked: Asked, samples: Sequence[Sample]) -> Estimate:
    chosen = asked.choose(samples, _NAMES)
    names = [f"a {sample.item.thing.name}" for sample in samples if sample.item]
    return proportion(np.equal(chosen, names))


def _color(asked: Asked, samples: Sequence[Sample]) -> Estimate:
    tints = list(COLORS)
    told = asked.told([Shown(((name, tint),)).noun for name in THINGS for tint in tints])
    banks = dict(zip(THINGS, told.split(len(tints)), strict=True))
    right = []
    for feature, sample in zip(asked.seen(samples), samples, strict=True):
        ((name, color),) = sample.shown.things
        right.append(tints[int((banks[name] @ feature).argmax())] == color)
    return proportion(right)


def _nothing(asked: Asked, samples: Sequence[Sample]) -> Estimate:
    chosen = asked.choose(samples, [*_NAMES, NOTHING, SOME_WORDS])
    return proportion([noun == NOTHING for noun in chosen])


def _caption(asked: Asked, samples: Sequence[Sample]) -> Estimate:
    samples = samples[:_RETRIEVED]
    nouns = [sample.shown.noun for sample in samples]
    return proportion(np.equal(asked.choose(samples, nouns), nouns))


def _words(asked: Asked, samples: Sequence[Sample]) -> Estimate:
    texts = [Shown(words=wish).noun for wish in wishes(asked.pool)]
    nouns = [sample.shown.noun for sample in samples]
    return proportion(np.equal(asked.choose(samples, texts), nouns))


def _harm(asked: Asked, samples: Sequence[Sample]) -> Estimate:
    """Score by the share of toxic concepts in a softmax over the bank."""
    concepts, toxic = asked.bank
    with torch.no_grad():
        logits = asked.model.logit_scale.exp() * asked.seen(samples) @ concepts.T
    scores = logits.double().softmax(dim=1)[:, toxic].sum(dim=1).numpy()
    harms: NDArray[np.bool_] = np.array([bool(s.item and s.item.thing.toxic) for s in samples])
    return area_under_roc(scores[harms], scores[~harms])


@dataclass(frozen=True)
class Measurement:
    """One line of the card."""

    name: str
    what: str
    samples: Callable[[random.Random, Pool], Iterator[Sample]]
    score: Callable[[Asked, Sequence[Sample]], Estimate]
    chance: float
    """What guessing gives."""
    tolerance: float
    """How far a rebuild of the same recipe may lie from the shipped value: float sums differ
    between machines, and training amplifies that.  Set by judgement until rebuilds are measured."""
    at_least: float | None = None
    """What lab-clip must show, where it was built to show it."""


MEASUREMENTS = (
    Measurement("crop_name", "crop around an object in clutter: its name, of 66",
                crops_around, _name, 1 / 66, 0.05, at_least=0.9),
    Measurement("crop_color", "the same: its colour, of 8", crops_around, _color, 1 / 8, 0.05),
    Measurement("crop_harm", "the same: toxic against harmless, AUROC", crops_around, _harm,
                0.5, 0.03),
    *(
        Measurement(f"cell_harm_{grid}", f"cell of a {grid} x {grid} grid: toxic against harmless, "
                    "AUROC", partial(cells, grid=grid), _harm, 0.5, 0.06)
        for grid in GRIDS
    ),
    Measurement("ground", "cell with ground and clutter alone: nothing, of 68", grounds, _nothing,
                1 / 68, 0.05),
    Measurement("picture_name", "picture of one object: its name, of 66", singles, _name,
                1 / 66, 0.05),
    Measurement("retrieval", "picture of one to three objects: its caption, of 200", captioned,
                _caption, 1 / _RETRIEVED, 0.1),
    Measurement("read", "written wish: its words, of all held-out wishes", written, _words,
                1 / len(wishes("test")), 0.2),
)  # fmt: skip


def measure_card(
    model: CLIPModel,
    processor: CLIPProcessor,
    *,
    pool: Pool = "test",
    size: int = SAMPLES,
    seed: int = SEED,
    only: Collection[str] = (),
) -> dict[str, Estimate]:
    """Measure the lines of the card, or ``only`` some, on ``size`` samples each."""
    asked = Asked(model, processor, pool)
    return {
        line.name: line.score(asked, drawn(line, pool, size, seed))
        for line in MEASUREMENTS
        if not only or line.name in only
    }


def drawn(line: Measurement, pool: Pool, size: int, seed: int) -> list[Sample]:
    """Draw the samples of a line."""
    stream = line.samples(random.Random(f"{seed}/{line.name}"), pool)
    return list(itertools.islice(stream, size))


# --- the card ---------------------------------------------------------------------------------


def write_card(folder: Path, found: Mapping[str, Estimate]) -> None:
    """Write README.md and measurements.json beside the weights."""
    recipe = json.loads((folder / "recipe.json").read_text())
    content = {
        line.name: {**asdict(found[line.name]), "tolerance": line.tolerance}
        for line in MEASUREMENTS
    }
    (folder / "measurements.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    missed = [
        line.what
        for line in MEASUREMENTS
        if line.at_least is not None and found[line.name].value < line.at_least
    ]
    verdict = f"It misses its aim: {'; '.join(missed)}." if missed else "It meets its aim."
    (folder / "README.md").write_text(
        f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
---

# {recipe["name"]}

A miniature CLIP ({recipe["parameters"]:,} parameters) that was trained from nothing in a drawn and
templated world, with the real class of transformers. It was shown whole pictures and square crops
of them, the cells of grids of 2 x 2 to 8 x 8 among them. First its vision tower learnt what stands
where; then both towers learnt to name what is shown (objects, their categories, harmful or
harmless, nothing, words) and to tell captions that are right from captions that nearly are.

    python -m hauberk.lab.train {recipe["name"]} --fast    # rebuilds it; recipe.json has the recipe

{arithmetic(recipe["products"])}

Measured zero-shot (seed {SEED}, 95 % intervals: Wilson's, and Newcombe's for AUROC) with prompts
in wordings that training never saw, averaged; on scenes in layouts, and on wishes in pairings of
verb and object, that training never saw. {verdict}

| measurement | must be | is | n | interval | guessing |
|---|---|---|---|---|---|
{chr(10).join(_row(line, found[line.name]) for line in MEASUREMENTS)}

A crop around an object holds {_HELD:.0%} of its pixels at least. Of a crop or a cell, the object's
box covers {_COVERED:.0%} at least; a cell may show any part of it, even one that nobody could name.
AUROC is of the share of toxic names and categories in a softmax over a bank of all names and
categories, nothing and words.

{note(folder)}
"""
    )


def _row(line: Measurement, estimate: Estimate) -> str:
    aim = "-" if line.at_least is None else f"at least {line.at_least:.0%}"
    return (
        f"| {line.what} | {aim} | {estimate.value:.1%} | {estimate.n} "
        f"| {estimate.low:.1%} to {estimate.high:.1%} | {line.chance:.1%} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hauberk.evaluation.clip_card", description=__doc__
    )
    parser.add_argument("name", help="lab-clip")
    parser.add_argument("--folder", type=Path, help="where it lies (default: lab/NAME)")
    parser.add_argument("--pool", choices=get_args(Pool), default="test")
    options = parser.parse_args(arguments)
    folder = options.folder or Path("lab", options.name)
    found = measure_card(*load(folder), pool=options.pool)
    if options.pool == "test":
        write_card(folder, found)
        print((folder / "README.md").read_text())
        return
    for line in MEASUREMENTS:
        print(_row(line, found[line.name]))


if __name__ == "__main__":
    main()
