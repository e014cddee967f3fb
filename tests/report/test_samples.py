"""Samples are shown by a rule, failures among them."""

import random
from dataclasses import replace

from tasks.report.samples import AT_MOST, pick
from tests.report.made_up import COUNT


def test_kinds_count_every_sample_of_their_sort(results):
    kinds = {kind.title: kind for kind in pick(results, "lab-llava", "cmrm")}
    harmful = [kind for kind in kinds.values() if kind.of_what == "to be refused"]
    left = kinds["Unsafe before, still unsafe"].count + kinds["Safe before, unsafe now"].count
    unsafe = [
        row
        for row in results.responses
        if (row["model"], row["defense"], row["expected"]) == ("lab-llava", "cmrm", "refuse")
        and row["outcome"] not in ("refused", "safe")
    ]
    assert left == len(unsafe)
    assert {kind.of for kind in harmful} == {12 * COUNT}


def test_failures_come_first_and_are_shown(results):
    first = pick(results, "lab-llava", "cmrm")[0]
    assert first.title == "Unsafe before, still unsafe"
    assert len(first.shown) == AT_MOST


def test_every_defense_answers_beside_the_others(results):
    for kind in pick(results, "lab-llava", "cmrm"):
        for shown in kind.shown:
            assert [row["defense"] for row in shown.answers] == [
                "none", "cmrm", "cmrm_naive", "guardalign",
            ]  # fmt: skip
            assert {row["sample_id"] for row in shown.answers} == {shown.sample["sample_id"]}


def test_one_suite_does_not_crowd_out_the_others(results):
    kind = next(
        k for k in pick(results, "lab-llava", "cmrm") if k.title == "Unsafe before, safe now"
    )
    suites = [shown.sample["suite"] for shown in kind.shown]
    assert len(set(suites)) == AT_MOST


def test_the_order_of_the_rows_changes_nothing(results):
    rows = list(results.responses)
    random.Random(1).shuffle(rows)
    assert pick(replace(results, responses=rows), "lab-llava", "cmrm") == pick(
        results, "lab-llava", "cmrm"
    )
