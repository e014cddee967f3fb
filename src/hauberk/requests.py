"""Requests: from messages and images to processor inputs, their twins, and their answers."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from inspect import signature
from itertools import groupby
from math import inf
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BatchFeature,
    MllamaProcessor,
    PaliGemmaProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from hauberk.anatomy import looks_across
from hauberk.blank import BlankKind, blank_image
from hauberk.decoding import greedy
from hauberk.errors import BadRequest, UnsupportedRequest

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


@dataclass(frozen=True)
class Request:
    """What a user asks: one turn of text, with the images before it.

    Images are read as they are: one from a file of a camera may lie on its side until
    ``PIL.ImageOps.exif_transpose`` turns it.
    """

    text: str
    images: tuple[Image.Image, ...] = ()
    system: str | None = None
    begun: str = ""
    """What the answer begins with: the model goes on behind it, as if it had said so itself."""

    def __post_init__(self) -> None:
        if isinstance(self.images, Image.Image | str):
            raise TypeError(
                f"images: {self.images!r} is wrong, a list of pictures is right: [image], each one "
                "opened by PIL.Image.open."
            )
        object.__setattr__(self, "images", tuple(self.images))
        for image in self.images:
            if not isinstance(image, Image.Image):
                raise TypeError(f"images: {image!r} is no picture; open it with PIL.Image.open.")

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chat templates read it, up to where the assistant begins."""
        content: list[dict[str, Any]] = [{"type": "image"} for _ in self.images]
        content.append({"type": "text", "text": self.text})
        turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.system is not None:
            part = {"type": "text", "text": self.system}
            turns.insert(0, {"role": "system", "content": [part]})
        return turns


@dataclass(frozen=True)
class Response:
    """One answer: its text, the number of generated tokens, and its share of the wall clock.

    The text begins with what the request says that it begins with, which was not generated.
    """

    text: str
    tokens: int
    seconds: float
    error: str = ""
    """Why there is no answer; "" where there is one, as always where the model runs here."""
    refused: bool = False
    """Whoever serves the model declares it to be no answer: see :mod:`hauberk.target`."""


class SupportsDefense(Protocol):
    """What :func:`respond` asks of a defense (see :class:`hauberk.defenses.Defense`)."""

    def rewrite(self, request: Request) -> Request:
        """Change a request before the processor sees it."""
        ...

    def applied(self, model: PreTrainedModel) -> "AbstractContextManager[None]":
        """Change the model while the ``with`` block runs."""
        ...


def text_twin(request: Request) -> Request:
    """The same request without its images; the chat template is rendered anew without them."""
    return replace(request, images=())


def blank_twin(
    request: Request, processor: ProcessorMixin, kind: BlankKind = "white", seed: int = 0
) -> Request:
    """The same request with every image replaced by a meaningless one of the same size."""
    blanks = tuple(
        blank_image(image.size, kind, mean=mean_color(processor), seed=seed)
        for image in request.images
    )
    return replace(request, images=blanks)


def mean_color(processor: ProcessorMixin) -> tuple[int, int, int]:
    """The colour that the image processor maps to zero, in 0..255."""
    images = processor.image_processor
    if not getattr(images, "do_normalize", False):
        return 0, 0, 0
    mean = images.image_mean
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue


def prompt_of(processor: ProcessorMixin, request: Request) -> str:
    """Render the chat template up to where the model goes on.

    That is where the assistant begins, or behind what its answer begins with.

    Raises
    ------
    UnsupportedRequest
        If the template does not put what the answer begins with behind the prompt.
    """
    prompt = _rendered(processor, request.messages, add_generation_prompt=True)
    return prompt + _behind(processor, request, prompt, request.begun)


def continuation_of(processor: ProcessorMixin, request: Request, answer: str) -> str:
    """Render an answer as the chat template puts it behind the prompt, up to its last character.

    Where the request says what the answer begins with, ``answer`` is what comes after that.

    Raises
    ------
    UnsupportedRequest
        If the template does not put the answer behind the prompt.
    """
    prompt = prompt_of(processor, replace(request, begun=""))
    begun = _behind(processor, request, prompt, request.begun)
    return _behind(processor, request, prompt, request.begun + answer).removeprefix(begun)


