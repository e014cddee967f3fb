"""GuardAlign's second half: a safety prefix, and attention that does not let go of it.

A prefix such as "As an AI assistant, " stands before the query.  Its part of the attention fades
with depth; so in the middle blocks every position behind it is made to look at it harder.  With Z
the logits of these positions on the prefix's tokens, before the mask (Eq. 12 to 14),

    Z <- Z + gamma * relu(Z)

at prefill and at every decoding step, in all heads.  The paper leaves open where the prefix
stands (before the query is the only place that Eq. 14's instruction tokens can look back to), which
blocks are meant, gamma, and the prefix's other words; our defaults are those of its ancestors.
Its Eq. 14 as printed multiplies by q.k once more; see :data:`hauberk.attention.Mode`.

Source: GuardAlign, ICLR 2026, arXiv:2602.24027, section 3.2; VAF ("ClearSight", CVPR 2025,
arXiv:2503.13107) for blocks and strength; ETA for the beginning of an answer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from hauberk.anatomy import Anatomy, anatomy_of
from hauberk.attention import (
    Calibration,
    Focus,
    Mode,
    aim_at,
    attentions_of,
    calibrating,
    check_reachable,
)
from hauberk.defenses.prefix_tokens import Placement, PrefixFinder, prefixed
from hauberk.errors import UnsupportedRequest
from hauberk.passes import Passes
from hauberk.requests import Request, encode, encode_answered

_FIRST, _LAST = 0.28, 0.44
"""Of the depth: VAF's blocks 9 to 14 of 32."""


@dataclass(frozen=True)
class PrefixSetting:
    """What a run may vary.

    Raises
    ------
    ValueError
        If a value is not one of those named, the text has no words, an answer would begin with a
        text that ends in a space, or a layer is named twice.
    """

    text: str = "As an AI assistant, "
    """The paper's only example."""
    placement: Placement = "user"
    """Before the query and behind the pictures, or, as ETA does it, at the beginning of the
    answer, where the prefix takes no space at its end ("As an AI assistant")."""
    gamma: float = 0.15
    """0 leaves the attention as it is; VAF multiplies logits by 1.15."""
    layers: tuple[int, ...] | None = None
    """Decoder blocks to calibrate, counted from 0; None for the middle ones: VAF's 9 to 14 of 32,
    scaled to the depth of the model."""
    mode: Mode = "clamped"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("placement", self.placement, get_args(Placement)),
            ("mode", self.mode, get_args(Mode)),
        ):
            if value not in known:
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(known)}.")
        if not (isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"gamma: {self.gamma} is wrong, 0 or more is right.")
        if not isinstance(self.text, str) or not self.text.strip():
            raise ValueError(f"text: {self.text!r} has no words; give the prefix.")
        if self.placement == "answer" and self.text != self.text.rstrip():
            raise ValueError(
                f"text: {self.text!r} ends in a space, behind which no model begins a word; "
                f"{self.text.rstrip()!r} is right for an answer."
            )
        layers = self.layers
        repeated = sorted({layer for layer in layers or () if (layers or ()).count(layer) > 1})
        if repeated or layers == () or not all(isinstance(n, int) for n in layers or ()):
            raise ValueError(f"layers: {layers} is wrong, one or more, each once, is right.")

    def chosen_layers(self, blocks: int) -> tuple[int, ...]:
        """Name the blocks to calibrate in a model of ``blocks`` blocks."""
        if self.layers is not None:
            return tuple(sorted(self.layers))
        return tuple(range(round(_FIRST * blocks), round(_LAST * blocks) + 1))


def check_calibrates(anatomy: Anatomy, setting: PrefixSetting) -> None:
    """Raise unless the attention of a model can be calibrated in the blocks of a setting.

    Raises
    ------
    LayerOutOfRange
        If the model has no such blocks.
    UnsupportedRequest
        If none of them looks back by self-attention, or their logits cannot be reached.
    """
    layers = setting.chosen_layers(len(anatomy.blocks))
    anatomy.check_layers(layers)
    modules = attentions_of(anatomy)
    chosen = [modules[layer] for layer in layers if layer in modules]
    if not chosen:
        raise UnsupportedRequest(
            f"layers {list(layers)} of this {anatomy.family!r} model have no self-attention "
            f"that looks back; {sorted(modules)} have. Name some of those."
        )
    for module in chosen:
        check_reachable(module)


