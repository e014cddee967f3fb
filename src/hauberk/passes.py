"""Which forward passes of a model read a prompt, and which go on with it token by token."""

from collections.abc import Mapping
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from transformers import Cache

from hauberk.decoding import rows_left
from hauberk.errors import UnsupportedRequest


class Passes:
    """Follows the passes of one model: for a defense that remembers something of every prompt.

    Its :meth:`before` and :meth:`after` are called by a forward pre-hook and a forward hook of the
    model, both with keyword arguments.

    Parameters
    ----------
    who : the defense, as an error names it
    """

    def __init__(self, who: str) -> None:
        self.who = who
        self.prompt = torch.empty(0, 0)
        """Tokens of the prompt, (rows, positions) int64."""
        self.left = torch.empty(0, dtype=torch.long)
        """Rows of the prompt that are still decoded, int64."""
        self.past = 0
        """Positions that the cache held before this pass."""
        self.length = 0
        """Positions seen since the prompt began, those of this pass included."""
        self._cached = False
        """Whether a cache has served a step of this prompt."""
        self._cache: ReferenceType[Cache] | None = None
        """The one that holds it: that of another prompt may be as long."""

    def before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Look at the inputs of a pass and tell whether it reads a new prompt.

        Raises
        ------
        UnsupportedRequest
            If there are no ``input_ids``, or the pass is neither a whole prompt nor one token after
            all that was seen of the last one.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise UnsupportedRequest(
                f"{self.who} reads the prompt from input_ids; call the model with input_ids, not "
                "with inputs_embeds alone."
            )
        cache = kwargs.get("past_key_values")
        self.past = 0 if cache is None else int(cache.get_seq_length())
        if self.past == 0 and not self._continues(ids, cache):
            self._begin(ids, cache)
            return True
        if self.past and not self._follows(ids, cache):
            raise UnsupportedRequest(
                f"{ids.shape[1]} tokens after {self.past} cached ones, where one after "
                f"{self.length} of this prompt's own cache would be right: {self.who} follows a "
                "whole prompt and then one token at a time; give every prompt whole and without a "
                "cache, and switch off chunked prefill, assisted decoding and prompt caches."
            )
        self.length += 1
        self._cached = self._cached or self.past > 0
        return False

    def after(self, output: Any) -> None:
        """Remember the cache that the model made for the prompt where the caller gave none."""
        if self._cache is None:
            parts = output.values() if isinstance(output, dict) else output
            self._cache = next((ref(part) for part in parts if isinstance(part, Cache)), None)

    def _begin(self, ids: Tensor, cache: Any) -> None:
        self.prompt, self.length = ids, ids.shape[1]
        self.left = torch.arange(len(ids), device=ids.device)
        self._cached, self._cache = False, None if cache is None else ref(cache)

    def _continues(self, ids: Tensor, cache: Any) -> bool:
        """Without a cache every step shows the prompt again, one token longer each time."""
        rows, known = self.prompt.shape
        return (
            cache is None
            and not self._cached
            and ids.shape == (rows, self.length + 1)
            and torch.equal(ids[:, :known], self.prompt)
        )

    def _follows(self, ids: Tensor, cache: Any) -> bool:
        """With a cache every step shows one token a row, after all that was seen so far."""
        if self._cache is None or self._cache() is not cache:
            return False
        left = rows_left(cache)
        self.left = self.left if left is None else left
        return self.past == self.length and ids.shape == (len(self.left), 1)
