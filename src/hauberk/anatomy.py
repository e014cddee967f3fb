"""Where the parts of a vision-language model live.

What transformers can tell itself (the decoder, the vision tower, the image token) is asked of it;
the projector, for which it has no getter, is looked for under the names that its models use.  Where
a family differs there is one row in :data:`FAMILIES`.  Nothing is guessed: a part that is not
found, or found twice, is an error that says what was looked for and what to add.

Only shapes and names are looked at, never values: a model without weights, on the meta device, has
the same anatomy.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from operator import attrgetter
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from hauberk.errors import LayerOutOfRange, UnknownFamily

Layout = Literal["fixed", "tiles", "flat", "anyres", "split", "sized", "cross"]
"""How the processor lays out pixels, and so how the tokens of a picture come about:

* ``fixed``   one square a picture, always as many tokens (LLaVA, PaliGemma, Gemma 3)
* ``tiles``   squares of all pictures below one another (InternVL)
* ``flat``    patches of all pictures below one another, and a grid for each, along which its tokens
  have positions (Qwen-VL)
* ``anyres``  tiles picture by picture, and the size of each picture (LLaVA-NeXT)
* ``split``   tiles request by request, with a mask of their pixels (Idefics3)
* ``sized``   pictures of their own size below one another, padded, and the sizes (Pixtral)
* ``cross``   tiles request by request, seen by blocks of their own: the prompt has one token for a
  picture and no positions of what it shows (Llama 3.2 Vision)
"""


@dataclass(frozen=True)
class Family:
    """One row of the table: what cannot be asked of transformers.  Paths are below the model."""

    layouts: Mapping[str, Layout] = field(default_factory=dict)
    """By the model type of the vision tower.  What is not named here, and has neither positions
    along a grid nor cross-attention, has no known layout."""
    vision_tower: str | None = None
    """None where ``get_encoder(modality="image")`` finds it."""
    projector: str | None = None
    """None where exactly one of :data:`PROJECTORS` is there."""
    deepstack: str | None = None
    """A module list of further mergers, whose features are added to the first decoder blocks; None
    for :data:`DEEPSTACK`, if that is there."""


_SQUARES: Mapping[str, Layout] = {
    "clip_vision_model": "fixed",
    "siglip_vision_model": "fixed",
}

FAMILIES = {
    "deepseek_vl": Family(_SQUARES),
    "gemma3": Family(_SQUARES),
    "idefics3": Family({"idefics3_vision": "split"}),
    "internvl": Family({"internvl_vision": "tiles"}),
    "llava": Family({**_SQUARES, "pixtral": "sized"}),
    "llava_next": Family({"clip_vision_model": "anyres", "siglip_vision_model": "anyres"}),
    "llava_onevision": Family({"siglip_vision_model": "anyres"}),
    "mistral3": Family({"pixtral": "sized"}),
    "paligemma": Family(_SQUARES),
    "smolvlm": Family({"smolvlm_vision": "split"}),
    "vipllava": Family(_SQUARES),
    # These have no projector, or two, by the names of others: Ovis2 a soft visual vocabulary.
    "ernie4_5_vl_moe": Family(projector="model.resampler_model"),
    "hyperclovax_vision_v2": Family(projector="model.projector"),
    "ovis2": Family(projector="model.visual_embeddings_table"),
}
"""By model type."""

PROJECTORS = (
    *("multi_modal_projector", "connector", "aligner", "projector", "mm_projector", "merger"),
    *("vision_projection", "embed_vision"),
)
"""What the models of transformers 5 call what leads from tower to decoder; beside the tower, or in
the case of ``merger`` inside of it."""
DEEPSTACK = "deepstack_merger_list"
"""What Qwen3-VL calls its further mergers, inside of the tower."""


@dataclass(frozen=True)
class FoldSite:
    """Where a constant that is added to what a block puts out can live in a checkpoint.

    Added to the bias of one linear layer at the end of the block, after division by ``scale``.
    """

    kind: Literal["linear", "scaled", "gated", "none"]
    layer: str = ""
    """Dotted path below the block."""
    gate: str = ""
    """A parameter of the block whose tanh the bias is to be divided by.  Such a block runs where
    there is a picture, and nowhere else."""
    scale: float = 1.0
    reason: str = ""
    """Why there is none."""


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
    """The placeholder that stands in ``input_ids`` once for every image feature; with the layout
    ``cross``, once for every picture."""
    layout: Layout | None
    """None if it is not known: nothing that depends on it is done then."""
    mutual: bool = False
    """Whether positions of one picture, or of the whole prompt, see each other in both directions,
    as ``token_type_ids`` tell (Gemma 3, PaliGemma)."""

    def check_layers(self, layers: Collection[int]) -> None:
        """Raise :class:`LayerOutOfRange` unless every layer is a block of this model."""
        outside = sorted(layer for layer in layers if not 0 <= layer < len(self.blocks))
        if outside:
            raise LayerOutOfRange(
                f"layers {outside} are outside 0..{len(self.blocks) - 1}, the decoder blocks of "
                f"this {self.family!r} model; correct `layers` in params.yaml."
            )


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Find the parts of ``model``, with weights or on the meta device.

    Raises
    ------
    UnknownFamily
        If a part is not found, found twice, or not what and where its row says.
    """
    decoder, blocks = decoder_of(model)
    tower = vision_tower_of(model)
    connectors = connectors_of(model, tower)
    return Anatomy(
        family=model.config.model_type,
        decoder=decoder,
        blocks=blocks,
        hidden_size=model.config.get_text_config().hidden_size,
        vision_tower=tower,
        projector=next(iter(connectors.values())),
        connectors=connectors,
        image_token_id=image_token_of(model),
        layout=layout_of(model),
        mutual="token_type_ids" in signature(model.forward).parameters,
    )


