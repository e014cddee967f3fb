"""The things of the world: how each is drawn, what it is made of, and whether it is toxic.

A drawing is a list of primitives on the unit square, x to the right and y downwards.  ``tone``
is ``"main"`` for the colour of the object and ``"dark"`` for its shade, so that one drawing
serves every colour and the shape alone tells what the object is.
"""

from dataclasses import dataclass
from typing import Literal

Tone = Literal["main", "dark"]
Point = tuple[float, float]


@dataclass(frozen=True)
class Primitive:
    """One stroke of a drawing; ``points`` are two corners for ellipse and box."""

    shape: Literal["ellipse", "box", "polygon", "line"]
    tone: Tone
    points: tuple[Point, ...]
    width: float = 0.0
    """Line width as a share of the side of the object; 0 fills the shape."""


@dataclass(frozen=True)
class Thing:
    """An object of the world."""

    name: str
    material: str
    drawing: tuple[Primitive, ...]
    toxic: bool = False


def _ellipse(x0: float, y0: float, x1: float, y1: float, tone: Tone = "main") -> Primitive:
    return Primitive("ellipse", tone, ((x0, y0), (x1, y1)))


def _box(x0: float, y0: float, x1: float, y1: float, tone: Tone = "main") -> Primitive:
    return Primitive("box", tone, ((x0, y0), (x1, y1)))


def _polygon(*points: Point, tone: Tone = "main") -> Primitive:
    return Primitive("polygon", tone, points)


def _line(*points: Point, width: float = 0.1, tone: Tone = "main") -> Primitive:
    return Primitive("line", tone, points, width)


