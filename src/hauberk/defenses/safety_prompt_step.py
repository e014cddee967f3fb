"""The loss of a safety prompt and its gradient, for one batch and in as few passes as there can be.

With s_i the score of the last prompt position of request i after one decoder block (see
:mod:`hauberk.analysis.harmfulness`), the loss of a batch is

    L = mean over harmful i of max(0, high - s_i)
      + mean over harmless i of max(0, s_i - low)
      + w * mean over answered i of mean_t -log p(y_t | framed picture, question, y_<t)
      + c * mean over i of |mean patch of the framed picture - mean patch of the picture|.

The authors run passes of batch 1 through all blocks, two for a harmless request, the text padded to
1,024 tokens.  Here a request whose answer does not count stops at the scored block; the score of
one whose answer does is read from the teacher-forced pass, because later tokens cannot change an
earlier state; the head sees answers alone; and where a group has nothing left to gain there is no
backward pass.

Source: as :mod:`hauberk.defenses.safety_prompt`; the authors' ``train/optimize.py``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ProcessorMixin

from hauberk.analysis.harmfulness import HarmAxis
from hauberk.anatomy import anatomy_of
from hauberk.defenses.safety_prompt import Geometry, SafetyPrompt
from hauberk.errors import UnsupportedRequest
from hauberk.hooks import recording, run_to
from hauberk.pixels import check_pixel_input, pixel_input
from hauberk.requests import IGNORED, Request, answer_kind, encode_answered


@dataclass(frozen=True)
class Case:
    """A request to train on, and what is to be answered."""

    request: Request
    """With one picture."""
    harmful: bool
    answer: str


@dataclass(frozen=True)
class Goal:
    """What a frame is to reach."""

    axis: HarmAxis
    high: float
    """Harmful requests are to score this much at least."""
    low: float
    """Harmless requests are to score this much at most."""
    answer_weight: float = 1.0
    """The authors' is 0.02, beside scores in raw units."""
    clean_weight: float = 0.0
    """Of the mean of what the projector is given, patches that it merges side by side; 0 in the
    authors' script as well."""


@dataclass(frozen=True)
class Prepared:
    """A case as tensors."""

    inside: Tensor
    """(3, height, width) uint8, black where the frame will be."""
    prompt: Mapping[str, Tensor]
    """What the processor says of every token of the prompt, (positions,) each."""
    answer: Tensor
    """(tokens,) int64"""
    harmful: bool
    patch: Tensor | None
    """The mean patch of the picture without a frame, if it is asked for."""


@dataclass(frozen=True)
class Measured:
    """The loss of one batch."""

    loss: float
    gradient: Tensor
    """(3, height, width) float32, by pixels in [0, 1]; zero inside of the frame."""
    hinge_harmful: float
    """Mean over the harmful requests of the batch; NaN without any, as in the three that follow."""
    hinge_harmless: float
    answer: float
    scores: Tensor
    """Of every request, (n,) float32."""
    backward: int
    """Backward passes that were needed: 0, 1 or 2."""


