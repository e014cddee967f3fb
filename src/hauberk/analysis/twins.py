"""The shift of one prompt: its states without an image minus its states with a blank one.

For a prompt x with an image, and img' a meaningless image of the same size,

    v[l](x) = h[l](x) - h[l](x, img')        at the last prompt position of decoder block l,

the "shifting vector" of CMRM (arXiv:2410.09047, Eq. 4; we add it, which moves towards text).
Taken literally that is two more prefills a prompt.  Where the image stands before the text, all
blank twins begin with the same tokens, so their key/value cache is computed once and reused;
what is left of a blank twin is as short as a text twin, and both run in one batch.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, ProcessorMixin

from hauberk.anatomy import anatomy_of
from hauberk.blank import BlankKind, blank_image
from hauberk.errors import UnsupportedRequest
from hauberk.hooks import recording
from hauberk.requests import Request, encode, mean_color, prompt_of, text_twin

_PROBE = "how do i open it ?"
_KEPT_PREFIXES = 8


class TwinStates:
    """Computes shifts for batches of tokenized prompts of one model.

    Parameters
    ----------
    model, processor : as loaded; the processor must be the one the prompts were made with
    blank : what the meaningless image shows; noise is drawn once, and is the same noise in every
        place of every request

    Raises
    ------
    UnsupportedRequest
        If a blank picture does not stand for every picture of any size (another layout than
        ``fixed``), or if the text twin cannot be read off a tokenized prompt, because the chat
        template does not simply insert text where an image stands or the tokenizer hides where.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, blank: BlankKind = "white"
    ) -> None:
        self.model, self.processor, self.blank = model, processor, blank
        self.anatomy = anatomy_of(model)
        if self.anatomy.layout != "fixed":
            raise UnsupportedRequest(
                f"blank twins of {self.anatomy.layout!r} pixel layouts are not built yet; "
                "use level: dataset."
            )
        tokenizer = processor.tokenizer
        self.token = tokenizer.convert_ids_to_tokens(self.anatomy.image_token_id)
        self._added_ids = frozenset(tokenizer.added_tokens_decoder)
        probe = Request(_PROBE, (blank_image(_input_size(processor)),))
        without, shown = (
            encode(processor, [request])["input_ids"][0].tolist()
            for request in (text_twin(probe), probe)
        )
        self.tokens_per_image = shown.count(self.anatomy.image_token_id)
        self.inserted = _inserted_by_image(processor, self.token)
        if self._text_twin(shown) != without:
            raise UnsupportedRequest(
                f"read off the ids of {prompt_of(processor, probe)!r}, the prompt without the "
                f"picture is not {prompt_of(processor, text_twin(probe))!r}: "
                f"{_named(tokenizer)} does not tell such templates' spaces apart. "
                "Use level: dataset."
            )
        self._prefixes: OrderedDict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = OrderedDict()

    @torch.no_grad()
    def shifts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute v for every row of a batch.

        Parameters
        ----------
        input_ids, attention_mask : (rows, positions) int64, padded on either side
            Prompts with expanded image tokens.  Rows without an image get zeros.

        Returns
        -------
        Tensor (rows, blocks, hidden size), float32, on the model's device
        """
        rows = [
            ids[kept.bool()].tolist() for ids, kept in zip(input_ids, attention_mask, strict=True)
        ]
        image = self.anatomy.image_token_id
        size = (len(rows), len(self.anatomy.blocks), self.anatomy.hidden_size)
        found = torch.zeros(size, device=input_ids.device)
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, ids in enumerate(rows):
            if image in ids:
                after = len(ids) - ids[::-1].index(image)
                groups.setdefault(tuple(ids[:after]), []).append(index)
        for prefix, members in groups.items():
            texts = [self._text_twin(rows[index]) for index in members]
            blanks = [rows[index][len(prefix) :] for index in members]
            with_text, with_blank = self._last_states(prefix, texts, blanks)
            found[members] = with_text - with_blank
        return found

    def _text_twin(self, ids: list[int]) -> list[int]:
        """Tokenize the prompt anew as if there had been no image."""
        prompt = self._prompt(ids)
        if self._ids(prompt) != ids:
            raise UnsupportedRequest(
                f"{_named(self.processor.tokenizer)} does not give these ids back for the prompt "
                f"that it decodes from them ({prompt[-60:]!r}); a shift per sample needs that. "
                "Use level: dataset."
            )
        expanded = self.inserted.replace(self.token, self.token * self.tokens_per_image)
        twin = prompt.replace(expanded, "")
        if self.token in twin:
            raise UnsupportedRequest(
                f"image tokens stand in the prompt other than as {self.inserted!r}, which the "
                "chat template inserts for one picture; render prompts with the processor's own "
                "template. One that numbers its pictures can be followed for one picture only: "
                "use level: dataset."
            )
        return self._ids(twin)

    def _prompt(self, ids: list[int]) -> str:
        """Find the text of a tokenized prompt.

        Every piece between added tokens (such as ``<s>`` and ``<image>``) is decoded by itself:
        tokenizers such as Llama's put a space before each piece, and take away no other than the
        first when they decode the whole.
        """
        prompt = before = ""
        for added, run in groupby(ids, self._added_ids.__contains__):
            piece = list(run)
            if added:
                tokens = self.processor.tokenizer.convert_ids_to_tokens(piece)
                prompt, before = prompt + "".join(tokens), tokens[-1]
            else:
                prompt += self._piece(piece, before)
        return prompt

    def _piece(self, ids: list[int], before: str) -> str:
        """Decode ids to the text that gives them again after ``before``, with the fewest spaces."""
        text: str = self.processor.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        first = self._ids(before)
        for candidate in (text.removeprefix(" "), text, f" {text}"):
            if self._ids(before + candidate) == first + ids:
                return candidate
        return text

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def _last_states(
        self, prefix: tuple[int, ...], texts: list[list[int]], blanks: list[list[int]]
    ) -> tuple[Tensor, Tensor]:
        """Run text twins and the rests of blank twins as one batch; (n, blocks, d) of each."""
        cached = self._prefix(prefix)
        device = cached[0][0].device
        tails, past = [*texts, *blanks], len(prefix)
        width, count = max(map(len, tails)), len(texts)
        ids = torch.zeros(len(tails), width, dtype=torch.long)
        mask = torch.zeros(len(tails), past + width, dtype=torch.long)
        mask[count:, :past] = 1  # text twins do not see the prefix
        for row, tail in enumerate(tails):
            ids[row, width - len(tail) :] = torch.tensor(tail)
            mask[row, past + width - len(tail) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(cached):
            shape = (len(tails), -1, -1, -1)
            cache.update(keys.expand(shape), values.expand(shape), layer)
        embeddings = self.model.get_input_embeddings()(ids.to(device))
        with self._recorded() as seen:
            self.anatomy.decoder(
                inputs_embeds=embeddings,
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                past_key_values=cache,
                use_cache=True,
            )
        states = torch.stack([outputs[0] for outputs in seen], dim=1)
        return states[:count], states[count:]

    def _prefix(self, prefix: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of a prompt up to its last image token, every image blank."""
        if prefix not in self._prefixes:
            ids = torch.tensor([prefix], device=self.model.device)
            cache = DynamicCache()
            self.model.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                use_cache=True,
                **self._blank_pixels(prefix),
            )
            layers: list[Any] = cache.layers
            self._prefixes[prefix] = [(layer.keys, layer.values) for layer in layers]
            while len(self._prefixes) > _KEPT_PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(prefix)
        return self._prefixes[prefix]

    def _blank_pixels(self, prefix: Sequence[int]) -> dict[str, Tensor]:
        images = prefix.count(self.anatomy.image_token_id) // self.tokens_per_image
        size = _input_size(self.processor)
        blank = blank_image(size, self.blank, mean=mean_color(self.processor))
        pixels = self.processor.image_processor([blank], return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.model.device, self.model.dtype)
        return {"pixel_values": pixels.expand(images, -1, -1, -1)}

    @contextmanager
    def _recorded(self) -> Iterator[list[list[Tensor]]]:
        with recording(self.anatomy.blocks, lambda states: states[:, -1].float()) as seen:
            yield seen


