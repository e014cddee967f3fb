"""GuardAlign, first half: find the unsafe patches of a picture by transport, and mask them.

A picture is cut into M patches, encoded by CLIP as x^m; category i has variants z_i^n.  With costs
C_i(m, n) = 1 - cos(x^m, z_i^n) and weights a of the patches, b of the variants (Eq. 6, 7),

    T_i = argmin <T, C_i> - epsilon H(T)     T 1 = a,  T' 1 = b            (Eq. 8, one per category)
    d(m) = sum_i sum_n T_i(m, n) C_i(m, n)                                 (Eq. 9)

and patches with d(m) <= tau are set to black (Eq. 10, 11; tau = 0.42).  That is ``problem:
per_category``, ``score: raw``, ``weights: as_printed``.  Since the rows of T_i sum to a, d(m) is
nearly 0.8 C a^m: it ranks patches by their weight and depends on M and C, which tau does not.  So
``per_mass`` divides by a^m, and ``joint`` lets all categories compete for the patches in one plan.
With low entropy weighing more, as the sentence below Eq. 7 has it, the raw score picks the wrong
patches; that pair is refused.

Ours is ``relaxed``: the marginal of the variants is given up, because it forces the same mass on
every concept in every picture, and harmless reference categories compete.  The plan is then
T(m, n) = a^m softmax_n(-C(m, n) / epsilon) in closed form, and the score of a patch the share of
its mass that stays with the harmless ones; it means the same in every picture.

Source: "GuardAlign", ICLR 2026, arXiv:2602.24027, section 3.1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, ProcessorMixin

from hauberk.concepts import ConceptBank
from hauberk.errors import BadRequest
from hauberk.requests import Request, as_rgb, mean_color

Weights = Literal["uniform", "as_printed", "low_entropy"]
Problem = Literal["relaxed", "joint", "per_category"]
Score = Literal["share", "per_mass", "raw"]
Fill = Literal["black", "mean"]


@dataclass(frozen=True)
class TransportSetting:
    """What a run may vary.

    Raises
    ------
    ValueError
        If a value is unknown or out of range, or two do not go together.
    """

    grid: int = 3
    """Patches along a side."""
    weights: Weights = "uniform"
    problem: Problem = "relaxed"
    score: Score = "share"
    epsilon: float | None = None
    """Of the entropic term.  None: 1 / the encoder's own scale if relaxed, else 0.02, at which a
    plan takes half of the way from a b' to the exact one (AWT's 0.1 an eighth)."""
    iterations: int = 200
    """Of Sinkhorn's algorithm: 61 reach 1e-9 at epsilon 0.02."""
    tau: float = float("-inf")
    """Patches with a score up to this are masked: -inf for none, inf for all."""
    fill: Fill = "black"
    max_share: float = 1.0
    """Of the patches of a picture that may be masked: those with the lowest scores."""

    def __post_init__(self) -> None:
        kinds = {"weights": Weights, "problem": Problem, "score": Score, "fill": Fill}
        for name, kind in kinds.items():
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(get_args(kind))}.")
        if self.grid < 1 or self.iterations < 1:
            raise ValueError(f"grid {self.grid}, iterations {self.iterations}: 1 or more is right.")
        if not 0 < self.max_share <= 1:
            raise ValueError(f"max_share: {self.max_share} is wrong, above 0 and up to 1 is right.")
        if self.epsilon is not None and self.epsilon <= 0:
            raise ValueError(f"epsilon: {self.epsilon} is wrong, more than 0 is right.")
        if (self.score == "share") != (self.problem == "relaxed"):
            raise ValueError(
                f"score {self.score!r} with problem {self.problem!r}: a share is comparable "
                "between pictures only if relaxed, and there it alone says something."
            )
        if self.weights == "low_entropy" and self.score == "raw":
            raise ValueError(
                "weights 'low_entropy' with score 'raw' give unsafe patches the larger scores and "
                "mask the others; take 'as_printed', or 'per_mass'."
            )


LITERAL = TransportSetting(
    grid=6, weights="as_printed", problem="per_category", score="raw", tau=0.42
)
"""Eq. 6 to 11 as printed.  The paper gives no grid: at 36 patches and 20 categories its tau means
something, because raw scores are near 0.8 C / M."""


