"""Greedy decoding of a batch whose rows leave as their answers end.

``generate`` computes every row until the longest answer has ended.  Here those that have ended
leave the batch and the cache, so that a step costs what is still being said.  All else is
``generate``'s: it prepares positions, masks, processors of logits and what ends an answer, and
calls :func:`greedy` where its own loop would stand.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel

_SHARE = 1 / 4
"""Of the rows of a batch: once so many have ended they leave, at the cost of a copy of the cache.
On the lab's models and batches of 64, 1/16 to 1/2 are equally fast."""
_BY_ROW = {"attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids"}
"""Inputs of a decoding step with an entry for every row, in the last dimension but one."""
_ROWS: WeakKeyDictionary[Cache, Tensor] = WeakKeyDictionary()


def rows_left(cache: Cache | None) -> Tensor | None:
    """Tell which rows of its prompt a cache still holds, (rows,) int64; None for all of them.

    For a defense that remembers something about every row of a prompt while it is decoded.
    """
    return None if cache is None else _ROWS.get(cache)


def greedy(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    **inputs: Any,
) -> list[list[int]]:
    """Decode one batch: the ``custom_generate`` of ``generate``, which tells the arguments.

    Returns
    -------
    list of lists of int
        The new tokens of every row, up to and with the one that ended its answer.
    """
    core: Any = model
    ids, rows = input_ids, torch.arange(len(input_ids), device=input_ids.device)
    unfinished = torch.ones_like(rows, dtype=torch.bool)
    lengths = torch.zeros_like(rows)
    number, new = len(rows), None
    while number:
        step = core.prepare_inputs_for_generation(
            ids[rows],
            next_sequence_length=new if inputs["use_cache"] else None,
            is_first_iteration=new is None,
            **inputs,
        )
        outputs = core(**step, return_dict=True)
        # Mllama's own takes no default.
        inputs = core._update_model_kwargs_for_generation(
            outputs, inputs, is_encoder_decoder=core.config.is_encoder_decoder
        )
        logits = outputs.logits[:, -1].to(ids.device, torch.float32)
        # Shown to processors and criteria, which may remember the prompt's rows, as all of them.
        scores = logits.new_zeros(len(ids), logits.shape[1]).index_copy(0, rows, logits)
        tokens = logits_processor(ids, scores).argmax(-1) * unfinished
        ids, lengths, new = torch.cat([ids, tokens.unsqueeze(1)], dim=1), lengths + unfinished, 1
        unfinished = unfinished & ~stopping_criteria(ids, None)
        number = int(unfinished.sum())
        if 0 < number <= (1 - _SHARE) * len(rows) and _can_leave(inputs):
            staying = unfinished[rows].nonzero().squeeze(1)
            rows = rows[staying]
            inputs |= {name: inputs[name].index_select(-2, staying) for name in _tensors(inputs)}
            inputs["past_key_values"].batch_select_indices(staying.cpu())  # on devices of its own
            _ROWS[inputs["past_key_values"]] = rows
    answers = zip(ids[:, input_ids.shape[1] :].tolist(), lengths.tolist(), strict=True)
    return [answer[:length] for answer, length in answers]


def _can_leave(inputs: dict[str, Any]) -> bool:
    return isinstance(inputs.get("past_key_values"), DynamicCache) and _tensors(inputs) <= _BY_ROW


def _tensors(inputs: dict[str, Any]) -> set[str]:
    return {name for name, value in inputs.items() if isinstance(value, Tensor)}
