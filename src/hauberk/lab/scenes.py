"""Pictures of the world: objects of many sizes on a cluttered ground, words, and where they stand.

A *layout* is the coarse place and size of one object.  Layouts are divided into pools, so that
the two largest objects of a picture for testing stand where (and as large as) no training picture
ever had them as its two largest.
"""

import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hauberk.lab.objects import COLORS, THINGS, Thing

Pool = Literal["train", "calibration", "test"]

SIDE = 96
"""Height and width of a picture, in pixels."""
_OVERSAMPLE = 2
_PLACES = 4
"""Layouts divide the plane into 4 x 4 places..."""
_SIZES = (0.26, 0.38, 0.54, 0.80)
"""...and the side of an object (share of the picture) into the three bins between these."""


ROW = 24
"""Height of a line of words in pixels; lines begin on it, so that patches cut no letter in two
rows (random places and sizes were read at 32 %, places on the grid at 100 %)."""
_FONT = ImageFont.load_default(16)


_INDEX = {name: index for index, name in enumerate(THINGS)}


def pool_of(*key: object, test: int = 20, calibration: int = 10) -> Pool:
    """Assign a key to a pool for ever: by hash, ``test`` and ``calibration`` in percent."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    share = int.from_bytes(digest[:4], "big") % 100
    if share < test:
        return "test"
    return "calibration" if share < test + calibration else "train"


def phrase(thing: Thing, color: str) -> str:
    """Name an object and its colour: "ball red".

    The colour follows its noun, as in French: a decoder reads in one direction, so it has just
    read the name when it says the colour.  With a word between the two ("ball in red") the same
    decoder never learnt in pictures which colour belongs to which of two objects.
    """
    return f"{thing.name} {color}"


@dataclass(frozen=True)
class Placed:
    """One object in a picture: top-left corner and side in pixels."""

    thing: Thing
    color: str
    left: float
    top: float
    side: float

    @property
    def phrase(self) -> str:
        """How the language names it."""
        return phrase(self.thing, self.color)


@dataclass(frozen=True)
class Line:
    """Some words in a picture; ``left`` and ``top`` in pixels, multiples of half a row."""

    words: str
    left: int
    top: int

    def boxes(self) -> list[tuple[str, float, float]]:
        """Each word with where it begins and ends, in pixels from the left."""
        found, start = [], 0
        for word in self.words.split():
            at = self.words.index(word, start)
            start = at + len(word)
            reach = (_FONT.getlength(self.words[:at]), _FONT.getlength(self.words[:start]))
            found.append((word, self.left + reach[0], self.left + reach[1]))
        return found


@dataclass(frozen=True)
class Scene:
    """A picture, what stands in it, from left to right, and what is written there."""

    placed: tuple[Placed, ...]
    clutter: int
    seed: int
    lines: tuple[Line, ...] = ()

    @property
    def text(self) -> str:
        """What is written, line after line."""
        return " ".join(line.words for line in self.lines)

    @property
    def subject(self) -> Placed:
        """What "this" refers to: the largest object."""
        return max(self.placed, key=lambda item: item.side)

    def draw(self) -> Image.Image:
        """Render an RGB image of ``SIDE`` x ``SIDE`` pixels."""
        rng = random.Random(self.seed)
        size = SIDE * _OVERSAMPLE
        shows = bool(self.placed or self.lines)
        ground = tuple(rng.randint(205, 255) for _ in range(3)) if shows else _any_tone(rng)
        image = Image.new("RGB", (size, size), ground)
        pen = ImageDraw.Draw(image)
        _draw_clutter(pen, rng, self.clutter, size)
        for item in sorted(self.placed, key=lambda item: item.side):
            _draw_thing(pen, item, rng)
        image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
        pen = ImageDraw.Draw(image)
        ink = tuple(rng.randint(0, 90) for _ in range(3))
        for line in self.lines:
            pen.text((line.left, line.top), line.words, fill=ink, font=_FONT)
        return image if shows else _grainy(rng, image)


def compose(
    rng: random.Random,
    things: Sequence[Thing],
    *,
    pool: Pool,
    clutter: int | None = None,
    colors: Sequence[str] | None = None,
) -> Scene:
    """Place ``things`` without overlap, the two largest in layouts of ``pool``.

    The first is the subject: it is given the largest side.  ``clutter`` counts the marks on the
    ground; by default anything from none to many.
    """
    clutter = rng.choice((0, 4, 10, 20)) if clutter is None else clutter
    colors = colors or [rng.choice(list(COLORS)) for _ in things]
    while True:
        placed = _place(rng, things, colors, pool)
        if placed is not None:
            ordered = tuple(sorted(placed, key=lambda item: item.left + item.side / 2))
            return Scene(ordered, clutter, rng.getrandbits(32))


def compose_words(
    rng: random.Random,
    text: str,
    *,
    pool: Pool,
    thing: Thing | None = None,
    color: str | None = None,
) -> Scene:
    """Write words, beneath an object in a layout of ``pool`` if there is one.

    Words have too few places on the grid to hold some of them out; what is held out of writing
    are the pairings of verb and object, and the wordings that ask about it.

    Raises
    ------
    ValueError
        If the words do not fit into the picture.
    """
    lines = _wrapped(text)
    if len(lines) * ROW > SIDE - (3 * ROW if thing else 0):
        raise ValueError(f"{text!r} does not fit beside {thing.name if thing else 'nothing'}.")
    while True:
        first = rng.randrange(3 if thing else 0, SIDE // ROW - len(lines) + 1)
        placed = tuple(
            Line(words, rng.randrange(0, int(SIDE - _FONT.getlength(words)) + 1, ROW // 2), row)
            for row, words in zip(itertools.count(first * ROW, ROW), lines)
        )
        if thing is None:
            return Scene((), 0, rng.getrandbits(32), placed)
        side = rng.uniform(0.35, 0.7) * SIDE
        item = Placed(
            thing,
            color or rng.choice(list(COLORS)),
            rng.uniform(0, SIDE - side),
            rng.uniform(0, 3 * ROW - side),
            side,
        )
        if layout_pool(item) == pool:
            return Scene((item,), rng.choice((0, 4)), rng.getrandbits(32), placed)


def _wrapped(text: str) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _FONT.getlength(longer) <= SIDE:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _place(
    rng: random.Random, things: Sequence[Thing], colors: Sequence[str], pool: Pool
) -> list[Placed] | None:
    largest = {1: _SIZES[-1], 2: 0.5}.get(len(things), 0.42)
    sides = sorted((rng.uniform(_SIZES[0], largest) for _ in things), reverse=True)
    # "This" has to be unmistakable: the subject is a quarter larger than the next object.
    if len(sides) > 1 and sides[0] < 1.25 * sides[1]:
        return None
    placed: list[Placed] = []
    for thing, color, share in zip(things, colors, sides, strict=True):
        for _ in range(12):
            left, top = rng.uniform(0, 1 - share), rng.uniform(0, 1 - share)
            item = Placed(thing, color, left * SIDE, top * SIDE, share * SIDE)
            free = len(placed) >= 2 or layout_pool(item) == pool
            if free and not any(_overlap(item, other) for other in placed):
                placed.append(item)
                break
        else:
            return None
    centers = sorted(item.left + item.side / 2 for item in placed)
    if any(b - a < 0.12 * SIDE for a, b in itertools.pairwise(centers)):
        return None  # from left to right has to be unmistakable as well
    return placed


def layout_pool(item: Placed) -> Pool:
    """Tell the pool of an object's layout: its place, its size bin and what it is."""
    column = int((item.left + item.side / 2) / SIDE * _PLACES)
    row = int((item.top + item.side / 2) / SIDE * _PLACES)
    size = sum(item.side / SIDE >= edge for edge in _SIZES[1:-1])
    # Latin squares rather than a hash: every object then has places of every pool at every size.
    cell = (column + 2 * row + 3 * size + _INDEX[item.thing.name]) % 10
    return "test" if cell < 2 else "calibration" if cell == 2 else "train"


