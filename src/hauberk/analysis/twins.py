"""The shift of one prompt: its states without an image minus its states with a blank one.

For a prompt x with an image, and img' a meaningless image of the same size,

    v[l](x) = h[l](x) - h[l](x, img')        at the last prompt position of decoder block l,

the "shifting vector" of CMRM (arXiv:2410.09047, Eq. 4; we add it, which moves towards text).
Taken literally that is two more prefills a prompt.  Where the image stands before the text, the
blank twins of all pictures of one size begin with the same tokens, so their key/value cache is
computed once and reused; what is left of a blank twin is as short as a text twin.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from math import prod
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel, ProcessorMixin

from hauberk.anatomy import Anatomy, anatomy_of
from hauberk.blank import BlankKind, blank_image
from hauberk.errors import UnsupportedRequest
from hauberk.hooks import recording
from hauberk.requests import (
    Request,
    batches,
    blank_twin,
    encode,
    mean_color,
    prompt_of,
    text_twin,
)

_PROBE = "how do i open it ?"
_PROBE_SIZE = 32, 32
_KEPT_PREFIXES = 8

Grid = tuple[int, ...]
"""Frames, rows and columns of the tokens of one picture, where pictures are flat patches."""
_Key = tuple[tuple[int, ...], tuple[Grid, ...]]
"""The tokens of a prompt, or of its beginning, and the grids of its pictures."""


@dataclass(frozen=True, eq=False)
class _Prefix:
    """What blank twins begin with, up to the last image token, as the decoder remembers it."""

    layers: list[tuple[Tensor, Tensor]]
    """Keys and values of every block, each (1, heads, length, head size)."""
    length: int
    next_position: int
    """Of the token after it: less than the length where a picture has positions in rows."""


class TwinStates:
    """Computes shifts for batches of tokenized prompts of one model.

    Parameters
    ----------
    model, processor : as loaded; the processor must be the one the prompts were made with
    blank : what the meaningless image shows; noise is drawn at the size at which the model sees a
        picture, and is the same in every place of every request
    remember : bytes of shifts, (blocks, hidden size) float32 each, that are kept at most for
        prompts that come again

    Raises
    ------
    UnsupportedRequest
        If the twins of a prompt do not follow from its tokens (:func:`check_read_off`), if the
        processor has no one size for its squares, or if the text twin cannot be read off, because
        the chat template does not simply insert text where an image stands or the tokenizer hides
        where.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        blank: BlankKind = "white",
        *,
        remember: int = 0,
    ) -> None:
        self.model, self.processor, self.blank = model, processor, blank
        self._free, self._known = remember, dict[_Key, Tensor]()
        self.anatomy = anatomy_of(model)
        check_read_off(self.anatomy, processor.image_processor)
        self.square = _input_size(processor) if self.anatomy.layout != "flat" else None
        tokenizer = processor.tokenizer
        self.token = tokenizer.convert_ids_to_tokens(self.anatomy.image_token_id)
        self._added_ids = frozenset(tokenizer.added_tokens_decoder)
        probe = Request(_PROBE, (Image.new("RGB", _PROBE_SIZE),))
        without, shown = (encode(processor, [request]) for request in (text_twin(probe), probe))
        ids = shown["input_ids"][0].tolist()
        # Of no use, and 0, where pictures are flat patches.
        self.tokens_a_square = ids.count(self.anatomy.image_token_id) // len(shown["pixel_values"])
        self.inserted = _inserted_by_image(processor, self.token)
        written = self._written_for_image(probe.images[0])
        self._picture = re.compile(
            re.escape(self.inserted.replace(self.token, written)).replace(
                re.escape(self.token), f"(?:{re.escape(self.token)})+"
            )
        )
        if self._text_twin(ids) != without["input_ids"][0].tolist():
            raise UnsupportedRequest(
                f"read off the ids of {prompt_of(processor, probe)!r}, the prompt without the "
                f"picture is not {prompt_of(processor, text_twin(probe))!r}: "
                f"{_named(tokenizer)} does not tell such templates' spaces apart. "
                "Use level: dataset."
            )
        self._prefixes: OrderedDict[_Key, _Prefix] = OrderedDict()

    @torch.no_grad()
    def shifts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        image_grid_thw: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Compute v for every row of a batch.

        Parameters
        ----------
        input_ids, attention_mask : (rows, positions) int64, padded on either side
            Prompts with expanded image tokens.  Rows without an image get zeros.
        image_grid_thw : (pictures, 3) int64, as the processor made it
        position_ids : (3 or 4, rows, positions) int64, as ``generate`` makes them
            Where pictures are flat patches (Qwen-VL), one of the two tells their heights and
            widths; elsewhere neither is looked at.

        Returns
        -------
        Tensor (rows, blocks, hidden size), float32, on the model's device

        Raises
        ------
        UnsupportedRequest
            If the twins of a prompt cannot be made from what is given.
        """
        image, kept = self.anatomy.image_token_id, attention_mask.bool()
        rows = [ids[mask].tolist() for ids, mask in zip(input_ids, kept, strict=True)]
        size = (len(rows), len(self.anatomy.blocks), self.anatomy.hidden_size)
        found = torch.zeros(size, device=input_ids.device)
        pictured = [index for index, ids in enumerate(rows) if image in ids]
        if not pictured:
            return found
        runs = [_runs(ids, image) for ids in rows]
        grids: list[tuple[Grid, ...]] = [()] * len(rows)
        if self.anatomy.layout == "flat":
            axes = None
            if position_ids is not None and position_ids.ndim == 3:
                axes = [position_ids[-3:, row, mask] for row, mask in enumerate(kept)]
            grids = self._grids(runs, image_grid_thw, axes)
        keys = {index: (tuple(rows[index]), grids[index]) for index in pictured}
        shifts = {
            index: self._known[keys[index]] for index in pictured if keys[index] in self._known
        }
        if new := [index for index in pictured if index not in shifts]:
            shifts |= zip(new, self._shifts(rows, runs, grids, new), strict=True)
        for index in new:
            self._remember(keys[index], shifts[index])
        found[pictured] = torch.stack([shifts[index].to(found.device) for index in pictured])
        return found

    def _remember(self, key: _Key, shift: Tensor) -> None:
        if shift.nbytes <= self._free and key not in self._known:
            self._known[key] = shift.cpu()
            self._free -= shift.nbytes

    def _shifts(
        self,
        rows: list[list[int]],
        runs: list[list[range]],
        grids: list[tuple[Grid, ...]],
        pictured: list[int],
    ) -> Tensor:
        """Compute the shifts of rows with an image: (rows, blocks, hidden size)."""
        texts, blanks, prefixes = [], [], []
        for index in pictured:
            ids, after = rows[index], runs[index][-1].stop
            if after == len(ids):
                raise UnsupportedRequest(
                    "a prompt ends with its picture, where a shift is read at the text after it; "
                    "render prompts with add_generation_prompt=True."
                )
            texts.append(self._text_twin(ids))
            blanks.append(ids[after:])
            prefixes.append(self._prefix(tuple(ids[:after]), grids[index]))
        return self._last_states(texts) - self._last_states(blanks, prefixes)

    def _grids(
        self, runs: list[list[range]], thw: Tensor | None, axes: list[Tensor] | None
    ) -> list[tuple[Grid, ...]]:
        """Tell the grid of every run of image tokens, from either of what may be known of it."""
        every: list[Grid] = []
        if thw is not None:
            every = self._in_tokens(thw)
        elif axes is not None:
            for row, places in zip(runs, axes, strict=True):
                every += [_extent(places[:, run.start : run.stop]) for run in row]
        tokens = [len(run) for row in runs for run in row]
        if [prod(grid) for grid in every] != tokens:
            raise UnsupportedRequest(
                f"pictures of {tokens} tokens stand in the prompts, where image_grid_thw or "
                f"position_ids tell of grids of {every}; call the model with all that its "
                "processor made of these prompts."
            )
        remaining = iter(every)
        return [tuple(islice(remaining, len(row))) for row in runs]

    def _in_tokens(self, thw: Tensor) -> list[Grid]:
        """Turn grids of patches into grids of tokens."""
        merged = self.processor.image_processor.merge_size
        return [(frames, high // merged, wide // merged) for frames, high, wide in thw.tolist()]

    def _written_for_image(self, picture: Image.Image) -> str:
        """What the processor makes of one image token of the template, the repeated one once."""
        inputs = self.processor(
            text=[self.token], images=[[picture]], add_special_tokens=False, return_tensors="pt"
        )
        written = self._prompt(inputs["input_ids"][0].tolist())
        return re.sub(f"(?:{re.escape(self.token)})+", lambda _: self.token, written)

    def _text_twin(self, ids: list[int]) -> list[int]:
        """Tokenize the prompt anew as if there had been no image."""
        prompt = self._prompt(ids)
        if self._ids(prompt) != ids:
            raise UnsupportedRequest(
                f"{_named(self.processor.tokenizer)} does not give these ids back for the prompt "
                f"that it decodes from them ({prompt[-60:]!r}); a shift per sample needs that. "
                "Use level: dataset."
            )
        twin = self._picture.sub("", prompt)
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

    def _last_states(self, tails: list[list[int]], prefixes: Sequence[_Prefix] = ()) -> Tensor:
        """Run one batch of tokens, each row after its prefix if there are any; (n, blocks, d)."""
        count, width = len(tails), max(map(len, tails))
        past = max((prefix.length for prefix in prefixes), default=0)
        ids = torch.zeros(count, width, dtype=torch.long)
        mask = torch.zeros(count, past + width, dtype=torch.long)
        for row, tail in enumerate(tails):
            ids[row, width - len(tail) :] = torch.tensor(tail)
            mask[row, past + width - len(tail) :] = 1
        positions = (mask[:, past:].cumsum(1) - 1).clamp(min=0)
        for row, prefix in enumerate(prefixes):
            mask[row, past - prefix.length : past] = 1
            positions[row] += prefix.next_position
        device = self.model.device
        with recording(self.anatomy.blocks, lambda states: states[:, -1].float()) as seen:
            self.anatomy.decoder(
                inputs_embeds=self.model.get_input_embeddings()(ids.to(device)),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),  # the same on all axes, if there are three
                past_key_values=_stacked(prefixes, past),
                use_cache=bool(prefixes),
            )
        return torch.stack([outputs[0] for outputs in seen], dim=1)

    def _prefix(self, ids: tuple[int, ...], grids: tuple[Grid, ...]) -> _Prefix:
        """Read the beginning of a prompt, every image blank, unless it was read lately."""
        key = ids, grids
        if key not in self._prefixes:
            self._prefixes[key] = self._read(ids, grids)
            while len(self._prefixes) > _KEPT_PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)
        return self._prefixes[key]

    def _read(self, ids: tuple[int, ...], grids: tuple[Grid, ...]) -> _Prefix:
        inputs = {
            "input_ids": torch.tensor([ids], device=self.model.device),
            **self._blank_pixels(ids, grids),
        }
        core: Any = self.model.model
        if grids:
            # Given positions, the model does not touch those it keeps for the prompt in hand.
            kinds = (inputs["input_ids"] == self.anatomy.image_token_id).int()
            positions, _ = core.get_rope_index(mm_token_type_ids=kinds, **inputs)
        else:
            positions = torch.arange(len(ids), device=self.model.device).unsqueeze(0)
        cache = DynamicCache()
        core(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        layers: list[Any] = cache.layers
        kept = [(layer.keys, layer.values) for layer in layers]
        return _Prefix(kept, len(ids), int(positions.max()) + 1)

    def _blank_pixels(self, ids: Sequence[int], grids: tuple[Grid, ...]) -> dict[str, Tensor]:
        """Blank pictures that take the place of those in ``ids``, as the model takes them."""
        if grids:
            images = self.processor.image_processor
            side = images.patch_size * images.merge_size
            made = self._blanks([(columns * side, rows * side) for _, rows, columns in grids])
            if self._in_tokens(made["image_grid_thw"]) != list(grids):
                raise UnsupportedRequest(
                    f"blank pictures of {self._in_tokens(made['image_grid_thw'])} tokens cannot "
                    f"stand for those of the prompt, {list(grids)}; give every picture through "
                    "the processor of this defense, or use level: dataset."
                )
            return made
        assert self.square is not None  # known where there are no grids
        squares = ids.count(self.anatomy.image_token_id) // self.tokens_a_square
        tiles = max(map(len, _runs(ids, self.anatomy.image_token_id))) // self.tokens_a_square
        if self.anatomy.layout == "tiles" and tiles > 1 and self.blank in ("uniform", "gaussian"):
            raise UnsupportedRequest(
                f"{self.blank} noise cut into {tiles} tiles is not the same as in one, and their "
                "order cannot be told from a prompt; use blank: white, black or mean."
            )
        made = self._blanks([self.square])
        return {"pixel_values": made["pixel_values"][:1].expand(squares, -1, -1, -1)}

    def _blanks(self, sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Process blank pictures of these widths and heights in pixels."""
        mean = mean_color(self.processor)
        blanks = [blank_image(size, self.blank, mean=mean) for size in sizes]
        made = self.processor.image_processor(blanks, return_tensors="pt")
        made["pixel_values"] = made["pixel_values"].to(self.model.dtype)
        return dict(made.to(self.model.device))


