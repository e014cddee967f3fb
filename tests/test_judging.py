"""The judges of params.yaml in the stages: asked once, after the answers, and paid for once."""

import contextlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hauberk.errors import BadJudge, BadParams
from hauberk.evaluation.judges import judge_of
from hauberk.evaluation.run import judge_response
from hauberk.evaluation.selection import rates_of
from hauberk.requests import Response
from tasks.judging import REPLIES, answers_it, judge_at, judged, outcomes
from tasks.params import GUARD_MODELS, LABELS, Judges
from tasks.params_file import load_params
from tests.serving import failure, last_text, serving
from tests.test_judges import BENIGN, HARMFUL, REFUSALS
from tests.test_served_judge import graded, said, spec_of

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = [replace(HARMFUL, sample_id="a"), replace(BENIGN, sample_id="b", suite="benign")]


def records_of(defense, *texts):
    return [
        judge_response(sample, Response(text, 3, 0.1), model="m", defense=defense)
        for sample, text in zip(SAMPLES, texts, strict=True)
    ]


RUNS = {
    "none": records_of("none", "harmful 1", "safe 2"),
    "cmrm": records_of("cmrm", "refused 3", "refused 4"),
}


@pytest.fixture
def params():
    with contextlib.chdir(ROOT):
        return load_params()


def test_the_judges_of_the_project_change_no_record(params):
    assert judged(params, RUNS, SAMPLES) == RUNS


@given(
    st.lists(
        st.sampled_from([*sorted(REFUSALS)[:2], "take some brick .", "no words", "", "a"]),
        max_size=6,
    )
)
def test_what_a_stage_goes_on_with_is_judged_as_the_records_are(texts):
    samples = [SAMPLES[place % 2] for place in range(len(texts))]
    responses = [Response(text, 1, 0.1) for text in texts]
    pairs = list(zip(samples, responses, strict=True))
    records = [judge_response(*pair, model="m", defense="d") for pair in pairs]
    for kind, column in (("exact", "outcome"), ("keyword", "outcome_keyword")):
        told = outcomes(judge_of({"kind": kind}), samples, responses)
        assert told == [getattr(record, column) for record in records]


def test_what_a_judge_fails_on_is_neither_a_refusal_nor_an_answer(params):
    trouble = {"1": failure(500), "2": "I can't assist with that.", "3": said("refused")}

    texts = ["safe 0", "harmful 1", "safe 2", "refused 3"]

    def by_number(body, count):
        (number,) = [n for n in "0123" if f"{texts[int(n)]}\n" in last_text(body)]
        return trouble.get(number) or graded(body)

    with serving(by_number) as server:
        judge = judge_of(spec_of(server))
        found = outcomes(judge, [SAMPLES[1]] * 4, [Response(text, 1, 0.1) for text in texts])
    assert found == ["safe", "judge_error", "judge_refused", "refused"]
    assert [answers_it(outcome) for outcome in found] == [True, False, False, False]


VETTED = replace(
    BENIGN, sample_id="v", suite="mm_vet", reference="a cup", meta='{"metric": "judged"}'
)


def test_answers_that_need_a_grader_get_their_grade_and_no_others(params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples = [*SAMPLES, VETTED]
    runs = {
        name: [
            *records,
            judge_response(VETTED, Response(f"{name} .", 1, 0.1), model="m", defense=name),
        ]
        for name, records in RUNS.items()
    }
    with pytest.raises(BadParams, match=r"judges.grader: missing: .* mm_vet; .*{kind: endpoint"):
        judged(params, runs, samples)
    with serving(lambda body, count: '{"reason": "r", "grade": 0.5}') as server:
        changed = replace(params, judges=replace(Judges(), grader=spec_of(server)))
        found = judged(changed, runs, samples)
        for name, records in found.items():
            assert records[:2] == RUNS[name]
            assert (records[2].score, records[2].out_of) == (0.5, 1.0)
            assert records[2].grader.startswith("m/")
        assert judged(changed, runs, samples) == found  # as if the stage had been killed
        assert len(server.seen) == 2


def test_another_judge_takes_its_place_in_every_run_and_leaves_the_other_alone(params):
    for place, column in (("first", "outcome"), ("second", "outcome_keyword")):
        other = {"first": {"kind": "keyword"}, "second": {"kind": "exact"}}[place]
        found = judged(replace(params, judges=replace(Judges(), **{place: other})), RUNS, SAMPLES)
        for name, records in found.items():
            for new, old in zip(records, RUNS[name], strict=True):
                swapped = old.outcome_keyword if place == "first" else old.outcome
                assert getattr(new, column) == swapped
                rest = {column, "judge" if place == "first" else "second"}
                assert {k: v for k, v in vars(new).items() if k not in rest} == {
                    k: v for k, v in vars(old).items() if k not in rest
                }


def test_a_served_judge_is_asked_once_whatever_happens_after(params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with serving(graded) as server:
        changed = replace(params, judges=Judges(first=spec_of(server)))
        found = judged(changed, RUNS, SAMPLES)
        told = [record.outcome for records in found.values() for record in records]
        assert told == ["harmful", "safe", "refused", "refused"]
        asked = len(server.seen)
        assert judged(changed, RUNS, SAMPLES) == found  # as if the stage had been killed
        assert len(server.seen) == asked == 4
    assert REPLIES.read_bytes().startswith(b"SQLite")


def test_stages_follow_what_their_judges_read_and_the_report_alone_the_labels():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    judging = {name for name, told in stages.items() if "judges.first" in told.get("params", [])}
    assert {name for name, told in stages.items() if str(GUARD_MODELS) in told["deps"]} == judging
    assert {name for name, told in stages.items() if str(LABELS) in told["deps"]} == {"compare"}
    whole = {name for name, told in stages.items() if "judges" in told.get("params", [])}
    assert whole == {"compare"}  # or a first sheet would make every evaluation stale
    asking = {
        path.stem
        for path in (ROOT / "tasks").glob("*.py")
        if re.search("from tasks.(judging|parts) import", path.read_text())
    }
    asking -= {"parts"}
    assert {stages[name]["cmd"].split()[2].removeprefix("tasks.") for name in judging} == asking
    assert all((ROOT / home).is_dir() for home in (GUARD_MODELS, LABELS))


def test_a_guard_that_is_not_there_ends_the_stage_with_one_message(params):
    guard = {"kind": "guard", "format": "llama-guard-3", "path": "lab/none", "revision": "a"}
    with pytest.raises(BadJudge, match="lab/none"):
        judge_at(replace(params, judges=Judges(first=guard)), "first")


def test_requests_to_hedge_have_no_say_in_a_choice():
    plain = RUNS["none"]
    hedged = replace(plain[0], sample_id="c", suite="advice", expected="hedge", correct=None)
    assert rates_of([*plain, hedged]) == rates_of(plain)
    with pytest.raises(ValueError, match="only one kind"):
        rates_of([plain[0], hedged])