def _behind(processor: ProcessorMixin, request: Request, prompt: str, said: str) -> str:
    """Render what the assistant says as it stands behind the prompt, what is between included."""
    if not said:
        return ""
    # Some templates read what the assistant said as text alone, others as parts alone.
    for content in (said, [{"type": "text", "text": said}]):
        turns = [*request.messages, {"role": "assistant", "content": content}]
        whole = _rendered(processor, turns)
        before, found, _ = whole.removeprefix(prompt).partition(said)
        if whole.startswith(prompt) and found:
            return before + found
    raise UnsupportedRequest(
        f"the chat template does not put the answer {said[:60]!r} behind the prompt "
        f"{prompt[:60]!r}; correct the template."
    )


_PALIGEMMA_CHAT = (
    "{% for turn in messages %}{% for part in turn['content'] if part['type'] == 'image' %}"
    "<image>{% endfor %}{% endfor %}{{ bos_token }}{% for turn in messages %}"
    "{% if turn['role'] == 'assistant' %}{{ '\n' + turn['content'] }}{% else %}"
    "{% for part in turn['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ ' ' if turn['role'] == 'system' else '' }}{% endif %}{% endfor %}"
    "{{ '\n' if add_generation_prompt else '' }}"
)
"""Its checkpoints bring none.  This writes what its processor makes of a question: pictures, the
beginning of text, the question, and a line break behind which the answer comes."""


