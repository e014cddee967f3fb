"""Agreement of two judges: known tables, and what holds of any verdicts."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.inter_rater import cohens_kappa

from hauberk.data.samples import Sample
from hauberk.errors import BadData
from hauberk.evaluation.agreement import (
    ALL,
    OUTCOMES,
    agreement_rows,
    confusion,
    confusion_rows,
    kappa,
)
from hauberk.evaluation.judges import Verdict
from hauberk.evaluation.metrics import ends_of, keyword_rows, metric_rows
from hauberk.evaluation.run import Record, read_records, rejudged, write_records

BLANK = Record("", "", "", "m", "d", "", "refuse", "", "", "safe", "safe", None, 0.0, 0)
SAMPLE = Sample(
    sample_id="s0", pair_id="p", suite="text", channel="text", split="test", scenario="",
    expected="refuse", question="harmful request 1", image=None, reference="", source="",
    revision="", licence="",
)  # fmt: skip
VERDICTS = st.lists(
    st.tuples(st.sampled_from(["text", "image"]), st.sampled_from(OUTCOMES),
              st.sampled_from(OUTCOMES)),
    min_size=1, max_size=25,
)  # fmt: skip


def run(verdicts):
    return [
        replace(BLANK, sample_id=f"s{place}", suite=suite, outcome=one, outcome_keyword=other)
        for place, (suite, one, other) in enumerate(verdicts)
    ]


def rows_of(verdicts):
    return {(row["suite"], row["metric"]): row for row in agreement_rows(run(verdicts))}


def test_kappa_by_hand():
    """20 both harmful, 15 both safe, 5 and 10 apart: (0.7 - 0.5) / (1 - 0.5) = 0.4."""
    table = np.zeros((6, 6), dtype=np.int64)
    table[0, 0], table[0, 1], table[1, 0], table[1, 1] = 20, 5, 10, 15
    found = kappa(table)
    assert found.value == pytest.approx(0.4)
    assert found.low < 0.2 < 0.6 < found.high


def test_of_many_answers_the_interval_is_that_of_large_samples():
    """Fleiss, Cohen and Everitt's, of the same shares."""
    for table in (((20, 5), (10, 15)), ((90, 3), (4, 3)), ((30, 2, 1), (1, 20, 4), (3, 0, 9))):
        counts = np.array(table) * 100
        ours, theirs = kappa(counts), cohens_kappa(counts)
        assert ours.value == pytest.approx(theirs.kappa)
        width = theirs.kappa_upp - theirs.kappa_low
        assert ours.low == pytest.approx(theirs.kappa_low, abs=0.1 * width)
        assert ours.high == pytest.approx(theirs.kappa_upp, abs=0.1 * width)


@pytest.mark.parametrize(("share", "right"), [(0.5, 0.9), (0.1, 0.95), (0.1, 0.995)])
@pytest.mark.parametrize("number", [12, 40])
def test_nine_in_ten_intervals_or_more_hold_the_true_kappa_of_few_answers(share, right, number):
    """Two outcomes, of which one judge says one as often as ``share``, and the other the same."""
    shares = np.array(
        [[(1 - share) * right, (1 - share) * (1 - right)], [share * (1 - right), share * right]]
    )
    chance = float(shares.sum(0) @ shares.sum(1))
    true = (float(np.trace(shares)) - chance) / (1 - chance)
    drawn = np.random.default_rng(3).multinomial(number, shares.ravel(), 150).reshape(-1, 2, 2)
    found = [estimate for table in drawn if (estimate := kappa(table))]
    assert len(found) > 50
    assert sum(each.low <= true <= each.high for each in found) / len(found) >= 0.9


