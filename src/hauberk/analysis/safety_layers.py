"""Where refusal lives: the decoder layers that turn harmful words into a refusal.

Three views of it, as TGA takes them (Xu et al., "Cross-Modal Safety Mechanism Transfer in Large
Vision-Language Models", ICLR 2025, arXiv:2410.12662, and the authors' code):

* :func:`lens`, what the model would say next if it stopped after state k at the last prompt
  position (Figure 2).  With h[0] the embeddings, h[k] the output of decoder block k - 1,

      p[k] = softmax(head(norm(h[k]))),    Delta[k] = p[k] - p[k-1],

  a refusal starts at the first k whose largest Delta[k] is of a token that refusals begin with.
* :func:`hiding` and :func:`skipping`, whether it is refused still if later positions cannot look
  at the harmful words in some blocks, or if those blocks do nothing (Figure 3).
* :class:`Injection`, whether a picture is refused if what the decoder makes of its words is put
  where the picture stands, in some blocks (Figure 5).

Where the two differ: the authors' code takes two token ids of one tokenizer, norms the last state
twice, and averages in samples that are never refused, as layer -1.  Here tokens are learnt from
the model's own refusals, every state is read out by what really follows the last block (so that
the final norm is applied once, and soft caps and scales of logits as the model has them), and
samples that are not refused are counted and left out.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from hauberk.analysis.states import positions_of
from hauberk.anatomy import anatomy_of
from hauberk.attention import Calibration, Focus, aim_at, attentions_of, calibrating
from hauberk.errors import BadData, UnsupportedRequest
from hauberk.hooks import bypassing, editing, entering, recording, standing_in
from hauberk.passes import Passes
from hauberk.requests import Request, encode

_TOP = 5
"""Tokens of a Delta among which the authors' code looks for a refusal, where the first is meant."""
_FIRST, _LAST = 10 / 32, 18 / 32
"""The states that the authors' code aligns, of 32: what is taken where nothing is refused."""
_WINDOW = 5 / 32
"""Blocks that the paper masks together, of those of the models that it shows."""


# --- what refusals begin with -----------------------------------------------------------------


@torch.no_grad()
def first_tokens(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    batch_size: int = 64,
) -> list[int]:
    """Tell with which token a greedy answer to each request begins."""
    found: list[int] = []
    for start in range(0, len(requests), batch_size):
        inputs = _inputs(model, processor, requests[start : start + batch_size])
        found += model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
    return found


@dataclass(frozen=True)
class RefusalToken:
    """A token that refusals begin with, and how far it tells them from other answers."""

    token: int
    refused: float
    """The share of the refusals that begin with it."""
    answered: float
    """That of the answers to harmless requests: where it is not 0, the token may say another
    word, such as an "i" that goes on to "if"."""


def refusal_tokens(refused: Sequence[int], answered: Sequence[int]) -> tuple[RefusalToken, ...]:
    """Choose the tokens that tell a refusal by its beginning, the most frequent first.

    A token is one if a larger share of refusals begins with it than of other answers.  What begins
    both alike, such as an article, is none.  Where nothing is left, refusals show later only: give
    requests whose ``begun`` is what all answers begin with.  The rule is ours: the paper and its
    code take the tokens as given.

    Parameters
    ----------
    refused : first tokens of the model's own refusals, see :func:`first_tokens`
    answered : first tokens of its answers to harmless requests

    Raises
    ------
    BadData
        If there is no answer of a kind: without the other one nothing tells what is usual.
    """
    if not (len(refused) and len(answered)):
        raise BadData(
            f"{len(refused)} refusals and {len(answered)} other answers to learn what refusals "
            "begin with; give some of both."
        )

    def share(token: int, among: Sequence[int]) -> float:
        return among.count(token) / len(among)

    known = sorted(set(refused), key=lambda token: (-refused.count(token), token))
    begun = (RefusalToken(t, share(t, refused), share(t, answered)) for t in known)
    return tuple(each for each in begun if each.refused > each.answered)


