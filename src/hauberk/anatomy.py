"""Where the parts of a vision-language model live.

What transformers can tell itself (the decoder, the image token) is asked of it; where a family
differs there is one row in :data:`FAMILIES`.  Nothing is guessed: a part that is not found is an
error that says what was looked for.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from hauberk.errors import LayerOutOfRange, UnknownFamily

Layout = Literal["fixed", "tiles", "flat", "cross"]
"""How the processor lays out pixels: one square, tiles, flat patches, or cross-attention."""


@dataclass(frozen=True)
class Family:
    """One row of the table: dotted paths below the model, and the pixel layouts."""

    vision_tower: str
    projector: str
    layouts: Mapping[str, Layout]
    """By the model type of the vision tower."""
    deepstack: str | None = None
    """A module list of further mergers, whose features are added to the first decoder blocks."""


FAMILIES = {
    "llava": Family(
        "model.vision_tower",
        "model.multi_modal_projector",
        {"clip_vision_model": "fixed", "siglip_vision_model": "fixed"},
    ),
    "qwen2_5_vl": Family("model.visual", "model.visual.merger", {"qwen2_5_vl_vision": "flat"}),
    "internvl": Family(
        "model.vision_tower", "model.multi_modal_projector", {"internvl_vision": "tiles"}
    ),
}


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model."""

    family: str
    decoder: nn.Module
    """The language model without its head; called with ``inputs_embeds``."""
    blocks: tuple[nn.Module, ...]
    """Decoder blocks, counted from 0."""
    hidden_size: int
    vision_tower: nn.Module
    projector: nn.Module
    connectors: Mapping[str, nn.Module]
    """All that connects picture and text, by dotted path below the model: the projector first (a
    merger, in some families), and what further mergers there are."""
    image_token_id: int
    """The placeholder that stands in ``input_ids`` once for every image feature."""
    layout: Layout

    def check_layers(self, layers: Collection[int]) -> None:
        """Raise :class:`LayerOutOfRange` unless every layer is a block of this model."""
        outside = sorted(layer for layer in layers if not 0 <= layer < len(self.blocks))
        if outside:
            raise LayerOutOfRange(
                f"layers {outside} are outside 0..{len(self.blocks) - 1}, the decoder blocks of "
                f"this {self.family!r} model; correct `layers` in params.yaml."
            )


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Find the parts of ``model``.

    Raises
    ------
    UnknownFamily
        If the model type has no row in :data:`FAMILIES`, or a part is not what and where the row
        says.
    """
    name = model.config.model_type
    family = FAMILIES.get(name)
    if family is None:
        raise UnknownFamily(
            f"model type {name!r} ({type(model).__name__}) is not known; known are "
            f"{sorted(FAMILIES)}. Add a row to FAMILIES in hauberk/anatomy.py with the paths of "
            "its vision tower and projector."
        )
    eyes = model.config.vision_config.model_type
    if eyes not in family.layouts:
        raise UnknownFamily(
            f"a vision tower of type {eyes!r} is not known in {name!r}; known are "
            f"{sorted(family.layouts)}. Add its pixel layout to the row in FAMILIES in "
            "hauberk/anatomy.py."
        )
    decoder = model.get_decoder()
    blocks = getattr(decoder, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise UnknownFamily(
            f"the decoder of {name!r}, a {type(decoder).__name__}, has no module list `layers`."
        )
    return Anatomy(
        family=name,
        decoder=decoder,
        blocks=tuple(blocks),
        hidden_size=model.config.get_text_config().hidden_size,
        vision_tower=_part(model, family.vision_tower, "vision tower"),
        projector=_part(model, family.projector, "projector"),
        connectors={
            path: _part(model, path, "projector")
            for path in (family.projector, family.deepstack)
            if path is not None
        },
        image_token_id=model.config.image_token_id,
        layout=family.layouts[eyes],
    )


def _part(model: PreTrainedModel, path: str, what: str) -> nn.Module:
    try:
        part: nn.Module = attrgetter(path)(model)
    except AttributeError:
        raise UnknownFamily(
            f"the {what} of {model.config.model_type!r} should be at `{path}`, but there is no "
            f"such module in {type(model).__name__}; correct its row in FAMILIES."
        ) from None
    return part