class FrameLoss:
    """Measures frames on batches of prepared cases.

    Parameters
    ----------
    model, processor : the model stays as it is; freeze its weights (:func:`hauberk.pixels.frozen`)
        around many calls
    geometry : of the frame
    goal : what it is to reach
    prefix : stands before every question
    autocast : compute the model's passes in this type; None for the model's own
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        geometry: Geometry,
        goal: Goal,
        *,
        prefix: str = "",
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.processor, self.geometry, self.goal = model, processor, geometry, goal
        self.anatomy = anatomy_of(model)
        self.anatomy.check_layers([goal.axis.layer])
        self.autocast = autocast
        blank = torch.zeros(3, geometry.height, geometry.width, dtype=torch.uint8)
        self._neutral = SafetyPrompt(blank, geometry, prefix)
        self._rim = geometry.rim.to(model.device)
        self._pad = int(processor.tokenizer.pad_token_id)

    def prepare(self, cases: Sequence[Case], tokens: int) -> list[Prepared]:
        """Turn cases into tensors, once; of an answer, the first ``tokens`` count.

        Raises
        ------
        UnsupportedRequest
            If a case has not exactly one picture, or its answer no token.
        UnknownFamily, ResampledPicture
            If the processor does not feed the canvas as it is, or :mod:`hauberk.pixels` does not
            know how it lays out pixels.
        """
        prepared: list[Prepared] = []
        for start in range(0, len(cases), _TOGETHER):
            prepared += self._prepared(cases[start : start + _TOGETHER], tokens)
        return prepared

    def _prepared(self, cases: Sequence[Case], tokens: int) -> list[Prepared]:
        for case in cases:
            if len(case.request.images) != 1:
                raise UnsupportedRequest(
                    f"the request {case.request.text[:60]!r} has {len(case.request.images)} "
                    "pictures; a frame is trained on requests of one picture each."
                )
        framed = [self._neutral.rewrite(case.request) for case in cases]
        inputs, labels = encode_answered(
            self.processor, framed, [case.answer for case in cases], tokens
        )
        inside = torch.stack([self.geometry.place(case.request.images[0]) for case in cases])
        check_pixel_input(self.processor, inside / 255, inputs)
        shape = inputs["input_ids"].shape
        told = {name: values for name, values in inputs.items() if values.shape == shape}
        length, device = shape[1] - labels.shape[1], self.model.device
        found = []
        for row, case in enumerate(cases):
            answer = labels[row][labels[row] != IGNORED]
            if not len(answer):
                raise UnsupportedRequest(
                    f"the answer {case.answer!r} to {case.request.text[:60]!r} has no token; give "
                    "one."
                )
            there = told["attention_mask"][row, :length].bool()
            prompt = {name: values[row, :length][there] for name, values in told.items()}
            found.append(
                Prepared(
                    inside=inside[row].to(device),
                    prompt={name: values.to(device) for name, values in prompt.items()},
                    answer=answer.to(device),
                    harmful=case.harmful,
                    patch=self._patch(case.request) if self.goal.clean_weight else None,
                )
            )
        return found

    def canvas(self, frame: Tensor, rows: Sequence[Prepared]) -> Tensor:
        """Put a frame, in [0, 1], around pictures: (n, 3, height, width) float32 in [0, 1].

        The frame is rounded to 8 bits on the way in; its gradient passes as if it were not.
        """
        rounded = frame + ((frame * 255).round() / 255 - frame).detach()
        inside = torch.stack([row.inside for row in rows]).float() / 255
        return torch.where(self._rim, rounded, inside)

    def __call__(
        self, frame: Tensor, rows: Sequence[Prepared], answered: Sequence[bool]
    ) -> Measured:
        """Measure a frame, with its gradient.

        Parameters
        ----------
        frame : (3, height, width) float32 in [0, 1]
        rows : of both kinds or of one
        answered : of which rows the answer counts
        """
        frame = frame.detach().to(self.model.device).requires_grad_()
        harmful = torch.tensor([row.harmful for row in rows], device=frame.device)
        shares = torch.where(harmful, 1 / harmful.sum(), 1 / (~harmful).sum())  # of the hinges
        counted = torch.tensor(answered, device=frame.device)
        scores, losses = (torch.full((len(rows),), torch.nan, device=frame.device) for _ in "12")
        hinges, gradient, total, backward = scores.clone(), torch.zeros_like(frame), 0.0, 0
        with torch.enable_grad():
            for group, forward in ((~counted, self._scored), (counted, self._answered)):
                where = group.nonzero().flatten()
                if not len(where):
                    continue
                chosen = [rows[place] for place in where.tolist()]
                score, loss, distance = forward(self.canvas(frame, chosen), chosen)
                hinge = torch.where(
                    harmful[where], self.goal.high - score, score - self.goal.low
                ).clamp(min=0)
                part = (hinge * shares[where]).sum()
                if loss is not None:
                    part = part + self.goal.answer_weight * loss.sum() / counted.sum()
                    losses[where] = loss.detach()
                if distance is not None:
                    part = part + self.goal.clean_weight * distance.sum() / len(rows)
                if part.item() > 0:
                    gradient += torch.autograd.grad(part, frame)[0]
                    backward += 1
                total += part.item()
                scores[where], hinges[where] = score.detach(), hinge.detach()
        return Measured(
            loss=total,
            gradient=gradient,
            hinge_harmful=hinges[harmful].mean().item(),
            hinge_harmless=hinges[~harmful].mean().item(),
            answer=losses[counted].mean().item(),
            scores=scores,
            backward=backward,
        )

    @torch.no_grad()
    def scores(self, frame: Tensor, rows: Sequence[Prepared]) -> Tensor:
        """Score requests under a frame, (3, height, width) uint8: (n,) float32."""
        canvas = self.canvas(frame.to(self.model.device).float() / 255, rows)
        return self._scored(canvas, rows)[0]

    def _scored(
        self, canvas: Tensor, rows: Sequence[Prepared]
    ) -> tuple[Tensor, None, Tensor | None]:
        """Score rows whose answers do not count, no further than the scored block."""
        text, _ = self._text(rows, answered=False)
        block = self.anatomy.blocks[self.goal.axis.layer]
        body: Callable[..., Any] = self.model.base_model
        with self._computing(), self._seeing() as seen:
            states = run_to(block, lambda: body(**text, **self._fed(canvas), use_cache=False))
        return self.goal.axis.score(_last(states, rows)), None, self._distance(seen, rows)

    def _answered(
        self, canvas: Tensor, rows: Sequence[Prepared]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Score rows and measure the loss of their answers, in one pass."""
        text, labels = self._text(rows, answered=True)
        predicting = (labels != IGNORED).any(0).nonzero().flatten() - 1
        layer = self.goal.axis.layer
        blocks = self.anatomy.blocks[layer : layer + 1]

        def last(states: Tensor) -> Tensor:
            return _last(states, rows)

        with self._computing(), self._seeing() as seen, recording(blocks, last) as states:
            logits = self.model(
                **text, **self._fed(canvas), use_cache=False, logits_to_keep=predicting
            ).logits
        labels = labels[:, predicting + 1]
        losses = cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        mean = losses.sum(1) / (labels != IGNORED).sum(1)
        return self.goal.axis.score(states[0][0]), mean, self._distance(seen, rows)

    def _text(
        self, rows: Sequence[Prepared], *, answered: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Lay out prompts, with answers or without, and the labels at the places of answers.

        Padded on the right, where nothing that counts looks, and without a mask: kernels that are
        told that attention is causal skip half of it, those that are given a mask do not.
        """
        answers = [row.answer if answered else row.answer[:0] for row in rows]
        text = {}
        for name in rows[0].prompt.keys() - {"attention_mask"}:
            ids, kind = name == "input_ids", answer_kind(self.processor, name)
            lines = [
                torch.cat([row.prompt[name], answer if ids else torch.full_like(answer, kind)])
                for row, answer in zip(rows, answers, strict=True)
            ]
            padding = self._pad if ids else kind
            text[name] = pad_sequence(lines, batch_first=True, padding_value=padding)
        labels = pad_sequence(
            [
                torch.cat([torch.full_like(row.prompt["input_ids"], IGNORED), answer])
                for row, answer in zip(rows, answers, strict=True)
            ],
            batch_first=True,
            padding_value=IGNORED,
        )
        return text, labels

    def _fed(self, canvas: Tensor) -> dict[str, Tensor]:
        fed = pixel_input(self.processor, canvas)
        return fed | {"pixel_values": fed["pixel_values"].to(self.model.dtype)}

    @contextmanager
    def _computing(self) -> Iterator[None]:
        kind = self.model.device.type
        with torch.autocast(kind, self.autocast, enabled=self.autocast is not None):
            yield

    @contextmanager
    def _seeing(self) -> Iterator[list[Tensor]]:
        """Collect the patches that the projector is given, if their mean counts."""
        if not self.goal.clean_weight:
            yield []
            return
        projector: Any = self.anatomy.projector
        seen: list[Tensor] = []
        with projector.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
            yield seen

    def _distance(self, seen: list[Tensor], rows: Sequence[Prepared]) -> Tensor | None:
        if not seen:
            return None
        clean = torch.stack([row.patch for row in rows if row.patch is not None])
        away: Tensor = (_mean_patch(seen[0], len(rows)) - clean).norm(dim=-1)
        return away

    @torch.no_grad()
    def _patch(self, request: Request) -> Tensor:
        """The mean patch of the picture of a request as the model sees it without a frame."""
        inputs, _ = encode_answered(self.processor, [request], ["."], 1)
        look: Any = self.model.base_model
        with self._seeing() as seen:
            known = {
                name: values.to(self.model.device)
                for name, values in inputs.items()
                if name in ("pixel_values", "image_grid_thw", "image_sizes")
            }
            known["pixel_values"] = known["pixel_values"].to(self.model.dtype)
            look.get_image_features(**known)
        return _mean_patch(seen[0], 1)[0]


_TOGETHER = 64
"""Cases that the processor is given at once."""


def _last(states: Tensor, rows: Sequence[Prepared]) -> Tensor:
    """Those of the last position of every prompt."""
    places = [len(row.prompt["input_ids"]) - 1 for row in rows]
    return states[torch.arange(len(rows)), places]


def _mean_patch(features: Tensor, pictures: int) -> Tensor:
    """Average (..., width) over the patches of each of some pictures of one size."""
    return features.float().reshape(pictures, -1, features.shape[-1]).mean(1)
