"""Served models under test: asked as models here are, guarded by what works on a request."""

import base64
import io
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hauberk.data.lab import build_suite
from hauberk.defenses import GuardAlign, Projector, SafetyPrompt, Shift, Stack, Undefended
from hauberk.defenses.prefix_attention import PrefixAttention, PrefixSetting
from hauberk.defenses.safety_prompt import Geometry
from hauberk.endpoint import Endpoint, EndpointSetting
from hauberk.errors import BadRequest, UnsupportedRequest
from hauberk.evaluation.run import evaluate_through, read_records
from hauberk.requests import Request, respond
from hauberk.target import Target, check_defense, obstacle
from tests.serving import failure, last_text, serving
from tests.test_endpoint import PASSING

PICTURE = Image.new("RGB", (48, 48), (0, 128, 255))


def target_of(server, **options):
    quick = {"backoff": 0.01, "timeout": 0.3, "deadline": 3.0, "retries": 1, "concurrency": 4}
    return Target(Endpoint(EndpointSetting(server.url, "m", **(quick | options))))


def echo(body, count):
    return f" said {last_text(body)} "


def pictures_in(body):
    content = body["messages"][-1]["content"]
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def test_requests_arrive_as_they_are_and_answers_come_back_in_their_order():
    requests = [
        Request("a"), Request("b", (PICTURE, PICTURE)), Request("c", (PICTURE,), system="be brief"),
    ]  # fmt: skip
    with serving(echo) as server:
        responses = target_of(server, concurrency=1).respond(requests, max_new_tokens=7)
        assert [response.text for response in responses] == ["said a", "said b", "said c"]
        assert all(response.tokens == 4 and response.seconds > 0 for response in responses)
        first, second, third = server.seen
    assert first["messages"] == [{"role": "user", "content": "a"}]
    assert [np.array(seen).tolist() for seen in pictures_in(second)] == [
        np.array(PICTURE).tolist()
    ] * 2
    assert third["messages"][0] == {"role": "system", "content": "be brief"}
    assert {(body["max_tokens"], body["temperature"]) for body in server.seen} == {(7, 0)}


@pytest.mark.parametrize("trouble", PASSING.values(), ids=PASSING)
def test_what_has_no_answer_is_a_response_that_says_so(trouble):
    def behave(body, count):
        return trouble if last_text(body) == "b" else echo(body, count)

    with serving(behave) as server:
        kept = {}
        responses = target_of(server).respond(
            [Request(text) for text in "abc"],
            on_batch=lambda indices, batch: kept.update(zip(indices, batch, strict=True)),
        )
        assert [response.text for response in responses] == ["said a", "", "said c"]
        assert [bool(response.error) for response in responses] == [False, True, False]
        assert [kept[index] for index in range(3)] == responses


def frame(prefix="be careful . "):
    return SafetyPrompt(
        torch.zeros(3, 48, 48, dtype=torch.uint8), Geometry(48, 48, (4, 4, 4, 4)), prefix
    )


@pytest.fixture
def guard(tiny):
    def make(gamma):
        return GuardAlign(None, PrefixAttention(PrefixSetting(gamma=gamma), tiny.processor))

    return make


@pytest.mark.parametrize("defense", [None, frame()], ids=["none", "framed"])
def test_a_model_answers_the_same_here_and_served(tiny, defense):
    def behave(body, count):
        request = Request(last_text(body), pictures_in(body))
        (response,) = respond(tiny.model, tiny.processor, [request], max_new_tokens=6)
        return response.text

    requests = tiny.pictured[:4]
    with serving(behave) as server:
        served = target_of(server, concurrency=1, timeout=10.0).respond(requests, defense)
    here = respond(tiny.model, tiny.processor, requests, defense, max_new_tokens=6)
    assert [response.text for response in served] == [response.text for response in here]
    assert len({response.text for response in here}) > 1


class Unknown:
    """A defense of somebody else."""

    def rewrite(self, request):
        return request

    def applied(self, model):
        return nullcontext()


def shift():
    return object.__new__(Shift)


def projector():
    return object.__new__(Projector)


def test_a_defense_that_works_on_requests_changes_what_is_asked(guard):
    with serving(echo) as server:
        target = target_of(server, concurrency=1)
        for defense in (None, Undefended(), frame(), guard(0), Stack([guard(0), frame()])):
            target.respond([Request("a", (PICTURE,))], defense)
    texts = [last_text(body) for body in server.seen]
    assert texts == ["a", "a", "be careful . a", "As an AI assistant, a",
                     "be careful . As an AI assistant, a"]  # fmt: skip
    looks = [np.array(pictures_in(body)[0]) for body in server.seen]
    assert np.array_equal(looks[0], np.array(PICTURE))
    assert np.array_equal(looks[2], np.array(frame().framed(PICTURE)))
    assert not np.array_equal(looks[2], looks[0])


