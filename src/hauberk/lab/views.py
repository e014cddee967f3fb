"""Views of scenes: square crops, what each shows, and how that is said in a caption.

Among the views are whole scenes, the cells of the grids into which GuardAlign cuts a picture, and
crops around an object.  A *noun* is the part of a caption that tells what is shown ("a ball red
and the words make a lamp"); a *wording* has one gap for it.  Wordings belong to pools, as scenes
and the pairings in written wishes do.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, product

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hauberk.lab import language as lang
from hauberk.lab.objects import COLORS, THINGS
from hauberk.lab.scenes import (
    ROW,
    SIDE,
    Placed,
    Pool,
    Scene,
    compose,
    compose_words,
    phrase,
    random_things,
)

NOTHING, SOME_WORDS = "nothing", "some words"
WRITTEN = {name: f"written {name}" for name in THINGS}
"""The name of a thing, where it can be read."""
CLASSES = (*THINGS, *WRITTEN.values(), NOTHING, SOME_WORDS)
"""What a view may show; a thing and its name are two."""
_INDEX = {name: index for index, name in enumerate(CLASSES)}


# --- what a view shows ------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What can be told of a view."""

    things: tuple[tuple[str, str], ...] = ()
    """Name and colour of each object, from left to right."""
    words: str | None = None
    """What can be read; "" where words are cut so that none can be."""

    @property
    def phrases(self) -> list[str]:
        """How the language names the objects."""
        return [phrase(THINGS[name], color) for name, color in self.things]

    @property
    def noun(self) -> str:
        """What fills the gap of a wording."""
        nouns = [f"a {named}" for named in self.phrases]
        if self.words is not None:
            nouns.append(f"the words {self.words}" if self.words else SOME_WORDS)
        return " and ".join(nouns) or NOTHING

    @property
    def told(self) -> str | None:
        """As the language of the world tells a scene; None where words are cut."""
        if self.words is None:
            return lang.there_is(self.phrases)
        if not self.words:
            return None
        says = lang.it_says(self.words)
        return lang.told(lang.there_is(self.phrases), says) if self.things else says


@dataclass(frozen=True)
class View:
    """A square crop of a scene: its top-left corner and side, in pixels."""

    left: int
    top: int
    side: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom edge, as Pillow's ``crop`` takes them."""
        return self.left, self.top, self.left + self.side, self.top + self.side

    def share(self, left: float, top: float, right: float, bottom: float) -> float:
        """The share of the view that a box covers."""
        width = min(right, self.left + self.side) - max(left, self.left)
        height = min(bottom, self.top + self.side) - max(top, self.top)
        return max(width, 0.0) * max(height, 0.0) / self.side**2

    def count(self, ink: NDArray[np.bool_]) -> int:
        """How many of some pixels, bool (SIDE, SIDE), lie in the view."""
        left, top, right, bottom = self.box
        return int(ink[top:bottom, left:right].sum())


# The numbers are ours, set by judgement: what is smaller, nobody could name.
_LARGE = 0.04
"""An object is seen if it fills this share of a view..."""
_MUCH = 0.3
"""...or if this share of its own pixels lies in it."""
_LETTERS = 0.02
"""Words are seen if their letters fill this share of a view..."""
_READABLE = 0.9
"""...and a word can be read if this share of its box lies in it."""
_SLIVER = 0.005
"""More than this of what is not seen makes a view that shows neither something nor nothing."""
_AWAY = 10 * SIDE
"""Pixels from the left that lie in no picture."""
_INK = 20
"""Levels by which a pixel that is drawn on differs from the ground, in one channel at least."""


