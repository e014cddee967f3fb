"""GuardAlign, second half: a safety prefix, and attention that keeps looking at it.

A prefix such as "As an AI assistant, " is put before the query.  Its influence fades from block to
block and from token to token, so in the middle blocks the logits of attention from what comes
after it (query, template and answer) to its tokens are raised (Eq. 12 to 14),

    Z = scaling q k^T,    Z <- Z + gamma relu(Z)    at rows after the prefix x columns of it.

Eq. 14 as printed multiplies Z by relu(q.k) once more, which makes it quadratic: a logit of 4 over
128 dimensions becomes 22 at gamma 0.1, and attention a choice of one token.  We read it as an
indicator, 1[Z > 0]; ``mode: literal`` is the printed one, and ``unclamped`` that of its ancestor
(VAF, "ClearSight"), which raises negative logits' distance from zero as well.

The paper does not say which blocks: it names the middle ones.  VAF's 9 to 14 of 32, scaled by
depth, are the default; so is its strength, gamma 0.15.

Source: "GuardAlign", ICLR 2026, arXiv:2602.24027, sections 3.2 and 3.3.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, ProcessorMixin

from hauberk.anatomy import anatomy_of
from hauberk.attention import Bias, biased
from hauberk.decoding import rows_left
from hauberk.errors import UnsupportedRequest
from hauberk.requests import Request, prompt_of

Mode = Literal["clamped", "unclamped", "literal"]

_FIRST, _LAST = 0.28, 0.44
"""VAF's blocks 9 to 14 of 32, as shares of the depth."""


@dataclass(frozen=True)
class PrefixSetting:
    """What a run may vary.

    Raises
    ------
    ValueError
        If the text is empty or the mode unknown, gamma is negative, or a layer is named twice.
    """

    text: str = "As an AI assistant, "
    """Put before the query, behind the pictures; the paper's only example."""
    gamma: float = 0.15
    """How much logits are raised; 0 for a prefix alone."""
    layers: tuple[int, ...] | None = None
    """Decoder blocks, counted from 0; None for those at 0.28 to 0.44 of the depth."""
    mode: Mode = "clamped"

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError(f"text: {self.text!r} is empty; give the prefix some words.")
        if self.gamma < 0:
            raise ValueError(f"gamma: {self.gamma} is wrong, 0 or more is right.")
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode: {self.mode!r} is not one of {', '.join(get_args(Mode))}.")
        layers = self.layers or ()
        repeated = sorted({layer for layer in layers if layers.count(layer) > 1})
        if repeated:
            raise ValueError(f"layers: {repeated} stand there more than once; once is right.")

    def chosen_layers(self, blocks: int) -> tuple[int, ...]:
        """Name the blocks to calibrate in a model of ``blocks`` blocks."""
        if self.layers is not None:
            return tuple(sorted(self.layers))
        return tuple(range(round(_FIRST * blocks), round(_LAST * blocks) + 1))