def decoder_of(model: PreTrainedModel) -> tuple[nn.Module, tuple[nn.Module, ...]]:
    """Find the language model without its head, and its blocks.

    Raises
    ------
    UnknownFamily
        If there is none that goes from left to right, or it has no module list ``layers``.
    """
    if model.config.get_text_config().is_encoder_decoder or model.config.is_encoder_decoder:
        raise UnknownFamily(
            f"{_named(model)} reads prompts with an encoder of their own, where the defenses need "
            "one decoder for prompt and answer; choose a decoder-only model."
        )
    decoder: Any = model.get_decoder()
    if not hasattr(decoder, "layers"):
        decoder = getattr(decoder, "model", decoder)  # that of Llama 4 has its head
    blocks = getattr(decoder, "layers", None)
    if decoder is model or not isinstance(blocks, nn.ModuleList):
        raise UnknownFamily(
            f"the decoder of {_named(model)}, a {type(decoder).__name__} that get_decoder() "
            "finds, has no module list `layers`. Models whose class does not tell where their "
            "decoder is are not served."
        )
    return decoder, tuple(blocks)


def vision_tower_of(model: PreTrainedModel) -> nn.Module:
    """Find what looks at pictures.

    Raises
    ------
    UnknownFamily
        If it is not where its row, or transformers, says.
    """
    row = FAMILIES.get(model.config.model_type, Family())
    if row.vision_tower is not None:
        return _part(model, row.vision_tower, "vision tower")
    found: Any = model.get_encoder(modality="image")
    if not isinstance(found, nn.Module) or found in (model, model.base_model):
        raise UnknownFamily(
            f"{_named(model)} has no vision tower that get_encoder(modality='image') finds. If it "
            f"looks at pictures, {_add_row(model, 'vision_tower')}; if not, choose a model that "
            "does."
        )
    return found


def connectors_of(model: PreTrainedModel, tower: nn.Module) -> dict[str, nn.Module]:
    """Find all that connects picture and text, the projector first, by path below the model.

    Raises
    ------
    UnknownFamily
        If there is no projector under a known name, or more than one.
    """
    row = FAMILIES.get(model.config.model_type, Family())
    paths = {id(module): name for name, module in model.named_modules()}
    inside, beside = paths[id(tower)], paths[id(model.base_model)]
    projector = row.projector or _projector_path(model, beside, inside)
    found = {projector: _part(model, projector, "projector")}
    deepstack = row.deepstack or f"{inside}.{DEEPSTACK}"
    if row.deepstack is not None or hasattr(tower, DEEPSTACK):
        found[deepstack] = _part(model, deepstack, "deepstack")
    return found


def image_token_of(model: PreTrainedModel) -> int:
    """Find the id of the token that stands for pictures.

    Raises
    ------
    UnknownFamily
        If the config names none.
    """
    names = ("image_token_id", "image_token_index")
    for name in names:
        token = getattr(model.config, name, None)
        if isinstance(token, int):
            return token
    raise UnknownFamily(
        f"the config of {_named(model)} gives no token that stands for pictures, neither as "
        f"`{names[0]}` nor as `{names[1]}`; put the id of that token into its config.json."
    )


