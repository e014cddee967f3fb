"""What a frozen vision tower makes of pictures: computed once, and fed to the projector ever after.

Of every set of pictures the input of the projector is kept, and in which order the decoder is given
the rows that the projector puts out (Qwen's merger works on windows, whose rows are put back into
reading order behind it).  The order is found by letting the projector put out the numbers of its
rows once; a model that does anything else to them is not served.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hauberk.anatomy import Anatomy
from hauberk.errors import UnsupportedRequest


@dataclass(frozen=True)
class Seen:
    """What a vision tower makes of the pictures of one request."""

    fed: Tensor
    """Input of the projector: (patches, width), or (pictures or tiles, patches, width)."""
    order: Tensor
    """(image tokens,) int64: which row of the projector's output each of them is."""
    shapes: tuple[torch.Size, ...]
    """Of the features that are handed to the decoder."""
    listed: bool
    """Whether these come in a list."""

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return self.fed.nbytes + self.order.nbytes


class Features:
    """Gives a model the features of pictures, from what is kept or from the tower.

    A picture is always looked at by itself, so that what is kept does not depend on which pictures
    came together, nor on what there was no room for.

    Parameters
    ----------
    model, anatomy : whose vision tower does not change
    limit : bytes that are kept at most, on the model's device; 0 runs the tower inside of every
        pass, as the model itself does
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, limit: int) -> None:
        takes = "mm_encoder_outputs" in signature(model.forward).parameters
        single = len(anatomy.connectors) == 1  # deepstack mergers work inside of the tower
        # Of tiles and sizes some is cut away, and line ends are put in, behind the projector; where
        # it has sizes as a second input, it does that itself.
        rows = anatomy.layout != "anyres"
        rows = rows and len(signature(anatomy.projector.forward).parameters) == 1
        self.model, self.projector = model, anatomy.projector
        self.free = limit if takes and single and rows else 0
        self.split = bool(self.free)
        """Whether projector and tower run apart."""
        self._kept: dict[tuple[int, ...], tuple[Sequence[Any], Seen]] = {}

    def given(self, rows: Sequence[tuple[Sequence[Any], Mapping[str, Tensor]]]) -> dict[str, Any]:
        """Make the inputs that show pictures to the model.

        Parameters
        ----------
        rows : for each request with pictures, these (by which they are known again) and what the
            processor made of them, ``pixel_values`` and perhaps more
        """
        if not rows:
            return {}
        names = rows[0][1].keys()
        told = {name: _joined([inputs[name] for _, inputs in rows]) for name in names}
        if not self.split:
            return self._ready(told)
        seen = [self._seen(*row) for row in rows]
        made = self.projector(torch.cat([one.fed for one in seen])).flatten(0, -2)
        parts: list[Tensor] = []
        first = 0
        for one in seen:
            rows_made = made[first : first + len(one.order)][one.order]
            first += len(one.order)
            sizes = [shape[:-1].numel() for shape in one.shapes]
            split = rows_made.split(sizes)
            parts += [part.reshape(shape) for part, shape in zip(split, one.shapes, strict=True)]
        features: Any = tuple(parts) if seen[0].listed else torch.cat(parts)
        del told["pixel_values"]
        ready = BaseModelOutputWithPooling(pooler_output=features)
        return told | {"mm_encoder_outputs": {"image": ready}}

    def _ready(self, told: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ready = {name: values.to(self.model.device) for name, values in told.items()}
        return ready | {"pixel_values": ready["pixel_values"].to(self.model.dtype)}

    def _seen(self, images: Sequence[Any], inputs: Mapping[str, Tensor]) -> Seen:
        key = tuple(map(id, images))
        if key not in self._kept:
            seen = self._look(inputs)
            if seen.bytes > self.free:
                return seen
            self.free -= seen.bytes
            self._kept[key] = images, seen  # ids are theirs as long as these are held
        return self._kept[key][1]

    @torch.no_grad()
    def _look(self, inputs: Mapping[str, Tensor]) -> Seen:
        fed: list[Tensor] = []

        def number(_module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            fed.append(args[0])
            count = output.shape[:-1].numel()
            numbers = torch.arange(count, device=output.device, dtype=torch.float32)
            return numbers.view(*output.shape[:-1], 1).expand(output.shape)

        body: Any = self.model.base_model
        with self.projector.register_forward_hook(number):
            found = body.get_image_features(**self._ready(inputs), return_dict=True).pooler_output
        parts = [found] if isinstance(found, Tensor) else list(found)
        rows = torch.cat([part.flatten(0, -2) for part in parts])
        numbers = torch.arange(len(rows), device=rows.device, dtype=rows.dtype)
        if len(fed) != 1 or not torch.equal(rows.sort(0).values, numbers[:, None].expand_as(rows)):
            raise UnsupportedRequest(
                f"{type(self.model).__name__} does more to what its projector puts out than to "
                "change the order of rows, so that features cannot be kept; train with no memory "
                "for them (features: 0), which runs the tower at every step."
            )
        return Seen(
            fed=fed[0].detach().clone(),
            order=rows[:, 0].long(),
            shapes=tuple(part.shape for part in parts),
            listed=not isinstance(found, Tensor),
        )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Put pictures below one another, padded with zeros to one shape, as processors do.

    What is padded is told by ``image_sizes`` or a mask, and no model reads it.
    """
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    filled = [part.new_zeros(len(part), *shape) for part in parts]
    for whole, part in zip(filled, parts, strict=True):
        whole[tuple(slice(size) for size in part.shape)] = part
    return torch.cat(filled)