def test_a_defense_that_needs_the_model_is_refused_with_its_reason_before_anything_is_asked(guard):
    cases = [
        (shift(), "hidden states"), (projector(), "export"), (guard(0.15), r"with_gamma\(0\)"),
        (Stack([frame(), shift()]), "hidden states"), (Stack([Stack([guard(1)])]), "gamma 1"),
        (Unknown(), "Unknown.*register"),
    ]  # fmt: skip
    with serving(echo) as server:
        for defense, reason in cases:
            with pytest.raises(UnsupportedRequest, match=reason):
                target_of(server).respond([Request("a")], defense)
        assert server.seen == []


def test_a_defense_of_another_package_can_say_that_it_leaves_the_model_alone():
    class Known(Unknown):
        pass

    obstacle.register(Known, lambda defense: "")
    check_defense(Known())
    check_defense(Stack([Known()]))


def test_an_answer_cannot_be_begun_for_a_served_model(tiny):
    prefix = PrefixSetting("As an AI assistant", placement="answer", gamma=0)
    guard = GuardAlign(None, PrefixAttention(prefix, tiny.processor))
    with serving(echo) as server, pytest.raises(UnsupportedRequest, match="'user'"):
        target_of(server).respond([Request("a")], guard)


@pytest.mark.parametrize("bad", [Image.new("F", (4, 4)), Image.new("I", (4, 4))])
def test_a_picture_that_cannot_be_sent_is_named(bad):
    with serving(echo) as server, pytest.raises(BadRequest, match="request 1"):
        target_of(server).respond([Request("a"), Request("b", (bad,))])


@pytest.mark.parametrize("size", ["batch_size", "max_new_tokens"])
def test_a_size_that_is_not_positive_is_refused(size):
    with serving(echo) as server, pytest.raises(ValueError, match=size):
        target_of(server).respond([Request("a")], **{size: 0})


def test_many_are_rewritten_at_once_as_far_as_the_batch_goes():
    class Together(Unknown):
        sizes = []  # noqa: RUF012

        def rewrite_all(self, requests):
            self.sizes.append(len(requests))
            assert not torch.is_grad_enabled()
            return [replace(request, text=f"{request.text} !") for request in requests]

    obstacle.register(Together, lambda defense: "")
    with serving(echo) as server:
        responses = target_of(server).respond(
            [Request(text) for text in "abcde"], Together(), batch_size=2
        )
    assert [response.text for response in responses] == [f"said {text} !" for text in "abcde"]
    assert Together.sizes == [2, 2, 1]


@pytest.fixture(scope="module")
def samples():
    return [
        sample
        for suite in ("text_image", "benign_image")
        for sample in build_suite(suite, "test", 4, seed=2)
    ]


def run(server, samples, journal, **options):
    return evaluate_through(
        target_of(server, **options).respond, samples, None,
        names=("served", "none"), journal=journal, max_new_tokens=8, batch_size=4,
    )  # fmt: skip


def test_an_evaluation_of_a_served_model_goes_on_with_what_has_no_answer(samples, tmp_path):
    lost = samples[1].question

    def behave(body, count):
        return failure(500) if last_text(body) == lost else "i can not help with that ."

    journal = tmp_path / "responses.jsonl"
    with serving(behave) as server:
        records = run(server, samples, journal)
        assert [record.sample_id for record in records] == [s.sample_id for s in samples]
        failed = [record for record in records if record.question == lost]
        assert failed
        for record in failed:
            assert record.outcome == record.outcome_keyword == "judge_error"
            assert (record.declared, record.correct) == ("failed", None)
            assert "500" in record.error
            assert record.unsafe
        others = [record for record in records if record.question != lost]
        assert {record.outcome for record in others} == {"refused"}
        kept = {record.sample_id: record for record in read_records(journal)}
        assert kept == {record.sample_id: record for record in others}
        server.behave, asked = lambda body, count: "take some wood and glue it .", len(server.seen)
        again = run(server, samples, journal)
        assert len(server.seen) - asked == len(failed)
        assert all(record.outcome != "refused" for record in again if record.question == lost)
        assert not any(record.declared for record in again)


def test_a_refusal_that_the_endpoint_declares_is_one_whatever_its_words(samples, tmp_path):
    def behave(body, count):
        return failure(400, "The prompt was filtered.", code="content_filter")

    with serving(behave) as server:
        records = run(server, samples, tmp_path / "responses.jsonl")
    assert {(record.outcome, record.outcome_keyword) for record in records} == {
        ("refused", "refused")
    }
    assert {record.declared for record in records} == {"refused"}
    assert all(record.over_refused == (record.expected == "answer") for record in records)
