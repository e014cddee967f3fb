"""Requests with the answers wanted to them, as a model would be given them token by token."""

import copy
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hauberk.errors import UnsupportedRequest
from hauberk.lab.build import FAMILIES
from hauberk.requests import (
    IGNORED,
    Request,
    continuation_of,
    encode,
    encode_answered,
    prompt_of,
    respond,
)

ANSWERS = ["take some wood and shape it .", "it .", "to draw a lamp , take some glass ."]
PARTS = (
    "{% for message in messages %}{{ message['role'] }}:{% for part in message['content']"
    " | selectattr('type', 'equalto', 'text') %} {{ part['text'] }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Reads what anybody says as parts alone, as the template of LLaVA-1.5 does."""


@pytest.fixture
def templated(tiny, monkeypatch):
    def use(template):
        monkeypatch.setattr(tiny.processor, "chat_template", template)
        return tiny.processor

    return use


def test_the_continuation_is_what_the_lab_trains_to_say_but_for_its_end(any_tiny):
    (chat,) = {
        family.chat
        for family in FAMILIES.values()
        if family.chat.template == any_tiny.processor.chat_template
    }
    for request in (any_tiny.pictured[0], any_tiny.plain[0]):
        assert continuation_of(any_tiny.processor, request, "it .") == f"{chat.gap}it ."


def test_a_template_that_reads_parts_alone_gives_its_continuation_as_well(templated):
    processor = templated(PARTS)
    assert continuation_of(processor, Request("what ?"), "it .") == " it ."


@pytest.mark.parametrize("template", ["{{ 'assistant:' }}", "{{ messages[0]['role'] }} it ."])
def test_a_template_without_the_answer_behind_the_prompt_is_refused(templated, template):
    processor = templated(template + "{% if add_generation_prompt %}now:{% endif %}")
    with pytest.raises(UnsupportedRequest, match=r"'it \.' behind the prompt .*now:"):
        continuation_of(processor, Request("what ?"), "it .")


def test_the_columns_on_the_right_are_the_answer_after_the_prompt(any_tiny):
    processor, requests = any_tiny.processor, [*any_tiny.pictured[:2], any_tiny.plain[0]]
    inputs, labels = encode_answered(processor, requests, ANSWERS, tokens=100)
    prompts = encode(processor, requests)
    there = labels != IGNORED
    width = labels.shape[1]
    assert set(inputs) == set(prompts)
    for name, values in prompts.items():
        if values.shape == prompts["input_ids"].shape:
            assert torch.equal(inputs[name][:, :-width], values)
        else:
            assert torch.equal(inputs[name], values)
    assert torch.equal(inputs["attention_mask"][:, -width:].bool(), there)
    for request, answer, row, kept in zip(requests, ANSWERS, labels, there, strict=True):
        text = processor.decode(row[kept])
        assert text == continuation_of(processor, request, answer)
        whole = prompt_of(processor, request) + text
        if not request.images:
            ids = processor.tokenizer(whole, add_special_tokens=False).input_ids
            assert ids[-int(kept.sum()) :] == row[kept].tolist()


def test_behind_what_an_answer_begins_with_stands_the_rest_of_it(any_tiny):
    processor, begun = any_tiny.processor, "take some"
    for request in (any_tiny.pictured[0], any_tiny.plain[0]):
        whole, whole_labels = encode_answered(processor, [request], ANSWERS[:1], tokens=100)
        rest = ANSWERS[0].removeprefix(begun)
        inputs, labels = encode_answered(
            processor, [replace(request, begun=begun)], [rest], tokens=100
        )
        assert torch.equal(inputs["input_ids"], whole["input_ids"])
        assert torch.equal(labels, whole_labels[:, -labels.shape[1] :])
        assert processor.decode(labels[0]) == rest


def test_an_answer_ends_after_the_tokens_asked_for(any_tiny):
    processor, requests = any_tiny.processor, any_tiny.pictured[:3]
    _, whole = encode_answered(processor, requests, ANSWERS, tokens=100)
    _, first = encode_answered(processor, requests, ANSWERS, tokens=3)
    assert first.shape == (3, 3)
    assert torch.equal(first, whole[:, :3])


LINES = (
    PARTS.replace(":{%", "\n{%", 1).replace("assistant:", "assistant\n").replace("%} {{", "%}{{")
)
"""As :data:`PARTS`, but an answer begins its line."""


def metaspaced(tiny, corpus):
    """A processor whose tokenizer puts a space before a text, as those of Llama 2 do."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<pad>", "<s>", "</s>", "<image>"]
    core.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=200,
            special_tokens=special,
            initial_alphabet=[chr(code) for code in range(128)],
            show_progress=False,
        ),
    )
    processor = copy.copy(tiny.processor)
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    processor.chat_template = LINES
    return processor


def test_an_answer_is_tokenized_where_it_stands_and_not_as_a_text_of_its_own(tiny):
    processor = metaspaced(tiny, ["user assistant what take some wood"] * 9)
    request, answer = Request("what ?"), "take some wood"
    assert prompt_of(processor, request).endswith("assistant\n")
    inputs, labels = encode_answered(processor, [request], [answer], tokens=100)
    tokenizer = processor.tokenizer
    whole = tokenizer(prompt_of(processor, request) + answer, add_special_tokens=False)
    assert inputs["input_ids"][0].tolist() == whole.input_ids
    assert "".join(tokenizer.convert_ids_to_tokens(labels[0])) == "take▁some▁wood"
    assert "".join(tokenizer.tokenize(answer)) == "▁take▁some▁wood"


def test_a_tokenizer_that_drops_a_first_space_does_not_take_it_from_inside_an_answer(
    tiny, monkeypatch
):
    processor = metaspaced(tiny, ["user assistant what take some wood"] * 9)
    processor.tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    wood = processor.tokenizer.convert_tokens_to_ids("▁wood")
    assert processor.decode([wood]) == "wood"
    others = [token for token in range(tiny.model.config.text_config.vocab_size) if token != wood]
    monkeypatch.setattr(tiny.model.generation_config, "suppress_tokens", others)
    (answer,) = respond(
        tiny.model, processor, [Request("what ?", begun="take some")], max_new_tokens=2
    )
    assert answer.text == "take some wood wood"


def test_an_answer_that_shares_a_token_with_its_prompt_is_refused(tiny):
    processor = metaspaced(tiny, ["assistant\ntake some wood"] * 9)
    with pytest.raises(UnsupportedRequest, match=r"joins the end of the prompt .* 'take some"):
        encode_answered(processor, [Request("what ?")], ["take some wood"], tokens=3)


@torch.no_grad()
def test_what_a_model_answers_is_what_its_logits_predict_at_those_columns(any_tiny, monkeypatch):
    model, processor, requests = any_tiny.model, any_tiny.processor, any_tiny.pictured[:6]
    unseen = processor.tokenizer.all_special_ids
    monkeypatch.setattr(model.generation_config, "suppress_tokens", unseen)
    said = [answer.text for answer in respond(model, processor, requests, max_new_tokens=4)]
    pairs = [
        (request, text)
        for request, text in zip(requests, said, strict=True)
        # Of other letters a token may be one byte, which cannot be shown alone.
        if text
        and text.isascii()
        and processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text
    ]
    assert pairs
    requests, answers = zip(*pairs, strict=True)
    inputs, _ = encode_answered(processor, requests, answers, tokens=1)
    logits = model(**inputs).logits[:, -2]
    logits[:, unseen] = -torch.inf
    shown = [text.strip() for text in processor.batch_decode(logits.argmax(-1, keepdim=True))]
    assert all(shown)
    assert all(answer.startswith(text) for answer, text in zip(answers, shown, strict=True))