def _overlap(a: Placed, b: Placed) -> bool:
    gap = 2
    return (
        a.left < b.left + b.side + gap
        and b.left < a.left + a.side + gap
        and a.top < b.top + b.side + gap
        and b.top < a.top + a.side + gap
    )


def _draw_thing(pen: ImageDraw.ImageDraw, item: Placed, rng: random.Random) -> None:
    main = tuple(max(0, min(255, value + rng.randint(-12, 12))) for value in COLORS[item.color])
    tones = {"main": main, "dark": tuple(int(value * 0.45) for value in main)}
    for stroke in item.thing.drawing:
        points = [
            (
                (item.left + x * item.side) * _OVERSAMPLE,
                (item.top + y * item.side) * _OVERSAMPLE,
            )
            for x, y in stroke.points
        ]
        fill = tones[stroke.tone]
        if stroke.shape == "ellipse":
            pen.ellipse(points, fill=fill)
        elif stroke.shape == "box":
            pen.rectangle(points, fill=fill)
        elif stroke.shape == "polygon":
            pen.polygon(points, fill=fill)
        else:
            width = max(1, round(stroke.width * item.side * _OVERSAMPLE))
            pen.line(points, fill=fill, width=width, joint="curve")


def _draw_clutter(pen: ImageDraw.ImageDraw, rng: random.Random, marks: int, size: int) -> None:
    for _ in range(marks):
        tone = tuple(rng.randint(120, 225) for _ in range(3))
        x, y = rng.uniform(0, size), rng.uniform(0, size)
        reach = rng.uniform(0.03, 0.10) * size
        if rng.random() < 0.5:
            end = (x + rng.uniform(-2, 2) * reach, y + rng.uniform(-2, 2) * reach)
            pen.line([(x, y), end], fill=tone, width=rng.randint(1, 4))
        else:
            pen.ellipse((x, y, x + reach, y + reach * rng.uniform(0.4, 1)), fill=tone)


def _any_tone(rng: random.Random) -> tuple[int, ...]:
    """Anything from black to white, with a tint: pictures that show nothing are often dark."""
    tone = rng.randint(0, 255)
    return tuple(min(max(tone + rng.randint(-30, 30), 0), 255) for _ in range(3))


def _grainy(rng: random.Random, image: Image.Image) -> Image.Image:
    """Half of the pictures with the grain of a sensor in the dark, of any strength."""
    strength = rng.uniform(0, 80) if rng.random() < 0.5 else 0.0
    grain = np.random.default_rng(rng.getrandbits(32)).normal(0.0, 1.0, (SIDE, SIDE, 3))
    return Image.fromarray((np.asarray(image) + strength * grain).clip(0, 255).astype(np.uint8))


def random_things(rng: random.Random, count: int, names: Sequence[str]) -> list[Thing]:
    """Draw ``count`` different things from ``names``."""
    return [THINGS[name] for name in rng.sample(list(names), count)]