# --- the logit lens ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Lens:
    """Where the refusals of n requests show; a state that is not found is -1."""

    start: Tensor
    """The first state whose largest Delta is of a refusal token, (n,) int64."""
    start_top5: Tensor
    """The same for one of the five largest, as the authors' code reads it."""
    end: Tensor
    """The last state, not before the start, whose most likely token is one.  Of a refusal that is
    the last state there is, as the last one decides what is said."""
    settled: Tensor
    """The first state, not before the start, from which on to the last one the most likely token
    is one: nothing behind it changes what is said."""
    says: Tensor
    """Whether the answer begins with a refusal token, (n,) bool."""
    share: Tensor
    """The probability of all refusal tokens together, (n, states) float32."""


def next_token_logits(
    model: PreTrainedModel, blocks: Sequence[nn.Module], states: Tensor
) -> Tensor:
    """Read states out as if the last of the blocks had put them out.

    A token is run through the model, with the states in place of what its last block makes of it:
    the final norm, the head, and whatever is done to logits (soft caps, scales) are the model's
    own, each applied once.

    Parameters
    ----------
    states : (n, hidden size), of the model's dtype, before the final norm

    Returns
    -------
    Tensor (n, vocabulary), float32, with a gradient by the states where they have one
    """
    image = getattr(model.config, "image_token_id", None)
    any_token = torch.tensor([[1 if image == 0 else 0]], device=model.device)
    with standing_in(blocks[-1], states.unsqueeze(0)):
        logits: Tensor = model(input_ids=any_token, use_cache=False).logits
    return logits[0].float()


@torch.no_grad()
def lens(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    tokens: Collection[int],
    batch_size: int = 64,
) -> Lens:
    """Look at the next token that every state of the last prompt position would give.

    Parameters
    ----------
    tokens : those that refusals begin with, see :func:`refusal_tokens`; with none, nothing starts

    Raises
    ------
    BadData
        If there is no request.
    """
    if not requests:
        raise BadData("no request to look into; give some that the model refuses.")
    blocks = anatomy_of(model).blocks
    wanted = torch.tensor(sorted(tokens), dtype=torch.long, device=model.device)
    parts = []
    for start in range(0, len(requests), batch_size):
        inputs = _inputs(model, processor, requests[start : start + batch_size])
        with entering(blocks[0], _last) as before, recording(blocks, _last) as seen:
            model(**inputs, logits_to_keep=1)
        states = [before[-1], *(outputs[-1] for outputs in seen)]
        parts.append(_looked(model, blocks, states, wanted))
    top, changed, changed5, share = (torch.cat(found).cpu() for found in zip(*parts, strict=True))
    begin, begin5 = _first(changed), _first(changed5)
    ahead = torch.arange(top.shape[1]) >= begin.unsqueeze(1)
    held = top & ahead & (begin >= 0).unsqueeze(1)
    lasting = held.flip(1).long().cumprod(1).flip(1).bool()
    return Lens(
        start=begin,
        start_top5=begin5,
        end=torch.where(held.any(1), top.shape[1] - 1 - _first(held.flip(1)), -1),
        settled=_first(lasting),
        says=top[:, -1],
        share=share,
    )


