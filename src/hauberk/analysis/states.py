"""What a decoder makes of a picture, and of words: block outputs averaged over their positions.

For a request and a set P of its prompt positions, the state after decoder block l is

    m[l] = mean_{p in P} h[l, p].

TGA compares m over the positions of an image with m over those of its caption in a run without
the image (Xu et al., "Cross-Modal Safety Mechanism Transfer in Large Vision-Language Models",
ICLR 2025, arXiv:2410.12662, Figure 4).  Positions are found by token id and by offsets of the
tokenizer, so that padding and the template are never among them.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from hauberk.anatomy import anatomy_of
from hauberk.errors import UnsupportedRequest
from hauberk.hooks import recording
from hauberk.requests import Request, encode, prompt_of

Where = Callable[[Sequence[int], BatchFeature], Tensor]
"""Takes the places of a batch's requests and its inputs; gives the positions to average over,
(requests, positions) bool."""


def image_states(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    batch_size: int = 64,
) -> Tensor:
    """Average block outputs over the image positions of each request.

    Returns
    -------
    Tensor (requests, blocks, hidden size), float32, CPU

    Raises
    ------
    UnsupportedRequest
        If a request has no picture.
    """
    token = anatomy_of(model).image_token_id
    return _mean_states(
        model, processor, requests, lambda _, inputs: inputs["input_ids"] == token, batch_size
    )


def text_states(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    texts: Sequence[str],
    batch_size: int = 64,
) -> Tensor:
    """Average block outputs over the tokens of ``texts[i]``, a part of the text of request i.

    Parameters
    ----------
    requests : without pictures, whose tokens are not those of the rendered prompt
    texts : where one stands in its prompt more than once, the first place counts

    Returns
    -------
    Tensor (requests, blocks, hidden size), float32, CPU

    Raises
    ------
    UnsupportedRequest
        If a request has a picture or does not hold its text.
    """
    spans = [
        positions_of(processor, request, text)
        for request, text in zip(requests, texts, strict=True)
    ]

    def where(places: Sequence[int], inputs: BatchFeature) -> Tensor:
        mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for row, place in enumerate(places):
            inside = torch.tensor(spans[place])
            mask[row, -len(inside) :] = inside  # padding is on the left
        return mask

    return _mean_states(model, processor, requests, where, batch_size)


@torch.no_grad()
def _mean_states(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    where: Where,
    batch_size: int,
) -> Tensor:
    found = []
    for start in range(0, len(requests), batch_size):
        places = range(start, min(start + batch_size, len(requests)))
        inputs = encode(processor, [requests[place] for place in places]).to(model.device)
        mask = where(places, inputs)
        if not mask.any(1).all():
            without = requests[places[int((~mask.any(1)).nonzero()[0])]]
            raise UnsupportedRequest(
                f"the request {without.text[:60]!r} has no position to average over; "
                "give it a picture, or a text of at least one token."
            )
        with recording(anatomy_of(model).blocks, partial(_mean, mask.to(model.device))) as seen:
            model(**inputs, logits_to_keep=1)
        found.append(torch.stack([outputs[-1] for outputs in seen], dim=1).cpu())
    return torch.cat(found)


def _mean(mask: Tensor, states: Tensor) -> Tensor:
    if states.shape[:2] != mask.shape:  # of a defense's own pass through the blocks, before ours
        return states.new_empty(0)
    weights = mask.float() / mask.sum(1, keepdim=True)
    return torch.einsum("bp,bpd->bd", weights, states.float())


def positions_of(processor: ProcessorMixin, request: Request, text: str) -> list[bool]:
    """Tell for each token of the rendered prompt, padding aside, whether it is of ``text``.

    Raises
    ------
    UnsupportedRequest
        If the request has a picture or does not hold the text.
    """
    prompt = prompt_of(processor, request)
    begin = prompt.find(text)
    if request.images or begin < 0:
        raise UnsupportedRequest(
            f"the tokens of {text[:60]!r} are looked for in a request without pictures that holds "
            f"it; {request.text[:60]!r} with {len(request.images)} pictures is none."
        )
    tokens = processor.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    finish = begin + len(text)
    return [start < finish and end > begin for start, end in tokens["offset_mapping"]]
