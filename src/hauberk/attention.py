"""A bias on the attention of single blocks, through the registries of transformers.

Inside :func:`biased` the decoder attends through functions that are registered here: stock
attention, bit by bit, but for the blocks that were given a bias, which is added to the logits
before the softmax.  What a block is given belongs to its module, so that two models in one process
know nothing of each other; the vision tower keeps its own attention.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import (
    create_position_bias_mask,
    sdpa_attention_forward,
)
from transformers.masking_utils import eager_mask, sdpa_mask

from hauberk.anatomy import Anatomy
from hauberk.errors import UnsupportedRequest

Bias = Callable[[Tensor, Tensor, float], Tensor | None]
"""Takes queries (rows, heads, queries, width), all keys (rows, heads, keys, width) and the scaling
of their products; gives what is added to the logits, (rows, heads, queries, keys), or None."""

_SDPA, _EAGER = "hauberk_sdpa", "hauberk_eager"
_REGISTERED = {"sdpa": _SDPA, "eager": _EAGER}
_BIASES: WeakKeyDictionary[nn.Module, Bias] = WeakKeyDictionary()


@contextmanager
def biased(anatomy: Anatomy, biases: Mapping[int, Bias]) -> Iterator[None]:
    """Let blocks attend with a bias while the ``with`` block runs.

    Parameters
    ----------
    biases : by decoder block, counted from 0

    Raises
    ------
    UnsupportedRequest
        If the decoder attends by anything but sdpa or eager, which alone take a bias, if a block
        has no causal self-attention, or has a bias already.
    LayerOutOfRange
        If the model has no such block.
    """
    anatomy.check_layers(biases)
    decoder: Any = anatomy.decoder
    before = decoder.config._attn_implementation
    if before not in (*_REGISTERED, *_REGISTERED.values()):
        raise UnsupportedRequest(
            f"the decoder attends by {before!r}, which takes no bias; load the model with "
            "attn_implementation='sdpa' or 'eager'."
        )
    modules = {_attention_of(anatomy.blocks[layer], layer): bias for layer, bias in biases.items()}
    if any(module in _BIASES for module in modules):
        raise UnsupportedRequest(
            "a bias acts on the attention of this model already; leave that block first."
        )
    with ExitStack() as stack:
        decoder.set_attn_implementation(_REGISTERED.get(before, before))
        stack.callback(decoder.set_attn_implementation, before)
        for module, bias in modules.items():
            _BIASES[module] = bias
            stack.callback(_BIASES.pop, module)
        yield


def _attention_of(block: nn.Module, layer: int) -> nn.Module:
    found = getattr(block, "self_attn", None)
    # Mllama's cross-attention goes through the same registry and is not causal.
    if not isinstance(found, nn.Module) or getattr(found, "is_causal", False) is not True:
        raise UnsupportedRequest(
            f"block {layer}, a {type(block).__name__}, has no causal attention `self_attn`; name "
            "other layers."
        )
    return found


def _by_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **more: Any,
) -> tuple[Tensor, None]:
    bias = _bias(module, query, key, more.get("scaling"))
    if bias is not None:
        # As a mask and not as `position_bias`: without a mask grouped heads would be left to CUDA's
        # slowest kernel.
        causal = query.shape[2] > 1
        bias = bias.to(query.dtype)
        attention_mask = create_position_bias_mask(bias, attention_mask, causal, query, key)
    attended: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **more
    )
    return attended


def _by_eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **more: Any,
) -> Any:
    # Every family has an eager attention of its own, beside its modules.
    stock = sys.modules[type(module).__module__].eager_attention_forward
    bias = _bias(module, query, key, more.get("scaling"))
    if bias is not None:
        bias = bias.to(query.dtype)
        attention_mask = bias if attention_mask is None else attention_mask + bias
    return stock(module, query, key, value, attention_mask, **more)


def _bias(module: nn.Module, query: Tensor, key: Tensor, scaling: float | None) -> Tensor | None:
    given = _BIASES.get(module)
    if given is None:
        return None
    return given(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)


AttentionInterface.register(_SDPA, _by_sdpa)
AttentionInterface.register(_EAGER, _by_eager)
# Without a mask function of its own name a model would be given no mask, not even for padding.
AttentionMaskInterface.register(_SDPA, sdpa_mask)
AttentionMaskInterface.register(_EAGER, eager_mask)
