"""The loss that draws what a picture does to a decoder towards what its caption does.

For sample b and target block k, with I from the run with the picture, C from the run in which the
caption stands in its place, and R of a retrieved text, all float32 vectors,

    s_IC = cos(I, C),  s_RC = cos(R, C),  r = share of the training that is done,

    pair    1/4  (1 - r)    mean over b, k of exp(-s_IC),
    margin  1/10 (1 - r)^2  mean over b, k of exp(s_RC - s_IC).

The pair term is least where picture and caption agree, at e^-1 times its weight; the margin term
asks that the picture be as near to the caption as the retrieved text is.  Which states I, C and R
are is the position:

    image     I: mean over the image's positions; C: over the caption's in the run without the
              picture; R: over the retrieved text's, where that stands in the prompt.  As the
              authors write it.
    decision  I: the last position of the prompt, where the answer is decided; C: the same of the
              text twin, "CAPTION QUESTION"; R: the same of "RETRIEVED QUESTION".  Ours.
    question  I, C, R: as decision, but at every position of the question, whose tokens are the same
              in all runs; the mean over them is taken with that over b and k.  Ours.

The form ``kl`` has distances in place of cosines: not of states, but of what the model says next,

    d_IC = KL(p(. | C) || p(. | I)),   pair d_IC,   margin log(1 + exp(d_IC - d_RC)),

with p read from the states after the last block by the model's own norm and head.  Ours: states of
an answer and of a refusal have most in common, so that cosines near 1 may still tell them apart;
on miniature models it reached refusals in a tenth of the steps.

The authors' code computes both terms with ``math.exp``, which has no gradient: what it trains is
the language model loss alone.  Here they are tensors, and tests ask for their gradients.

Source: Xu et al., "Cross-Modal Safety Mechanism Transfer in Large Vision-Language Models" (TGA),
ICLR 2025, arXiv:2410.12662, and the authors' code, from which the weights are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, softplus

Position = Literal["image", "decision", "question"]
Form = Literal["exp", "log", "kl"]
Target = Literal["reference", "current"]

_LEAST_COSINE = 1e-3
"""The logarithm of the form ``log`` has no value below 0, and too steep a slope just above it."""
_LEAST_COUNT = 1e-6
"""Keeps a batch in which no sample counts from a division by 0."""
_FIRST, _LAST = 0.31, 0.56
"""Of a decoder's blocks, those that the authors align: 10 to 18 of 32, counted from 1."""


@dataclass(frozen=True)
class AlignmentSetting:
    """What is aligned, where and how hard.

    Raises
    ------
    ValueError
        If a word is not one of those named, a weight is negative, or there is no layer.
    """

    layers: tuple[int, ...]
    """Decoder blocks, counted from 0, whose outputs are aligned."""
    position: Position = "decision"
    pair: float = 0.25
    """Weight of the pair term; the authors' is 1/4."""
    margin: float = 0.1
    """Weight of the margin term, which counts where there is a retrieved text; theirs is 1/10."""
    decay: bool = True
    """Whether the terms fade with (1 - r) and (1 - r)^2."""
    form: Form = "exp"
    """``log`` has -log s_IC and log(1 + exp(s_RC - s_IC)), as the paper is remembered to have;
    ``kl`` compares what the model says next, and needs a position of words and the last block."""
    centred: bool = False
    """Whether the mean state of all captions is taken from every state first, block by block: what
    all states share makes every cosine high."""
    target: Target = "reference"
    """Whose text run C is of: the ``reference``, the model before training, computed once; or the
    ``current`` weights, as the authors do, at every step."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        for name, known in (("position", Position), ("form", Form), ("target", Target)):
            if getattr(self, name) not in get_args(known):
                right = ", ".join(get_args(known))
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {right}.")
        if min(self.pair, self.margin) < 0:
            raise ValueError(f"pair {self.pair} and margin {self.margin}: 0 or more is right.")
        if self.form == "kl" and self.position == "image":
            raise ValueError(
                "form 'kl' compares what is said next, and no word follows an image's position; "
                "position 'decision' is right."
            )
        if not self.layers:
            raise ValueError("layers: () is nothing to align; give one block or more.")

    @property
    def off(self) -> bool:
        """Whether there is no term at all: the control of everything else in a training."""
        return self.pair == 0 and self.margin == 0


def authors_layers(blocks: int) -> tuple[int, ...]:
    """Blocks at the authors' depth, of a decoder of so many: what a locator would find, unasked."""
    first, last = round(_FIRST * blocks), round(_LAST * blocks)
    return tuple(range(max(first, 1) - 1, max(last, 1)))


@dataclass(frozen=True)
class Aligned:
    """The alignment of one batch."""

    loss: Tensor
    """What is descended: both terms, weighted; scalar float32."""
    pair: Tensor
    """mean exp(-s_IC), without weight and decay, scalar; NaN where no sample counts."""
    margin: Tensor
    """mean exp(s_RC - s_IC) likewise."""
    image_caption: Tensor
    """Mean s_IC by layer, (layers,), without gradient."""
    retrieved_caption: Tensor
    """Mean s_RC by layer, (layers,), without gradient."""