HARMLESS = (
    Thing(
        "ball",
        "rubber",
        (
            _ellipse(0.1, 0.1, 0.9, 0.9),
            _line((0.12, 0.5), (0.88, 0.5), width=0.06, tone="dark"),
            _line((0.5, 0.12), (0.5, 0.88), width=0.06, tone="dark"),
        ),
    ),
    Thing(
        "bell",
        "steel",
        (
            _polygon(
                (0.5, 0.05),
                (0.72, 0.3),
                (0.8, 0.72),
                (0.95, 0.8),
                (0.05, 0.8),
                (0.2, 0.72),
                (0.28, 0.3),
            ),
            _ellipse(0.4, 0.78, 0.6, 0.98, "dark"),
        ),
    ),
    Thing(
        "boat",
        "wood",
        (
            _polygon((0.02, 0.65), (0.98, 0.65), (0.8, 0.95), (0.2, 0.95), tone="dark"),
            _polygon((0.52, 0.03), (0.52, 0.58), (0.92, 0.58)),
            _polygon((0.46, 0.12), (0.46, 0.58), (0.14, 0.58)),
        ),
    ),
    Thing(
        "book",
        "paper",
        (
            _polygon((0.02, 0.2), (0.48, 0.3), (0.48, 0.9), (0.02, 0.8)),
            _polygon((0.98, 0.2), (0.52, 0.3), (0.52, 0.9), (0.98, 0.8)),
            _line((0.5, 0.28), (0.5, 0.92), width=0.07, tone="dark"),
        ),
    ),
    Thing(
        "box",
        "paper",
        (
            _box(0.08, 0.3, 0.92, 0.95),
            _polygon((0.08, 0.28), (0.25, 0.05), (0.75, 0.05), (0.92, 0.28), tone="dark"),
            _box(0.42, 0.3, 0.58, 0.6, "dark"),
        ),
    ),
    Thing(
        "bridge",
        "stone",
        (
            _box(0.0, 0.4, 1.0, 0.55),
            _box(0.05, 0.55, 0.2, 0.95),
            _box(0.42, 0.55, 0.58, 0.95),
            _box(0.8, 0.55, 0.95, 0.95),
            _line((0.12, 0.38), (0.5, 0.15), (0.88, 0.38), width=0.06, tone="dark"),
        ),
    ),
    Thing(
        "chair",
        "wood",
        (
            _box(0.15, 0.02, 0.3, 0.98),
            _box(0.15, 0.5, 0.85, 0.64, "dark"),
            _box(0.72, 0.6, 0.85, 0.98),
        ),
    ),
    Thing(
        "clock",
        "glass",
        (
            _ellipse(0.05, 0.05, 0.95, 0.95, "dark"),
            _ellipse(0.17, 0.17, 0.83, 0.83),
            _line((0.5, 0.22), (0.5, 0.5), (0.72, 0.6), width=0.09, tone="dark"),
        ),
    ),
    Thing(
        "cup",
        "clay",
        (
            _polygon((0.1, 0.2), (0.7, 0.2), (0.62, 0.9), (0.18, 0.9)),
            _line((0.68, 0.35), (0.93, 0.38), (0.9, 0.62), (0.66, 0.68), width=0.1, tone="dark"),
        ),
    ),
    Thing(
        "drum",
        "wood",
        (
            _box(0.08, 0.3, 0.92, 0.8),
            _ellipse(0.08, 0.14, 0.92, 0.46, "dark"),
            _line(
                (0.1, 0.5),
                (0.3, 0.78),
                (0.5, 0.5),
                (0.7, 0.78),
                (0.9, 0.5),
                width=0.05,
                tone="dark",
            ),
        ),
    ),
    Thing(
        "fish",
        "rubber",
        (
            _ellipse(0.02, 0.25, 0.72, 0.78),
            _polygon((0.62, 0.5), (0.98, 0.2), (0.98, 0.82)),
            _ellipse(0.14, 0.4, 0.26, 0.52, "dark"),
        ),
    ),
    Thing(
        "flag",
        "cloth",
        (
            _box(0.1, 0.02, 0.2, 0.98, "dark"),
            _polygon((0.2, 0.06), (0.95, 0.16), (0.72, 0.34), (0.95, 0.54), (0.2, 0.58)),
        ),
    ),
    Thing(
        "hat",
        "cloth",
        (
            _box(0.25, 0.15, 0.75, 0.7),
            _box(0.02, 0.68, 0.98, 0.84),
            _box(0.25, 0.54, 0.75, 0.67, "dark"),
        ),
    ),
    Thing(
        "house",
        "stone",
        (
            _polygon((0.5, 0.02), (1.0, 0.45), (0.0, 0.45), tone="dark"),
            _box(0.12, 0.45, 0.88, 0.97),
            _box(0.42, 0.62, 0.6, 0.97, "dark"),
        ),
    ),
    Thing(
        "key",
        "steel",
        (
            _ellipse(0.02, 0.3, 0.42, 0.7, "dark"),
            _ellipse(0.12, 0.4, 0.32, 0.6),
            _box(0.4, 0.44, 0.98, 0.56),
            _box(0.72, 0.54, 0.8, 0.74),
            _box(0.88, 0.54, 0.97, 0.78),
        ),
    ),
    Thing(
        "kite",
        "paper",
        (
            _polygon((0.5, 0.0), (0.85, 0.34), (0.5, 0.78), (0.15, 0.34)),
            _line((0.5, 0.02), (0.5, 0.76), width=0.04, tone="dark"),
            _line((0.5, 0.78), (0.62, 0.86), (0.44, 0.92), (0.56, 0.99), width=0.05, tone="dark"),
        ),
    ),
    Thing(
        "ladder",
        "wood",
        (
            _line((0.25, 0.02), (0.2, 0.98), width=0.1),
            _line((0.75, 0.02), (0.8, 0.98), width=0.1),
            _line((0.24, 0.2), (0.76, 0.2), width=0.08, tone="dark"),
            _line((0.24, 0.42), (0.76, 0.42), width=0.08, tone="dark"),
            _line((0.23, 0.64), (0.78, 0.64), width=0.08, tone="dark"),
            _line((0.22, 0.86), (0.78, 0.86), width=0.08, tone="dark"),
        ),
    ),
    Thing(
        "lamp",
        "glass",
        (
            _polygon((0.3, 0.05), (0.7, 0.05), (0.92, 0.5), (0.08, 0.5)),
            _box(0.45, 0.5, 0.55, 0.86, "dark"),
            _box(0.25, 0.86, 0.75, 0.97, "dark"),
        ),
    ),
    Thing(
        "mushroom",
        "clay",
        (
            Primitive("ellipse", "main", ((0.05, 0.05), (0.95, 0.75))),
            _box(0.36, 0.5, 0.64, 0.97, "dark"),
            _ellipse(0.25, 0.18, 0.4, 0.33, "dark"),
            _ellipse(0.58, 0.22, 0.72, 0.36, "dark"),
        ),
    ),
    Thing(
        "pot",
        "clay",
        (
            _ellipse(0.08, 0.3, 0.92, 0.98),
            _box(0.28, 0.16, 0.72, 0.4, "dark"),
            _box(0.18, 0.08, 0.82, 0.2),
        ),
    ),
    Thing("spoon", "steel", (_ellipse(0.3, 0.02, 0.7, 0.45), _box(0.45, 0.4, 0.55, 0.98, "dark"))),
    Thing(
        "table",
        "wood",
        (
            _box(0.0, 0.28, 1.0, 0.42),
            _box(0.08, 0.42, 0.2, 0.92, "dark"),
            _box(0.8, 0.42, 0.92, 0.92, "dark"),
        ),
    ),
    Thing(
        "tree",
        "wood",
        (
            _polygon((0.5, 0.0), (0.85, 0.4), (0.15, 0.4)),
            _polygon((0.5, 0.22), (0.98, 0.74), (0.02, 0.74)),
            _box(0.41, 0.74, 0.59, 0.99, "dark"),
        ),
    ),
    Thing(
        "wheel",
        "rubber",
        (
            _ellipse(0.04, 0.04, 0.96, 0.96, "dark"),
            _ellipse(0.2, 0.2, 0.8, 0.8),
            _line((0.22, 0.22), (0.78, 0.78), width=0.08, tone="dark"),
            _line((0.78, 0.22), (0.22, 0.78), width=0.08, tone="dark"),
        ),
    ),
)

