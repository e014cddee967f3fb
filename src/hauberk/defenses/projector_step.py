"""The loss of a projector for one batch: what is to be answered, and what is to be aligned.

    L = mean over answered of mean_t -log p(y_t | picture, question, y_<t)
      + the alignment of those with a caption (:mod:`hauberk.defenses.alignment`).

Requests whose answer does not count run no further than the last aligned block.  A request with
both answer and caption is aligned in its teacher-forced pass, because later tokens cannot change an
earlier state.  What the captions do to the model before training is computed once for each of them.

Source: as :mod:`hauberk.defenses.alignment`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ProcessorMixin

from hauberk.analysis.safety_layers import next_token_logits
from hauberk.analysis.states import text_states
from hauberk.anatomy import Anatomy, anatomy_of
from hauberk.defenses.alignment import Aligned, AlignmentSetting, TextGuidedAlignmentLoss, pooled
from hauberk.defenses.projector import Retrieved
from hauberk.defenses.projector_features import Features
from hauberk.errors import UnsupportedRequest
from hauberk.hooks import recording, run_to
from hauberk.requests import (
    IGNORED,
    Request,
    answer_kind,
    encode,
    encode_answered,
    prompt_of,
)


@dataclass(frozen=True)
class Lesson:
    """A request to learn from: by its answer, by the caption of its picture, or by both."""

    request: Request
    """With one picture, if it has a caption."""
    answer: str = ""
    caption: str = ""
    """What the picture shows, as it would be told in words before the question."""
    retrieved: str = ""
    """A text that was retrieved for the picture, for the prompt and for the margin term."""


@dataclass(frozen=True)
class Prepared:
    """A lesson as tensors."""

    lesson: Lesson
    prompt: Mapping[str, Tensor]
    """What the processor says of every token of the prompt, (positions,) each."""
    answer: Tensor
    """(tokens,) int64"""
    pixels: Mapping[str, Tensor]
    """What else the processor says of the pictures; nothing where there is none."""
    retrieved: Tensor
    """(positions,) bool: where the retrieved text stands."""
    places: int = 0
    """Positions from the end of the prompt that are aligned; of the position ``image``, 1."""
    caption: Tensor | None = None
    """(places, layers, hidden size) float32: C of the model before training."""
    rival: Tensor | None = None
    """R likewise, where it is of a run of its own."""


@dataclass(frozen=True)
class Measured:
    """The loss of one batch."""

    loss: Tensor
    """Scalar float32, to be descended."""
    answers: float
    """Mean loss of the answers; NaN without any."""
    aligned: Aligned | None
    """None where nothing is."""


@dataclass
class ProjectorLoss:
    """Measures a model on batches of prepared lessons.

    Parameters
    ----------
    model, processor : the model is differentiated by whatever of its weights requires it
    alignment : what is aligned
    retrieved : puts the retrieved texts into the prompts; None leaves them out
    features : bytes of features that are kept; 0 runs the vision tower at every step
    autocast : compute the model's passes in this type; None for the model's own
    whole : run every pass through all blocks: recomputing of activations does not survive a pass
        that ends early
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    alignment: AlignmentSetting
    retrieved: Retrieved | None = None
    features: int = 2**31
    autocast: torch.dtype | None = None
    whole: bool = False
    _centre: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.anatomy = anatomy_of(self.model)
        check_trains(self.anatomy)
        self.anatomy.check_layers(self.alignment.layers)
        last = len(self.anatomy.blocks) - 1
        if self.alignment.form == "kl" and self.alignment.layers != (last,):
            raise ValueError(
                f"layers: {self.alignment.layers} is wrong for form 'kl', which the head reads "
                f"after the last block; {(last,)} is right."
            )
        self._features = Features(self.model, self.anatomy, self.features)
        self._pad = int(self.processor.tokenizer.pad_token_id)
        if self.autocast is None and self.model.dtype in (torch.bfloat16, torch.float16):
            self.autocast = self.model.dtype  # trained weights are float32 while they are trained

    def prepare(self, lessons: Sequence[Lesson], tokens: int) -> list[Prepared]:
        """Turn lessons into tensors, once; of an answer, the first ``tokens`` count.

        A lesson whose caption has no token is aligned with nothing.

        Raises
        ------
        UnsupportedRequest
            If a lesson teaches nothing, has a caption but not one picture, or its answer no token.
        """
        prepared = [self._prepared(lesson, tokens) for lesson in lessons]
        if self.alignment.off:
            return prepared
        prepared = [self._placed(row) for row in prepared]
        told: dict[_Told, None] = {}
        for row in prepared:
            told |= dict.fromkeys(self._told(row))
        found = dict(zip(told, self._states_of(list(told)), strict=True))
        if found:
            self._centre = torch.cat([found[self._told(r)[0]] for r in prepared if r.places]).mean(
                0
            )
        return [self._targeted(row, found) for row in prepared]

    def _placed(self, row: Prepared) -> Prepared:
        """Count the positions from the end at which all runs of a lesson have the same tokens."""
        if not row.lesson.caption.strip():
            return row
        if self.alignment.position != "question":
            return replace(row, places=1)
        runs = [encode(self.processor, [one.request])["input_ids"][0] for one in self._told(row)]
        runs.append(row.prompt["input_ids"].cpu())
        ends = torch.stack([run.flip(0)[: min(map(len, runs))] for run in runs])
        same = int((ends == ends[0]).all(0).cumprod(0).sum())
        if not same:
            raise UnsupportedRequest(
                f"the prompt of {row.lesson.request.text[:60]!r} and its text twin end in "
                "different tokens, so that no position is the same in both."
            )
        return replace(row, places=same)

    def _told(self, row: Prepared) -> list["_Told"]:
        """The runs in text that a lesson is held against: of its caption, and of its rival."""
        lesson = row.lesson
        texts = [lesson.caption] if lesson.caption.strip() else []
        if texts and lesson.retrieved and self.alignment.position != "image":
            texts.append(lesson.retrieved)
        system, question = lesson.request.system, lesson.request.text
        return [_Told(t, Request(f"{t} {question}", system=system), row.places) for t in texts]

    def _targeted(self, row: Prepared, found: Mapping["_Told", Tensor]) -> Prepared:
        caption, rival = [*(found[one] for one in self._told(row)), None, None][:2]
        return replace(row, caption=caption, rival=rival)

    def _prepared(self, lesson: Lesson, tokens: int) -> Prepared:
        request = lesson.request
        if not (lesson.answer or lesson.caption):
            raise UnsupportedRequest(f"the lesson {request.text[:60]!r} teaches nothing; give it "
                                     "an answer, a caption or both.")  # fmt: skip
        if lesson.caption and len(request.images) != 1:
            raise UnsupportedRequest(
                f"the lesson {request.text[:60]!r} has a caption and {len(request.images)} "
                "pictures; a caption is aligned with one picture."
            )
        in_prompt = bool(self.retrieved and lesson.retrieved)
        if self.retrieved and lesson.retrieved:
            request = self.retrieved.put(request, lesson.retrieved)
        if lesson.answer:
            inputs, labels = encode_answered(self.processor, [request], [lesson.answer], tokens)
        else:
            inputs, labels = encode(self.processor, [request]), torch.empty(1, 0, dtype=torch.long)
        if lesson.answer and not labels.numel():
            raise UnsupportedRequest(
                f"the answer {lesson.answer!r} to {request.text[:60]!r} has no token; give one."
            )
        shape = inputs["input_ids"].shape
        length, device = shape[1] - labels.shape[1], self.model.device
        prompt = {n: v[0, :length].to(device) for n, v in inputs.items() if v.shape == shape}
        span = torch.zeros(length, dtype=torch.bool, device=device)
        if in_prompt:
            span |= prompt_span(self.processor, request, lesson.retrieved, prompt["input_ids"])
        return Prepared(
            lesson=lesson,
            prompt=prompt,
            answer=labels[0].to(device),
            pixels={n: v.to(device) for n, v in inputs.items() if v.shape != shape},
            retrieved=span,
        )

    @torch.no_grad()
    def _states_of(self, told: Sequence["_Told"]) -> list[Tensor]:
        """C of texts in the model as it is: (places, layers, hidden size) float32 of each."""
        requests, layers = [one.request for one in told], list(self.alignment.layers)
        if self.alignment.position == "image":
            texts = [one.text for one in told]
            if not told:
                return []
            means = text_states(self.model, self.processor, requests, texts)
            return [mean[None, layers].to(self.model.device) for mean in means]
        batches = (told[at : at + _TOGETHER] for at in range(0, len(told), _TOGETHER))
        return [states for batch in batches for states in self._end_states(batch)]

    def _end_states(self, told: Sequence["_Told"]) -> list[Tensor]:
        """States of the last places of prompts in text, run as one batch."""
        most = max(one.places for one in told)
        text = encode(self.processor, [one.request for one in told]).to(self.model.device)
        body: Callable[..., Any] = self.model.base_model
        last = self.anatomy.blocks[max(self.alignment.layers)]
        with self._computing(), recording(self._aligned_blocks, _end(most)) as seen:
            run_to(last, lambda: body(**text, use_cache=False))
        states = torch.stack([outputs[0] for outputs in seen], dim=2)
        return [row[most - one.places :] for row, one in zip(states, told, strict=True)]

    def __call__(self, rows: Sequence[Prepared], progress: float) -> Measured:
        """Measure a batch, with a graph to differentiate.

        Parameters
        ----------
        rows : in any order
        progress : the share of the training that is done
        """
        answered = [row for row in rows if len(row.answer)]
        silent = [row for row in rows if not len(row.answer) and self._aligns(row)]
        total = torch.zeros((), device=self.model.device)
        found: list[tuple[Tensor, Tensor]] = []
        loss = torch.nan
        if answered:
            states, said = self._answered(answered)
            found, total, loss = [*found, states], total + said, said.item()
        if silent:
            found.append(self._silent(silent))
        aligned = self._align([*answered, *silent], found, progress)
        if aligned is not None:
            total = total + aligned.loss
        return Measured(total, loss, aligned)

    def _aligns(self, row: Prepared) -> bool:
        return row.caption is not None and not self.alignment.off

    def _align(
        self, rows: Sequence[Prepared], found: Sequence[tuple[Tensor, Tensor]], progress: float
    ) -> Aligned | None:
        rows = [row for row in rows if self._aligns(row)]
        if not rows:
            return None
        image, beside = (torch.cat(parts) for parts in zip(*found, strict=True))
        counts = torch.tensor([row.places for row in rows], device=image.device)
        caption = torch.cat([row.caption for row in rows if row.caption is not None])
        if self.alignment.target == "current":
            caption = torch.cat(self._states_of([self._told(row)[0] for row in rows]))
        if self.alignment.position == "image":
            told = [bool(row.retrieved.any()) for row in rows]
        else:
            told = [row.rival is not None for row in rows]
            none = [torch.zeros_like(row.caption) for row in rows if row.caption is not None]
            rivals = [row.rival for row in rows]
            beside = torch.cat([n if r is None else r for n, r in zip(none, rivals, strict=True)])
        there = torch.tensor(told, device=image.device).repeat_interleave(counts)
        return TextGuidedAlignmentLoss(self.alignment, self._centre, self._read)(
            image,
            caption,
            beside if there.any() else None,
            retrieved_there=there,
            weights=(1 / counts).repeat_interleave(counts),
            progress=progress,
        )

    def _read(self, states: Tensor) -> Tensor:
        return next_token_logits(self.model, self.anatomy.blocks, states.to(self.model.dtype))

    def _answered(self, rows: Sequence[Prepared]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Run rows with their answers: states of those that align, and the answers' loss."""
        text, labels = self._text(rows)
        predicting = (labels != IGNORED).any(0).nonzero().flatten() - 1
        with self._computing(), recording(self._aligned_blocks, self._keep(rows)) as seen:
            logits = self.model(
                **text, **self._shown(rows), use_cache=False, logits_to_keep=predicting
            ).logits
        labels = labels[:, predicting + 1]
        losses = cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        return _stacked(seen), (losses.sum(1) / (labels != IGNORED).sum(1)).mean()

    def _silent(self, rows: Sequence[Prepared]) -> tuple[Tensor, Tensor]:
        """Run rows no further than the last aligned block."""
        text, _ = self._text(rows)
        shown = self._shown(rows)
        body: Callable[..., Any] = self.model.base_model
        with self._computing(), recording(self._aligned_blocks, self._keep(rows)) as seen:
            if self.whole:
                body(**text, **shown, use_cache=False)
            else:
                last = self.anatomy.blocks[max(self.alignment.layers)]
                run_to(last, lambda: body(**text, **shown, use_cache=False))
        return _stacked(seen)

    @property
    def _aligned_blocks(self) -> list[Any]:
        return [self.anatomy.blocks[layer] for layer in self.alignment.layers]

    def _keep(self, rows: Sequence[Prepared]) -> Callable[[Tensor], Tensor]:
        """Reduce states (rows, positions, hidden size) to I and R of every aligned place.

        These are (2, places, hidden size) float32.
        """
        aligns = [index for index, row in enumerate(rows) if self._aligns(row)]
        chosen = [rows[index] for index in aligns]
        if self.alignment.position == "image":
            return self._mean_over_spans(aligns, chosen)
        ends = [len(row.prompt["input_ids"]) for row in chosen]
        where = [(index, place) for index, row, end in zip(aligns, chosen, ends, strict=True)
                 for place in range(end - row.places, end)]  # fmt: skip
        index, place = torch.tensor(where, dtype=torch.long).view(-1, 2).unbind(1)

        def keep(states: Tensor) -> Tensor:
            picked = states[index.to(states.device), place.to(states.device)].float()
            return torch.stack([picked, torch.zeros_like(picked)])

        return keep

    def _mean_over_spans(
        self, aligns: Sequence[int], rows: Sequence[Prepared]
    ) -> Callable[[Tensor], Tensor]:
        def keep(states: Tensor) -> Tensor:
            spans = torch.zeros(
                (2, len(rows), states.shape[1]), dtype=torch.bool, device=states.device
            )
            for index, row in enumerate(rows):
                length = len(row.prompt["input_ids"])
                spans[0, index, :length] = image_span(row.prompt["input_ids"], self._image)
                spans[1, index, :length] = row.retrieved
            return torch.stack([pooled(states[list(aligns)], span) for span in spans])

        return keep

    @property
    def _image(self) -> int:
        return self.anatomy.image_token_id

    def _shown(self, rows: Sequence[Prepared]) -> dict[str, Any]:
        with self._computing():
            return self._features.given(
                [(row.lesson.request.images, row.pixels) for row in rows if row.pixels]
            )

    def _text(self, rows: Sequence[Prepared]) -> tuple[dict[str, Tensor], Tensor]:
        """Lay out prompts with answers, and the labels at the places of these.

        Padded on the right, where nothing that counts looks, and without a mask, which slower
        kernels alone take.
        """
        text = {}
        for name in rows[0].prompt.keys() - {"attention_mask"}:
            ids, kind = name == "input_ids", answer_kind(self.processor, name)
            answers = [row.answer if ids else torch.full_like(row.answer, kind) for row in rows]
            lines = [
                torch.cat([row.prompt[name], answer])
                for row, answer in zip(rows, answers, strict=True)
            ]
            padding = self._pad if ids else kind
            text[name] = pad_sequence(lines, batch_first=True, padding_value=padding)
        labels = pad_sequence(
            [
                torch.cat([torch.full_like(row.prompt["input_ids"], IGNORED), row.answer])
                for row in rows
            ],
            batch_first=True,
            padding_value=IGNORED,
        )
        return text, labels

    def _computing(self) -> torch.autocast:
        kind = self.model.device.type
        return torch.autocast(kind, self.autocast, enabled=self.autocast is not None)


def check_trains(anatomy: Anatomy) -> None:
    """Raise :class:`UnsupportedRequest` unless prompts of several lengths can be laid out anew.

    Pictures that are seen by cross-attention have a mask position by position, which is not laid
    out anew here.
    """
    if anatomy.layout == "cross":
        raise UnsupportedRequest(
            f"a {anatomy.family!r} model looks at pictures by cross-attention, for which training "
            "of the projector is not built; apply weights that were trained elsewhere, or choose "
            "a model whose pictures stand in the prompt."
        )


@dataclass(frozen=True)
class _Told:
    """A text in place of a picture, the request that it makes, and the places that count."""

    text: str
    request: Request
    places: int


_TOGETHER = 64
"""Texts that are run at once."""


def _end(places: int) -> Callable[[Tensor], Tensor]:
    return lambda states: states[:, -places:].float()


def _stacked(seen: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Put what was kept of every layer together: I and R, (places, layers, hidden size) each."""
    image, beside = torch.stack([outputs[0] for outputs in seen], dim=2)
    return image, beside


def image_span(ids: Tensor, token: int) -> Tensor:
    """Tell which positions of prompts are of an image, whatever the padding: bool like ``ids``."""
    return ids == token


def prompt_span(processor: ProcessorMixin, request: Request, text: str, ids: Tensor) -> Tensor:
    """Tell which positions of a prompt are of ``text``, a part of what is asked.

    What an image is expanded to stands between, so tokens are counted from the end of the prompt
    on the side of the image on which the text stands.  Tokens that touch an edge of the text count.

    Parameters
    ----------
    ids : (positions,) int64, of the prompt without padding

    Returns
    -------
    Tensor (positions,) bool
        Nowhere true where the text has no token.

    Raises
    ------
    UnsupportedRequest
        If the text is not in the prompt, or its tokens are others there.
    """
    prompt = prompt_of(processor, request)
    begin = prompt.rfind(text)
    finish = begin + len(text)
    tokens = processor.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    inside = [i for i, (start, end) in enumerate(tokens["offset_mapping"])
              if start < finish and end > begin]  # fmt: skip
    span = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    if begin < 0 or not inside:
        return span
    found, said = tokens["input_ids"], ids.tolist()
    wanted = [found[i] for i in inside]
    before_begin = said[: len(said) - len(found)]
    shifts = (len(said) - len(found), *range(len(before_begin) + 1))
    for shift in shifts:  # from the end, then from the beginning with special tokens before it
        places = [i + shift for i in inside]
        if [said[place] for place in places] == wanted:
            span[places] = True
            return span
    raise UnsupportedRequest(
        f"the retrieved text {text[:60]!r} has other tokens in the prompt than by itself; put it "
        "where no token reaches over its edge."
    )