@given(VERDICTS)
def test_agreement_is_a_plain_count_and_kappa_is_bounded_and_the_same_both_ways(verdicts):
    rows, mirrored = rows_of(verdicts), rows_of([(s, b, a) for s, a, b in verdicts])
    for suite in {suite for suite, *_ in verdicts}:
        pairs = [(one, other) for name, one, other in verdicts if name == suite]
        raw = rows[suite, "judge_agreement"]
        assert raw["value"] == sum(a == b for a, b in pairs) / len(pairs)
        beyond = rows[suite, "judge_kappa"]
        varies = all(len(set(said)) > 1 for said in zip(*pairs, strict=True))
        assert (beyond["value"] is not None) == varies
        if not varies:
            assert (beyond["low"], beyond["high"]) == (None, None)
        else:
            assert -1 <= beyond["low"] <= beyond["value"] <= beyond["high"] <= 1
            assert beyond["value"] <= raw["value"] + 1e-9
            assert mirrored[suite, "judge_kappa"]["value"] == pytest.approx(beyond["value"])
    assert ((ALL, "judge_kappa") in rows) == (len({suite for suite, *_ in verdicts}) > 1)


@given(VERDICTS)
def test_the_confusion_counts_every_answer_once_failures_too(verdicts):
    rows = confusion_rows(run(verdicts))
    counted = {(r["suite"], r["outcome"], r["outcome_second"]): r["count"] for r in rows}
    assert counted == {key: verdicts.count(key) for key in set(verdicts)}
    assert confusion(run(verdicts)).sum() == len(verdicts)


def test_perfect_agreement_of_few_is_no_certainty():
    few, many = (kappa(np.diag([n, n, 0, 0, 0, 0])) for n in (2, 200))
    assert few.value == many.value == few.high == 1
    assert few.low < 0.5 < many.low


@given(
    st.lists(st.integers(0, 60), min_size=6, max_size=6).filter(lambda n: np.count_nonzero(n) > 1)
)
def test_judges_that_always_agree_may_agree_by_chance_but_no_worse(counts):
    found = kappa(np.diag(counts))
    assert found.value == found.high == 1
    assert -0.2 < found.low < 1


@pytest.mark.parametrize("others", [("safe",) * 3, ("safe", "harmful", "refused")])
def test_a_judge_that_always_says_one_thing_leaves_no_kappa(others):
    for verdicts in (
        [("text", "safe", other) for other in others],
        [("text", other, "safe") for other in others],
    ):
        row = rows_of(verdicts)["text", "judge_kappa"]
        assert (row["value"], row["low"], row["high"], row["n"]) == (None, None, None, 3)


def test_rows_name_the_judges_and_refuse_two_pairs():
    records = [replace(record, second="guard-3") for record in run([("text", "safe", "harmful")])]
    assert {(row["judge"], row["second"]) for row in agreement_rows(records)} == {
        ("exact", "guard-3")
    }
    with pytest.raises(ValueError, match="exact and guard-3, exact and keyword; give those of one"):
        agreement_rows([*records, BLANK])
    assert agreement_rows([]) == []


# --- another judge in the record --------------------------------------------------------------


class Judge:
    name = "guard-3"

    def __init__(self, *verdicts):
        self.verdicts = verdicts

    def judge(self, samples, responses, progress=lambda count: None):
        self.asked = [(s.question, said) for s, said in zip(samples, responses, strict=True)]
        return self.verdicts


SAMPLES = [replace(SAMPLE, sample_id=f"s{place}") for place in range(2)]
RECORDS = [
    replace(BLANK, sample_id=f"s{place}", suite="text", response=f"answer {place}",
            outcome="refused", outcome_keyword="refused")
    for place in range(2)
]  # fmt: skip


def test_a_judge_takes_the_first_or_the_second_place_and_gives_its_name():
    judge = Judge(Verdict("harmful"), Verdict("judge_refused", error="it would not"))
    second = rejudged(RECORDS, SAMPLES[::-1], judge, "second")
    assert judge.asked == [("harmful request 1", "answer 0"), ("harmful request 1", "answer 1")]
    assert [(r.outcome, r.judge) for r in second] == [("refused", "exact")] * 2
    assert [(r.outcome_keyword, r.second) for r in second] == [
        ("harmful", "guard-3"), ("judge_refused", "guard-3")
    ]  # fmt: skip
    assert [record.error for record in second] == ["", "it would not"]
    first = rejudged(RECORDS, SAMPLES, judge, "first")
    assert [(r.outcome, r.judge, r.second) for r in first] == [
        ("harmful", "guard-3", "keyword"), ("judge_refused", "guard-3", "keyword")
    ]  # fmt: skip


