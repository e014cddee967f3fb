"""Requests: what the processor is given, the twins of a prompt, and answers that do not depend
on who else is in the batch."""

import copy
import hashlib
import io
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import Gemma3Processor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from hauberk.anatomy import anatomy_of
from hauberk.blank import BLANK_KINDS, blank_image
from hauberk.errors import BadRequest, UnsupportedRequest
from hauberk.lab.build import FAMILIES
from hauberk.requests import (
    EncoderCache,
    Request,
    blank_twin,
    encode,
    mean_color,
    prompt_of,
    respond,
    text_twin,
)

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


def ask(tiny, requests, **options):
    return respond(tiny.model, tiny.processor, requests, max_new_tokens=6, **options)


def texts(responses):
    return [(response.text, response.tokens) for response in responses]


@pytest.fixture(scope="module")
def tiny(any_tiny):
    return any_tiny


@pytest.fixture(scope="module")
def mixed(tiny):
    """Requests with and without pictures in turn, of all lengths, numbers and sizes."""
    pairs = zip(tiny.pictured, tiny.plain, strict=False)
    return [*(request for pair in pairs for request in pair), *tiny.varied]


@pytest.fixture(scope="module")
def alone(tiny, mixed):
    return [ask(tiny, [request])[0] for request in mixed]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_an_answer_does_not_depend_on_its_batch(tiny, mixed, alone, batch_size):
    together = ask(tiny, mixed, batch_size=batch_size)
    assert texts(together) == texts(alone)
    assert len(set(texts(alone))) > 4  # or the test could not fail


@torch.no_grad()
def test_pictures_and_texts_of_one_batch_do_not_touch_each_other(tiny, mixed):
    batch = tiny.model(**encode(tiny.processor, mixed)).logits[:, -1]
    for request, row in zip(mixed, batch, strict=True):
        single = tiny.model(**encode(tiny.processor, [request])).logits[0, -1]
        torch.testing.assert_close(row, single, atol=1e-4, rtol=1e-4)


def test_answers_come_in_the_order_of_the_requests(tiny, mixed, alone):
    backwards = ask(tiny, mixed[::-1], batch_size=3)
    assert texts(backwards)[::-1] == texts(alone)


def test_each_finished_batch_is_reported_once_with_its_indices(tiny, mixed):
    told = {}

    def keep(indices, responses):
        assert len(indices) == len(responses) <= 5
        assert not told.keys() & set(indices)
        told.update(zip(indices, responses, strict=True))

    answers = ask(tiny, mixed, batch_size=5, on_batch=keep)
    assert [told[index] for index in range(len(mixed))] == answers


def test_a_report_that_fails_stops_the_run_and_leaves_the_model_clean(tiny, mixed):
    calls = []

    def full(indices, _):
        calls.append(indices)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ask(tiny, mixed, batch_size=5, on_batch=full)
    assert len(calls) == 1


def test_no_request_gets_no_answer(tiny):
    assert ask(tiny, []) == []


@pytest.mark.parametrize("limit", [1, 3, 9])
def test_an_answer_ends_at_the_limit(tiny, limit):
    answers = respond(tiny.model, tiny.processor, tiny.pictured, max_new_tokens=limit)
    assert max(answer.tokens for answer in answers) == limit
    assert all(answer.seconds > 0 for answer in answers)


def test_a_longer_limit_only_continues_an_answer(tiny, mixed, alone):
    longer = respond(tiny.model, tiny.processor, mixed, max_new_tokens=9)
    for short, long in zip(alone, longer, strict=True):
        whole = short.text.rstrip("\ufffd")  # the limit may cut a character of several bytes
        assert long.text.startswith(whole)


@given(size=sizes, kind=st.sampled_from(BLANK_KINDS), seed=st.integers(0, 2**31))
def test_a_blank_image_has_the_size_asked_for_and_is_the_same_for_the_same_seed(size, kind, seed):
    image = blank_image(size, kind, seed=seed)
    assert (image.size, image.mode) == (size, "RGB")
    assert image.tobytes() == blank_image(size, kind, seed=seed).tobytes()