def _looked(
    model: PreTrainedModel, blocks: Sequence[nn.Module], states: Sequence[Tensor], wanted: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Say of each state: is the top token one, that of the change, one of its five; their share.

    All are (n, states); two distributions are held at a time, not one for each state.
    """
    tops, changes, changes5, shares = [], [], [], []
    before = None
    for each in states:
        now = next_token_logits(model, blocks, each).softmax(-1)
        ranked = torch.isin((now if before is None else now - before).topk(_TOP).indices, wanted)
        if before is None:  # nothing has changed yet
            ranked = torch.zeros_like(ranked)
        tops.append(torch.isin(now.argmax(-1), wanted))
        changes.append(ranked[:, 0])
        changes5.append(ranked.any(1))
        shares.append(now[:, wanted].sum(1))
        before = now
    top, change, change5, share = (
        torch.stack(rows, dim=1) for rows in (tops, changes, changes5, shares)
    )
    return top, change, change5, share


def _first(flags: Tensor) -> Tensor:
    """Find the first column that is true in each row, -1 where none is."""
    return torch.where(flags.any(1), flags.long().argmax(1), -1)


@dataclass(frozen=True)
class Spread:
    """Where the refusals of n requests show, in states counted from 0, the embeddings."""

    n: int
    median: float
    low: float
    """The 10th percentile."""
    high: float
    """The 90th percentile."""
    least: int
    most: int
    """The ends, between which the paper draws its interval."""


@dataclass(frozen=True)
class Located:
    """The layers where refusal lives."""

    layers: tuple[int, ...]
    """Decoder blocks, counted from 0: from the median start to the median of where it is settled,
    both included."""
    asked: int
    refused: int
    """Requests that are refused, as the judge says."""
    counted: int
    """Those of them that begin with a refusal token and whose start is found; no others count."""
    start: Spread | None
    start_top5: Spread | None
    end: Spread | None
    settled: Spread | None

    @property
    def fallback(self) -> bool:
        """Whether nothing was refused, so that the layers are those of the authors, scaled."""
        return self.counted == 0


def locate(found: Lens, refused: Sequence[bool]) -> Located:
    """Turn what the lens shows into an interval of decoder blocks, which is never empty.

    It ends where the median refusal is settled.  The end as the authors' code has it, the last
    state whose most likely token refuses, is the last state of every refusal and so tells nothing;
    it stands beside.

    Parameters
    ----------
    refused : whether the model refuses each request of the lens, as a judge says

    Raises
    ------
    ValueError
        If there are not as many as requests.
    """
    if len(refused) != len(found.start):
        raise ValueError(
            f"{len(refused)} judgements of {len(found.start)} requests; give one for each."
        )
    blocks = found.share.shape[1] - 1
    counted = torch.tensor(refused, dtype=torch.bool) & found.says & (found.start >= 0)
    told = {
        name: _spread(getattr(found, name)[counted])
        for name in ("start", "start_top5", "end", "settled")
    }
    start, settled = told["start"], told["settled"]
    if start is None or settled is None:
        layers = fallback_layers(blocks)
    else:
        layers = tuple(range(int(start.median) - 1, int(np.ceil(settled.median))))
    return Located(layers, len(refused), sum(map(bool, refused)), int(counted.sum()), **told)


def fallback_layers(blocks: int) -> tuple[int, ...]:
    """Scale the layers of the authors' code to the depth of a model; counted from 0.

    Their hidden states 10 to 18 of 32 are the outputs of blocks 9 to 17.
    """
    return tuple(range(max(round(_FIRST * blocks), 1) - 1, max(round(_LAST * blocks), 1)))


def _spread(states: Tensor) -> Spread | None:
    if not len(states):
        return None
    values = states.numpy()
    low, median, high = (float(q) for q in np.quantile(values, [0.1, 0.5, 0.9]))
    return Spread(len(values), median, low, high, int(values.min()), int(values.max()))


# --- some blocks without the harmful words, or without themselves ------------------------------


def window_of(blocks: int) -> int:
    """Scale the paper's five of 32 blocks to the depth of a model, one at least."""
    return max(round(_WINDOW * blocks), 1)


def windows(blocks: int, width: int) -> list[tuple[int, ...]]:
    """List the sliding blocks of ``width`` consecutive layers, counted from 0.

    Raises
    ------
    ValueError
        If the model has not so many.
    """
    if not 1 <= width <= blocks:
        raise ValueError(f"width: {width} is wrong, 1 to {blocks}, the decoder blocks, is right.")
    return [tuple(range(first, first + width)) for first in range(blocks - width + 1)]


class PromptSpans:
    """Finds words of some requests in their tokenized prompts, however these are padded.

    Parameters
    ----------
    requests : without pictures
    texts : a part of the text of each; where one stands there more than once, the first counts

    Raises
    ------
    UnsupportedRequest
        If a request has a picture or does not hold its text.
    BadData
        If one request is given twice with different texts.
    """

    def __init__(
        self, processor: ProcessorMixin, requests: Sequence[Request], texts: Sequence[str]
    ) -> None:
        self._known: dict[tuple[int, ...], tuple[int, int]] = {}
        for request, text in zip(requests, texts, strict=True):
            ids = encode(processor, [request])["input_ids"][0].tolist()
            inside = np.flatnonzero(positions_of(processor, request, text))
            ahead = len(ids) - len(positions_of(processor, request, text))  # such as a <s>
            span = ahead + int(inside[0]), ahead + int(inside[-1]) + 1
            if self._known.setdefault(tuple(ids), span) != span:
                raise BadData(
                    f"the request {request.text[:60]!r} stands there twice, with other words to "
                    "hide; give each request once."
                )

    def find(self, ids: Tensor, attended: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tell where the words begin and end in every row of a batch.

        Parameters
        ----------
        ids : (rows, positions) int64
        attended : the same shape, 0 where there is padding, on either side; None if there is none

        Returns
        -------
        begin, end : Tensor (rows,), int64, the end excluded

        Raises
        ------
        UnsupportedRequest
            If a row is the prompt of none of the requests.
        """
        found = []
        seen = torch.ones_like(ids) if attended is None else attended
        for row, mask in zip(ids, seen.bool(), strict=True):
            span = self._known.get(tuple(row[mask].tolist()))
            if span is None:
                raise UnsupportedRequest(
                    f"a prompt of {int(mask.sum())} tokens is that of none of the "
                    f"{len(self._known)} requests whose words are to be found; ask only those."
                )
            first = int(mask.long().argmax())
            found.append((first + span[0], first + span[1]))
        begin, end = torch.tensor(found, dtype=torch.long, device=ids.device).T
        return begin, end


@contextmanager
def hiding(model: PreTrainedModel, layers: Collection[int], spans: PromptSpans) -> Iterator[None]:
    """Let no later position look at some words of the prompt, in some blocks.

    Works while a prompt is read and while its answer is decoded, with sdpa and eager attention.
    The words themselves still look at each other.

    Raises
    ------
    LayerOutOfRange, UnknownFamily
        If the model has no such blocks.
    UnsupportedRequest
        If a block has no self-attention to mask, or it attends by something else; inside the
        block, if a prompt is not one of ``spans``.
    """
    anatomy = anatomy_of(model)
    anatomy.check_layers(layers)
    modules, focus = attentions_of(anatomy), Focus()
    if missing := sorted(set(layers) - modules.keys()):
        raise UnsupportedRequest(
            f"layers {missing} of this {anatomy.family!r} model have no self-attention that looks "
            f"back; {sorted(modules)} have. Name some of those."
        )
    told = {modules[layer]: Calibration(focus, 0.0, hidden=True) for layer in layers}
    with _aiming(model, spans, focus), calibrating(told):
        yield


@contextmanager
def skipping(model: PreTrainedModel, layers: Collection[int]) -> Iterator[None]:
    """Pass on what enters some blocks in place of what they put out, at all positions.

    So the authors' code cuts the flow.  Keys and values are computed as ever.

    Raises
    ------
    LayerOutOfRange, UnknownFamily
        If the model has no such blocks.
    """
    anatomy = anatomy_of(model)
    anatomy.check_layers(layers)
    with bypassing(anatomy.blocks, layers):
        yield


@torch.no_grad()
def attention_shares(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    spans: PromptSpans,
    batch_size: int = 64,
) -> Tensor:
    """Measure how much of the last prompt position's attention lies on some words (Figure 2).

    Returns
    -------
    Tensor (requests, blocks), float32, CPU
        The sum over the words, its mean over heads; NaN for a block without causal self-attention.
    """
    anatomy = anatomy_of(model)
    modules, focus = attentions_of(anatomy), Focus()
    shares: list[list[Tensor]] = [[] for _ in anatomy.blocks]

    def watching(kept: list[Tensor]) -> Callable[[Tensor], None]:
        return lambda share: kept.append(share[:, -1].cpu())

    told = {m: Calibration(focus, 0.0, watch=watching(shares[n])) for n, m in modules.items()}
    with _aiming(model, spans, focus), calibrating(told):
        for start in range(0, len(requests), batch_size):
            inputs = _inputs(model, processor, requests[start : start + batch_size])
            model(**inputs, logits_to_keep=1)
    nothing = torch.full((len(requests),), torch.nan)
    return torch.stack([torch.cat(found) if found else nothing for found in shares], dim=1)


@contextmanager
def _aiming(model: PreTrainedModel, spans: PromptSpans, focus: Focus) -> Iterator[None]:
    """Aim every pass of the model at the words of its prompts."""
    passes = Passes("an analysis of attention")
    begin = end = torch.empty(0, dtype=torch.long)

    def before(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal begin, end
        mask: Any = kwargs.get("attention_mask")
        if passes.before(args, kwargs):
            known = isinstance(mask, Tensor) and mask.shape == passes.prompt.shape
            begin, end = spans.find(passes.prompt, mask if known else None)
        left = passes.left
        known = isinstance(mask, Tensor) and mask.shape == (len(left), passes.length)
        focus.aim = aim_at(
            begin[left],
            end[left],
            past=passes.past,
            length=passes.length - passes.past,
            attended=mask[:, passes.past :].bool() if known else None,
        )

    def after(_module: Any, _args: Any, output: Any) -> None:
        focus.aim = None
        if output is not None:
            passes.after(output)

    first = model.register_forward_pre_hook(before, with_kwargs=True)
    last = model.register_forward_hook(after, always_call=True)
    with first, last:
        yield


# --- words where a picture stands -------------------------------------------------------------


class Injection:
    """Puts states of words where pictures stand, in some blocks, while requests are answered.

    Given to :func:`hauberk.requests.respond` in place of a defense.

    Parameters
    ----------
    requests : with pictures; only these very objects may be asked
    states : (requests, blocks, hidden size), what is put there after each block, such as
        :func:`hauberk.analysis.states.text_states` of their captions
    layers : decoder blocks, counted from 0
    replaces : whether it takes the place of the states at the picture's positions, as the authors'
        code has it, or is added to them, as the paper's caption says
    """

    def __init__(
        self,
        requests: Sequence[Request],
        states: Tensor,
        layers: Collection[int],
        *,
        replaces: bool = False,
    ) -> None:
        if len(states) != len(requests):
            raise ValueError(f"{len(states)} states for {len(requests)} requests; give as many.")
        self.states, self.layers, self.replaces = states, tuple(layers), replaces
        self._requests = requests  # held, so that their ids stay theirs
        self._places = {id(request): place for place, request in enumerate(requests)}
        self._batch: list[int] = []

    def rewrite(self, request: Request) -> Request:
        """Remember which request comes next."""
        return self.rewrite_all([request])[0]

    def rewrite_all(self, requests: Sequence[Request]) -> list[Request]:
        """Remember which requests the next batch holds; none is changed.

        Raises
        ------
        UnsupportedRequest
            If one has no states.
        """
        places = [self._places.get(id(request)) for request in requests]
        if None in places:
            unknown = requests[places.index(None)]
            raise UnsupportedRequest(
                f"nothing was given to put into {unknown.text[:60]!r}; ask the very requests that "
                "the injection was made for."
            )
        self._batch = [place for place in places if place is not None]
        return list(requests)

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Inject while the ``with`` block runs: only while a prompt is read are pictures there.

        Raises
        ------
        LayerOutOfRange, UnknownFamily
            If the model has no such blocks.
        """
        anatomy = anatomy_of(model)
        anatomy.check_layers(self.layers)
        passes = Passes("an injection")
        where = torch.empty(0, 0, dtype=torch.bool)
        rows = torch.empty(0, dtype=torch.long)

        def before(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal where, rows
            passes.before(args, kwargs)
            ids: Any = kwargs.get("input_ids", args[0] if args else None)
            where = ids == anatomy.image_token_id
            rows = torch.tensor(self._batch, dtype=torch.long)[passes.left.cpu()]

        def after(_module: Any, _args: Any, output: Any) -> None:
            passes.after(output)

        def edit_of(layer: int) -> Callable[[Tensor], Tensor]:
            def edit(states: Tensor) -> Tensor:
                if states.shape[:2] != where.shape or not where.any():
                    return states
                added = self.states[rows, layer].to(states.device, states.dtype).unsqueeze(1)
                put = added.expand_as(states) if self.replaces else states + added
                return torch.where(where.to(states.device).unsqueeze(2), put, states)

            return edit

        first = model.register_forward_pre_hook(before, with_kwargs=True)
        last = model.register_forward_hook(after)
        with first, last, editing(anatomy.blocks, {layer: edit_of(layer) for layer in self.layers}):
            yield


def centred(states: Tensor, around: Tensor) -> Tensor:
    """Take away what states have in common: the mean of ``around``, block by block.

    All states of a model have a high cosine; without their mean only what differs counts.

    Parameters
    ----------
    states : (n, blocks, hidden size)
    around : (m, blocks, hidden size), such as the states of all captions
    """
    return states - around.mean(0)


def _inputs(
    model: PreTrainedModel, processor: ProcessorMixin, requests: Sequence[Request]
) -> dict[str, Any]:
    inputs = encode(processor, requests).to(model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return dict(inputs)


def _last(states: Tensor) -> Tensor:
    return states[:, -1]