class PrefixAttention:
    """A safety prefix that is kept attended to.

    Parameters
    ----------
    setting : what to say and how much to raise it
    processor : that of the model: it tells which tokens the prefix becomes
    """

    method = "prefix_attention"

    def __init__(self, setting: PrefixSetting, processor: ProcessorMixin) -> None:
        self.setting, self.processor = setting, processor

    def rewrite(self, request: Request) -> Request:
        """Put the prefix before the query; templates put pictures before both."""
        return replace(request, text=self.setting.text + request.text)

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Raise attention to the prefix in every prompt that has it, while the block runs.

        Raises
        ------
        UnsupportedRequest
            If the model attends in a way that takes no bias, or the tokenizer joins the prefix
            with what stands around it.
        LayerOutOfRange, UnknownFamily
            If the model has no such blocks.
        """
        anatomy = anatomy_of(model)
        layers = self.setting.chosen_layers(len(anatomy.blocks))
        anatomy.check_layers(layers)
        if self.setting.gamma == 0:
            yield
            return
        tokens = prefix_tokens(self.processor, self.setting.text)
        session = _Session(self.setting, tokens, anatomy.image_token_id)
        bias: Bias = session.bias
        before = model.register_forward_pre_hook(session.before, with_kwargs=True)
        after = model.register_forward_hook(session.after)
        with before, after, biased(anatomy, dict.fromkeys(layers, bias)):
            yield


def prefix_tokens(processor: ProcessorMixin, text: str) -> list[int]:
    """Tokenize a prefix where it stands: between the template and a query.

    Returns
    -------
    list of int
        The tokens that lie wholly within the prefix, whatever stands before and behind it.  One at
        an edge that a tokenizer joins with a neighbour is not among them.

    Raises
    ------
    UnsupportedRequest
        If the tokenizer does not tell where tokens stand, or none lies within the prefix always.
    """
    tokenizer: Any = processor.tokenizer
    if not tokenizer.is_fast:
        raise UnsupportedRequest(
            f"{type(tokenizer).__name__} does not tell where in a text its tokens stand; load the "
            "fast one."
        )
    found = []
    for behind in ("how", "7 a", "? x", "\nx", " x"):
        prompt = prompt_of(processor, Request(text + behind))
        start = prompt.rindex(text + behind)
        told = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        found.append(
            [
                token
                for token, (begin, end) in zip(
                    told["input_ids"], told["offset_mapping"], strict=True
                )
                if start <= begin < end <= start + len(text)
            ]
        )
    shortest = min(found, key=len)
    # A picture before the prefix may change its first token, as a space would.
    for tokens in (shortest, shortest[1:]):
        if tokens and all(_place(torch.tensor(one), tokens) is not None for one in found):
            return tokens
    raise UnsupportedRequest(
        f"the tokenizer joins the prefix {text!r} with what stands around it, so that no token is "
        "the prefix's own; choose a prefix that ends in a whole word or a space."
    )


def _place(ids: Tensor, tokens: list[int], start: int = 0) -> int | None:
    """Where tokens stand first in ids, at ``start`` or behind it."""
    if len(ids) - start < len(tokens):
        return None
    windows = ids[start:].unfold(0, len(tokens), 1)
    hits = (windows == torch.tensor(tokens, device=ids.device)).all(1).nonzero()
    return start + int(hits[0]) if len(hits) else None


class _Session:
    """Where the prefix stands in the prompt that is being answered, for one model."""

    def __init__(self, setting: PrefixSetting, tokens: list[int], image_token: int) -> None:
        self.setting, self.tokens, self.image_token = setting, tokens, image_token
        self.starts = torch.empty(0, dtype=torch.long)
        """First position of the prefix in every row of the prompt, -1 where there is none."""
        self.left = torch.empty(0, dtype=torch.long)
        """Rows of the prompt that are still decoded."""
        self.past = self.length = 0
        self.cache: ReferenceType[Cache] | None = None
        """The cache that holds the prompt: one of another prompt may be as long."""

    def before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Look at the inputs of one forward pass: a prompt, or a token that follows one."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise UnsupportedRequest(
                "the prefix is found in input_ids; call the model with input_ids, not with "
                "inputs_embeds alone."
            )
        cache = kwargs.get("past_key_values")
        self.past = 0 if cache is None else int(cache.get_seq_length())
        if self.past == 0:
            self._read_prompt(ids)
            self.cache = None if cache is None else ref(cache)
            return
        left = rows_left(cache)
        self.left = self.left if left is None else left
        own = self.cache is not None and self.cache() is cache and self.past == self.length
        if not own or ids.shape != (len(self.left), 1):
            raise UnsupportedRequest(
                f"{ids.shape[1]} tokens after {self.past} cached ones, where one after "
                f"{self.length} of this prompt's own cache would be right: the prefix is looked "
                "for in a whole prompt and followed one token at a time; switch off chunked "
                "prefill, assisted decoding and prompt caches."
            )
        self.length += 1

    def after(self, module: Any, args: Any, output: Any) -> None:
        """Remember the cache that the model made for the prompt where the caller gave none."""
        if self.cache is None:
            parts = output.values() if isinstance(output, dict) else output
            self.cache = next((ref(part) for part in parts if isinstance(part, Cache)), None)

    def bias(self, query: Tensor, key: Tensor, scaling: float) -> Tensor | None:
        """Eq. 13: what is added to the logits of one block, float32; None if nothing is."""
        starts = self.starts[self.left].to(query.device)
        if (starts < 0).all():
            return None
        rows, heads, queries, width = query.shape
        columns = starts.clamp(min=0).unsqueeze(1) + torch.arange(
            len(self.tokens), device=query.device
        )
        picked = columns[:, None, :, None].expand(-1, key.shape[1], -1, width)
        prefix = key.gather(2, picked).repeat_interleave(heads // key.shape[1], dim=1)
        products = query.float() @ prefix.float().transpose(2, 3)
        raised = self._raised(products, scaling)
        positions = self.past + torch.arange(queries, device=query.device)
        behind = (positions > columns[:, -1:]) & (starts >= 0).unsqueeze(1)
        raised = raised * behind[:, None, :, None]
        whole = raised.new_zeros(rows, heads, queries, key.shape[2])
        return whole.scatter(3, columns[:, None, None, :].expand_as(raised), raised)

    def _raised(self, products: Tensor, scaling: float) -> Tensor:
        logits = scaling * products
        if self.setting.mode == "literal":
            return self.setting.gamma * products.relu() * logits
        return self.setting.gamma * (logits.relu() if self.setting.mode == "clamped" else logits)

    def _read_prompt(self, ids: Tensor) -> None:
        self.left = torch.arange(len(ids), device=ids.device)
        self.length = ids.shape[1]
        starts = []
        for row in ids.cpu():
            pictures = (row == self.image_token).nonzero()
            behind = int(pictures[-1]) + 1 if len(pictures) else 0
            place = _place(row, self.tokens, behind)
            starts.append(-1 if place is None else place)
        self.starts = torch.tensor(starts, device=ids.device)