def _rendered(
    processor: ProcessorMixin, turns: list[dict[str, Any]], *, add_generation_prompt: bool = False
) -> str:
    """Render a conversation by the chat template of the processor.

    Raises
    ------
    UnsupportedRequest
        If there is none.
    """
    template = None  # that of the processor
    if not (processor.chat_template or processor.tokenizer.chat_template):
        template = _PALIGEMMA_CHAT if isinstance(processor, PaliGemmaProcessor) else ""
    if template == "":
        raise UnsupportedRequest(
            f"{type(processor).__name__} brings no chat template, so that nobody knows how the "
            "model is asked; set processor.chat_template to that of its family."
        )
    return str(
        processor.apply_chat_template(
            turns,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    )


IGNORED = -100
"""Stands among labels where there is no token; torch's own choice."""


def encode_answered(
    processor: ProcessorMixin, requests: Sequence[Request], answers: Sequence[str], tokens: int
) -> tuple[BatchFeature, Tensor]:
    """Turn requests and the first tokens of an answer to each into one batch of model inputs.

    Returns
    -------
    inputs : BatchFeature
        As :func:`encode` makes them, with k more columns on the right, k <= ``tokens``: answers
        that have fewer are padded and masked.
    labels : Tensor (n, k), int64
        The tokens of these columns, :data:`IGNORED` where there is none.  Column j is predicted by
        the logits of the position before it, of which the first is the last one of the prompt.

    Raises
    ------
    UnsupportedRequest
        If the template does not put an answer behind its prompt, or the tokenizer joins the two.
    """
    inputs = encode(processor, requests)
    said = [_tokens_said(processor, *pair) for pair in zip(requests, answers, strict=True)]
    rows = [torch.tensor(ids[:tokens]) for ids in said]
    labels = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    there = labels != IGNORED
    columns = {
        "input_ids": labels.where(there, processor.tokenizer.pad_token_id),
        "attention_mask": there.to(inputs["attention_mask"].dtype),
    }
    shape = inputs["input_ids"].shape
    for name, values in list(inputs.items()):
        if values.shape == shape:
            kind = values.new_full(labels.shape, answer_kind(processor, name))
            inputs[name] = torch.cat([values, columns.get(name, kind)], dim=1)
        elif name == "cross_attention_mask":  # an answer sees what the end of its prompt sees
            seen = values[:, -1:].expand(-1, labels.shape[1], *values.shape[2:])
            inputs[name] = torch.cat([values, seen], dim=1)
    return inputs, labels


def answer_kind(processor: ProcessorMixin, name: str) -> int:
    """What is said of the tokens of an answer where an input tells the kind of every token.

    Plain text, 0; but to PaliGemma, 0 is what a prompt sees in both directions, and 1 what follows.
    """
    return int(name == "token_type_ids" and isinstance(processor, PaliGemmaProcessor))


def _tokens_said(processor: ProcessorMixin, request: Request, answer: str) -> list[int]:
    """Tokenize an answer where it stands: alone, a tokenizer may put a space before it."""
    prompt, said = prompt_of(processor, request), continuation_of(processor, request, answer)
    before, whole = (
        list(processor.tokenizer(text, add_special_tokens=False).input_ids)
        for text in (prompt, prompt + said)
    )
    if whole[: len(before)] != before:
        raise UnsupportedRequest(
            f"the tokenizer joins the end of the prompt {prompt[-30:]!r} and the answer "
            f"{said[:30]!r} in one token, which no model says behind that prompt; let the chat "
            "template end the prompt at the end of a token."
        )
    return whole[len(before) :]


def encode(processor: ProcessorMixin, requests: Sequence[Request]) -> BatchFeature:
    """Turn requests, with or without images, into one left-padded batch of model inputs.

    Raises
    ------
    BadRequest
        If a text holds what stands for a picture, or :func:`as_rgb` cannot read a picture.
    UnsupportedRequest
        If there is no chat template, or pictures are seen by cross-attention and not all requests
        have as many.
    """
    _refuse_placeholders(processor, requests)
    numbers = sorted({len(request.images) for request in requests})
    if isinstance(processor, MllamaProcessor) and len(numbers) > 1:
        raise UnsupportedRequest(
            f"requests of {numbers} pictures in one batch: to cross-attention, positions that have "
            "no picture to look at see those of the whole batch; encode requests of as many "
            "pictures together, as hauberk.requests.batches puts them."
        )
    prompts = [prompt_of(processor, request) for request in requests]
    images = [[as_rgb(image) for image in request.images] for request in requests]
    if isinstance(processor, PaliGemmaProcessor):
        return _paligemma_inputs(processor, prompts, images)
    bos = processor.tokenizer.bos_token
    templated = bool(bos) and all(prompt.startswith(bos) for prompt in prompts)
    inputs: BatchFeature = processor(
        text=prompts,
        images=images if any(images) else None,
        padding=True,
        padding_side="left",
        add_special_tokens=not templated,  # a template that writes <s> itself needs no second one
        return_tensors="pt",
    )
    return inputs


def _paligemma_inputs(
    processor: PaliGemmaProcessor, prompts: Sequence[str], images: Sequence[list[Image.Image]]
) -> BatchFeature:
    """Do what its processor does with a prompt that has a picture, with every prompt.

    It takes none without, and beside others it puts the beginning of text into the middle of such
    a one.  Its labels, which tell the model that it is trained, are left out.
    """
    token, tokenizer = processor.image_token, processor.tokenizer
    for prompt, shown in zip(prompts, images, strict=True):
        if prompt.count(token) != len(shown) or tokenizer.bos_token not in prompt:
            raise ValueError(
                f"the chat template makes {prompt[:60]!r} of a request with {len(shown)} pictures; "
                f"for PaliGemma it has to write {token!r} for each, and {tokenizer.bos_token!r} "
                "behind them."
            )
    expanded = [prompt.replace(token, token * processor.image_seq_length) for prompt in prompts]
    told = tokenizer(
        expanded,
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_token_type_ids=True,
        return_tensors="pt",
    )
    flat = [image for shown in images for image in shown]
    pixels = processor.image_processor(flat, return_tensors="pt") if flat else {}
    return BatchFeature({**told, **pixels})


def _refuse_placeholders(processor: ProcessorMixin, requests: Sequence[Request]) -> None:
    # boi_token is what Gemma 3 reads in a prompt where others read image_token
    names = ("image_token", "boi_token", "video_token")
    tokens = [getattr(processor, name, None) for name in names]
    for index, request in enumerate(requests):
        for text in (request.text, request.system or "", request.begun):
            for token in tokens:
                if isinstance(token, str) and token in text:
                    raise BadRequest(
                        f"request {index}: the text {text[:60]!r} holds {token!r}, which stands "
                        "for a picture or video to the model; take it out and give pictures as "
                        "`images`."
                    )


def as_rgb(image: Image.Image) -> Image.Image:
    """Read a picture of any mode as 8-bit colours; 16-bit greyscale is scaled down.

    Raises
    ------
    BadRequest
        If nothing tells which value is white: 32-bit integers (mode I) and floats (mode F), which
        Pillow would clip to 0..255.
    """
    if image.mode in ("I", "F"):
        raise BadRequest(
            f"a picture of mode {image.mode!r} does not say which value is white; scale it to "
            "0..255 and convert it to mode 'L' or 'RGB'."
        )
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))  # 65535 / 255
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of the direct way, which cannot keep it
    return image if image.mode == "RGB" else image.convert("RGB")


