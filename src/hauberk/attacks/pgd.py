"""Projected gradient descent: a bounded change of a picture that makes a model comply.

Within the ball of radius epsilon in the maximum norm around a picture x0 the answer y that an
attacker wants is made as likely as possible, from a random start,

    x <- clip( x - alpha * sign( grad_x  mean_t -log p(y_t | x, question, y_<t) ),
               x0 - epsilon, x0 + epsilon ),

over the first tokens of y.  Pictures are on the scale 0..255 and epsilon, alpha and the start are
whole numbers, so that every step is an 8-bit picture: what is stored is what was measured.

Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018,
arXiv:1706.06083, section 2.1, with a target in place of the true label.  On vision-language models:
Carlini et al., arXiv:2306.15447; Qi et al., arXiv:2306.13213, whose radii are 16, 32, 64 and none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from numbers import Integral
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, ProcessorMixin

from hauberk.pixels import check_pixel_input, frozen, pixel_input
from hauberk.requests import IGNORED, Request, as_rgb, encode_answered

_RIGHT = {
    "epsilon": (0, 255),
    "step_size": (1, 255),
    "steps": (0, inf),
    "tokens": (1, inf),
    "confidence": (0, 1),
}
"""The least and the most of every number of :class:`Pgd` that has such."""


@dataclass(frozen=True)
class Pgd:
    """How strong an attack is.

    Raises
    ------
    ValueError
        If a number is out of its range, or one but the confidence is not whole.
    """

    epsilon: int
    """Radius of the ball, on the scale 0..255; 0 changes nothing, 255 leaves the picture free."""
    step_size: int
    """How far a value moves in one step, on the same scale; a quarter of epsilon is that of the
    paper on CIFAR-10."""
    steps: int
    tokens: int
    """So many first tokens of the wanted answer are aimed at."""
    confidence: float = 0.0
    """A picture is done when the model follows the wanted tokens greedily, each with at least this
    probability.  At 0 the first picture that is followed is kept; more makes it hold elsewhere,
    such as against a defense that it was not made for."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in _RIGHT.items():
            value = getattr(self, name)
            whole = name != "confidence"
            if not low <= value <= high or (whole and not isinstance(value, Integral)):
                kind = "a whole number" if whole else "a number"
                right = f"from {low} to {high}" if high < inf else f"of {low} or more"
                raise ValueError(f"{name}: {value} is wrong; give {kind} {right}.")


class Around(Protocol):
    """A defense that surrounds every picture, such as :class:`hauberk.defenses.SafetyPrompt`."""

    def rewrite(self, request: Request) -> Request:
        """Change a request before the processor sees it."""
        ...

    def around(self, pixels: Tensor) -> Tensor:
        """Do the same to pictures (n, 3, height, width) in [0, 1], differentiably."""
        ...


@dataclass(frozen=True)
class Attacked:
    """One attacked picture; losses are means over the tokens, in nats."""

    image: Image.Image
    loss_before: float
    loss_after: float
    followed_before: bool
    followed: bool
    """Whether each wanted token is the most likely by the model's logits, unprocessed: so the model
    begins a greedy answer unless its generation config changes logits (``repetition_penalty``)."""


def attack(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    answers: Sequence[str],
    setting: Pgd,
    *,
    defense: Around | None = None,
    batch_size: int = 32,
    progress: Callable[[int], Any] = lambda _: None,
) -> list[Attacked]:
    """Change the picture of each request so that the model begins the answer wanted for it.

    A row does not depend on the others but for rounding: all start from the same random offset.
    Of the pictures of a row, the one it had among them, the best is kept: one that is done (see
    :attr:`Pgd.confidence`) before one that is followed, and that before all others; of two alike
    that of the lower loss.  So the loss rises only where a picture is followed or done instead.

    Parameters
    ----------
    model, processor : as ``from_pretrained`` gives them; no weight gets a gradient
    requests : each with one picture, all of one size that the processor feeds as it is
        (see :func:`hauberk.pixels.as_fed`)
    answers : the answer wanted to each request, as plain text
    defense : what surrounds the pictures where the model is deployed, whose pixels the attacker
        knows but cannot change; None for the undefended model.  Pictures are then of the size that
        it leaves as it is
    batch_size : requests that are attacked together
    progress : called with the number of newly finished requests

    Returns
    -------
    list of Attacked
        In the order of ``requests``.

    Raises
    ------
    ValueError
        If a request has not one picture, sizes differ, their numbers do, or an answer is empty.
    ResampledPicture, UnknownFamily
        If no gradient passes from the model's input to such pictures, or it would be that of
        another input than the processor makes.
    """
    sizes = {request.images[0].size if len(request.images) == 1 else None for request in requests}
    if None in sizes or len(sizes) > 1:
        raise ValueError(
            "each request needs one picture, and all pictures one size; found "
            f"{sorted({len(request.images) for request in requests})} pictures, sizes {sizes}."
        )
    pairs = list(zip(requests, answers, strict=True))
    if empty := [place for place, answer in enumerate(answers) if not answer.strip()]:
        raise ValueError(
            f"the answers at {empty} are empty, and a model follows no tokens without a word; "
            "give each request the answer wanted to it."
        )
    attacked = []
    for start in range(0, len(pairs), batch_size):
        batch = _attack(model, processor, pairs[start : start + batch_size], setting, defense)
        attacked += batch
        progress(len(batch))
    return attacked