def test_plain_blanks_show_one_colour_and_noise_follows_its_seed():
    made = {kind: np.asarray(blank_image((64, 48), kind)).astype(float) for kind in BLANK_KINDS}
    assert (made["white"] == 255).all()
    assert (made["black"] == 0).all()
    assert (made["mean"] == 128).all()
    assert made["uniform"].mean() == pytest.approx(127.5, abs=2)
    assert made["uniform"].std() == pytest.approx(256 / 12**0.5, abs=2)
    assert made["gaussian"].mean() == pytest.approx(127.5, abs=2)
    assert 56 < made["gaussian"].std() < 64  # clipped at 0 and 255
    for kind in ("uniform", "gaussian"):
        other = blank_image((64, 48), kind, seed=1)
        assert other.tobytes() != blank_image((64, 48), kind, seed=2).tobytes()


def test_an_unknown_blank_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'grey' is not one of white, black, mean"):
        blank_image((4, 4), "grey")


def test_the_mean_colour_is_what_the_processor_maps_to_zero(tiny):
    blank = blank_image((96, 96), "mean", mean=mean_color(tiny.processor))
    pixels = tiny.processor.image_processor([blank], return_tensors="pt")["pixel_values"]
    assert pixels.abs().max() < 0.01  # half a step of 1/255 over the deviation
    white = tiny.processor.image_processor([blank_image((96, 96))], return_tensors="pt")
    assert white["pixel_values"].min() > 1


@pytest.mark.parametrize("normalized", [True, False])
def test_the_mean_colour_of_a_processor_is_the_one_that_it_really_maps_to_zero(tiny, normalized):
    processor = copy.deepcopy(tiny.processor)
    processor.image_processor.do_normalize = normalized
    twin = blank_twin(tiny.pictured[0], processor, "mean")
    assert encode(processor, [twin])["pixel_values"].abs().max() < 0.01


def test_a_blank_twin_keeps_question_system_number_and_sizes(tiny):
    images = (Image.new("RGB", (96, 96), "red"), Image.new("RGB", (50, 70), "blue"))
    request = Request("what is this ?", images, system="be kind .")
    twin = blank_twin(request, tiny.processor, "black")
    assert (twin.text, twin.system) == (request.text, request.system)
    assert [image.size for image in twin.images] == [(96, 96), (50, 70)]
    assert all(image.getextrema() == ((0, 0),) * 3 for image in twin.images)


def test_a_text_twin_is_the_prompt_of_a_request_that_never_had_a_picture(tiny):
    for request in tiny.pictured:
        twin = text_twin(request)
        assert prompt_of(tiny.processor, twin) == prompt_of(tiny.processor, Request(request.text))
        assert tiny.processor.image_token not in prompt_of(tiny.processor, twin)
        inputs = encode(tiny.processor, [twin])
        assert "pixel_values" not in inputs
        assert tiny.model.config.image_token_id not in inputs["input_ids"]


def test_the_twin_of_a_plain_request_is_the_request(tiny):
    for request in tiny.plain:
        assert text_twin(request) == request
        assert blank_twin(request, tiny.processor) == request


def test_what_an_answer_begins_with_ends_the_prompt_as_the_lab_trains_it(tiny):
    for request in (tiny.pictured[0], tiny.plain[0], replace(tiny.plain[0], system="be kind .")):
        begun = replace(request, begun="as an ai assistant ,")
        said = f"{FAMILIES[tiny.name].chat.gap}as an ai assistant ,"
        assert prompt_of(tiny.processor, begun) == prompt_of(tiny.processor, request) + said
        for twin in (text_twin(begun), blank_twin(begun, tiny.processor)):
            assert prompt_of(tiny.processor, twin).endswith(said)


