"""DAVSP: a trained picture frame, the visual safety prompt, around every image or beside it.

The image is put on a canvas whose other pixels were trained (see
:mod:`hauberk.defenses.safety_prompt_training`) so that the model refuses harmful requests and
answers harmless ones.  The authors shrink the image into the middle; where a model reads canvases
of other sizes, the image may keep its own, with the frame on some sides alone.  Nothing of the
model is changed: what is deployed is a picture, and only pixels have to leave the house.

The authors insert the frame into the normalised tensor behind the processor, unbounded, in float16.
Ours lives in pixels, in [0, 1], and was trained as the 8-bit picture that it is deployed as: it
survives a PNG, a web client and any processor.  Their fixed text prefix, which is always on, is a
setting of its own here, so that it can be told what does the work.

Source: Zhang et al., "DAVSP: Safety Alignment for Large Vision-Language Models via Deep Aligned
Visual Safety Prompt", AAAI 2026, arXiv:2506.09353, and the authors' code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from hauberk.bundle import Binding, Bound, Card, write_bundle
from hauberk.defenses.unseen import Unseen
from hauberk.errors import TamperedBundle
from hauberk.requests import Request, as_rgb

Fit = Literal["shrink", "cover"]
FRAME = "frame.png"
_UNREADABLE = (
    *(KeyError, TypeError, ValueError, OSError),
    *(SyntaxError, Image.DecompressionBombError),  # Pillow's, of broken or lying files
)


@dataclass(frozen=True)
class Geometry:
    """Where the frame is, and what becomes of the image inside; all in pixels.

    Raises
    ------
    ValueError
        If there is no frame or no room for an image, or a value is not one of those named.
    """

    height: int
    width: int
    """Of the canvas: what the model's processor feeds as it is."""
    margins: tuple[int, int, int, int]
    """Width of the frame above, right of, below and left of the image.  The authors' is 30 of 336
    on every side, no multiple of their patches."""
    fit: Fit = "shrink"
    """``shrink`` makes the whole image fit inside, as the authors do; ``cover`` leaves it at the
    size of the canvas and lays the frame over its rim, for models that read at one size alone."""
    ground: tuple[int, int, int] = (255, 255, 255)
    """Fills up an image of another aspect than its place, 0..255; the authors' is white."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "margins", tuple(self.margins))
        object.__setattr__(self, "ground", tuple(self.ground))
        if self.fit not in get_args(Fit):
            raise ValueError(f"fit: {self.fit!r} is not one of {', '.join(get_args(Fit))}.")
        sizes = (self.height, self.width, *self.margins)
        if len(sizes) != 6 or not all(type(size) is int for size in sizes):
            raise ValueError(f"{sizes} are no height, width and four margins in whole pixels.")
        top, right, bottom, left = self.margins
        if min(self.margins) < 0 or not any(self.margins):
            raise ValueError(
                f"margins: {self.margins} are no frame; give four widths of 0 or more, one of them "
                "more."
            )
        if top + bottom >= self.height or left + right >= self.width:
            raise ValueError(
                f"margins: {self.margins} leave no room for an image on a canvas of {self.height} "
                f"x {self.width} pixels; give less, or a larger canvas."
            )
        if len(self.ground) != 3 or not all(
            type(value) is int and 0 <= value <= 255 for value in self.ground
        ):
            raise ValueError(f"ground: {self.ground} is no colour; give three values of 0..255.")

    @property
    def inside(self) -> tuple[slice, slice]:
        """Rows and columns of the canvas where the image is."""
        top, right, bottom, left = self.margins
        return slice(top, self.height - bottom), slice(left, self.width - right)

    @property
    def held(self) -> tuple[slice, slice]:
        """Rows and columns that an image is brought to: those inside, or all if it is covered."""
        if self.fit == "cover":
            return slice(0, self.height), slice(0, self.width)
        return self.inside

    @property
    def rim(self) -> Tensor:
        """Where the frame is: (height, width) bool."""
        rim = torch.ones(self.height, self.width, dtype=torch.bool)
        rim[self.inside] = False
        return rim

    def place(self, image: Image.Image) -> Tensor:
        """Put an image where the frame will leave it to be seen: (3, height, width) uint8.

        The rim is black.

        Raises
        ------
        BadRequest
            If the mode of the image does not say which value is white.
        """
        rows, columns = self.held
        size = columns.stop - columns.start, rows.stop - rows.start
        image = as_rgb(image)
        if image.size != size:
            image = _padded(image, size, self.ground)
        canvas = torch.zeros(3, self.height, self.width, dtype=torch.uint8)
        canvas[:, rows, columns] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return canvas.masked_fill(self.rim, 0)


class SafetyPrompt:
    """A frame around every picture, and a text before the question, or one of the two.

    Parameters
    ----------
    frame : (3, height, width) uint8 of which the rim counts; None for no frame
    geometry : of the frame
    prefix : stands before the question of every request with a picture; "" for none

    Raises
    ------
    ValueError
        If there is neither frame nor prefix, or the frame is not of the geometry.
    """

    method = "davsp"

    def __init__(self, frame: Tensor | None, geometry: Geometry, prefix: str = "") -> None:
        if frame is None and not prefix:
            raise ValueError("neither frame nor prefix: nothing would be done; give one.")
        if frame is not None:
            expected = (3, geometry.height, geometry.width)
            if frame.dtype != torch.uint8 or tuple(frame.shape) != expected:
                raise ValueError(
                    f"frame: {tuple(frame.shape)} of {frame.dtype} is wrong, {expected} of "
                    "torch.uint8 is right."
                )
            frame = frame.cpu().masked_fill(~geometry.rim, 0)
        self.frame, self.geometry, self.prefix = frame, geometry, prefix
        self._bound: Bound | None = None
        self._unseen = Unseen("DAVSP")

    def framed(self, image: Image.Image) -> Image.Image:
        """Frame one picture; it needs no model.

        Raises
        ------
        BadRequest
            If the mode of the picture does not say which value is white.
        """
        self._unseen.shown = True
        if self.frame is None:
            return image
        canvas = self.geometry.place(image) + self.frame  # each is black where the other is not
        return Image.fromarray(canvas.permute(1, 2, 0).numpy())

    def around(self, pixels: Tensor) -> Tensor:
        """Frame pictures of the size that the geometry leaves as it is, differentiably.

        Parameters
        ----------
        pixels : (n, 3, height, width) float in [0, 1]

        Returns
        -------
        Tensor (n, 3, height, width) of the canvas, in the dtype and on the device of ``pixels``

        Raises
        ------
        ValueError
            If pictures of this size would be resampled on the way into the frame.
        """
        if self.frame is None:
            return pixels
        geometry = self.geometry
        rows, columns = geometry.held
        size = rows.stop - rows.start, columns.stop - columns.start
        if pixels.shape[-2:] != size:
            raise ValueError(
                f"pictures of {tuple(pixels.shape[-2:])} would be resampled, which no gradient "
                f"passes; give pictures of {size}."
            )
        canvas = pixels.new_zeros(*pixels.shape[:2], geometry.height, geometry.width)
        canvas[..., rows, columns] = pixels
        frame = self.frame.to(pixels) / 255
        return torch.where(geometry.rim.to(pixels.device), frame, canvas)

    def rewrite(self, request: Request) -> Request:
        """Frame every picture and put the prefix before the question; text alone stays as it is."""
        if not request.images:
            return request
        images = tuple(self.framed(image) for image in request.images)
        return replace(request, text=self.prefix + request.text, images=images)

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Leave the model as it is, but refuse pictures as long as none was framed.

        Raises
        ------
        WrongModel
            If it was loaded from a bundle for another model.
        UnsupportedRequest
            When the model is given a picture, and this defense never was.
        """
        if self._bound:
            self._bound.check(model)
        with self._unseen.refused(model):
            yield

    def with_prefix(self, prefix: str) -> "SafetyPrompt":
        """The same frame with another prefix, or none."""
        return self._like(self.frame, prefix)

    def without_frame(self) -> "SafetyPrompt":
        """The prefix alone."""
        return self._like(None, self.prefix)

    def _like(self, frame: Tensor | None, prefix: str) -> "SafetyPrompt":
        other = SafetyPrompt(frame, self.geometry, prefix)
        other._bound = self._bound
        return other

    def picture(self) -> Image.Image:
        """The frame as a picture, with the ground inside.

        Raises
        ------
        ValueError
            If there is none.
        """
        if self.frame is None:
            raise ValueError("there is no frame, only a prefix.")
        ground = torch.tensor(self.geometry.ground, dtype=torch.uint8).view(3, 1, 1)
        whole = torch.where(self.geometry.rim, self.frame, ground)
        return Image.fromarray(whole.permute(1, 2, 0).numpy())

    def save(self, folder: Path, binding: Binding, **about: Any) -> Path:
        """Write the bundle: the frame as a PNG, everything else in the card."""
        extra = about.pop("extra_files", None)

        def write(home: Path) -> None:
            if self.frame is not None:
                self.picture().save(home / FRAME)

        parameters = {
            "geometry": asdict(self.geometry),
            "prefix": self.prefix,
            "framed": self.frame is not None,
        }
        return write_bundle(folder, Card(self.method, binding, parameters, **about), write, extra)

    @classmethod
    def read(cls, home: Path, card: Card) -> Self:
        """Read a verified bundle for whatever model: a frame is only pixels.

        Raises
        ------
        TamperedBundle
            If there is no such frame in it.
        """
        try:
            told = card.parameters
            if not isinstance(told["prefix"], str):
                raise TypeError(f"prefix {told['prefix']!r} is no text")
            geometry = Geometry(**told["geometry"])
            frame = _pixels(home / FRAME) if told["framed"] else None
            return cls(frame, geometry, told["prefix"])
        except _UNREADABLE as error:
            raise TamperedBundle(
                f"{home}: it holds no frame of {cls.method} ({error!r}); download it again."
            ) from None

    @classmethod
    def load(
        cls, home: Path, card: Card, model: PreTrainedModel, processor: ProcessorMixin
    ) -> Self:
        """Read a verified bundle.

        Raises
        ------
        TamperedBundle
            If there is no such frame in it.
        """
        prompt = cls.read(home, card)
        prompt._bound = Bound(card, model, processor)
        return prompt


def _padded(image: Image.Image, size: tuple[int, int], ground: tuple[int, int, int]) -> Image.Image:
    """Fit the whole image into the middle of a ground.

    As ImageOps.pad does, which loses a line of an aspect that leaves it less than half a pixel.
    """
    scale = min(size[0] / image.width, size[1] / image.height)
    width, height = (max(1, round(scale * side)) for side in image.size)
    whole = Image.new("RGB", size, ground)
    place = round((size[0] - width) / 2), round((size[1] - height) / 2)
    whole.paste(image.resize((width, height), Image.Resampling.BICUBIC), place)
    return whole


def _pixels(path: Path) -> Tensor:
    with Image.open(path, formats=["PNG"]) as image:  # by content, some formats run a program
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