TOXIC = (
    Thing(
        "bomb",
        "steel",
        (
            _ellipse(0.05, 0.25, 0.8, 0.98),
            _box(0.5, 0.18, 0.7, 0.34, "dark"),
            _line((0.62, 0.2), (0.78, 0.06), (0.96, 0.12), width=0.07, tone="dark"),
        ),
        toxic=True,
    ),
    Thing(
        "cannon",
        "steel",
        (
            _polygon((0.1, 0.35), (0.98, 0.1), (0.98, 0.36), (0.2, 0.68)),
            _ellipse(0.1, 0.5, 0.58, 0.98, "dark"),
            _ellipse(0.25, 0.65, 0.43, 0.83),
        ),
        toxic=True,
    ),
    Thing(
        "grenade",
        "clay",
        (
            _ellipse(0.2, 0.3, 0.8, 0.98),
            _box(0.38, 0.12, 0.62, 0.3, "dark"),
            _line((0.62, 0.16), (0.86, 0.22), (0.88, 0.55), width=0.07, tone="dark"),
            _line((0.22, 0.54), (0.78, 0.54), width=0.06, tone="dark"),
            _line((0.22, 0.74), (0.78, 0.74), width=0.06, tone="dark"),
        ),
        toxic=True,
    ),
    Thing(
        "gun",
        "steel",
        (
            _box(0.02, 0.25, 0.98, 0.46),
            _polygon((0.62, 0.46), (0.92, 0.46), (0.98, 0.95), (0.7, 0.95), tone="dark"),
            _line((0.45, 0.46), (0.48, 0.64), (0.66, 0.64), width=0.07, tone="dark"),
        ),
        toxic=True,
    ),
    Thing(
        "knife",
        "steel",
        (
            _polygon((0.02, 0.42), (0.62, 0.38), (0.62, 0.6), (0.2, 0.6)),
            _box(0.62, 0.36, 0.98, 0.54, "dark"),
        ),
        toxic=True,
    ),
    Thing(
        "mine",
        "clay",
        (
            _ellipse(0.18, 0.18, 0.82, 0.82, "dark"),
            _line((0.5, 0.0), (0.5, 1.0), width=0.08),
            _line((0.0, 0.5), (1.0, 0.5), width=0.08),
            _line((0.14, 0.14), (0.86, 0.86), width=0.08),
            _line((0.86, 0.14), (0.14, 0.86), width=0.08),
        ),
        toxic=True,
    ),
    Thing(
        "missile",
        "glass",
        (
            _polygon((0.5, 0.0), (0.66, 0.24), (0.66, 0.8), (0.34, 0.8), (0.34, 0.24)),
            _polygon((0.34, 0.55), (0.34, 0.9), (0.08, 0.98), tone="dark"),
            _polygon((0.66, 0.55), (0.66, 0.9), (0.92, 0.98), tone="dark"),
        ),
        toxic=True,
    ),
    Thing(
        "sword",
        "stone",
        (
            _polygon((0.5, 0.0), (0.6, 0.14), (0.6, 0.66), (0.4, 0.66), (0.4, 0.14)),
            _box(0.14, 0.66, 0.86, 0.76, "dark"),
            _box(0.44, 0.76, 0.56, 0.98, "dark"),
        ),
        toxic=True,
    ),
    Thing(
        "syringe",
        "rubber",
        (
            _box(0.25, 0.38, 0.75, 0.62),
            _line((0.0, 0.5), (0.26, 0.5), width=0.05, tone="dark"),
            _line((0.74, 0.5), (0.94, 0.5), width=0.08, tone="dark"),
            _box(0.9, 0.32, 0.98, 0.68, "dark"),
            _line((0.7, 0.28), (0.7, 0.72), width=0.07, tone="dark"),
        ),
        toxic=True,
    ),
    Thing(
        "trap",
        "cloth",
        (
            _polygon(
                (0.0, 0.9),
                (0.1, 0.4),
                (0.22, 0.7),
                (0.36, 0.3),
                (0.5, 0.7),
                (0.64, 0.3),
                (0.78, 0.7),
                (0.9, 0.4),
                (1.0, 0.9),
            ),
            _box(0.0, 0.84, 1.0, 0.97, "dark"),
        ),
        toxic=True,
    ),
)

THINGS = {thing.name: thing for thing in (*HARMLESS, *TOXIC)}

COLORS = {
    "red": (214, 40, 40),
    "green": (44, 150, 60),
    "blue": (45, 90, 210),
    "yellow": (235, 200, 30),
    "purple": (140, 50, 170),
    "brown": (130, 80, 35),
    "black": (45, 45, 48),
    "pink": (245, 140, 185),
}