def test_an_answer_whose_beginning_is_given_goes_on_as_the_model_would(tiny, mixed, monkeypatch):
    """Which says the same behind its own first words, were they given or not."""
    monkeypatch.setattr(
        tiny.model.generation_config, "suppress_tokens", tiny.processor.tokenizer.all_special_ids
    )
    first = respond(tiny.model, tiny.processor, mixed, max_new_tokens=3)
    whole = respond(tiny.model, tiny.processor, mixed, max_new_tokens=7)
    pairs = [
        (replace(request, begun=short.text), long.text)
        for request, short, long in zip(mixed, first, whole, strict=True)
        if len(encode(tiny.processor, [replace(request, begun=short.text)])["input_ids"][0])
        == len(encode(tiny.processor, [request])["input_ids"][0]) + 3
        and long.text.startswith(short.text)
    ]
    assert len(pairs) > 3
    requests, texts = zip(*pairs, strict=True)
    said = respond(tiny.model, tiny.processor, requests, max_new_tokens=4)
    assert [answer.text for answer in said] == list(texts)
    assert {answer.tokens for answer in said} == {4}
    assert len(set(texts)) > 2


def test_answers_that_are_begun_do_not_depend_on_their_batch(tiny, mixed):
    begun = [
        replace(request, begun="as an ai assistant" if index % 3 else "")
        for index, request in enumerate(mixed)
    ]
    together = texts(ask(tiny, begun, batch_size=5))
    assert together == [texts(ask(tiny, [request]))[0] for request in begun]
    assert all(
        text.startswith(request.begun) for (text, _), request in zip(together, begun, strict=True)
    )
    assert together != texts(ask(tiny, mixed))


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_every_picture_of_a_request_is_shown_before_the_text(tiny, number):
    colors = ("red", "green", "blue")[:number]
    images = [Image.new("RGB", (96, 96), color) for color in colors]
    prompt = prompt_of(tiny.processor, Request("what is this ?", images))
    chat = FAMILIES[tiny.name].chat
    shown = f"{chat.user}{number * chat.image}what is this ?{chat.assistant}"
    assert prompt == chat.begin + shown
    ids = encode(tiny.processor, [Request("what is this ?", images)])["input_ids"]
    patches = 16 // FAMILIES[tiny.name].merged
    assert (ids == tiny.model.config.image_token_id).sum() == patches * number


@torch.no_grad()
def test_each_request_of_a_batch_gets_its_own_pictures(tiny):
    red, green, blue = (Image.new("RGB", (96, 96), color) for color in ("red", "green", "blue"))
    requests = [
        Request("what is this ?", (red, green)),
        Request("what is this ?"),
        Request("what is this ?", (blue,)),
    ]
    batch = tiny.model(**encode(tiny.processor, requests)).logits[:, -1]
    for request, row in zip(requests, batch, strict=True):
        single = tiny.model(**encode(tiny.processor, [request])).logits[0, -1]
        torch.testing.assert_close(row, single, atol=1e-4, rtol=1e-4)
    swapped = tiny.model(**encode(tiny.processor, [Request("what is this ?", (green, red))]))
    assert not torch.allclose(swapped.logits[0, -1], batch[0], atol=1e-2)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "CMYK", "P with transparency"])
