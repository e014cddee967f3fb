"""Graders that are served: what they are asked, and that no grade is ever guessed."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hauberk.errors import BadEndpoint, BadJudge
from hauberk.evaluation.judges import grader_of
from hauberk.evaluation.run import judge_response
from hauberk.evaluation.utility import estimates, graded
from hauberk.requests import Response
from tests.serving import Answer, completion, failure, last_text, serving
from tests.test_endpoint import PASSING
from tests.test_judges import BENIGN
from tests.test_served_judge import spec_of

VET = replace(
    BENIGN, suite="mm_vet", question="What is there?", reference="a cup <AND> a plate",
    caption="a caption", image=Image.new("RGB", (4, 4)), meta='{"metric": "judged"}',
)  # fmt: skip
BENCH = replace(VET, suite="bench", reference="A cup.", meta='{"metric": "relative"}')
KINDS = {"judged": VET, "relative": BENCH}


def quoted(body):
    """What stands between marks, by its name."""
    found = re.findall(r"\[([a-z ]+) (\w{16})\]\n(.*?)\n\[end of \1 \2\]", last_text(body), re.S)
    assert len({mark for _, mark, _ in found}) == 1
    return {name: text for name, _, text in found}


def by_answer(body, count=0):
    """Grade as a model would: by the number in the answer that is quoted."""
    told = quoted(body)
    if "answer" in told:
        return json.dumps({"reason": "r", "grade": float(told["answer"].split()[-1])})
    return json.dumps({"reason": "r", "first": 8, "second": int(told["second answer"].split()[-1])})


def grades(behave, sample, *responses, **options):
    with serving(behave) as server:
        found = grader_of(spec_of(server, **options)).grade([sample] * len(responses), responses)
        return found, server


def test_each_answer_gets_the_grade_of_itself_on_its_scale():
    found, _ = grades(by_answer, VET, "grade 0.0", "grade 0.3", "grade 1")
    assert [(each.score, each.out_of, each.error) for each in found] == [
        (0.0, 1.0, ""), (0.3, 1.0, ""), (1.0, 1.0, ""),
    ]  # fmt: skip
    found, _ = grades(by_answer, BENCH, "score 4", "score 10")
    assert [(each.score, each.out_of) for each in found] == [(4.0, 8.0), (10.0, 8.0)]


def test_mm_vet_is_asked_with_what_is_right_and_llava_bench_with_the_reference_first():
    _, server = grades(by_answer, VET, "grade 1")
    assert quoted(server.seen[0]) == {
        "question": VET.question, "what is right": VET.reference, "answer": "grade 1",
    }  # fmt: skip
    assert "<AND>" in server.seen[0]["messages"][0]["content"]
    _, server = grades(by_answer, BENCH, "score 4")
    assert list(quoted(server.seen[0]).items()) == [
        ("what the picture shows", BENCH.caption), ("question", BENCH.question),
        ("first answer", BENCH.reference), ("second answer", "score 4"),
    ]  # fmt: skip
    bare = replace(BENCH, caption="")
    _, server = grades(by_answer, bare, "score 4")
    assert list(quoted(server.seen[0])) == ["question", "first answer", "second answer"]


@pytest.mark.parametrize("sample", KINDS.values(), ids=KINDS)
def test_the_picture_is_shown_if_the_grader_can_see(sample):
    for image in (False, True):
        _, server = grades(by_answer, sample, "grade 1", image=image)
        content = server.seen[0]["messages"][-1]["content"]
        assert isinstance(content, list) == image
        assert ("picture is the one in question" in last_text(server.seen[0])) == image


@pytest.mark.parametrize("sample", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("trouble", PASSING.values(), ids=PASSING)
def test_whatever_the_endpoint_does_no_answer_is_lost_and_none_is_graded_wrongly(trouble, sample):
    def behave(body, count):
        return trouble if " 1\n" in last_text(body) else by_answer(body)

    found, _ = grades(behave, sample, "a 1", "b 1", "grade 1 1 1.0e0" if sample is VET else "c 7")
    assert [each.score for each in found[:2]] == [None, None]
    assert all(each.error for each in found[:2])
    assert (found[2].score, found[2].error) == (1.0 if sample is VET else 7.0, "")


NO_GRADES = [
    "", "0.5", "I give it 0.5.", "[]", "null", '"0.5"', "{}", '{"grade": "0.5"}', '{"grade": null}',
    '{"grade": true}', '{"grade": [0.5]}', '{"grade": NaN}', '{"grade": Infinity}',
    '{"grade": 1.1}', '{"grade": -0.1}', '{"grade": 0.5, "grade": 1}', '{"grade": 0.5, "other": 1}',
    '{"grade": 0.5', 'Sure: {"grade": 0.5}', '{"score": 0.5}', '{"first": 8}', '{"second": 8}',
    '{"first": 8, "second": 0}', '{"first": 0, "second": 8}', '{"first": 8, "second": 11}',
    '{"first": "8", "second": 7}', '{"first": 8, "second": true}', "8 7", "[8, 7]",
    f'{{"grade": {"9" * 400}}}', "{" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("sample", KINDS.values(), ids=KINDS)
def test_what_is_no_grade_is_none_and_says_why(sample):
    def behave(body, count):
        told = quoted(body)
        return NO_GRADES[int(told.get("answer") or told["second answer"])]

    said = [str(place) for place in range(len(NO_GRADES))]
    found, _ = grades(behave, sample, *said, timeout=30.0, deadline=60.0)
    for text, each in zip(NO_GRADES, found, strict=True):
        assert each.score is None, text
        assert "grader said" in each.error or "grader gave" in each.error, text
        assert len(each.error) < 600


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't grade this.", completion(None, refusal="No."),
        failure(400, "filtered", code="content_filter"),
    ],
)  # fmt: skip
def test_a_grader_that_declines_is_told_apart(answer):
    ((found,), _) = grades(lambda body, count: answer, VET, "x")
    assert (found.score, found.error[:19]) == (None, "the grader declined")


@pytest.mark.parametrize("form", ["```json\n{}\n```", "<think>perhaps 0.9</think> {}"])
def test_a_grade_in_the_form_is_read(form):
    ((found,), _) = grades(lambda body, count: form.replace("{}", '{"grade": 0.5}'), VET, "x")
    assert (found.score, found.error) == (0.5, "")


@given(st.text(max_size=60))
def test_no_quoted_text_can_end_its_quotation(text):
    """The mark depends on the text itself, so that none can hold its own."""
    from hauberk.endpoint import Endpoint, EndpointSetting
    from hauberk.evaluation.judges.grader import ServedGrader

    grader = ServedGrader(Endpoint(EndpointSetting("http://a/v1", "m")))
    for sample in KINDS.values():
        body = grader.payload(sample, text)
        (mark,) = set(re.findall(r"\[end of [a-z ]+ (\w{16})\]", last_text(body))) - set(
            re.findall(r"\w{16}", text)
        )
        assert last_text(body).count(f"\n[end of question {mark}]") == 1


def test_a_key_that_is_not_accepted_ends_the_run_and_no_answer_is_counted_as_wrong():
    record = judge_response(VET, Response("x", 1, 0.1), model="m", defense="d")
    with serving(lambda body, count: failure(401)) as server:
        with pytest.raises(BadEndpoint, match="its key is not accepted"):
            graded([record], [VET], grader_of(spec_of(server)))
    for spec in ({}, {"kind": "guard"}, {"kind": "endpoint", "model": "m"}):
        with pytest.raises(BadJudge):
            grader_of(spec)


@pytest.mark.parametrize("sample", KINDS.values(), ids=KINDS)
def test_what_is_not_graded_is_bounded_and_asked_again_while_grades_are_kept(sample, tmp_path):
    samples = [replace(sample, sample_id=str(place)) for place in range(4)]
    texts = ["a 1", "b 1", "c 1", "d 1"]
    records = [
        judge_response(one, Response(text, 1, 0.1), model="m", defense="d")
        for one, text in zip(samples, texts, strict=True)
    ]
    down = Answer(b"garbage")
    with serving(
        lambda body, count: down if "\nd 1\n" in last_text(body) else by_answer(body)
    ) as server:
        grader = grader_of(spec_of(server, cache=tmp_path / "replies.sqlite"))
        told = estimates(graded(records, samples, grader))
        most = 1.0 if sample is VET else 1 / 8
        assert told["accuracy"].value == pytest.approx(most * 3 / 4)
        assert told["accuracy_upper"].value == pytest.approx((most * 3 + 1) / 4)
        assert told["unparsed_rate"].value == 1 / 4
        server.behave, asked = by_answer, len(server.seen)
        whole = estimates(graded(records, samples, grader))
        assert len(server.seen) == asked + 1
        assert whole["accuracy"].value == whole["accuracy_upper"].value == pytest.approx(most)


def test_another_prompt_or_way_to_ask_is_another_grader():
    with serving(by_answer) as server:
        names = {
            grader_of(spec_of(server, **o)).name for o in ({}, {"image": True}, {"form": "text"})
        }
    assert len(names) == 3