def layout_of(model: PreTrainedModel) -> Layout | None:
    """Tell how pixels are laid out; None if that is not known."""
    if looks_across(model):
        return "cross"
    positions = getattr(model.base_model, "get_rope_index", None)
    if (
        positions
        and {"image_grid_thw", "mm_token_type_ids"} <= signature(positions).parameters.keys()
    ):
        return "flat"
    row = FAMILIES.get(model.config.model_type, Family())
    eyes = getattr(model.config, "vision_config", None)
    return row.layouts.get(getattr(eyes, "model_type", ""))


def looks_across(model: PreTrainedModel) -> bool:
    """Tell whether blocks of the decoder look at pictures by cross-attention."""
    return bool(getattr(model.config.get_text_config(), "cross_attention_layers", None))


def fold_site(block: nn.Module) -> FoldSite:
    """Tell where a constant added to the output of a decoder block could be kept as a bias.

    Blocks are known by the names of their parts: those that end in ``residual + mlp(...)``.  What
    follows the MLP in a block of other parts is not known, and nothing is folded there.
    """
    parts = {name for name, _ in block.named_children()}
    names = {name for name, _ in block.named_modules() if name.rpartition(".")[2] == "down_proj"}
    after = sorted(parts & {"post_feedforward_layernorm", "post_mlp_layernorm"})
    if getattr(block, "norm_after", False):  # a switch of Molmo 2
        after = ["post_attention_layernorm"]
    if after:
        return FoldSite("none", reason=f"`{after[0]}` follows the MLP and would scale a bias")
    if names != {"mlp.down_proj"} or not isinstance(_at(block, "mlp.down_proj"), nn.Linear):
        return FoldSite(
            "none",
            reason=f"a bias needs one linear `mlp.down_proj`; a {type(block).__name__} has "
            f"{', '.join(sorted(names)) or 'none of that name'}",
        )
    gate = "cross_attn_mlp_gate"
    if parts == {"cross_attn", "input_layernorm", "mlp", "post_attention_layernorm"}:
        if hasattr(block, gate):
            return FoldSite("gated", "mlp.down_proj", gate=gate)
    elif parts | {"post_attention_layernorm"} == _PLAIN:
        scale = float(getattr(block, "residual_multiplier", 1.0))
        return FoldSite("linear" if scale == 1 else "scaled", "mlp.down_proj", scale=scale)
    return FoldSite(
        "none",
        reason=f"a {type(block).__name__} of {', '.join(sorted(parts))} is not known to end in "
        "`residual + mlp(...)`",
    )


_PLAIN = {"input_layernorm", "mlp", "post_attention_layernorm", "self_attn"}
"""Parts of a block that adds what its MLP makes; a parallel one has no second norm."""


def path_of(model: PreTrainedModel, part: nn.Module) -> str:
    """The dotted path of a part below the model."""
    paths: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return paths[part]


def _projector_path(model: PreTrainedModel, beside: str, inside: str) -> str:
    looked = [*_below(beside, PROJECTORS), *_below(inside, ["merger"])]
    found = [path for path in looked if isinstance(_at(model, path), nn.Module)]
    if len(found) == 1:
        return found[0]
    what = f"has {len(found)} that may be the projector, {found}" if found else "has no projector"
    raise UnknownFamily(
        f"{_named(model)} {what}; looked for {looked}. If one part leads from its vision tower to "
        f"its decoder, {_add_row(model, 'projector')}."
    )


def _below(path: str, names: Iterable[str]) -> list[str]:
    return [f"{path}.{name}".lstrip(".") for name in names]


def _at(module: nn.Module, path: str) -> Any:
    try:
        return attrgetter(path)(module)
    except AttributeError:
        return None


def _named(model: PreTrainedModel) -> str:
    return f"{model.config.model_type!r} ({type(model).__name__})"


def _add_row(model: PreTrainedModel, part: str) -> str:
    return (
        f"add a row {model.config.model_type!r}: Family({part}='...') with its path below the "
        "model to FAMILIES in hauberk/anatomy.py"
    )


def _part(model: PreTrainedModel, path: str, what: str) -> nn.Module:
    part = _at(model, path)
    if not isinstance(part, nn.Module):
        raise UnknownFamily(
            f"the {what} of {_named(model)} should be at `{path}`, but there is no such module; "
            "correct its row in FAMILIES of hauberk/anatomy.py."
        )
    return part