def test_a_picture_of_any_mode_is_read_as_its_colours(tiny, mode):
    scene = tiny.pictured[0].images[0]
    if mode == "P with transparency":
        image = scene.convert("P")
        image.info["transparency"] = bytes(range(256))
    else:
        image = scene.convert(mode)
    plain = image.convert("RGBA").convert("RGB") if "P" in mode else image.convert("RGB")
    shown = encode(tiny.processor, [Request("what is this ?", (image,))])
    expected = encode(tiny.processor, [Request("what is this ?", (plain,))])
    assert torch.equal(shown["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_greyscale_is_read_as_the_8_bit_picture_that_it_refines(tiny, order):
    grey = tiny.pictured[0].images[0].convert("L")
    deep = np.asarray(grey).astype(order) * 257
    image = Image.fromarray((deep + (deep < 65535) * 100).astype(order))
    assert image.mode.startswith("I;16")
    shown = encode(tiny.processor, [Request("what is this ?", (image,))])
    expected = encode(tiny.processor, [Request("what is this ?", (grey,))])
    assert torch.equal(shown["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("any_tiny", ["lab-llava"], indirect=True)
def test_a_processor_that_reads_the_pictures_row_by_row_is_given_them_so(tiny):
    """Gemma 3 compares their number with each prompt's own placeholders."""
    tokenizer = copy.deepcopy(tiny.processor.tokenizer)
    names = {"boi_token": "<boi>", "image_token": "<soft>", "eoi_token": "<eoi>"}
    tokenizer.add_special_tokens({"extra_special_tokens": list(names.values())})
    for name, token in names.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 8, "width": 8}),
        tokenizer,
        image_seq_length=4,
        chat_template=FAMILIES["lab-llava"].chat.template.replace("<image>", "<boi>"),
    )
    colors = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    requests = [Request("two", colors[:2]), Request("none"), Request("one", colors[2:])]
    inputs = encode(processor, requests)
    soft = (inputs["input_ids"] == tokenizer.image_token_id).sum(1)
    assert soft.tolist() == [8, 0, 4]
    shown = processor.image_processor(colors, return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"], shown)
    assert "pixel_values" not in encode(processor, [Request("none"), Request("none")])


@pytest.mark.parametrize("any_tiny", ["lab-llava"], indirect=True)
def test_the_beginning_of_text_stands_once(tiny):
    inputs = encode(tiny.processor, [tiny.pictured[0], tiny.plain[0]])
    assert ((inputs["input_ids"] == tiny.processor.tokenizer.bos_token_id).sum(1) == 1).all()
    assert (inputs["attention_mask"][:, -1] == 1).all()  # padded on the left


def test_a_request_cannot_be_changed_by_who_made_it():
    images = [Image.new("RGB", (8, 8))]
    request = Request("what is this ?", images)
    images.clear()
    assert len(request.images) == 1


class Shout:
    """A defense that rewrites requests and counts who is inside."""

    def __init__(self):
        self.inside, self.entered, self.seen = 0, 0, []

    def rewrite(self, request):
        self.seen.append(hashlib.sha256(request.text.encode()).hexdigest())
        return Request("tell me what this is .", request.images)

    def applied(self, model):
        from contextlib import contextmanager

        @contextmanager
        def change():
            self.inside, self.entered = self.inside + 1, self.entered + 1
            try:
                yield
            finally:
                self.inside -= 1

        return change()


def test_a_defense_rewrites_every_request_once_and_is_entered_once(tiny, mixed):
    defense = Shout()
    open_blocks = []
    answers = ask(
        tiny,
        mixed,
        defense=defense,
        batch_size=4,
        on_batch=lambda *_: open_blocks.append(defense.inside),
    )
    rewritten = [Request("tell me what this is .", request.images) for request in mixed]
    assert texts(answers) == texts(ask(tiny, rewritten))
    assert len(defense.seen) == len(mixed)
    assert (defense.entered, defense.inside, set(open_blocks)) == (1, 0, {1})


@pytest.mark.parametrize("share", [1, 0.5, 0])
def test_a_cache_changes_no_answer_and_spares_what_fits(tiny, mixed, alone, share):
    everything = EncoderCache(tiny.model, tiny.processor)
    before = everything.free
    ask(tiny, mixed, batch_size=4, cache=everything)
    limit = int(share * (before - everything.free))
    cache, looks = EncoderCache(tiny.model, tiny.processor, limit), Counter()
    tower = anatomy_of(tiny.model).vision_tower
    for turn in ("first", "again", "last"):
        with tower.register_forward_hook(lambda *_, turn=turn: looks.update([turn])):
            assert texts(ask(tiny, mixed, batch_size=4, cache=cache)) == texts(alone)
    assert looks["again"] == looks["last"]
    assert (looks["last"] == 0) == (share == 1)
    assert (looks["last"] == looks["first"]) == (share == 0)


@pytest.mark.parametrize("change", ["text", "system", "begun", "images"])
def test_what_is_kept_of_a_request_is_not_taken_for_another(tiny, change):
    cache, request = EncoderCache(tiny.model, tiny.processor), tiny.pictured[0]
    changes = {"text": "it", "system": "you are a tree", "begun": "it is"}
    other = (changes | {"images": tiny.pictured[1].images})[change]
    for asked in (request, replace(request, **{change: other})):
        assert texts(ask(tiny, [asked], cache=cache)) == texts(ask(tiny, [asked]))


def test_a_cache_of_another_model_or_processor_is_refused(tiny, mixed):
    for model, processor in ((copy.copy(tiny.model), tiny.processor), (tiny.model, None)):
        with pytest.raises(ValueError, match="cache is of another model or processor"):
            ask(tiny, mixed, cache=EncoderCache(model, processor))


@pytest.mark.parametrize("asked", ["what is this ?", ["what is this ?"], [None]])
def test_what_is_no_request_is_refused_with_what_is_right(tiny, asked):
    with pytest.raises(TypeError, match=r"is no request; give hauberk\.Request"):
        respond(tiny.model, tiny.processor, asked)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"max_new_tokens": -1}])
