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
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ProcessorMixin

from hauberk.analysis.states import text_states
from hauberk.analysis.twins import last_states
from hauberk.anatomy import anatomy_of
from hauberk.defenses.alignment import Aligned, AlignmentSetting, TextGuidedAlignmentLoss, pooled
from hauberk.defenses.projector_features import Features
from hauberk.errors import UnsupportedRequest
from hauberk.hooks import recording, run_to
from hauberk.requests import IGNORED, Request, encode, encode_answered, prompt_of

Place = Literal["before", "after"]


@dataclass(frozen=True)
class Retrieved:
    """Where a retrieved text stands in a prompt.

    Raises
    ------
    ValueError
        If the place is not one of those named or the wording has not one gap.
    """

    place: Place = "before"
    """``before`` the image, as in the authors' training code: in the system's turn, behind what
    stands there, because many chat templates put pictures before all text of the user; ``after``
    the image and before the question, as in their analysis."""
    wording: str = "Retrieved Text: {}."
    """The authors'."""

    def __post_init__(self) -> None:
        if self.place not in get_args(Place):
            right = ", ".join(get_args(Place))
            raise ValueError(f"place: {self.place!r} is not one of {right}.")
        if self.wording.count("{}") != 1:
            raise ValueError(f"wording: {self.wording!r} has not one gap; write {{}} once.")

    def put(self, request: Request, text: str) -> Request:
        """Put a text into the prompt of a request."""
        said = self.wording.replace("{}", text)
        if self.place == "after":
            return replace(request, text=f"{said} {request.text}")
        return replace(request, system=said if not request.system else f"{request.system} {said}")


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
    caption: Tensor | None = None
    """(layers, hidden size) float32: C of the model before training."""
    rival: Tensor | None = None
    """R of the position ``decision`` likewise."""


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
        self.anatomy.check_layers(self.alignment.layers)
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
        captioned = [row for row in prepared if row.lesson.caption.strip()]
        told = sorted({_told(row.lesson, row.lesson.caption) for row in captioned}, key=repr)
        if self.alignment.position == "decision":
            rivals = {_told(row.lesson, r) for row in captioned if (r := row.lesson.retrieved)}
            told += sorted(rivals - set(told), key=repr)
        found = dict(zip(told, self._states_of(told), strict=True))
        if found:
            self._centre = torch.stack(list(found.values())).mean(0)
        return [self._targeted(row, found) for row in prepared]

    def _targeted(self, row: Prepared, found: Mapping["_Told", Tensor]) -> Prepared:
        lesson = row.lesson
        if not lesson.caption.strip():
            return row
        rival = found.get(_told(lesson, lesson.retrieved)) if lesson.retrieved else None
        return replace(row, caption=found[_told(lesson, lesson.caption)], rival=rival)

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

    def _states_of(self, told: Sequence["_Told"]) -> Tensor:
        """C of texts in the model as it is: (texts, layers, hidden size) float32 on its device."""
        if not told:
            return torch.empty(0)
        requests = [one.request for one in told]
        with torch.no_grad():
            if self.alignment.position == "decision":
                states = last_states(self.model, self.processor, requests)
            else:
                texts = [one.text for one in told]
                states = text_states(self.model, self.processor, requests, texts)
        return states[:, list(self.alignment.layers)].to(self.model.device)

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
        states: list[tuple[Prepared, Tensor, Tensor]] = []
        loss = torch.nan
        for group, forward in ((answered, self._answered), (silent, self._silent)):
            if group:
                found, said = forward(group)
                states += found
                if said is not None:
                    total, loss = total + said, said.item()
        aligned = self._align(states, progress)
        if aligned is not None:
            total = total + aligned.loss
        return Measured(total, loss, aligned)

    def _aligns(self, row: Prepared) -> bool:
        return row.caption is not None and not self.alignment.off

    def _align(
        self, states: Sequence[tuple[Prepared, Tensor, Tensor]], progress: float
    ) -> Aligned | None:
        if not states:
            return None
        rows = [row for row, _, _ in states]
        image, beside = (torch.stack([one[place] for one in states]) for place in (1, 2))
        caption = torch.stack([row.caption for row in rows if row.caption is not None])
        if self.alignment.target == "current":
            caption = self._states_of([_told(row.lesson, row.lesson.caption) for row in rows])
        if self.alignment.position == "decision":
            beside = torch.stack(
                [torch.zeros_like(c) if row.rival is None else row.rival
                 for row, c in zip(rows, caption, strict=True)]
            )  # fmt: skip
            told = [row.rival is not None for row in rows]
        else:
            told = [bool(row.retrieved.any()) for row in rows]
        there = torch.tensor(told, device=image.device)
        return TextGuidedAlignmentLoss(self.alignment, self._centre)(
            image,
            caption,
            beside if there.any() else None,
            retrieved_there=there,
            progress=progress,
        )

    def _answered(
        self, rows: Sequence[Prepared]
    ) -> tuple[list[tuple[Prepared, Tensor, Tensor]], Tensor]:
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
        return self._sorted(rows, seen), (losses.sum(1) / (labels != IGNORED).sum(1)).mean()

    def _silent(
        self, rows: Sequence[Prepared]
    ) -> tuple[list[tuple[Prepared, Tensor, Tensor]], None]:
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
        return self._sorted(rows, seen), None

    @property
    def _aligned_blocks(self) -> list[Any]:
        return [self.anatomy.blocks[layer] for layer in self.alignment.layers]

    def _keep(self, rows: Sequence[Prepared]) -> Callable[[Tensor], Tensor]:
        """Reduce states (rows, positions, hidden size) to I and R: (rows, 2, hidden size)."""
        lengths = [len(row.prompt["input_ids"]) for row in rows]
        longest = max(length + len(row.answer) for length, row in zip(lengths, rows, strict=True))
        shape = (2, len(rows), longest)
        spans = torch.zeros(shape, dtype=torch.bool, device=self.model.device)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if self.alignment.position == "decision":
                spans[0, index, length - 1] = True
            else:
                spans[0, index, :length] = image_span(row.prompt["input_ids"], self._image)
                spans[1, index, :length] = row.retrieved

        def keep(states: Tensor) -> Tensor:
            return torch.stack([pooled(states, span) for span in spans], dim=1)

        return keep

    @property
    def _image(self) -> int:
        return self.anatomy.image_token_id

    def _sorted(
        self, rows: Sequence[Prepared], seen: list[list[Tensor]]
    ) -> list[tuple[Prepared, Tensor, Tensor]]:
        by_row = torch.stack([outputs[0] for outputs in seen], dim=2)  # rows, 2, layers, width
        return [
            (row, states[0], states[1])
            for row, states in zip(rows, by_row, strict=True)
            if self._aligns(row)
        ]

    def _shown(self, rows: Sequence[Prepared]) -> dict[str, Any]:
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
            ids = name == "input_ids"  # of what else there is, an answer is plain text, 0
            lines = [
                torch.cat([row.prompt[name], row.answer if ids else torch.zeros_like(row.answer)])
                for row in rows
            ]
            text[name] = pad_sequence(lines, batch_first=True, padding_value=self._pad * ids)
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


@dataclass(frozen=True)
class _Told:
    """A text in place of a picture, and the request that it makes."""

    text: str
    request: Request


def _told(lesson: Lesson, text: str) -> _Told:
    request = lesson.request
    return _Told(text, Request(f"{text} {request.text}", system=request.system))


def image_span(ids: Tensor, token: int) -> Tensor:
    """Tell which positions of prompts are of an image, whatever the padding: bool like ``ids``."""
    return ids == token


def prompt_span(
    processor: ProcessorMixin, request: Request, text: str, ids: Tensor
) -> Tensor:
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