class EncoderCache:
    """What a processor and a vision tower make of requests that are answered again and again.

    For settings of a defense that leave requests, vision tower and projector as they are, as those
    of CMRM do.  A picture that is edited in place is not seen to have changed.

    Parameters
    ----------
    model, processor : those that :func:`respond` is called with
    limit : bytes of tensors, on the model's device, that are kept at most; what comes later is made
        anew each time
    """

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, limit: int = 2**31
    ) -> None:
        self.model, self.processor, self.free = model, processor, limit
        self._kept: dict[tuple[Any, ...], tuple[Sequence[Request], dict[str, Any]]] = {}

    def inputs(
        self, requests: Sequence[Request], make: Callable[[], Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """Give the inputs of a batch as ``make`` made them first, features in place of pixels."""
        key = tuple(
            (request.text, request.system, request.begun, *map(id, request.images))
            for request in requests
        )
        if key not in self._kept:
            inputs = self._looked_at(make())
            size = _bytes(inputs.values())
            if size > self.free:
                return inputs
            self.free -= size
            self._kept[key] = requests, inputs  # ids of images are theirs as long as these are held
        return self._kept[key][1]

    def _looked_at(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Let the model look at the pictures, if it takes what it sees there as an input."""
        ready = dict(inputs)
        look = getattr(self.model.base_model, "get_image_features", None)
        takes = "mm_encoder_outputs" in signature(self.model.forward).parameters
        if "pixel_values" not in ready or look is None or not takes:
            return ready
        names = signature(look).parameters.keys() & ready.keys()
        seen = look(**{name: ready[name] for name in names}, return_dict=True)
        for name in {"hidden_states", "attentions"} & seen.keys():
            seen[name] = None  # of every layer; no decoder reads them
        del ready["pixel_values"]
        return ready | {"mm_encoder_outputs": {"image": seen}}


def _bytes(value: Any) -> int:
    if isinstance(value, Mapping):
        return _bytes(value.values())
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, Iterable) else 0


@torch.no_grad()  # not inference_mode: what a defense keeps may serve a later backward pass
def respond(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    defense: SupportsDefense | None = None,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    on_batch: Callable[[Sequence[int], Sequence[Response]], None] | None = None,
    cache: EncoderCache | None = None,
) -> list[Response]:
    """Answer requests greedily, in batches, with the model armoured by ``defense``.

    The one way to generate.  Requests with and without images may be mixed; similar lengths are
    batched together, and rows leave a batch as their answers end.  Every answer is meant to equal
    that of a batch of one; rounding can tip a near tie between two tokens, so every evaluation
    checks some (:func:`hauberk.evaluation.run.differing_alone`).

    Parameters
    ----------
    model, processor : as ``from_pretrained`` gives them; the model stays where it is
    requests : any number of them
    defense : what rewrites the requests and changes the model meanwhile; None for nothing
    max_new_tokens : an answer ends here if the model does not end it
    batch_size : requests that are prefilled and decoded together
    on_batch : called after each batch with the indices of its requests and their responses, so
        that a caller can keep what is finished
    cache : keeps what the encoders make of a batch for when the same requests are asked with the
        same ``batch_size`` under another setting

    Returns
    -------
    list of Response
        In the order of ``requests``.

    Raises
    ------
    TypeError, ValueError
        If something else than requests is asked, a size is not positive, or the cache is of another
        model or processor.
    BadRequest
        Naming the request: before anything is answered if a text holds what stands for a picture,
        in its batch if the processor cannot read it or it does not fit into the model's context.
    UnsupportedRequest
        If the generation config sets ``min_length``, which counts padding.
    """
    for name, number in {"batch_size": batch_size, "max_new_tokens": max_new_tokens}.items():
        if number < 1:
            raise ValueError(f"{name}: {number} is wrong, 1 or more is right.")
    if cache and (cache.model is not model or cache.processor is not processor):
        raise ValueError("the cache is of another model or processor; make one for each.")
    if isinstance(requests, Request):
        raise TypeError(f"{requests!r} is one request; give a list: [request].")
    for request in requests:
        if not isinstance(request, Request):
            raise TypeError(
                f"{request!r} is no request; give hauberk.Request(text, images) for each answer."
            )

    if shortest := getattr(model.generation_config, "min_length", None):
        raise UnsupportedRequest(
            f"generation_config.min_length is {shortest}, which counts the prompt and its padding, "
            "so that an answer would depend on its batch; set min_new_tokens instead."
        )

    _refuse_placeholders(processor, requests)
    answers: dict[int, Response] = {}
    with defense.applied(model) if defense else nullcontext():
        order = sorted(range(len(requests)), key=lambda i: _length(requests[i]))
        for indices in batches(model, requests, order, batch_size):
            asked = [requests[index] for index in indices]
            batch = _respond(model, processor, asked, indices, defense, max_new_tokens, cache)
            answers.update(zip(indices, batch, strict=True))
            if on_batch:
                on_batch(indices, batch)
    return [answers[index] for index in range(len(requests))]


def batches(
    model: PreTrainedModel, requests: Sequence[Request], order: Iterable[int], batch_size: int
) -> Iterator[list[int]]:
    """Cut an order of requests into batches that a model answers as it does single ones.

    To cross-attention, positions that have no picture to look at see those of the whole batch: of
    such a model, only requests of as many pictures come together.
    """
    alike = looks_across(model)
    placed = sorted(order, key=lambda i: len(requests[i].images)) if alike else order
    for _, group in groupby(placed, lambda i: alike and len(requests[i].images)):
        indices = list(group)
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]


def _length(request: Request) -> tuple[int, int]:
    return len(request.images), len(request.text)


def _respond(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    indices: Sequence[int],
    defense: SupportsDefense | None,
    max_new_tokens: int,
    cache: EncoderCache | None,
) -> list[Response]:
    started = time.perf_counter()
    batch = rewritten(defense, requests, indices) if defense else requests

    def make() -> BatchFeature:
        inputs = _encode(processor, batch, indices).to(model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        return inputs

    inputs = cache.inputs(batch, make) if cache else make()
    _refuse_overlong(model, inputs, indices, max_new_tokens)
    generate: Any = model.generate
    answers = generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        max_time=None,  # an answer is not to depend on the clock
        do_sample=False,
        num_beams=1,
        custom_generate=greedy,
    )
    lasts = inputs["input_ids"][:, -1].tolist()
    texts = [
        _said(processor, request.begun, last, answer)
        for request, last, answer in zip(batch, lasts, answers, strict=True)
    ]
    seconds = (time.perf_counter() - started) / len(indices)
    return [
        Response(text.strip(), len(answer), seconds)
        for text, answer in zip(texts, answers, strict=True)
    ]


def _said(processor: ProcessorMixin, begun: str, last: int, answer: list[int]) -> str:
    """Spell out an answer: what it began with, and the tokens after the ``last`` of that."""
    if not begun:
        return str(processor.decode(answer, skip_special_tokens=True))
    # Decoded alone, some tokenizers would take the space from its first word.
    known, whole = (
        str(processor.decode(ids, skip_special_tokens=True)) for ids in ([last], [last, *answer])
    )
    return begun + whole[len(known) :]


def rewritten(
    defense: SupportsDefense, requests: Sequence[Request], indices: Sequence[int]
) -> Sequence[Request]:
    """Let a defense change requests, all at once if it can; one that it cannot read is named."""
    _read_pictures(requests, indices)
    if together := getattr(defense, "rewrite_all", None):
        try:
            rewritten: list[Request] = together(requests)
            return rewritten
        except BadRequest:
            pass  # one by one tells which
    found = []
    for index, request in zip(indices, requests, strict=True):
        try:
            found.append(defense.rewrite(request))
        except BadRequest as error:
            raise BadRequest(f"request {index}: {error}") from error
    return found


def _read_pictures(requests: Sequence[Request], indices: Sequence[int]) -> None:
    """Read lazily opened files here: at a second attempt, Pillow takes half of some for whole."""
    for index, request in zip(indices, requests, strict=True):
        for number, image in enumerate(request.images):
            try:
                image.load()
            except Exception as error:  # Pillow has no error of its own for what it cannot read
                raise BadRequest(
                    f"request {index}: picture {number}: its file cannot be read ({error!r}); "
                    "load it again, whole."
                ) from None


def _encode(
    processor: ProcessorMixin, requests: Sequence[Request], indices: Sequence[int]
) -> BatchFeature:
    try:
        return encode(processor, requests)
    except Exception as error:  # processors have no error of their own for what they cannot read
        if len(indices) > 1:
            for index, request in zip(indices, requests, strict=True):
                _encode(processor, [request], [index])  # raises for the first that is unreadable
        named = ", ".join(map(str, indices))
        raise BadRequest(f"request {named}: the processor cannot read it: {error}") from error


def context_of(model: PreTrainedModel) -> float:
    """How many tokens a model reads and writes at the most; infinity where its config is silent."""
    text = model.config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or inf


def _refuse_overlong(
    model: PreTrainedModel, inputs: Mapping[str, Any], indices: Sequence[int], max_new_tokens: int
) -> None:
    context = context_of(model)
    for index, tokens in zip(indices, inputs["attention_mask"].sum(1).tolist(), strict=True):
        if tokens + max_new_tokens > context:
            raise BadRequest(
                f"request {index}: {tokens} tokens of prompt and {max_new_tokens} of answer do not "
                f"fit into the model's context of {context}; shorten the text, give fewer or "
                "smaller pictures, or ask for fewer new tokens."
            )