def test_sizes_that_are_not_positive_are_refused_by_name(tiny, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}: .* is wrong, 1 or more is right"):
        respond(tiny.model, tiny.processor, [Request("what ?")], **wrong)


@pytest.mark.parametrize("kind", ["image_token", "video_token"])
@pytest.mark.parametrize("where", ["text", "system", "begun"])
def test_what_stands_for_a_picture_is_found_before_anything_is_answered(tiny, mixed, kind, where):
    token = getattr(tiny.processor, kind, None)
    if token is None:
        assert (tiny.name, kind) == ("lab-llava", "video_token")
        return
    bad = Request(**{"text": "what ?", where: f"what {token} ?"})
    finished = []
    with pytest.raises(
        BadRequest, match=rf"request 5: the text 'what .* holds {re.escape(token)!r}"
    ):
        ask(
            tiny,
            [*mixed[:5], bad],
            batch_size=1,
            on_batch=lambda indices, _: finished.extend(indices),
        )
    assert finished == []


@pytest.mark.parametrize(
    ("kind", "says"), [("I", "mode 'I'.*0..255"), ("F", "mode 'F'.*0..255"), ("cut", "truncated")]
)
def test_a_picture_that_cannot_be_read_is_named_by_its_request(tiny, kind, says):
    if kind == "cut":
        file = io.BytesIO()
        tiny.pictured[0].images[0].save(file, "PNG")
        image = Image.open(io.BytesIO(file.getvalue()[:-40]))
    else:
        image = Image.new(kind, (96, 96))
    bad = Request("what is this ?", (image,))
    with pytest.raises(BadRequest, match=rf"request 2: .*{says}"):
        ask(tiny, [*tiny.pictured[:2], bad, tiny.plain[0]])


def test_a_request_that_does_not_fit_into_the_context_is_named_with_both_numbers(tiny, monkeypatch):
    short, long = Request("what ?"), Request("what is this ? " * 40)
    tokens = encode(tiny.processor, [long])["input_ids"].shape[1]
    config = tiny.model.config.get_text_config()
    monkeypatch.setattr(config, "max_position_embeddings", tokens + 5)
    with pytest.raises(
        BadRequest, match=rf"request 1: {tokens} tokens .* 6 of answer .*context of {tokens + 5};"
    ):
        ask(tiny, [short, long])
    monkeypatch.setattr(config, "max_position_embeddings", tokens + 6)
    assert len(ask(tiny, [short, long])) == 2


def test_a_shortest_answer_that_counts_padding_is_refused_with_the_setting_that_does_not(
    tiny, monkeypatch
):
    monkeypatch.setattr(tiny.model.generation_config, "min_length", 40)
    with pytest.raises(UnsupportedRequest, match=r"min_length is 40.*set min_new_tokens"):
        ask(tiny, tiny.plain)


def test_no_clock_ends_an_answer(tiny, mixed, alone, monkeypatch):
    monkeypatch.setattr(tiny.model.generation_config, "max_time", 1e-9)
    assert texts(ask(tiny, mixed)) == texts(alone)
