"""GuardAlign, first half: find the unsafe patches of a picture and mask them, before any model.

A picture is cut into g x g patches, a CLIP encodes every patch as a picture of its own, transport
to concepts scores it (:mod:`hauberk.defenses.transport`), and patches with score <= tau are painted
over (Eq. 10 and 11 of arXiv:2602.24027; its code is not public).  No model is trained or changed.

Where the defaults depart from the paper, they were chosen on the lab's calibration pool:

* score, problem and concepts: see :mod:`hauberk.defenses.transport`;
* ``grid`` and ``scales``: 2 x 2 patches, to whose scores that of the whole picture is added.  A
  patch that cuts a thing in two shows neither half well, and lab-clip reads words only whole.  More
  patches mask the harm of fewer pictures, and so do patches without the whole picture, though these
  rank better; stage ``measure_detection`` sweeps both, and the report shows it;
* a patch that is not square is squeezed into one.  CLIP's processors would cut its ends off, where
  nothing that stands there would be seen.

:data:`AS_PRINTED` is the literal reading.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, ProcessorMixin

from hauberk.concepts import ConceptBank
from hauberk.defenses.transport import (
    Transport,
    check_words,
    entropy_weights,
    patch_scores,
    sinkhorn,
)
from hauberk.errors import BadRequest
from hauberk.requests import Request, as_rgb, mean_color

__all__ = [
    "AS_PRINTED", "Masked", "PatchTransport", "Remembering", "TransportSetting",
    "calibrate_threshold", "entropy_weights", "mask_image", "patch_boxes", "patch_grid",
    "patch_scores", "plain", "setting_from", "sinkhorn",
]  # fmt: skip

Fill = Literal["black", "mean"]
Gate = Literal["always_on", "any_masked"]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class TransportSetting(Transport):
    """What a run may vary, as plain data.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    grid: int = 2
    """Patches along a side; M is its square."""
    scales: tuple[int, ...] = (1,)
    """Further grids whose scores are added where they overlap a patch; the paper has none."""
    threshold: float = -math.inf
    """tau: patches with a score up to it are masked; -inf masks nothing, inf everything.  Take it
    from :func:`calibrate_threshold`: it depends on the CLIP, the bank and every field above."""
    fill: Fill = "black"
    """Black as in Eq. 11, or the colour that CLIP's processor maps to zero."""
    max_share: float = 1.0
    """The largest share of a picture's patches that may be masked: the most unsafe ones are.  1, no
    bound, as in the paper; where a thing fills the picture a bound of 0.5 leaves half of it."""
    gate: Gate = "always_on"
    """Whether what else a defense does (GuardAlign's prefix) is for every request, as the paper has
    it, or only where a patch is masked: see :meth:`PatchTransport.opens_gate`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scales", tuple(self.scales))
        check_words(self, fill=Fill, gate=Gate)
        sides = self.grid, *self.scales
        if not all(isinstance(side, int) for side in sides) or min(sides) < 1:
            raise ValueError(f"grid {self.grid}, scales {self.scales}: 1 or more is right.")
        if not 0 <= self.max_share <= 1 or math.isnan(self.threshold):
            raise ValueError(
                f"max_share {self.max_share}, threshold {self.threshold}: a share between 0 and 1 "
                "and a number are right."
            )


def plain(setting: TransportSetting) -> dict[str, Any]:
    """Write a setting as plain JSON, which knows no infinity."""
    return {
        name: str(value) if isinstance(value, float) and math.isinf(value) else value
        for name, value in asdict(setting).items()
    }


def setting_from(told: Mapping[str, Any]) -> TransportSetting:
    """Read what :func:`plain` wrote.

    Raises
    ------
    TypeError, ValueError
        If it is no setting.
    """
    read: dict[str, Any] = {
        name: float(value) if value in ("inf", "-inf") else value for name, value in told.items()
    }
    return TransportSetting(**read)


AS_PRINTED = TransportSetting(
    weights="as_printed",
    problem="per_category",
    score="raw",
    column_penalty=math.inf,
    grid=6,
    scales=(),
    threshold=0.42,
)
"""Eq. 7 to 11 to the letter, with the paper's tau.  The raw score is close to 0.8 C / M, so that
0.42 means something only where C / M is about a half: M = 36 patches and C = 20 categories, our
guess, as the paper gives neither.  It ranks patches by their entropy; ours does not."""


# --- pictures ---------------------------------------------------------------------------------


def patch_boxes(size: tuple[int, int], grid: int) -> list[Box]:
    """Cut a picture of (width, height) into grid x grid boxes (left, top, right, bottom), by rows.

    The last row and column take the remainder.  Where there are fewer pixels than patches, boxes of
    one pixel repeat, so that every picture has as many.
    """

    def edges(length: int) -> list[tuple[int, int]]:
        step = max(1, length // grid)
        starts = [min(index * step, length - 1) for index in range(grid)]
        return [(start, min(start + step, length)) for start in starts[:-1]] + [
            (starts[-1], length)
        ]

    columns, rows = (edges(length) for length in size)
    return [(left, top, right, bottom) for top, bottom in rows for left, right in columns]


def patch_grid(image: Image.Image, grid: int) -> list[Image.Image]:
    """Cut a picture into grid x grid patches that do not overlap, by rows."""
    return [image.crop(box) for box in patch_boxes(image.size, grid)]


def mask_image(
    image: Image.Image, masked: Sequence[bool], *, color: tuple[int, int, int] = (0, 0, 0)
) -> Image.Image:
    """Paint over patches of a picture, in its own pixels (Eq. 11).

    Parameters
    ----------
    image : of mode RGB
    masked : (grid * grid,), by rows

    Returns
    -------
    Image
        The same object if nothing is masked, else a copy.
    """
    grid = math.isqrt(len(masked))
    if grid**2 != len(masked):
        raise ValueError(f"{len(masked)} patches are no square grid; give grid * grid flags.")
    if not any(masked):
        return image
    painted = image.copy()
    for box, hidden in zip(patch_boxes(image.size, grid), masked, strict=True):
        if hidden:
            painted.paste(color, box)
    return painted


def _readable(image: Image.Image, index: int) -> Image.Image:
    """Read a picture as the models do: one frame, without transparency, not turned."""
    try:
        rgb = as_rgb(image)
        rgb.load()  # Pillow reads a file's pixels only here
    except BadRequest as error:
        raise BadRequest(f"picture {index}: {error}") from None
    except Exception as error:  # Pillow has no error of its own for what it cannot read
        raise BadRequest(
            f"picture {index}: its file cannot be read ({error!r}); load it again, whole."
        ) from None
    if not min(rgb.size):
        raise BadRequest(f"picture {index}: {rgb.size} pixels are none; give one at least.")
    return rgb


# --- the detector -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Masked:
    """Pictures after masking, and what was done to them."""

    images: tuple[Image.Image, ...]
    """Those with nothing masked are the objects that were given."""
    patches: Tensor
    """bool (pictures, M): which patches are masked."""
    spared: int
    """Patches up to the threshold that ``max_share`` kept, over all pictures."""


class PatchTransport:
    """Scores and masks the patches of pictures.

    Of a moving picture the frame that is shown now counts, which is the first of a file that was
    just opened; pictures are not turned as their EXIF says.  Both as :mod:`hauberk.requests` hands
    them to the model.

    Parameters
    ----------
    clip : CLIPModel, SiglipModel or alike, in any precision, on any device; it stays as it is
    processor : the CLIP's own
    bank : made with this CLIP
    setting : what to do
    batch_size : patches that are encoded together, whatever pictures they are of; 64 are as many as
        stay in a core's cache
    """

    def __init__(
        self,
        clip: PreTrainedModel,
        processor: ProcessorMixin,
        bank: ConceptBank,
        setting: TransportSetting,
        *,
        batch_size: int = 64,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is wrong, 1 or more is right.")
        if setting.score == "log_odds" and not bank.reference:
            raise ValueError(
                "score 'log_odds' needs reference concepts and the bank has none; build it with "
                "`reference`, or take another score."
            )
        self.clip, self.processor, self.bank, self.setting = clip, processor, bank, setting
        self.batch_size = batch_size

    def with_setting(self, **changes: Any) -> "PatchTransport":
        """The same detector with other fields of its setting."""
        setting = replace(self.setting, **changes)
        return type(self)(self.clip, self.processor, self.bank, setting, batch_size=self.batch_size)

    def rewrite(self, request: Request) -> Request:
        """Mask every picture of a request; the same object where nothing is masked.

        Raises
        ------
        BadRequest
            If a picture cannot be read.
        """
        return self.rewrite_all([request])[0]

    def rewrite_all(self, requests: Sequence[Request]) -> list[Request]:
        """Mask the pictures of requests, the patches of all in common batches."""
        found = iter(self.masked([one for request in requests for one in request.images]).images)
        masked = [tuple(islice(found, len(request.images))) for request in requests]
        return [
            request
            if all(new is old for new, old in zip(images, request.images, strict=True))
            else replace(request, images=images)
            for request, images in zip(requests, masked, strict=True)
        ]

    def opens_gate(self, before: Request, after: Request) -> bool:
        """Whether the rest of a defense is for a request that :meth:`rewrite` made another of."""
        return self.setting.gate == "always_on" or after is not before

    def masked(self, images: Sequence[Image.Image]) -> Masked:
        """Mask pictures; where the threshold leaves no choice they are not even looked at."""
        setting = self.setting
        nothing = torch.zeros(len(images), setting.grid**2, dtype=torch.bool)
        if not images or setting.threshold == -math.inf:
            return Masked(tuple(images), nothing, 0)
        if setting.threshold == math.inf and setting.max_share == 1:
            patches, spared = ~nothing, 0
        else:
            patches, spared = self.chosen(self.scores(images).cpu())
        black = setting.fill == "black"
        color = (0, 0, 0) if black else mean_color(self.processor)
        painted = tuple(
            mask_image(_readable(image, index), hidden, color=color) if any(hidden) else image
            for index, (image, hidden) in enumerate(zip(images, patches.tolist(), strict=True))
        )
        return Masked(painted, patches, spared)

    def chosen(self, scores: Tensor) -> tuple[Tensor, int]:
        """Choose the patches up to the threshold, the lowest first: bool (pictures, M).

        With them goes how many of these ``max_share`` spares.
        """
        unsafe = scores <= self.setting.threshold
        most = math.floor(self.setting.max_share * scores.shape[1] + 1e-9)
        ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
        chosen = unsafe & (ranks < most)
        return chosen, int(unsafe.sum() - chosen.sum())

    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image]) -> Tensor:
        """Score the patches of pictures: (pictures, M) on the CLIP's device; low is unsafe.

        Raises
        ------
        BadRequest
            If a picture cannot be read; its index is named.
        """
        setting, total = self.setting, None
        pictures = [_readable(image, index) for index, image in enumerate(images)]
        for grid in (setting.grid, *setting.scales):
            found = patch_scores(self.features(pictures, grid), self.bank, setting)
            spread = _spread(found, grid, setting.grid)
            total = spread if total is None else total + spread
        assert total is not None
        if wrong := total.isnan().any(dim=1).nonzero().flatten().tolist():
            raise BadRequest(
                f"picture {wrong[0]}: its patches have no scores, so that nothing would be masked; "
                f"the CLIP computes in {self.clip.dtype}: load it in float32."
            )
        return total

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image], grid: int) -> Tensor:
        """Encode the patches of RGB pictures: float32 (pictures, grid * grid, d), unit rows."""
        crops = chain.from_iterable(patch_grid(picture, grid) for picture in pictures)
        found = [self._encoded(batch) for batch in _batches(crops, self.batch_size)]
        width = self.bank.features.shape[-1]
        rows = torch.cat(found) if found else torch.empty(0, width, device=self.clip.device)
        return rows.view(len(pictures), grid**2, width)

    def _encoded(self, crops: Sequence[Image.Image]) -> Tensor:
        images: Any = self.processor.image_processor
        side = _side(images)
        squeezed = [crop.resize(side, Image.Resampling.BICUBIC) for crop in crops]
        pixels = images(images=squeezed, return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.clip.device, self.clip.dtype)
        clip: Any = self.clip
        features: Tensor = clip.get_image_features(pixel_values=pixels).pooler_output
        return normalize(features.float(), dim=-1)


class Remembering(PatchTransport):
    """One that looks at the same pictures once, for measurements that ask again and again.

    Detectors made by :meth:`with_setting` share what is remembered: features of the patches, by
    pictures and grid.  A picture that is edited in place is not seen to have changed, and one that
    is not of mode RGB is looked at anew.  Everything is kept as long as the detector is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: dict[tuple[int, ...], tuple[Sequence[Image.Image], Tensor]] = {}

    @classmethod
    def of(cls, detector: PatchTransport) -> "Remembering":
        """Give a detector a memory; one that has one keeps it."""
        if isinstance(detector, Remembering):
            return detector
        clip, processor, bank = detector.clip, detector.processor, detector.bank
        return cls(clip, processor, bank, detector.setting, batch_size=detector.batch_size)

    def with_setting(self, **changes: Any) -> "Remembering":
        """The same detector with other fields of its setting, and the same memory."""
        other = super().with_setting(**changes)
        assert isinstance(other, Remembering)
        other._kept = self._kept
        return other

    def features(self, pictures: Sequence[Image.Image], grid: int) -> Tensor:
        """Encode patches, or remember what they were encoded to."""
        key = (grid, *map(id, pictures))
        if key not in self._kept:  # ids of pictures are theirs as long as these are held
            self._kept[key] = list(pictures), super().features(pictures, grid)
        return self._kept[key][1]


