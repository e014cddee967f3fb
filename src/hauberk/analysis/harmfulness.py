"""The harmfulness vector: the direction in which a decoder tells harmful requests from harmless.

At the last prompt position of decoder block l, over requests that the model refuses because they
are harmful and harmless ones that it answers,

    v[l] = mean h[l](harmful) - mean h[l](harmless).

A state is scored by where it lies along v[l]: ``span`` puts the harmless mean at 0 and the harmful
one at 1, so that numbers mean the same in every model; ``raw`` is the paper's <h, v / |v|>, in the
units of one model's residual stream.

Block and thresholds come from requests that the vector was not fitted on.  The authors' code takes
block 20 of 40 and the thresholds 27 and -2, which fit one model.

Source: Zhang et al., "DAVSP: Safety Alignment for Large Vision-Language Models via Deep Aligned
Visual Safety Prompt", AAAI 2026, arXiv:2506.09353, and the authors' code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from hauberk.analysis.twins import last_states
from hauberk.errors import BadData
from hauberk.requests import Request

Score = Literal["span", "raw"]


@dataclass(frozen=True)
class HarmVectors:
    """The two means of every block."""

    harmful: Tensor
    """(blocks, hidden size) float32"""
    harmless: Tensor
    """(blocks, hidden size) float32"""

    def direction(self, layer: int) -> Tensor:
        """From the harmless mean to the harmful one, (hidden size,) float32."""
        return self.harmful[layer] - self.harmless[layer]

    def axis(self, layer: int, score: Score = "span") -> "HarmAxis":
        """How states after a block are scored.

        Raises
        ------
        ValueError
            If the score is unknown.
        BadData
            If the two means are the same, so that there is no direction.
        """
        if score not in get_args(Score):
            raise ValueError(f"score {score!r} is not one of {', '.join(get_args(Score))}.")
        along = self.direction(layer)
        length = along.norm()
        if length == 0:
            raise BadData(f"harmful and harmless requests have the same mean state in {layer=}.")
        if score == "raw":
            return HarmAxis(layer, along / length, 0.0)
        weights = along / length**2
        return HarmAxis(layer, weights, -(weights @ self.harmless[layer]).item())


@dataclass(frozen=True)
class HarmAxis:
    """Scores a state after one block: ``states @ weights + offset``."""

    layer: int
    """The decoder block, counted from 0, after which states are read."""
    weights: Tensor
    """(hidden size,) float32"""
    offset: float

    def score(self, states: Tensor) -> Tensor:
        """Score states of any dtype in float32: (..., hidden size) to (...)."""
        return states.float() @ self.weights.to(states.device) + self.offset


@dataclass(frozen=True)
class Separation:
    """How well each block tells held-out requests apart, and which is taken."""

    auroc: tuple[float, ...]
    """By block: the chance that a harmful request scores higher than a harmless one."""
    distance: tuple[float, ...]
    """By block: the difference of the mean scores, in standard deviations (Cohen's d)."""
    layer: int


def fit_harm_vectors(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    harmful: Sequence[Request],
    harmless: Sequence[Request],
    batch_size: int = 64,
) -> HarmVectors:
    """Average the states of both kinds, in one pass and a batch at a time.

    Raises
    ------
    BadData
        If there is no request of a kind, or a state is not finite.
    """
    means = []
    for name, requests in (("harmful", harmful), ("harmless", harmless)):
        if not requests:
            raise BadData(f"no {name} request to fit a harmfulness vector on; give some.")
        total, starts = torch.zeros(()), range(0, len(requests), batch_size)
        for start in starts:  # sums, not states: of 40 blocks of a 13B they would fill a GB
            states = last_states(model, processor, requests[start : start + batch_size], batch_size)
            total = total + states.double().sum(0)
        mean = (total / len(requests)).float()
        if not mean.isfinite().all():
            raise BadData(
                f"states of {name} requests are not finite; load the model in bfloat16 or float32, "
                "whose range is wide enough."
            )
        means.append(mean)
    return HarmVectors(*means)


def separation(vectors: HarmVectors, *pairs: tuple[Tensor, Tensor]) -> Separation:
    """Find the block that tells held-out requests apart best.

    That is the one of the largest AUROC; of those that are perfect, or alike, the one of the
    largest distance in standard deviations.

    Parameters
    ----------
    pairs : last states of harmful and of harmless requests that the vectors were not fitted on,
        (n, blocks, hidden size) and (m, blocks, hidden size); of several pairs, such as with
        pictures and without, the mean counts, so that none is compared with another

    Raises
    ------
    BadData
        If there is no request of a kind, or a block in which both kinds have the same mean.
    """
    for harmful, harmless in pairs:
        if not (len(harmful) and len(harmless)):
            raise BadData(
                f"{len(harmful)} harmful and {len(harmless)} harmless requests to tell apart; give "
                "some of both."
            )
    areas, distances = [], []
    for layer in range(len(vectors.harmful)):
        axis = vectors.axis(layer)
        found = [
            _apart(*(axis.score(states[:, layer]).numpy() for states in pair)) for pair in pairs
        ]
        area, distance = np.mean(found, axis=0)
        areas.append(float(area))
        distances.append(float(distance))
    best = max(range(len(areas)), key=lambda layer: (round(areas[layer], 3), distances[layer]))
    return Separation(tuple(areas), tuple(distances), best)


def _apart(harmful: Any, harmless: Any) -> tuple[float, float]:
    """Measure how far two groups of scores lie apart: AUROC, and Cohen's d."""
    pairs = len(harmful) * len(harmless)
    spread = np.sqrt((harmful.var() + harmless.var()) / 2)
    area = mannwhitneyu(harmful, harmless).statistic / pairs
    return float(area), float((harmful.mean() - harmless.mean()) / max(spread, 1e-12))
