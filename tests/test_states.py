"""Averaged states are those of the positions meant, whatever stands around them."""

import pytest
import torch
from PIL import Image

from hauberk.analysis.states import image_states, text_states
from hauberk.anatomy import anatomy_of
from hauberk.defenses.shift import Shift, ShiftSetting
from hauberk.errors import UnsupportedRequest
from hauberk.lab.language import told
from hauberk.requests import Request, encode, prompt_of, text_twin

CAPTION = "there is a lamp red and a ball blue ."
TOLD = Request(told(CAPTION, "how do i open this ?"))


def hidden(any_tiny, request):
    """States of one request after every block but the last, as transformers reports them."""
    with torch.no_grad():
        inputs = encode(any_tiny.processor, [request])
        out = any_tiny.model(**inputs, output_hidden_states=True)
    return inputs["input_ids"][0], torch.stack(out.hidden_states[1:-1], dim=1)[0]


def test_a_picture_s_state_is_the_mean_over_its_tokens(any_tiny):
    request = any_tiny.pictured[0]
    ids, states = hidden(any_tiny, request)
    found = image_states(any_tiny.model, any_tiny.processor, [request])
    assert found.shape == (1, len(anatomy_of(any_tiny.model).blocks), states.shape[-1])
    mine = states[:, ids == anatomy_of(any_tiny.model).image_token_id]
    torch.testing.assert_close(found[0, :-1], mine.mean(1), rtol=1e-4, atol=1e-4)


def test_a_text_s_state_is_the_mean_over_its_tokens(any_tiny):
    ids, states = hidden(any_tiny, TOLD)
    found = text_states(any_tiny.model, any_tiny.processor, [TOLD], [CAPTION])
    prompt = prompt_of(any_tiny.processor, TOLD)
    whole = prompt[: prompt.index(CAPTION) + len(CAPTION)]
    begin, end = (
        len(any_tiny.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (whole.removesuffix(CAPTION).rstrip(" "), whole)
    )
    assert any_tiny.processor.tokenizer.decode(ids[begin:end]).strip() == CAPTION
    torch.testing.assert_close(found[0, :-1], states[:, begin:end].mean(1), rtol=1e-4, atol=1e-4)


def test_words_before_a_text_change_its_state_and_words_behind_do_not(any_tiny):
    behind = Request(told(CAPTION, "is there a key ?"))
    before = Request(told("it says zorb .", TOLD.text))
    mine, same, other = text_states(
        any_tiny.model, any_tiny.processor, [TOLD, behind, before], [CAPTION] * 3
    )
    torch.testing.assert_close(mine, same, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mine, other, rtol=1e-2)


def test_a_batch_gives_the_states_of_each_request_alone(any_tiny):
    texts = ["there is a ball blue .", CAPTION, "how do i"]
    requests = [Request(told(text, "how do i open this ?")) for text in texts]
    together = text_states(any_tiny.model, any_tiny.processor, requests, texts, batch_size=2)
    alone = [
        text_states(any_tiny.model, any_tiny.processor, [r], [t])
        for r, t in zip(requests, texts, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    pictured = any_tiny.pictured[:3]
    together = image_states(any_tiny.model, any_tiny.processor, pictured, batch_size=2)
    alone = [image_states(any_tiny.model, any_tiny.processor, [request]) for request in pictured]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_a_defense_that_runs_twins_in_the_same_blocks_does_not_disturb_the_mean(any_tiny):
    model, processor = any_tiny.model, any_tiny.processor
    anatomy = anatomy_of(model)
    vectors = torch.zeros(len(anatomy.blocks), anatomy.hidden_size)
    requests = [*any_tiny.pictured[:2], any_tiny.varied[0]]
    plain = image_states(model, processor, requests)
    for position in ("last", "all"):
        setting = ShiftSetting(level="sample", compose="incremental", position=position)
        with Shift(vectors, setting, processor).applied(model):
            shifted = image_states(model, processor, requests)
        # Image positions come before the last one, which alone is edited: no block changes them.
        assert torch.allclose(shifted, plain, rtol=1e-4, atol=1e-4) == (position == "last")


def test_a_request_without_picture_has_no_picture_s_state(any_tiny):
    with pytest.raises(UnsupportedRequest, match="no position to average over; give it a picture"):
        image_states(any_tiny.model, any_tiny.processor, [text_twin(any_tiny.pictured[0])])


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (TOLD, "there is nothing ."),
        (Request(TOLD.text, (Image.new("RGB", (96, 96)),)), CAPTION),
    ],
)
def test_words_that_cannot_be_found_are_named(any_tiny, request_, text):
    with pytest.raises(UnsupportedRequest, match=f"tokens of '{text}' are looked for"):
        text_states(any_tiny.model, any_tiny.processor, [request_], [text])


def test_a_text_of_no_token_has_no_state(any_tiny):
    with pytest.raises(UnsupportedRequest, match="a text of at least one token"):
        text_states(any_tiny.model, any_tiny.processor, [TOLD], [""])
