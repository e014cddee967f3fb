"""The judges of params.yaml in the stages: asked once, after the answers, and paid for once."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from hauberk.errors import BadJudge
from hauberk.evaluation.run import judge_response
from hauberk.evaluation.selection import rates_of
from hauberk.requests import Response
from tasks.judging import REPLIES, judge_at, judged
from tasks.params import Judges, load_params
from tests.serving import serving
from tests.test_judges import BENIGN, HARMFUL
from tests.test_served_judge import graded, spec_of

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
    assert judge_at(params, "first") is judge_at(params, "second") is None
    assert judged(params, RUNS, SAMPLES) == RUNS


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
        said = [record.outcome for records in found.values() for record in records]
        assert said == ["harmful", "safe", "refused", "refused"]
        asked = len(server.seen)
        assert judged(changed, RUNS, SAMPLES) == found  # as if the stage had been killed
        assert len(server.seen) == asked == 4
    assert REPLIES.is_file()


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