class Subject:
    """A scene as it is drawn, with the pixels of each object and of the words."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.picture = scene.draw()
        # The same seed gives the same ground, and the same clutter.  What is told apart from them
        # is moved out of the picture rather than left out: a scene of nothing has another ground.
        bare = replace(scene, clutter=0, lines=())
        away = [replace(item, left=_AWAY) for item in scene.placed]
        drawn = _differ(bare, replace(bare, placed=tuple(away)))
        self.inks = [
            _inside(drawn, item.left, item.top, item.left + item.side, item.top + item.side)
            for item in scene.placed
        ]
        """For each object, bool (SIDE, SIDE): where it is drawn."""
        unwritten = replace(scene, lines=tuple(replace(line, left=_AWAY) for line in scene.lines))
        letters = _differ(scene, unwritten) if scene.lines else drawn
        self.words = [
            (word, (left, line.top, right, line.top + ROW),
             _inside(letters, left, line.top, right, line.top + ROW))
            for line in scene.lines
            for word, left, right in line.boxes()
        ]  # fmt: skip
        """Each word with its box, and where its letters are."""

    def shown(self, view: View) -> tuple[Shown, Tensor] | None:
        """Tell what a view shows, and how much of each class: float32 (classes,), sum 1.

        None where that is not clear, as with a sliver of something.
        """
        shares, things, words = torch.zeros(len(CLASSES)), [], []
        area, unseen = view.side**2, 0.0
        for item, ink in zip(self.scene.placed, self.inks, strict=True):
            pixels = view.count(ink)
            if pixels >= min(_LARGE * area, _MUCH * int(ink.sum())):
                things.append((item.thing.name, item.color))
                shares[_INDEX[item.thing.name]] = pixels / area
            else:
                unseen += pixels / area
        for word, box, ink in self.words:
            share, whole = view.share(*box), (box[2] - box[0]) * ROW
            if share * area >= _READABLE * whole:
                words.append(word)
                shares[_INDEX[WRITTEN.get(word, SOME_WORDS)]] += share
            elif view.count(ink) >= _LETTERS * area:
                words.append("")
                shares[_INDEX[SOME_WORDS]] += share
            else:
                unseen += view.count(ink) / area
        if not shares.any():
            if unseen > _SLIVER:
                return None
            shares[_INDEX[NOTHING]] = 1
        said = " ".join(filter(None, words)) if words else None
        return Shown(tuple(things), said), shares / shares.sum()


def _differ(one: Scene, other: Scene) -> NDArray[np.bool_]:
    """Where two scenes are drawn differently: bool (SIDE, SIDE)."""
    first, second = (np.asarray(scene.draw(), dtype=np.int16) for scene in (one, other))
    found: NDArray[np.bool_] = np.abs(first - second).max(axis=-1) > _INK
    return found


def _inside(
    drawn: NDArray[np.bool_], left: float, top: float, right: float, bottom: float
) -> NDArray[np.bool_]:
    box = slice(max(0, int(top)), int(bottom) + 1), slice(max(0, int(left)), int(right) + 1)
    ink = np.zeros_like(drawn)
    ink[box] = drawn[box]
    return ink


# --- views to learn from and to measure on ----------------------------------------------------

WHOLE = View(0, 0, SIDE)
GRIDS = range(2, 9)
"""Cells along a side, in the grids of GuardAlign."""

# The shares are ours, set by judgement; none was searched.
_EMPTY, _WORDED = 0.08, 0.25
"""Of the scenes: without an object; with words."""
_WISHES = 0.75
"""Of the scenes with words: a wish; the others have a name and its object."""
_WHOLE, _AROUND = 0.35, 0.4
"""Of the views: whole scenes; jittered around an object.  The others are cells of grids."""
_SIDES = (0.6, 3.0)
"""Sides of the latter, in sides of their object: all scales between a part and a whole scene."""
_BARE = 0.2
"""Of the crops that show nothing: kept."""
_VIEWS = 4
"""Views of one scene in a batch, because drawing costs more than cutting."""


def scene_of(rng: random.Random, pool: Pool) -> Scene:
    """Compose a scene of a pool: nothing, words, a name with its object, or 1 to 3 objects."""
    kind = rng.random()
    if kind < _EMPTY:
        return compose(rng, (), pool=pool)
    if kind < _EMPTY + _WORDED:
        if rng.random() < _WISHES:
            return compose_words(rng, written_wish(rng, pool), pool=pool)
        (thing,) = random_things(rng, 1, list(THINGS))
        return compose_words(rng, thing.name, pool=pool, thing=thing)
    return objects_of(rng, pool)


def objects_of(rng: random.Random, pool: Pool, clutter: int | None = None) -> Scene:
    """Compose a scene of 1 to 3 objects."""
    count = rng.choice((1, 1, 1, 2, 2, 3))
    things = random_things(rng, count, list(THINGS))
    return compose(rng, things, pool=pool, clutter=clutter)


def written_wish(rng: random.Random, pool: Pool) -> str:
    """Draw a wish whose pairing belongs to a pool, as it is written in a picture."""
    return rng.choice(wishes(pool))


def wishes(pool: Pool) -> list[str]:
    """List the wishes of a pool, as they are written in a picture."""
    return [
        lang.written_wish(verb, thing)
        for harmful in (False, True)
        for verb, thing in lang.pairings(pool, harmful=harmful)
    ]


def cell_of(grid: int, row: int, column: int) -> View:
    """One of ``grid`` x ``grid`` cells of a scene; its side is rounded up, so that cells touch."""
    side = -(-SIDE // grid)
    return View(min(column * SIDE // grid, SIDE - side), min(row * SIDE // grid, SIDE - side), side)


def around(rng: random.Random, item: Placed, *, sides: tuple[float, float], shift: float) -> View:
    """Jitter a view around an object; ``sides`` and ``shift`` in sides of the object.

    Sides are drawn evenly on a scale of logarithms.
    """
    low, high = map(math.log, sides)
    side = min(SIDE, round(item.side * math.exp(rng.uniform(low, high))))
    left, top = (
        round(start + item.side / 2 + item.side * rng.uniform(-shift, shift) - side / 2)
        for start in (item.left, item.top)
    )
    return View(min(max(0, left), SIDE - side), min(max(0, top), SIDE - side), side)


def _view(rng: random.Random, scene: Scene) -> View:
    kind = rng.random()
    if kind < _WHOLE:
        return WHOLE
    if kind < _WHOLE + _AROUND and scene.placed:
        return around(rng, rng.choice(scene.placed), sides=_SIDES, shift=0.35)
    grid = rng.choice(GRIDS)
    return cell_of(grid, rng.randrange(grid), rng.randrange(grid))


@dataclass(frozen=True)
class Batch:
    """Some views and what they show."""

    subjects: list[Subject]
    """The scene of each view."""
    views: list[View]
    shown: list[Shown]
    shares: Tensor
    """float32 (views, classes): how much of each class a view shows."""

    def crops(self) -> list[Image.Image]:
        """Cut every view out of its picture."""
        return [
            subject.picture.crop(view.box)
            for subject, view in zip(self.subjects, self.views, strict=True)
        ]


def batches(rng: random.Random, size: int, pool: Pool) -> Iterator[Batch]:
    """Yield views to learn from, endlessly."""
    while True:
        drawn: list[tuple[Subject, View, Shown, Tensor]] = []
        while len(drawn) < size:
            drawn += _some(rng, Subject(scene_of(rng, pool)))
        subjects, views, shown, shares = zip(*drawn[:size], strict=True)
        yield Batch(list(subjects), list(views), list(shown), torch.stack(shares))


def _some(rng: random.Random, subject: Subject) -> list[tuple[Subject, View, Shown, Tensor]]:
    """Up to :data:`_VIEWS` different views of a scene; most crops of bare ground are left out."""
    taken = {}
    for _ in range(4 * _VIEWS):
        view = _view(rng, subject.scene)
        found = subject.shown(view)
        if found is None:
            continue
        if found[0] == Shown() and view != WHOLE and rng.random() > _BARE:
            continue
        taken[view] = (subject, view, *found)
        if len(taken) == _VIEWS:
            break
    return list(taken.values())


# --- captions ---------------------------------------------------------------------------------

_FRAMES = ("", "a picture of", "an image of", "a crop of", "a part of", "there is", "this is",
           "you see", "it shows", "here is")  # fmt: skip
_TAILS = ("", ".", "in the picture", "in the picture .")
_POOLS: tuple[Pool, ...] = ("train", "train", "calibration", "train", "test", "train", "test")
"""The pools of successive wordings, as for the questions of the world: every frame and every tail
occurs in training, and what is held out are combinations."""

WORDINGS: dict[Pool, list[str]] = {"train": [], "calibration": [], "test": []}
"""Ways to say a noun, by pool."""
for _pool, (_frame, _tail) in zip(cycle(_POOLS), product(_FRAMES, _TAILS)):
    WORDINGS[_pool].append(f"{_frame} {{}} {_tail}".strip())

_TOLD = 0.2
"""Of the captions: told as the language of the world does."""


def caption_of(rng: random.Random, shown: Shown, pool: Pool) -> str:
    """Say what is shown in a wording of a pool, or as the language of the world tells it."""
    if rng.random() < _TOLD and shown.told:
        return shown.told
    return rng.choice(WORDINGS[pool]).format(shown.noun)


def altered(rng: random.Random, shown: Shown) -> Shown:
    """Change one thing, one colour or one word: what is nearly shown.

    False captions of this kind teach which colour belongs to which object (Yuksekgonul et al.,
    "When and why vision-language models behave like bags-of-words, and what to do about it?",
    ICLR 2023).
    """
    names, colors = list(THINGS), list(COLORS)
    if shown.words and (not shown.things or rng.random() < 0.5):
        words = shown.words.split()
        place = rng.choice([i for i, word in enumerate(words) if word != "a"] or [0])
        words[place] = _other(rng, list(lang.VERBS) if words[place] in lang.VERBS else names,
                              words[place])  # fmt: skip
        return replace(shown, words=" ".join(words))
    if not shown.things:
        return replace(shown, things=((rng.choice(names), rng.choice(colors)),))
    things = list(shown.things)
    place = rng.randrange(len(things))
    other = (place + 1) % len(things)
    (name, color), (neighbour, tint) = things[place], things[other]
    if color != tint and rng.random() < 0.5:
        things[place], things[other] = (name, tint), (neighbour, color)
    elif rng.random() < 0.5:
        things[place] = (name, _other(rng, colors, color))
    else:
        things[place] = (_other(rng, names, name), color)
    return replace(shown, things=tuple(things))


def _other(rng: random.Random, among: Sequence[str], than: str) -> str:
    return rng.choice([one for one in among if one != than])


# --- what views are classified into -----------------------------------------------------------


@dataclass(frozen=True)
class Bank:
    """Classes, each with the nouns that it is known by."""

    nouns: list[tuple[str, ...]]
    member: Tensor
    """float32 (classes of a view, classes of the bank): 1 where one belongs to the other."""

    def texts(self, rng: random.Random, wording: str) -> list[str]:
        """One prompt a class."""
        return [wording.format(rng.choice(nouns)) for nouns in self.nouns]


_Groups = dict[tuple[str, ...], list[str]]
"""Nouns, and what of :data:`CLASSES` they say."""


def _bank(groups: _Groups, others: _Groups) -> Bank:
    groups = groups | others
    member = [[float(name in group) for group in groups.values()] for name in CLASSES]
    return Bank(list(groups), torch.tensor(member))


def nouns_of(category: str) -> tuple[str, ...]:
    """How a category is called: "a weapon", "weapon", "a thing of weapon"."""
    article = "an" if category[0] in "aeiou" else "a"
    return f"{article} {category}", category, f"a thing of {category}"


CATEGORIES = tuple(dict.fromkeys(thing.category for thing in THINGS.values()))
HARMFUL = ("something harmful", "a harmful thing", "something toxic")
HARMLESS = ("something harmless", "a harmless thing", "something safe")

_OTHERS: _Groups = {(NOTHING,): [NOTHING], (SOME_WORDS,): [SOME_WORDS, *WRITTEN.values()]}
_CATEGORIES: _Groups = {
    nouns_of(category): [thing.name for thing in THINGS.values() if thing.category == category]
    for category in CATEGORIES
}
_HARM: _Groups = {
    HARMFUL: [thing.name for thing in THINGS.values() if thing.toxic],
    HARMLESS: [thing.name for thing in THINGS.values() if not thing.toxic],
}

BANKS = {
    "name": _bank({(f"a {name}", name): [name] for name in THINGS}, _OTHERS),
    "category": _bank(_CATEGORIES, _OTHERS),
    "harm": _bank(_HARM, _OTHERS),
    "written": _bank({(Shown(words=name).noun,): [WRITTEN[name]] for name in THINGS}, {}),
}
"""What views are classified into; the last is not asked where no name can be read."""