def boxes_of(size: tuple[int, int], grid: int) -> list[tuple[int, int, int, int]]:
    """Cut a picture into grid x grid boxes in reading order, together all of its pixels.

    Of a picture with fewer pixels than patches along a side some are of the same pixels.
    """
    (xs, ys) = (
        [(i * n // grid, max((i + 1) * n // grid, i * n // grid + 1)) for i in range(grid)]
        for n in size
    )
    return [(left, top, right, bottom) for top, bottom in ys for left, right in xs]


def patch_weights(cosines: Tensor, scale: float, kind: Weights) -> Tensor:
    """Weigh patches by how sure it is what they show (Eq. 7): (pictures, M), rows sum to 1.

    Parameters
    ----------
    cosines : (pictures, M, C), of patches with the means of the categories' variants
    """
    logarithms = (scale * cosines).log_softmax(-1)
    entropy = -(logarithms.exp() * logarithms).sum(-1)
    sign = {"uniform": 0.0, "as_printed": 1.0, "low_entropy": -1.0}[kind]
    return (sign * entropy).softmax(-1)


def sinkhorn(cost: Tensor, a: Tensor, b: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Solve entropic transport problems in one batch, by scaling (Eq. 2).

    A fixed number of iterations needs no word from the device to the host.

    Parameters
    ----------
    cost : (problems, M, N), float32 or float64
    a, b : (problems, M) and (problems, N); rows sum to 1

    Returns
    -------
    Tensor (problems, M, N)
        The plans.
    """
    lowest = cost.flatten(1).amin(1).view(-1, 1, 1)  # cancels, and keeps exp away from 0
    kernel = (-(cost - lowest) / epsilon).exp()
    u, v = torch.ones_like(a).unsqueeze(2), torch.ones_like(b).unsqueeze(2)
    for _ in range(iterations):
        v = b.unsqueeze(2) / torch.bmm(kernel.transpose(1, 2), u)
        u = a.unsqueeze(2) / torch.bmm(kernel, v)
    return u * kernel * v.transpose(1, 2)


def patch_scores(patches: Tensor, bank: ConceptBank, setting: TransportSetting) -> Tensor:
    """Score patches, low where they are unsafe.

    Parameters
    ----------
    patches : (pictures, M, width) float32, of unit length

    Returns
    -------
    Tensor (pictures, M)
    """
    if setting.problem == "relaxed":
        epsilon = setting.epsilon or 1 / bank.scale
        features = normalize(bank.features.mean(1), dim=-1).to(patches)
        mass = ((patches @ features.T - 1) / epsilon).softmax(-1)
        return mass[..., bank.unsafe :].sum(-1)
    bank = bank.alone()
    features = bank.features.to(patches)
    cosines = patches @ normalize(features.mean(1), dim=-1).T
    a = patch_weights(cosines, bank.scale, setting.weights)
    cost = 1 - torch.einsum("pmd,cnd->pcmn", patches, features)
    if setting.problem == "joint":
        cost = cost.transpose(1, 2).flatten(2).unsqueeze(1)
    pictures, problems, m, n = cost.shape
    flat = cost.flatten(0, 1)
    plan = sinkhorn(
        flat,
        a.repeat_interleave(problems, dim=0),
        flat.new_full((len(flat), n), 1 / n),
        epsilon=setting.epsilon or 0.02,
        iterations=setting.iterations,
    )
    paid = (plan * flat).sum(-1).view(pictures, problems, m).sum(1)
    return paid if setting.score == "raw" else paid / (problems * a)


def calibrated_tau(benign: Tensor, share: float = 0.01) -> float:
    """Choose the threshold that masks at most this share of the patches of harmless pictures.

    Parameters
    ----------
    benign : scores of any shape

    Raises
    ------
    ValueError
        If there are fewer scores than one in this share.
    """
    if benign.numel() * share < 1:
        raise ValueError(
            f"{benign.numel()} scores do not tell where {share:.2%} of them lie; give "
            f"{int(1 / share)} or more."
        )
    ordered = benign.flatten().double().sort().values
    # Just below the first that stays, so that of equal scores none is masked.
    return math.nextafter(float(ordered[int(benign.numel() * share)]), -math.inf)


class PatchTransport:
    """A detector that masks the unsafe patches of pictures.

    Parameters
    ----------
    clip, processor : the dual encoder and what prepares its pictures
    bank : its concepts
    setting : how patches are scored and masked

    Raises
    ------
    ValueError
        If the setting needs reference categories and the bank has none.
    """

    method = "patch_transport"

    def __init__(
        self,
        clip: PreTrainedModel,
        processor: ProcessorMixin,
        bank: ConceptBank,
        setting: TransportSetting,
    ) -> None:
        if setting.problem == "relaxed" and bank.unsafe == len(bank.categories):
            raise ValueError(
                "problem 'relaxed' needs harmless categories that compete; give the bank some, or "
                "take 'joint'."
            )
        self.clip, self.processor, self.bank, self.setting = clip, processor, bank, setting

    def rewrite(self, request: Request) -> Request:
        """Mask every picture of a request; one in which nothing is masked stays the same object."""
        if not request.images:
            return request
        return replace(request, images=tuple(self.masked(request.images)))

    def masked(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Fill the patches up to tau; pictures come back as they were where there is none.

        Raises
        ------
        BadRequest
            If a picture cannot be read.
        """
        if self.setting.tau == float("-inf"):
            return list(images)
        scores = self.scores(images)
        return [self._mask(image, row) for image, row in zip(images, scores, strict=True)]

    def scores(self, images: Sequence[Image.Image], *, batch_size: int = 32) -> Tensor:
        """Score the patches of pictures of any sizes: (pictures, M), low where unsafe."""
        found = []
        for start in range(0, len(images), batch_size):
            patches = self._encoded(images[start : start + batch_size])
            found.append(patch_scores(patches, self.bank, self.setting).cpu())
        return torch.cat(found) if found else torch.empty(0, self.setting.grid**2)

    @torch.no_grad()
    def _encoded(self, images: Sequence[Image.Image]) -> Tensor:
        crops = [
            image.crop(box)
            for image in map(_read, images)
            for box in boxes_of(image.size, self.setting.grid)
        ]
        clip: Any = self.clip
        # Square first: the processor would cut the ends off a crop that is not.
        side = _side(self.processor)
        squares = [crop.resize((side, side), Image.Resampling.BICUBIC) for crop in crops]
        pixels: Any = self.processor(images=squares, return_tensors="pt")
        seen = clip.get_image_features(
            pixel_values=pixels["pixel_values"].to(clip.device, clip.dtype)
        )
        found: Tensor = getattr(seen, "pooler_output", seen)
        features: Tensor = normalize(found.float(), dim=-1)
        patches: Tensor = features.unflatten(0, (len(images), -1))
        return patches

    def _mask(self, image: Image.Image, scores: Tensor) -> Image.Image:
        lowest = scores.argsort()[: int(self.setting.max_share * len(scores))].tolist()
        # In double, as the threshold is: rounded to float32 it may be the next score.
        chosen = [index for index in lowest if float(scores[index]) <= self.setting.tau]
        if not chosen:
            return image
        covered = _read(image).copy()
        color = (0, 0, 0) if self.setting.fill == "black" else mean_color(self.processor)
        boxes = boxes_of(image.size, self.setting.grid)
        for index in chosen:
            covered.paste(color, boxes[index])
        return covered


def _read(image: Image.Image) -> Image.Image:
    """Read a picture of any mode; of several frames the first, as processors do."""
    try:
        image.load()  # a file is read only when its pixels are asked for
        return as_rgb(image)
    except (OSError, SyntaxError) as error:
        raise BadRequest(
            f"a picture of {image.size[0]} x {image.size[1]} cannot be read ({error}); send the "
            "whole file again."
        ) from error


def _side(processor: Any) -> int:
    """The height of the square that an image processor makes of a picture."""
    images = processor.image_processor
    size = getattr(images, "crop_size", None) or images.size
    return int(size["height"] if "height" in size else size["shortest_edge"])