class PrefixAttention:
    """A safety prefix with calibrated attention on it.

    Parameters
    ----------
    setting : what to say, and how hard to look at it
    processor : that of the models it is applied to, which tells what tokens the prefix becomes;
        None where requests are rewritten alone, for a model that is served elsewhere
    """

    method = "prefix_attention"

    def __init__(self, setting: PrefixSetting, processor: ProcessorMixin | None) -> None:
        self.setting, self.processor = setting, processor
        self._finders: dict[int, PrefixFinder] = {}
        """By the token that stands for a picture, which is all that they ask of a model."""

    def rewrite(self, request: Request) -> Request:
        """Put the prefix into a request, with pictures or without."""
        return prefixed(request, self.setting.text, self.setting.placement)

    def with_gamma(self, gamma: float) -> "PrefixAttention":
        """The same prefix at another strength."""
        return PrefixAttention(replace(self.setting, gamma=gamma), self.processor)

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Calibrate the attention of prompts with the prefix while the ``with`` block runs.

        Rows without the prefix keep every bit, and so does everything at gamma 0.  A defense that
        runs the decoder for itself, as CMRM does at sample level, is to be applied outside.

        Raises
        ------
        UnsupportedRequest
            If the attention of this model is calibrated already, attends by something else than
            sdpa or eager, or the prefix cannot be found in its prompts.  Inside the block: if the
            model is called with something else than a whole prompt and then one token at a time.
        LayerOutOfRange, UnknownFamily
            If the model has no such blocks.
        """
        with self._looking(model, None):
            yield

    @contextmanager
    def _looking(
        self, model: PreTrainedModel, shares: Sequence[list[Tensor]] | None
    ) -> Iterator[None]:
        """Calibrate; ``shares`` collect, block by block, how much attention the prefix has."""
        if self.processor is None:
            raise UnsupportedRequest(
                "this prefix was read without a model, so that it is only words; load it for this "
                "one: hauberk.load(folder, model, processor)."
            )
        anatomy, setting = anatomy_of(model), self.setting
        check_calibrates(anatomy, setting)
        layers = setting.chosen_layers(len(anatomy.blocks))
        image = anatomy.image_token_id
        if image not in self._finders:
            self._finders[image] = PrefixFinder(
                self.processor, image, setting.text, setting.placement
            )
        finder = self._finders[image]
        modules, focus = attentions_of(anatomy), Focus()
        told = {
            module: Calibration(
                focus,
                setting.gamma if layer in layers else 0.0,
                setting.mode,
                shares[layer].append if shares else None,
            )
            for layer, module in modules.items()
            if shares or layer in layers
        }
        session = _Session(finder, focus)
        before = model.register_forward_pre_hook(session.before, with_kwargs=True)
        after = model.register_forward_hook(session.after, always_call=True)
        with before, after, calibrating(told):
            yield


class _Session:
    """Where the prefix stands in the prompts of one model, from pass to pass."""

    def __init__(self, finder: PrefixFinder, focus: Focus) -> None:
        self.finder, self.focus = finder, focus
        self.passes = Passes("a calibrated prefix")
        self.begin = self.end = torch.empty(0, dtype=torch.long)
        """Positions of the prefix in every row of the prompt, both 0 where there is none."""

    def before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Look at the inputs of one forward pass and aim at the prefix."""
        if self.passes.before(args, kwargs):
            self.begin, self.end = self.finder.spans(self.passes.prompt)
        passes, left = self.passes, self.passes.left
        mask: Any = kwargs.get("attention_mask")
        known = isinstance(mask, Tensor) and mask.shape == (len(left), passes.length)
        self.focus.aim = aim_at(
            self.begin[left],
            self.end[left],
            past=passes.past,
            length=passes.length - passes.past,
            attended=mask[:, passes.past :].bool() if known else None,
        )

    def after(self, module: Any, args: Any, output: Any) -> None:
        """Look at nothing until the next pass, also after an error."""
        self.focus.aim = None
        if output is not None:
            self.passes.after(output)


@torch.no_grad()
def prefix_share(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    defense: PrefixAttention,
    *,
    answers: Sequence[str] | None = None,
    batch_size: int = 16,
) -> Tensor:
    """Measure how much of the attention lies on the prefix, block by block (Fig. 1b).

    The share of one position behind the prefix is the sum of its attention on the prefix's tokens,
    averaged over heads; that of a request is the mean over all positions behind it, in the prompt
    and in the answer.  The same at ``defense.with_gamma(0)`` shows what the calibration changes.

    Parameters
    ----------
    requests : without the prefix, their pictures as the model is to see them
    answers : what is said after each prompt, the same whatever the strength; at the beginning of
        an answer, a prefix has only these behind it

    Returns
    -------
    Tensor (requests, layers), float32, on the CPU
        NaN for a block without causal self-attention.

    Raises
    ------
    ValueError
        If no position comes behind a prefix.
    """
    armoured = [defense.rewrite(request) for request in requests]
    shares: list[list[Tensor]] = [[] for _ in anatomy_of(model).blocks]
    with defense._looking(model, shares):
        for start in range(0, len(armoured), batch_size):
            batch = armoured[start : start + batch_size]
            if answers is None:
                inputs = encode(processor, batch)
            else:
                said = answers[start : start + batch_size]
                inputs, _ = encode_answered(processor, batch, said, tokens=max(map(len, said)))
            inputs = inputs.to(model.device)
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            model(**inputs)
    if not any(shares):
        raise ValueError(
            f"no position comes behind the prefix in {len(requests)} requests; give some, and for "
            "a prefix that begins the answer give `answers`."
        )
    nothing = torch.full((len(requests),), torch.nan)
    of_requests = [[share.nanmean(dim=1).cpu() for share in found] for found in shares]
    return torch.stack([torch.cat(found) if found else nothing for found in of_requests], dim=1)