def _attack(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Sequence[tuple[Request, str]],
    setting: Pgd,
    defense: Around | None,
) -> list[Attacked]:
    requests, answers = map(list, zip(*pairs, strict=True))
    sent = [defense.rewrite(request) for request in requests] if defense else requests
    inputs, labels = encode_answered(processor, sent, answers, setting.tokens)

    def fed_as(pictures: Tensor) -> Tensor:
        return defense.around(pictures) if defense else pictures

    of_text = {
        name: values.to(model.device)
        for name, values in inputs.items()
        if values.shape == inputs["input_ids"].shape
    }
    labels = labels.to(model.device)
    benign = _stacked([request.images[0] for request in requests])
    check_pixel_input(processor, fed_as(benign / 255), inputs)
    benign = benign.to(model.device)

    def measured(pictures: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss of some rows, whether the model follows, whether surely, and the gradient."""
        shown = (pictures / 255).requires_grad_()
        fed = pixel_input(processor, fed_as(shown))
        fed["pixel_values"] = fed["pixel_values"].to(model.dtype)
        wanted = labels[rows]
        logits = model(
            **{name: values[rows] for name, values in of_text.items()},
            **fed,
            logits_to_keep=wanted.shape[1] + 1,
            use_cache=False,
        ).logits[:, :-1]
        losses = cross_entropy(
            logits.float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
        )
        there = wanted != IGNORED
        loss = losses.sum(1) / there.sum(1)
        (gradient,) = torch.autograd.grad(loss.sum(), shown)
        follows = ((logits.argmax(-1) == wanted) | ~there).all(1)
        sure = follows & ((-losses.detach()).exp().amin(1) >= setting.confidence)
        return loss.detach(), follows, sure, gradient

    def within(pictures: Tensor, rows: Tensor) -> Tensor:
        """Project onto the ball around the benign pictures, and onto 0..255."""
        ball = benign[rows] - setting.epsilon, benign[rows] + setting.epsilon
        return pictures.clamp(*ball).clamp(0, 255)

    with frozen(model), torch.enable_grad():
        rows = torch.arange(len(benign), device=benign.device)
        before, followed_before, sure, _ = measured(benign, rows)
        best, loss, followed = benign.clone(), before.clone(), followed_before.clone()
        rows = rows[~sure]
        moving = within(benign[rows] + _start(benign, setting), rows)
        for _ in range(setting.steps + 1):
            if not len(rows):
                break
            now, follows, sure_now, gradient = measured(moving, rows)
            surer = sure_now | (follows & ~followed[rows])
            better = surer | ((follows == followed[rows]) & (now < loss[rows]))
            kept = rows[better]
            best[kept], loss[kept], followed[kept] = moving[better], now[better], follows[better]
            sure[kept] = sure_now[better]
            going = ~sure[rows]
            rows = rows[going]
            moving = within((moving - setting.step_size * gradient.sign())[going], rows)

    return [
        Attacked(Image.fromarray(picture), *measures)
        for picture, *measures in zip(
            best.to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy(),
            before.tolist(),
            loss.tolist(),
            followed_before.tolist(),
            followed.tolist(),
            strict=True,
        )
    ]


def _stacked(images: Sequence[Image.Image]) -> Tensor:
    """Pictures as (n, 3, height, width), float32, whole numbers in 0..255."""
    arrays = np.stack([np.asarray(as_rgb(image)) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float()


def _start(benign: Tensor, setting: Pgd) -> Tensor:
    """Draw whole numbers in -epsilon..epsilon, one picture of them."""
    generator = torch.Generator().manual_seed(setting.seed)
    radius = setting.epsilon
    return torch.randint(-radius, radius + 1, benign.shape[1:], generator=generator).to(benign)