def _side(images: Any) -> tuple[int, int]:
    """Width and height of what the tower is fed, so that the processor changes no size."""
    size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    size = dict(size)
    if "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    return size["width"], size["height"]


def _batches(crops: Iterator[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    batch: list[Image.Image] = []
    for crop in crops:
        batch.append(crop)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _spread(scores: Tensor, grid: int, onto: int) -> Tensor:
    """Average scores of one grid over the patches of another, by how much they overlap."""
    if grid == onto:
        return scores
    here, there = (torch.arange(n, dtype=torch.float64) / n for n in (grid, onto))
    ends = torch.minimum(there[:, None] + 1 / onto, here + 1 / grid)
    overlap = (ends - torch.maximum(there[:, None], here)).clamp_min(0) * onto
    share = overlap.to(scores)
    spread = torch.einsum("ai,bj,pij->pab", share, share, scores.unflatten(1, (grid, grid)))
    return spread.flatten(1)


def calibrate_threshold(scores: ArrayLike, share: float = 0.01) -> float:
    """Choose tau so that at most ``share`` of benign patches are masked.

    Parameters
    ----------
    scores : of benign patches, any shape, from the setting that is calibrated
    share : more than 0 and less than 1

    Returns
    -------
    float
        The highest score with at most that share up to it; -inf if every score has more, as when
        there are fewer than 1 / share of them.

    Raises
    ------
    ValueError
        If there is no score, one is not a number, or the share is out of range.
    """
    values = np.sort(np.asarray(scores, dtype=float), axis=None)
    if not values.size or np.isnan(values).any():
        raise ValueError(f"{values.size} scores, {int(np.isnan(values).sum())} of them NaN; "
                         "give scores of benign patches, 100 or more.")  # fmt: skip
    if not 0 < share < 1:
        raise ValueError(f"share {share} must lie between 0 and 1.")
    below = values[values < values[math.floor(share * values.size)]]
    return float(below[-1]) if below.size else -math.inf