@torch.no_grad()
def last_states(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    batch_size: int = 64,
) -> Tensor:
    """Block outputs at the last prompt position: (requests, blocks, hidden size) float32, CPU.

    Read with hooks of our own: the last entry of ``output_hidden_states`` has already passed the
    final norm.  Also inside ``defense.applied(model)``, where it shows the states as edited.
    """
    found = []
    for start in range(0, len(requests), batch_size):
        inputs = encode(processor, requests[start : start + batch_size]).to(model.device)
        with recording(anatomy_of(model).blocks, lambda states: states[:, -1].float()) as seen:
            model(**inputs, logits_to_keep=1)
        # The last pass: a defense per sample runs the twins through the same blocks before it.
        found.append(torch.stack([outputs[-1] for outputs in seen], dim=1).cpu())
    return torch.cat(found)


def _inserted_by_image(processor: ProcessorMixin, token: str) -> str:
    """The text that the chat template writes for one image, such as ``<image>`` and a newline."""
    probe = Request(_PROBE, (Image.new("RGB", (1, 1)),))
    without, with_image = prompt_of(processor, text_twin(probe)), prompt_of(processor, probe)
    surplus = len(with_image) - len(without)
    for start in range(len(with_image) - surplus + 1):
        end = start + surplus
        if token in with_image[start:end] and with_image[:start] + with_image[end:] == without:
            return with_image[start:end]
    raise UnsupportedRequest(
        "the chat template changes more than one place when there is an image: "
        f"{with_image!r} against {without!r}; a shift per sample needs an inserted image. "
        "Use level: dataset."
    )


def _named(tokenizer: Any) -> str:
    return f"the tokenizer {tokenizer.name_or_path!r} ({type(tokenizer).__name__})"


def _input_size(processor: ProcessorMixin) -> tuple[int, int]:
    """Width and height of the pictures that the model sees, in pixels."""
    images = processor.image_processor
    size = dict(getattr(images, "crop_size", None) or images.size)
    edge = size.get("shortest_edge")
    width, height = size.get("width", edge), size.get("height", edge)
    if width is None or height is None:
        raise UnsupportedRequest(
            f"{type(images).__name__} gives every picture a size of its own ({size}), where one "
            "width and height would let a blank picture stand for all; use level: dataset."
        )
    return width, height
