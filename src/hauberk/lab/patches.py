"""Pictures as towers are fed them, and what each patch of them shows."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hauberk.lab.build import CLIP_MEAN, CLIP_STD
from hauberk.lab.language import VERBS
from hauberk.lab.objects import COLORS, THINGS
from hauberk.lab.scenes import ROW, Scene

SEEN = {
    word: index + 1
    for index, word in enumerate([*THINGS, *(f"written {word}" for word in ("a", *VERBS, *THINGS))])
}
"""What a patch may show besides ground: a thing, or a word (a thing and its name are two)."""

_TINTS = {name: index for index, name in enumerate(COLORS)}


def stacked(pictures: Iterable[Image.Image]) -> Tensor:
    """Stack pictures of one size: uint8 (n, 3, height, width)."""
    rows = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(rows).permute(0, 3, 1, 2).contiguous()


def normalised(pixels: Tensor) -> Tensor:
    """Pixels as the processor hands them to the tower: float32 (n, 3, height, width)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels.float() / 255 - mean) / std


@dataclass(frozen=True)
class Box:
    """Where in a scene a thing or a word is, in pixels, and of which class and colour."""

    left: float
    top: float
    right: float
    bottom: float
    seen: int
    tint: int = -1


def boxes(scene: Scene) -> list[Box]:
    """The things and the words of a scene; words, drawn last, lie over things."""
    things = [
        Box(
            item.left, item.top, item.left + item.side, item.top + item.side,
            SEEN[item.thing.name], _TINTS[item.color],
        )
        for item in scene.placed
    ]  # fmt: skip
    words = [
        Box(left, line.top, right, line.top + ROW, SEEN[f"written {word}"])
        for line in scene.lines
        for word, left, right in line.boxes()
    ]
    return [*things, *words]


def patch_labels(
    scene: Scene, grid: int, *, left: float = 0, top: float = 0, side: float
) -> tuple[Tensor, Tensor]:
    """Tell for each patch of a square view in whose box its centre lies, and of which colour.

    The view is ``side`` pixels of the scene, from ``left`` and ``top``, cut into ``grid`` by
    ``grid`` patches.  Both are int64 (grid * grid,).  Class 0 is the ground; the colour of ground
    and words is -1 (not asked).
    """
    centers = (np.arange(grid) + 0.5) * side / grid

    def covered(low: float, high: float) -> slice:
        """The patches, in one direction, with their centre between two places in the view."""
        first, last = np.searchsorted(centers, (low, high))
        return slice(int(first), int(last))

    what = torch.zeros(grid, grid, dtype=torch.long)
    which = torch.full_like(what, -1)
    for box in boxes(scene):
        area = covered(box.top - top, box.bottom - top), covered(box.left - left, box.right - left)
        what[area], which[area] = box.seen, box.tint
    return what.flatten(), which.flatten()
