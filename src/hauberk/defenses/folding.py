"""CMRM folded into weights: a checkpoint that any engine serves, without a hook.

A vector that is added after a block at every position is a bias of the last linear layer of that
block, where nothing but an addition follows it (:func:`hauberk.anatomy.fold_site`):

    residual + W m + v  =  residual + (W m + b),    b = v / scale.

What is folded acts on every position of every request, on those without a picture too.  That is
another defense than the one that looks for pictures: evaluate it under a name of its own, or let
the base model answer what has no picture.

Few decoders of transformers have a switch for such a bias in their config, and a bias without one
is dropped without a word when the checkpoint is loaded.  Llama has one, and Qwen2 and Mistral are
Llama by another name as long as they use no window.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel, ProcessorMixin

from hauberk.anatomy import Anatomy, FoldSite, anatomy_of, fold_site
from hauberk.defenses.shift import Shift, ShiftSetting, composed
from hauberk.errors import UnsupportedRequest
from hauberk.files import replacing
from hauberk.hooks import Edit, editing

_LIKE_LLAMA = ("llama", "mistral", "qwen2")
"""Model types of text configs whose blocks are Llama's but for biases and windows."""
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def check_folds(anatomy: Anatomy, setting: ShiftSetting) -> None:
    """Raise :class:`UnsupportedRequest` unless a shift is a constant that biases can hold.

    Raises
    ------
    LayerOutOfRange
        If the model has no such blocks.
    """
    wrong = [
        f"{name}: {value}"
        for name, value, right in (
            ("level", setting.level, "dataset"),
            ("position", setting.position, "all"),
            ("steps", setting.steps, "all"),
        )
        if value != right
    ]
    if wrong:
        raise UnsupportedRequest(
            f"with {', '.join(wrong)} what is added is not the same at every position, as a bias "
            "is; fit and evaluate the shift with level: dataset, position: all, steps: all."
        )
    layers = setting.chosen_layers(len(anatomy.blocks))
    anatomy.check_layers(layers)
    for layer in layers:
        site = fold_site(anatomy.blocks[layer])
        if site.kind == "none":
            raise UnsupportedRequest(
                f"block {layer} of this {anatomy.family!r} model cannot hold a shift as a bias: "
                f"{site.reason}; apply the shift with hooks."
            )
        if site.kind == "gated":
            raise UnsupportedRequest(
                f"block {layer} of this {anatomy.family!r} model looks at pictures behind a gate "
                "that is shut for what stands before a picture, where a bias would be lost; name "
                "`layers` without it, or apply the shift with hooks."
            )


def check_exports(model: PreTrainedModel, setting: ShiftSetting) -> None:
    """Raise unless biases can hold a shift and stock transformers loads them into this decoder.

    Raises
    ------
    UnsupportedRequest, LayerOutOfRange, UnknownFamily
        If not.
    """
    check_folds(anatomy_of(model), setting)
    text: Any = model.config.get_text_config()
    if text.model_type not in _LIKE_LLAMA:
        raise UnsupportedRequest(
            f"no switch in the config of a {model.config.model_type!r} model, whose decoder is a "
            f"{text.model_type!r}, tells that its MLPs have biases, and stock transformers would "
            "drop them without a word; apply the shift with hooks."
        )
    window = getattr(text, "sliding_window", None)
    if window and getattr(text, "use_sliding_window", True) and window < _longest(text):
        raise UnsupportedRequest(
            f"the decoder, a {text.model_type!r}, looks back over a window of {window} positions, "
            "which Llama, as which it would be loaded, does not; apply the shift with hooks."
        )


def _longest(text: Any) -> int:
    return int(text.max_position_embeddings)


@contextmanager
def folded(shift: Shift, model: PreTrainedModel) -> Iterator[None]:
    """Let biases do what :meth:`Shift.applied` does with hooks, while the ``with`` block runs.

    Raises
    ------
    UnsupportedRequest, LayerOutOfRange, UnknownFamily
        If they cannot (:func:`check_folds`).
    """
    anatomy = anatomy_of(model)
    check_folds(anatomy, shift.setting)
    before: list[tuple[nn.Linear, nn.Parameter | None]] = []
    try:
        for layer, vector in composed(shift.vectors, shift.setting).items():
            site = fold_site(anatomy.blocks[layer])
            linear: nn.Linear = anatomy.blocks[layer].get_submodule(site.layer)  # type: ignore[assignment]
            before.append((linear, linear.bias))
            linear.bias = nn.Parameter(_bias(linear, site, vector), requires_grad=False)
        yield
    finally:
        for linear, bias in before:
            linear.bias = bias  # type: ignore[assignment]