def check_read_off(anatomy: Anatomy, images: Any) -> None:
    """Raise :class:`UnsupportedRequest` unless a prompt's tokens tell what its twins are.

    ``images`` is the image processor.

    They tell the size of a picture only where that is fixed, or a grid; and a blank prefix can be
    read once for many prompts only where nothing looks ahead.
    """
    if anatomy.layout not in ("fixed", "tiles", "flat"):
        raise UnsupportedRequest(
            f"how a {anatomy.family!r} model is given a blank picture of the same size cannot be "
            f"told from the tokens of a prompt (pixel layout: {anatomy.layout or 'not known'}); "
            "use level: dataset."
        )
    if anatomy.layout == "flat" and not hasattr(images, "merge_size"):
        raise UnsupportedRequest(
            f"the image processor of this {anatomy.family!r} model, {type(images).__name__}, does "
            "not tell how many patches become one token (merge_size); use level: dataset."
        )
    if anatomy.layout == "fixed" and getattr(images, "do_pad", None):
        raise UnsupportedRequest(
            f"the {type(images).__name__} of this {anatomy.family!r} model fills pictures up to "
            "squares, so that what a blank one looks like depends on a size that the tokens of a "
            "prompt do not tell; use level: dataset."
        )
    if anatomy.mutual:
        raise UnsupportedRequest(
            f"in a {anatomy.family!r} model tokens of a picture or prompt see those behind them, "
            "so that a blank prefix is not the same before every question; use level: dataset."
        )


