"""Decoding in which rows leave as they end: the same answers, for less."""

import pytest
import torch

from hauberk.defenses.shift import Shift, ShiftSetting
from hauberk.requests import encode, respond

LIMIT = 12


@pytest.fixture
def requests(any_tiny):
    return [*any_tiny.pictured, *any_tiny.plain, *any_tiny.varied]


def generated(tiny, requests):
    """The new tokens of each row as ``generate`` alone tells them, cut behind what ended them."""
    inputs = encode(tiny.processor, requests)
    found = tiny.model.generate(**inputs, max_new_tokens=LIMIT, do_sample=False)
    rows = found[:, inputs["input_ids"].shape[1] :].tolist()
    ends = tiny.model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    lengths = [
        next((place for place, token in enumerate(row, 1) if token in ends), len(row))
        for row in rows
    ]
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def answered(tiny, requests, defense=None):
    """Texts and numbers of tokens, and how many rows each pass of the decoder had."""
    passes = []
    blocks = tiny.model.get_decoder().layers
    with blocks[0].register_forward_hook(
        lambda _module, _inputs, states: passes.append(len(states))
    ):
        found = respond(tiny.model, tiny.processor, requests, defense, max_new_tokens=LIMIT)
    return [(answer.text, answer.tokens) for answer in found], passes


def expected(tiny, rows):
    texts = tiny.processor.batch_decode(rows, skip_special_tokens=True)
    return [(text.strip(), len(row)) for text, row in zip(texts, rows, strict=True)]


def test_answers_are_those_of_generate_and_rows_leave_as_they_end(any_tiny, requests, ending):
    rows = generated(any_tiny, requests)
    assert len({len(row) for row in rows}) > 3
    found, passes = answered(any_tiny, requests)
    assert found == expected(any_tiny, rows)
    assert passes == sorted(passes, reverse=True)
    assert passes[0] == len(requests)
    assert sum(passes) < 0.8 * len(requests) * max(map(len, rows))
    over = [sum(len(row) > step for row in rows) for step in range(len(passes))]
    assert all(open <= computed <= open / 0.75 for open, computed in zip(over, passes, strict=True))


def test_an_answer_that_never_ends_stops_at_the_limit(any_tiny, requests, monkeypatch):
    monkeypatch.setattr(any_tiny.model.generation_config, "eos_token_id", None)
    found, passes = answered(any_tiny, requests)
    assert {tokens for _, tokens in found} == {LIMIT}
    assert passes == [len(requests)] * LIMIT


def test_a_single_token_may_end_answers(any_tiny, requests, ending, monkeypatch):
    monkeypatch.setattr(any_tiny.model.generation_config, "eos_token_id", ending[0])
    assert answered(any_tiny, requests)[0] == expected(any_tiny, generated(any_tiny, requests))


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 3.0},
        {"min_new_tokens": 5},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_what_the_generation_config_asks_for_is_honoured(
    any_tiny, requests, ending, monkeypatch, setting
):
    ((name, value),) = setting.items()
    image = any_tiny.model.config.image_token_id  # without a cache one that is made up is missed
    monkeypatch.setattr(any_tiny.model.generation_config, "suppress_tokens", [image])
    monkeypatch.setattr(any_tiny.model.generation_config, name, value)
    rows = generated(any_tiny, requests)
    found, _ = answered(any_tiny, requests)
    assert found == expected(any_tiny, rows)
    assert found[::3] == [answered(any_tiny, [request])[0][0] for request in requests[::3]]
    if "use_cache" not in setting and "cache_implementation" not in setting:
        monkeypatch.undo()
        assert rows != generated(any_tiny, requests)


def test_answers_stay_greedy_where_the_model_would_draw_or_search(any_tiny, requests, monkeypatch):
    plain, _ = answered(any_tiny, requests[:4])
    for name, value in {"do_sample": True, "num_beams": 3}.items():
        monkeypatch.setattr(any_tiny.model.generation_config, name, value)
    assert answered(any_tiny, requests[:4])[0] == plain


@pytest.mark.parametrize("level", ["dataset", "sample"])
@pytest.mark.parametrize("position", ["last", "all"])
def test_what_a_defense_knows_of_a_row_stays_with_it_when_others_leave(
    any_tiny, requests, ending, level, position
):
    setting = ShiftSetting(level=level, position=position, compose="incremental")
    torch.manual_seed(0)
    defense = Shift(torch.randn(4, 32), setting, any_tiny.processor)
    together, passes = answered(any_tiny, requests, defense)
    assert passes[-1] < len(requests)
    alone = [answered(any_tiny, [request], defense)[0][0] for request in requests[::3]]
    assert together[::3] == alone
    assert together != answered(any_tiny, requests)[0]