def _bias(linear: nn.Linear, site: FoldSite, vector: Tensor) -> Tensor:
    """Fold a vector into the bias that is there, in float32."""
    added = vector.to(linear.weight.device) / site.scale
    if linear.bias is not None:
        added = linear.bias.detach().float() + added
    return added.to(linear.weight.dtype)


def export_folded(
    shift: Shift, model: PreTrainedModel, processor: ProcessorMixin, folder: Path
) -> Path:
    """Write the model with a folded shift as a checkpoint that stock transformers loads.

    Raises
    ------
    UnsupportedRequest, LayerOutOfRange, UnknownFamily
        If the shift is not constant, or the model cannot hold or keep it; nothing is written then.
    """
    check_exports(model, shift.setting)
    _check_moved(shift, model)
    with folded(shift, model), replacing(folder) as partial, _typed_as_llama(model):
        model.save_pretrained(partial, state_dict=_with_biases(model))
        processor.save_pretrained(partial)
    return folder


@torch.no_grad()
def _check_moved(shift: Shift, model: PreTrainedModel) -> None:
    """Raise :class:`UnsupportedRequest` unless biases move states as hooks do.

    Names of parts do not tell everything that a block does; a short pass does.
    """
    anatomy = anatomy_of(model)
    words: Any = model.get_input_embeddings()
    some = words(torch.arange(4, device=model.device)).unsqueeze(0)

    def added(vector: Tensor) -> Edit:
        return lambda states: (states.float() + vector.to(states.device)).to(states.dtype)

    def states() -> Tensor:
        found: Tensor = anatomy.decoder(inputs_embeds=some, use_cache=False).last_hidden_state
        return found.float()

    edits = {layer: added(v) for layer, v in composed(shift.vectors, shift.setting).items()}
    plain = states()
    with editing(anatomy.blocks, edits):
        hooked = states()
    with folded(shift, model):
        biased = states()
    if (biased - hooked).norm() > _APART * (hooked - plain).norm():
        raise UnsupportedRequest(
            f"biases in this {anatomy.family!r} model do not move the states as hooks do: a block "
            "does more to its MLP's output than its parts tell; apply the shift with hooks."
        )


_APART = 0.05
"""Of the effect of a shift.  What bfloat16 rounds is a tenth of it; a wrong scale is far more."""


@contextmanager
def _typed_as_llama(model: PreTrainedModel) -> Iterator[None]:
    """Give the decoder a config of Llama, with biases, for as long as it is written."""
    config: Any = model.config
    text = config.text_config
    told = {key: value for key, value in text.to_dict().items() if key in LlamaConfig().to_dict()}
    told |= {"model_type": "llama", "mlp_bias": True, "attention_bias": _attention_biased(model)}
    try:
        config.text_config = LlamaConfig.from_dict(told)
        yield
    finally:
        config.text_config = text


def _attention_biased(model: PreTrainedModel) -> bool:
    attention = anatomy_of(model).blocks[0].self_attn
    return any(getattr(attention, name).bias is not None for name in _ATTENTION)


@torch.no_grad()
def _with_biases(model: PreTrainedModel) -> dict[str, Tensor]:
    """All weights, and zeros for each bias that the config of Llama tells of besides."""
    state = model.state_dict()
    paths = {module: name for name, module in model.named_modules()}
    for block in anatomy_of(model).blocks:
        places = [f"mlp.{name}" for name in _MLP]
        if _attention_biased(model):
            places += [f"self_attn.{name}" for name in _ATTENTION]
        for place in places:
            linear: Any = block.get_submodule(place)
            zeros = linear.weight.new_zeros(linear.out_features)
            state.setdefault(f"{paths[linear]}.bias", zeros)
    return state
