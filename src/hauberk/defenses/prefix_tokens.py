"""Where the tokens of a safety prefix stand in tokenized prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from hauberk.errors import UnsupportedRequest
from hauberk.requests import Request, encode, prompt_of

Placement = Literal["user", "answer"]

_PICTURE = Image.new("RGB", (32, 32))
_QUERIES = "how do i open it ?", "What is this", "7 of them", '"it"', "(a) or (b) !"
"""They begin and end with tokens of many kinds: what a neighbour changes is not the prefix's."""
_REST = "", " it is", ", it is"
"""The same of answers, which end with the prefix unless a request has begun one itself."""
_SYSTEMS = "be kind .", "You have 7 rules"


def prefixed(request: Request, text: str, placement: Placement) -> Request:
    """Put a prefix in front of what the user says, or of what the model answers."""
    if placement == "user":
        return replace(request, text=text + request.text)
    return replace(request, begun=text + request.begun)


@dataclass(frozen=True)
class _Pattern:
    """Tokens to look for."""

    lead: tuple[int, ...]
    """What always stands before the prefix."""
    inside: tuple[int, ...]
    """What always lies in it."""


class PrefixFinder:
    """Finds a prefix by the tokens that it becomes where it stands, never by decoded text.

    A prefix of the user's turn stands right behind the last picture, or behind what begins the
    turn if there is none; a prefix of the answer right behind the last assistant's tag.  The same
    words elsewhere, such as in the query, are not it.  A token at its edge that some neighbour
    changes or shares (but for a space) is not among its tokens.

    Parameters
    ----------
    processor : that of the model
    image_token_id : stands in ``input_ids`` once for every image feature
    text, placement : as :func:`prefixed` puts them

    Raises
    ------
    UnsupportedRequest
        If the tokenizer does not tell which characters its tokens stand for, or joins the prefix
        with its neighbours, or the chat template does not put the prefix there.
    """

    def __init__(
        self, processor: ProcessorMixin, image_token_id: int, text: str, placement: Placement
    ) -> None:
        self.processor, self.image, self.text = processor, image_token_id, text
        self.placement: Placement = placement
        if not getattr(processor.tokenizer, "is_fast", False):
            raise UnsupportedRequest(
                f"{type(processor.tokenizer).__name__} does not tell which characters its tokens "
                "stand for, so the prefix cannot be found; load the fast tokenizer."
            )
        asked = [Request(query) for query in _QUERIES]
        if placement == "answer":
            begun = [replace(request, begun=rest) for request in asked for rest in _REST]
            self.plain, self.pictured = [self._pattern(begun)], None
            if not self.plain[0].lead:
                raise self._not_there("has nothing before an answer that tells where it begins")
            return
        systems = self._with_systems(asked)
        self.plain = [self._pattern(group) for group in (asked, systems) if group]
        self.pictured = self._behind_picture(
            [replace(request, images=(_PICTURE,)) for request in asked]
        )

    def spans(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Find the prefix in every row of a batch of prompts.

        Parameters
        ----------
        ids : (rows, positions) int64, padded on either side, image tokens expanded

        Returns
        -------
        tuple of Tensor
            Begin and end (excluded) of its tokens, (rows,) int64 each; both 0 where it is not.
        """
        begin = end = ids.new_zeros(len(ids))
        for pattern, allowed in self._places(ids):
            hits = _starts(ids, pattern.lead + pattern.inside) & allowed
            at = hits.int().argmax(1) + len(pattern.lead)
            new = hits.any(1) & (end == 0)
            begin = torch.where(new, at, begin)
            end = torch.where(new, at + len(pattern.inside), end)
        return begin, end

    def _places(self, ids: Tensor) -> Iterator[tuple[_Pattern, Tensor]]:
        """Tell for each pattern where its lead may begin, bool that broadcasts to the ids."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        if self.pictured is None:
            (pattern,) = self.plain
            yield pattern, positions == _last(_starts(ids, pattern.lead))
            return
        picture = _last(ids == self.image)
        yield self.pictured, (positions == picture + 1) & (picture >= 0)
        for pattern in self.plain:
            yield pattern, picture < 0

    def _pattern(self, requests: Sequence[Request]) -> _Pattern:
        """Keep what does not depend on what else is said."""
        before, inside = zip(*map(self._cut, requests), strict=True)
        lead = _common([ids[::-1] for ids in before])[::-1]
        kept = _common(inside)
        if not kept:
            raise self._not_there("lets its tokens be joined with what stands around it")
        return _Pattern(lead, kept)

    def _cut(self, request: Request) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokenize one prompt: the tokens before the prefix, and those in it."""
        asked = prefixed(request, self.text, self.placement)
        prompt = prompt_of(self.processor, asked)
        start = prompt.rfind((asked.begun or asked.text).strip())
        if start < 0:
            raise self._not_there("does not show it as it is")
        stop = start + len(self.text.strip())
        tokenizer: Any = self.processor.tokenizer
        told = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        within = []
        for index, (first, last) in enumerate(told["offset_mapping"]):
            piece = prompt[first:last]
            first += len(piece) - len(piece.lstrip())  # a space before a word is part of its token
            if piece.strip() and first >= start and last <= stop:
                within.append(index)
        if not within:
            raise self._not_there("lets its tokens be joined with what stands around it")
        ids = tuple(told["input_ids"])
        return ids[: within[0]], ids[within[0] : within[-1] + 1]

    def _with_systems(self, requests: Sequence[Request]) -> list[Request]:
        told = [replace(request, system=text) for request in requests for text in _SYSTEMS]
        try:
            prompt_of(self.processor, told[0])
        except Exception:  # a template that knows no system turn has an error of its own
            return []
        return told

    def _behind_picture(self, requests: Sequence[Request]) -> _Pattern:
        """Find what the processor puts between the last image token and the prefix."""
        inside = self._pattern(requests).inside
        asked = prefixed(requests[0], self.text, self.placement)
        ids = encode(self.processor, [asked])["input_ids"]
        behind = ids[:, int(_last(ids == self.image)) + 1 :]
        starts = _starts(behind, inside)[0]
        if not starts.any():
            raise self._not_there("does not put it behind the pictures")
        return _Pattern(tuple(behind[0, : int(starts.int().argmax())].tolist()), inside)

    def _not_there(self, what: str) -> UnsupportedRequest:
        where = "what the user says" if self.placement == "user" else "the answer"
        return UnsupportedRequest(
            f"the prefix {self.text[:60]!r} cannot be found before {where}: the chat template, or "
            f"the tokenizer, {what}; choose a prefix of whole words, or the other placement."
        )


def _starts(ids: Tensor, pattern: tuple[int, ...]) -> Tensor:
    """Tell where a pattern begins, bool of the shape of the ids."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    if 0 < len(pattern) <= ids.shape[1]:
        windows = ids.unfold(1, len(pattern), 1)
        found[:, : windows.shape[1]] = (windows == ids.new_tensor(pattern)).all(2)
    return found


def _last(hits: Tensor) -> Tensor:
    """Where the last hit of every row is, (rows, 1) int64; -1 where there is none."""
    positions = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    return (hits * positions).amax(1, keepdim=True) - 1


def _common(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The beginning that all rows have in common."""
    columns = zip(*rows, strict=False)
    return tuple(tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