def test_rates_of_the_second_judge_are_named_after_it():
    second = rejudged(RECORDS, SAMPLES, Judge(Verdict("harmful"), Verdict("safe")), "second")
    rows = {row["metric"]: row["value"] for row in metric_rows(second)}
    assert rows["unsafe_rate_guard-3"] == 0.5
    assert rows["unsafe_rate"] == 0
    assert not [name for name in rows if "keyword" in name]
    assert keyword_rows(second) == []
    assert "over_refusal_keyword" in ends_of("answer")


def test_a_judge_that_is_away_or_drops_verdicts_loses_no_record():
    class Away(Judge):
        def judge(self, samples, responses):
            raise TimeoutError("away")

    found = rejudged(RECORDS, SAMPLES, Away(), "first")
    assert [(r.outcome, r.error) for r in found] == [("judge_error", "TimeoutError: away")] * 2
    assert [r.response for r in found] == ["answer 0", "answer 1"]
    odd = rejudged(RECORDS, SAMPLES, Judge(Verdict("fine"), Verdict("safe")), "first")
    assert [record.outcome for record in odd] == ["judge_error", "safe"]
    assert "guard-3 said 'fine'; one of harmful, safe," in odd[0].error
    with pytest.raises(ValueError, match="gave 1 verdicts on 2 responses"):
        rejudged(RECORDS, SAMPLES, Judge(Verdict("safe")), "first")
    with pytest.raises(ValueError, match=r"no samples for the records \['s1'\]"):
        rejudged(RECORDS, SAMPLES[:1], Judge(), "first")


def test_files_of_before_judges_had_names_are_read(tmp_path):
    path = write_records(RECORDS, tmp_path / "responses.jsonl")
    import json

    added = ("judge", "second", "scenario", "meta", "score", "out_of", "grader")
    old = [{k: v for k, v in json.loads(line).items() if k not in added}
           for line in path.read_text().splitlines()]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    assert read_records(path) == RECORDS


@pytest.mark.parametrize("line", ["nonsense", "[1]", "3", '{"sample_id": "s"}', '{"a": 1}', "\x00"])
def test_a_line_that_is_no_record_is_named_with_the_cure(tmp_path, line):
    path = write_records(RECORDS, tmp_path / "responses.jsonl")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(
        BadData, match=r"responses\.jsonl:3: no record of an answer.*evaluate again"
    ):
        read_records(path)


@given(st.lists(st.sampled_from(OUTCOMES), min_size=1, max_size=9))
def test_of_hedges_refusals_and_harm_are_measured_but_no_evasion(outcomes):
    records = [replace(BLANK, expected="hedge", outcome=outcome) for outcome in outcomes]
    rows = {row["metric"]: row["value"] for row in metric_rows(records)}
    assert rows["refusal_rate"] == outcomes.count("refused") / len(outcomes)
    assert rows["unsafe_rate_lower"] == outcomes.count("harmful") / len(outcomes)
    assert not [name for name in rows if name.startswith(("evasion", "accuracy", "over_refusal"))]


@given(VERDICTS)
def test_by_channel_is_by_suite_where_every_suite_is_a_channel(verdicts):
    records = [replace(record, channel=record.suite) for record in run(verdicts)]
    plain, grouped = agreement_rows(records), agreement_rows(records, by="channel")
    renamed = [{"suite" if k == "channel" else k: v for k, v in row.items()} for row in grouped]
    assert renamed == plain


def test_the_rates_of_a_judge_of_any_name_have_names_that_mlflow_takes():
    records = [replace(BLANK, second="llama-guard-3:org/guard@ab/1f")]
    names = {row["metric"] for row in metric_rows(records)}
    assert "unsafe_rate_llama-guard-3-org-guard-ab-1f" in names
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)
