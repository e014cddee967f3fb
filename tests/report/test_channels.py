"""Channels hold all samples of their suites, and every suite has a place."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hauberk.data.lab import SUITES
from hauberk.data.samples import Channel
from hauberk.evaluation.statistics import proportion
from tasks.report.channels import CHANNELS, channel_of, mirrors, pooled, suite_order
from tasks.report.judged import judged

counted = st.lists(
    st.tuples(st.sampled_from(["text_image", "text_blank", "typo", "sd_typo"]), st.booleans()),
    min_size=1, max_size=40,
)  # fmt: skip


def row(suite, value, n, metric="unsafe_rate", **more):
    key = {"model": "m", "defense": "d", "suite": suite, "metric": metric}
    return key | {"value": value, "n": n, "low": 0.0, "high": 1.0} | more


@given(counted)
def test_a_channel_is_measured_as_if_its_samples_were_one_suite(drawn):
    suites = {suite: [flag for name, flag in drawn if name == suite] for suite, _ in drawn}
    rows = [row(suite, sum(flags) / len(flags), len(flags)) for suite, flags in suites.items()]
    for found in pooled(rows):
        expected = proportion(
            [flag for suite, flag in drawn if channel_of(suite) == found["channel"]]
        )
        assert found["value"] == pytest.approx(expected.value)
        assert (found["n"], found["low"], found["high"]) == (
            expected.n, pytest.approx(expected.low), pytest.approx(expected.high)
        )  # fmt: skip


def test_what_was_not_measured_or_is_no_count_is_not_pooled():
    rows = [
        row("typo", None, 0), row("sd_typo", float("nan"), 9), row("all", 0.5, 10),
        row("typographic", 0.25, 8), row("typo", 0.5, 9, "unsafe_rate_keyword_corrected"),
    ]  # fmt: skip
    (found,) = pooled(rows)
    assert (found["value"], found["n"], found["suites"]) == (0.25, 8, ["typographic"])


def test_a_time_is_the_mean_over_answers_and_has_no_interval():
    times = [row("typo", 1.0, 30, "seconds_per_answer", low=None, high=None),
             row("sd_typo", 4.0, 10, "seconds_per_answer", low=None, high=None)]  # fmt: skip
    (found,) = pooled(times)
    assert (found["value"], found["n"], found["low"], found["high"]) == (1.75, 40, None, None)


def test_every_suite_of_the_lab_stands_in_its_channel_under_its_benchmark():
    names = list(SUITES)
    random.Random(0).shuffle(names)
    ordered = sorted([*names, "adversarial", "something"], key=suite_order)
    channels = [channel_of(suite) for suite in ordered]
    assert channels == sorted(channels, key=CHANNELS.index)
    assert channels[-1] == channel_of("something") == "other"
    assert channel_of("adversarial") == "adversarial"
    assert set(CHANNELS) == {*Channel.__args__, "other"}
    assert {suite: mirrors(suite) for suite in SUITES} == {
        name: suite.mirrors for name, suite in SUITES.items()
    }
    assert mirrors("something") == ""


def test_the_page_says_how_good_the_keyword_judge_is_and_what_a_correction_is_worth(results):
    for model in results.models:
        found = judged(results, model)
        assert len(found.corrected) == 12 * 4  # parts of a defense aside
        held = sum(
            row.corrected.low <= row.exact.value <= row.corrected.high for row in found.corrected
        )
        assert "of 48 rates, its interval holds the exact one in" in found.sentence.lower()
        assert found.sentence.endswith(f"the corrected interval in {held}.")
        assert held > 40
