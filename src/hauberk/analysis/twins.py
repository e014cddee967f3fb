"""The shift of one prompt: its states without an image minus its states with a blank one.

For a prompt x with an image, and img' a meaningless image of the same size,

    v[l](x) = h[l](x) - h[l](x, img')        at the last prompt position of decoder block l,

the "shifting vector" of CMRM (arXiv:2410.09047, Eq. 4; we add it, which moves towards text).
Taken literally that is two more prefills a prompt.  Where the image stands before the text, all
blank twins begin with the same tokens, so their key/value cache is computed once and reused;
what is left of a blank twin is as short as a text twin, and both run in one batch.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, ProcessorMixin

from hauberk.anatomy import anatomy_of
from hauberk.blank import BlankKind, blank_image
from hauberk.errors import UnsupportedRequest
from hauberk.hooks import recording
from hauberk.requests import Request, encode, mean_color, prompt_of

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
        If the chat template does not simply insert text where an image stands, so that the text
        twin cannot be read off a tokenized prompt.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, blank: BlankKind = "white"
    ) -> None:
        self.model, self.processor, self.blank = model, processor, blank
        self.anatomy = anatomy_of(model)
        self.token = processor.tokenizer.convert_ids_to_tokens(self.anatomy.image_token_id)
        self.inserted = _inserted_by_image(processor, self.token)
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
        tokenizer = self.processor.tokenizer
        prompt = tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if tokenizer(prompt, add_special_tokens=False)["input_ids"] != ids:
            raise UnsupportedRequest(
                "the tokenizer does not give these ids back for the prompt that it decodes from "
                f"them ({prompt[-60:]!r}); a shift per sample needs that. Use level: dataset."
            )
        collapsed = re.sub(f"(?:{re.escape(self.token)})+", lambda _: self.token, prompt)
        twin = collapsed.replace(self.inserted, "")
        if self.token in twin:
            raise UnsupportedRequest(
                f"image tokens stand in the prompt other than as {self.inserted!r}, which the "
                "chat template inserts; render prompts with the processor's own template."
            )
        found: list[int] = tokenizer(twin, add_special_tokens=False)["input_ids"]
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
        image = self.anatomy.image_token_id
        if self.anatomy.layout != "fixed":
            raise UnsupportedRequest(
                f"blank twins of {self.anatomy.layout!r} pixel layouts are not built yet; "
                "use level: dataset."
            )
        runs = sum(
            a == image and b != image for a, b in zip(prefix, (*prefix[1:], -1), strict=True)
        )
        size = _input_size(self.processor)
        blank = blank_image(size, self.blank, mean=mean_color(self.processor))
        pixels = self.processor.image_processor([blank], return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.model.device, self.model.dtype)
        return {"pixel_values": pixels.expand(runs, -1, -1, -1)}

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
    pixel = Image.new("RGB", (1, 1))
    without = prompt_of(processor, Request(_PROBE))
    with_image = prompt_of(processor, Request(_PROBE, (pixel,)))
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


def _input_size(processor: ProcessorMixin) -> tuple[int, int]:
    size = getattr(processor.image_processor, "crop_size", None) or processor.image_processor.size
    edge = size.get("shortest_edge", 1)
    return size.get("width", edge), size.get("height", edge)