class TextGuidedAlignmentLoss:
    """Measures how far pictures are from their captions.

    Parameters
    ----------
    setting : the weights and forms
    centre : (layers, hidden size) to take from every state; needed where ``setting.centred``
    read : turns states of the last layer, (samples, hidden size), into logits of the next token,
        (samples, vocabulary); needed for the form ``kl``

    Raises
    ------
    ValueError
        If a centre or a reading is needed and missing.
    """

    def __init__(
        self,
        setting: AlignmentSetting,
        centre: Tensor | None = None,
        read: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if setting.form == "kl" and read is None:
            raise ValueError("form 'kl' compares what the model says next; give `read`.")
        self.read = read
        if setting.centred and centre is None:
            raise ValueError("centred cosines need the mean state of the captions; give `centre`.")
        self.setting = setting
        self.centre = centre.float() if setting.centred and centre is not None else None

    def weights(self, progress: float) -> tuple[float, float]:
        """Weights of the pair and the margin term when a share of the training is done."""
        left = 1 - progress if self.setting.decay else 1.0
        return self.setting.pair * left, self.setting.margin * left**2

    def __call__(
        self,
        image: Tensor,
        caption: Tensor,
        retrieved: Tensor | None = None,
        *,
        there: Tensor | None = None,
        retrieved_there: Tensor | None = None,
        weights: Tensor | None = None,
        progress: float = 0.0,
    ) -> Aligned:
        """Measure a batch.

        Parameters
        ----------
        image, caption : (samples, layers, hidden size), any float dtype
        retrieved : of the same shape; None for no margin term
        there : (samples,) bool: whose I and C are of a span that is not empty; None for all.  The
            others are dropped
        retrieved_there : the same of R, on top
        weights : (samples,) float, how much each counts in the means; None for all the same
        progress : r

        Returns
        -------
        Aligned
            Its loss is 0, not NaN, where no sample counts.
        """
        first, second = self.weights(progress)
        near = self._cosine(image, caption)
        counted = _ones(near) if weights is None else weights.float()
        counted = counted if there is None else counted * there
        pair = self._apart(near, image, caption)
        loss = first * _mean(pair, counted).sum()
        margin = rival = near.new_full((1, near.shape[1]), torch.nan)
        told = torch.zeros_like(counted[:1])
        if retrieved is not None:
            told = counted if retrieved_there is None else counted * retrieved_there
            rival = self._cosine(retrieved, caption)
            margin = self._behind(rival, near, pair, retrieved, caption)
            loss = loss + second * _mean(margin, told).sum()
        return Aligned(
            loss=loss,
            pair=_shown(pair, counted).mean(),
            margin=_shown(margin, told).mean(),
            image_caption=_shown(near, counted),
            retrieved_caption=_shown(rival, told),
        )

    def _apart(self, near: Tensor, image: Tensor, caption: Tensor) -> Tensor:
        """What the pair term averages: (samples, layers), or (samples, 1) of what is said next."""
        if self.setting.form == "kl":
            return self._divergence(image, caption)
        if self.setting.form == "log":
            return -near.clamp(min=_LEAST_COSINE).log()
        return torch.exp(-near)

    def _behind(
        self, rival: Tensor, near: Tensor, pair: Tensor, retrieved: Tensor, caption: Tensor
    ) -> Tensor:
        """What the margin term averages, likewise."""
        if self.setting.form == "kl":
            return softplus(pair - self._divergence(retrieved, caption))
        return softplus(rival - near) if self.setting.form == "log" else torch.exp(rival - near)

    def _divergence(self, states: Tensor, caption: Tensor) -> Tensor:
        """KL from what captions say to what states say: (samples, 1) float32, in nats."""
        assert self.read is not None
        with torch.no_grad():
            wanted = self.read(caption[:, -1]).float().log_softmax(-1)
        said = self.read(states[:, -1]).float().log_softmax(-1)
        return kl_div(said, wanted, reduction="none", log_target=True).sum(-1, keepdim=True)

    def _cosine(self, first: Tensor, second: Tensor) -> Tensor:
        """(samples, layers) float32."""
        first, second = first.float(), second.float()
        if self.centre is not None:
            centre = self.centre.to(first.device)
            first, second = first - centre, second - centre
        return cosine_similarity(first, second, dim=-1)


def pooled(states: Tensor, span: Tensor) -> Tensor:
    """Average states over a span of positions; zeros, with no gradient, where it is empty.

    Parameters
    ----------
    states : (samples, positions, hidden size), any float dtype
    span : (samples, positions) bool

    Returns
    -------
    Tensor (samples, hidden size), float32
    """
    weights = span.float() / span.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("bp,bpd->bd", weights, states.float())


def _ones(cosines: Tensor) -> Tensor:
    return torch.ones(len(cosines), device=cosines.device)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over samples by how they count, and over layers, as (samples,) shares: 0 for none."""
    shares = counted / counted.sum().clamp(min=_LEAST_COUNT)
    return values.mean(1).where(counted > 0, 0) * shares


def _shown(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over the samples by how they count, by layer; NaN for none."""
    there = counted > 0
    weights = counted[there] / counted[there].sum()
    if not there.any():
        return values.new_full(values.shape[1:], torch.nan)
    return weights @ values.detach()[there]
