"""Attention that looks harder at some columns, or away: the only code that touches it.

Inside :func:`calibrating`, chosen self-attention modules of a decoder go through a function that is
registered with transformers under a name of its own.  It calls the stock function, of the kind that
the model was loaded with, and computes anew only what is calibrated: rows of the batch that have a
span to look at, and queries behind it.  With Z = scaling * q k^T, before the mask, and S the
columns of the span (GuardAlign, arXiv:2602.24027, Eq. 12 to 14),

    A = softmax(Z + bias + mask),      bias(i, j) = gamma * relu(Z(i, j)) for j in S, i behind S,

or, where the span is to be hidden, a bias whose exponential is 0.

Everything else keeps every bit.  What a module does is looked up by the module, so that models in
one process do not influence each other, and only the modules themselves are switched: neither the
vision tower, nor other blocks, nor a model that shares the config see anything of it.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from hauberk.anatomy import Anatomy
from hauberk.errors import UnsupportedRequest

Mode = Literal["clamped", "unclamped", "literal"]
"""What is added to Z in the columns looked at: gamma relu(Z), where Eq. 14's mask is read as an
indicator; gamma Z, as the equation's ancestor VAF (ClearSight) does, which takes attention away
where Z is negative; gamma relu(q.k) Z, Eq. 14 as printed, which is quadratic and makes attention a
choice of one column: Z = 4 of heads of 128 becomes 22 at gamma 0.1."""

NAMES = {"sdpa": "hauberk_sdpa", "eager": "hauberk_eager"}
"""Stock implementations that are known here, and the names of ours."""


@dataclass(frozen=True, eq=False)
class Aim:
    """What one forward pass looks at: r of its rows, w columns at most, q queries."""

    rows: Tensor
    """Rows of the batch that are calibrated, (r,) int64."""
    columns: Tensor
    """Positions of the span from the beginning of the prompt, (r, w) int64."""
    there: Tensor
    """Whether a column is one: spans may differ in length.  (r, w) bool."""
    first: int
    """The first query of this pass that any row calibrates; q are computed anew from there on."""
    past: int
    """Positions before the first query of this pass."""
    behind: Tensor
    """Queries that come after the span, (r, q) bool."""
    spots: tuple[Tensor, Tensor]
    """The same as indices into r and q: found once a pass, not once a module."""
    shape: tuple[int, int]
    """Rows and queries of the pass."""
    whole: bool
    """Whether all of them are calibrated."""


def aim_at(
    begin: Tensor, end: Tensor, *, past: int, length: int, attended: Tensor | None = None
) -> Aim | None:
    """Aim a pass at a span of every row.

    Parameters
    ----------
    begin, end : (rows,) int64
        Positions of the span, padding counted, ``end`` excluded; both alike where there is none.
    past, length : positions before this pass, and in it
    attended : (rows, length) bool
        Queries that are no padding, where it stands behind the prompt.

    Returns
    -------
    Aim
        None if no query of this pass comes after a span.
    """
    batch, rows = len(end), (end > begin).nonzero().squeeze(1)
    begin, end = begin[rows, None], end[rows, None]
    first = max(int(end.min()) - past, 0) if len(rows) else length
    behind = past + torch.arange(first, length, device=end.device) >= end
    if attended is not None:
        behind = behind & attended[rows, first:]
    if not behind.any():
        return None
    columns = begin + torch.arange(int((end - begin).max()), device=end.device)
    spots = behind.nonzero(as_tuple=True)
    return Aim(
        rows=rows,
        columns=columns.minimum(end - 1),
        there=columns < end,
        first=first,
        past=past,
        behind=behind,
        spots=(spots[0], spots[1]),
        shape=(batch, length),
        whole=len(rows) == batch and first == 0 and bool(behind.all()),
    )


@dataclass
class Focus:
    """Where all calibrated modules of one model look; set anew for every pass."""

    aim: Aim | None = None


@dataclass(frozen=True)
class Calibration:
    """What one module does.

    A module with ``gamma`` 0 attends as the stock function does, bit by bit.
    """

    focus: Focus
    gamma: float
    mode: Mode = "clamped"
    watch: Callable[[Tensor], None] | None = None
    """Given, in every pass, the share of attention that lies on the span, (r, q) float32: its sum
    over the columns, its mean over the heads; NaN for queries that are not behind it."""
    hidden: bool = False
    """Whether no query behind the span sees any of it, in place of looking harder."""

    @property
    def changes(self) -> bool:
        """Whether anything is attended to otherwise than by the stock function."""
        return self.hidden or self.gamma != 0


_CALIBRATED: WeakKeyDictionary[nn.Module, Calibration] = WeakKeyDictionary()


def attentions_of(anatomy: Anatomy) -> dict[int, nn.Module]:
    """Find the self-attention of every block of the decoder that has one.

    Mllama's cross-attention goes through the same functions and has another name; linear attention
    has no logits.
    """
    found = {}
    for layer, block in enumerate(anatomy.blocks):
        module = getattr(block, "self_attn", None)
        if isinstance(module, nn.Module) and hasattr(module, "is_causal"):
            found[layer] = module
    return found


def check_reachable(module: nn.Module) -> None:
    """Raise :class:`UnsupportedRequest` unless the logits of an attention can be calibrated."""
    if module in _CALIBRATED:
        return  # they can; that they are already is for `calibrating` to say
    kind = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if kind not in NAMES or (kind == "eager" and not hasattr(_home(module), _EAGER)):
        raise UnsupportedRequest(
            f"the decoder attends by {kind!r}, whose logits cannot be reached; load the "
            "model with attn_implementation='sdpa', or 'eager' where its file has an "
            f"{_EAGER}."
        )


@contextmanager
def calibrating(calibrations: Mapping[nn.Module, Calibration]) -> Iterator[None]:
    """Let attention modules attend as told while the ``with`` block runs, and no longer.

    Raises
    ------
    UnsupportedRequest
        If a module is calibrated already, or attends by something else than sdpa or eager.
    """
    with ExitStack() as stack:
        for module, calibration in calibrations.items():
            if module in _CALIBRATED:
                raise UnsupportedRequest(
                    "the attention of this model is calibrated already; leave that block first."
                )
            check_reachable(module)
            config: Any = module.config
            # A copy for this module alone: many modules, and maybe other models, share the config.
            own = copy(config)
            own._attn_implementation = {"": NAMES[config._attn_implementation]}
            stack.callback(setattr, module, "config", config)
            stack.callback(_CALIBRATED.pop, module)
            _CALIBRATED[module] = calibration
            module.config = own
        yield


_QUERIES = 64
"""Calibrated together: a bias is dense over heads and positions, so that of a long query all at
once would take twice the memory of a whole prefill."""
_EAGER = "eager_attention_forward"
"""What every family calls the eager attention beside its modules."""


def _home(module: nn.Module) -> Any:
    return sys.modules[type(module).__module__]


def _sdpa(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _attend(sdpa_attention_forward, module, *args, **kwargs)


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _attend(getattr(_home(module), _EAGER), module, *args, **kwargs)


def _attend(
    stock: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as ``stock`` does, but for what is calibrated; it says what shapes they have."""
    told = _CALIBRATED.get(module)
    aim = told.focus.aim if told else None
    if told is None or aim is None or not (told.changes or told.watch):
        return stock(module, query, key, value, attention_mask, **kwargs)
    if (len(query), query.shape[2]) != aim.shape:
        raise UnsupportedRequest(
            f"{len(query)} rows of {query.shape[2]} queries in a pass of {aim.shape}: something "
            "else runs the decoder before this pass does, such as a defense that is applied inside "
            "of this one; apply that one outside."
        )
    if key.shape[2] < aim.past + query.shape[2] or kwargs.get("cache") is not None:
        raise UnsupportedRequest(
            f"keys of {key.shape[2]} positions, where {aim.past + query.shape[2]} were seen: "
            "calibrated attention needs all of them in their places; use a cache that keeps every "
            "position (generate's default), and name layers without a sliding window."
        )
    causal = bool(getattr(module, "is_causal", True))  # PaliGemma's are not
    part = _Part(aim, query, key, value, attention_mask, kwargs.get("scaling"), causal=causal)
    bias = part.hiding() if told.hidden else part.bias(told.gamma, told.mode)
    if told.watch:
        told.watch(part.share(bias))
    if not told.changes:
        return stock(module, query, key, value, attention_mask, **kwargs)
    anew = part.attended(partial(stock, module, **kwargs), bias)
    if aim.whole:
        return anew
    plain = stock(module, query, key, value, attention_mask, **kwargs)
    weights = None
    if plain[1] is not None and anew[1] is not None:
        weights = part.merged(plain[1].transpose(1, 2), anew[1].transpose(1, 2)).transpose(1, 2)
    return part.merged(plain[0], anew[0]), weights