def rendered_shifts(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    blank: BlankKind = "white",
    batch_size: int = 64,
) -> Tensor:
    """The shifts of requests from two whole prefills each: (requests, blocks, hidden size).

    Of any family: the twins are rendered by the chat template and read by the processor.
    """
    twins = [text_twin(request) for request in requests]
    blanks = [blank_twin(request, processor, blank) for request in requests]
    without, shown = (last_states(model, processor, each, batch_size) for each in (twins, blanks))
    return without - shown


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
    blocks = anatomy_of(model).blocks
    found = torch.empty(len(requests), len(blocks), anatomy_of(model).hidden_size)
    for indices in batches(model, requests, range(len(requests)), batch_size):
        inputs = encode(processor, [requests[index] for index in indices]).to(model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        with recording(blocks, lambda states: states[:, -1].float()) as seen:
            model(**inputs, logits_to_keep=1)
        states: list[Tensor] = []
        for outputs in seen:
            # The last pass: a defense per sample runs the twins through the same blocks before it.
            # Cross-attention is passed over where there is no picture: the stream stays as it is.
            states.append(outputs[-1] if outputs else states[-1])
        found[indices] = torch.stack(states, dim=1).cpu()
    return found


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


def _runs(ids: Sequence[int], image: int) -> list[range]:
    """Tell where image tokens stand without a gap."""
    runs = (list(run) for _, run in groupby(range(len(ids)), lambda place: ids[place] == image))
    return [range(run[0], run[-1] + 1) for run in runs if ids[run[0]] == image]


def _extent(positions: Tensor) -> Grid:
    """Tell how far positions (axes, tokens) reach along every axis."""
    return tuple((positions.amax(1) - positions.amin(1) + 1).tolist())


def _stacked(prefixes: Sequence[_Prefix], length: int) -> DynamicCache | None:
    """Put the caches of prefixes below one another, padded on the left to ``length``."""
    if not prefixes:
        return None
    several = list(dict.fromkeys(prefixes))
    rows = [several.index(prefix) for prefix in prefixes]

    def stack(parts: Sequence[Tensor]) -> Tensor:
        padded = torch.cat([pad(part, (0, 0, length - part.shape[2], 0)) for part in parts])
        return padded[rows] if len(several) > 1 else padded.expand(len(rows), -1, -1, -1)

    cache = DynamicCache()
    for layer, pairs in enumerate(zip(*(prefix.layers for prefix in several), strict=True)):
        keys, values = zip(*pairs, strict=True)
        cache.update(stack(keys), stack(values), layer)
    return cache


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