class _Part:
    """The rows and queries of one module in one pass that are calibrated.

    Attributes
    ----------
    query : (r, heads, q, head size)
    key, value : (r, heads or groups of them, positions, head size)
    mask : added to the logits, (r or 1, 1 or heads, q, positions), dtype of the queries
    """

    def __init__(
        self,
        aim: Aim,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        *,
        causal: bool,
    ) -> None:
        self.aim, self.first = aim, aim.first
        self.rows, self.columns, self.there, self.behind = (
            part.to(query.device) for part in (aim.rows, aim.columns, aim.there, aim.behind)
        )
        self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        chosen: Any = slice(None) if len(self.rows) == len(query) else self.rows
        self.query = query[chosen][:, :, self.first :]
        self.key, self.value = key[chosen], value[chosen]
        self.groups = query.shape[1] // key.shape[1]
        if mask is None:  # there is no padding
            positions = torch.arange(key.shape[2], device=query.device)
            queries = torch.arange(self.first, query.shape[2], device=query.device) + aim.past
            mask = (positions <= queries.unsqueeze(1) if causal else positions >= 0)[None, None]
        else:
            mask = (mask if len(mask) == 1 else mask[chosen])[:, :, self.first :]
        if mask.dtype == torch.bool:
            hidden = torch.finfo(query.dtype).min
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, hidden)
        self.mask = mask.to(query.dtype)

    def bias(self, gamma: float, mode: Mode) -> Tensor:
        """Say what is added in the columns of the span, (r, heads, q, w) float32.

        Also at queries before its end, of which :meth:`merged` takes nothing.
        """
        rows = torch.arange(len(self.key), device=self.key.device).unsqueeze(1)
        keys = self.key[rows, :, self.columns].transpose(1, 2)  # no products with other columns
        products = self._products(keys)
        logits = self.scaling * products
        if mode == "literal":
            logits = products.relu() * logits
        elif mode == "clamped":
            logits = logits.relu()
        return gamma * logits * self.there[:, None, None, :]

    def hiding(self) -> Tensor:
        """Say what is added where the span is not to be seen, (r, heads, q, w) float32.

        Half of the least number, so that a query before the span, which is masked there already,
        cannot become NaN; its exponential is 0.
        """
        shape = *self.query.shape[:3], self.columns.shape[1]
        least = torch.finfo(self.query.dtype).min / 2
        return self.there[:, None, None, :].expand(shape) * least

    def attended(
        self, stock: Callable[..., tuple[Tensor, Tensor | None]], bias: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with the bias, some queries at a time: only so many rows of it are ever dense."""
        blocks = [
            stock(self.query[:, :, some], self.key, self.value, self.masked(bias, some))
            for start in range(0, bias.shape[2], _QUERIES)
            for some in [slice(start, start + _QUERIES)]
        ]
        if len(blocks) == 1:
            return blocks[0]
        outputs, weights = zip(*blocks, strict=True)
        return torch.cat(outputs, dim=1), None if weights[0] is None else torch.cat(weights, dim=2)

    def masked(self, bias: Tensor, some: slice) -> Tensor:
        """Add the bias of some queries to their mask: (r, heads, those queries, positions)."""
        added = bias[:, :, some].to(self.query.dtype)
        mask = self.mask[:, :, some].expand(*added.shape[:3], self.key.shape[2]).clone()
        return mask.scatter_add_(3, self.columns[:, None, None, :].expand_as(added), added)

    def share(self, bias: Tensor) -> Tensor:
        """Measure the attention on the span, (r, q) float32; NaN for queries not behind it."""
        logits = self.scaling * self._products(self.key) + self.masked(bias, slice(None))
        places = self.columns[:, None, None, :].expand_as(bias)
        weights = logits.softmax(-1).gather(3, places) * self.there[:, None, None, :]
        return weights.sum(3).mean(1).masked_fill(~self.behind, torch.nan)

    def merged(self, plain: Tensor, anew: Tensor) -> Tensor:
        """Put what was computed anew in its place: (rows, all queries, ...), (r, q, ...)."""
        row, query = (spot.to(plain.device) for spot in self.aim.spots)
        place = self.rows[row], query + self.first
        return plain.index_put(place, anew[row, query])

    def _products(self, keys: Tensor) -> Tensor:
        keys = keys.float().repeat_interleave(self.groups, dim=1)
        return self.query.float() @ keys.transpose(2, 3)


AttentionInterface.register(NAMES["sdpa"], _sdpa)
AttentionInterface.register(NAMES["eager"], _eager)
# Without a mask of its name a decoder that attends by one of ours would be given none at all.
AttentionMaskInterface.register(NAMES["sdpa"], sdpa_mask)
AttentionMaskInterface.register(NAMES["eager"], eager_mask)
