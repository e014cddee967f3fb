"""The gate, case by case."""

import math

import pytest

import hauberk
from registry.errors import BadRule, GateFailed
from registry.gate import UNDEFENDED, Rule, judge, rules_from


def row(value: float | None, low: float = 0.0, high: float = 1.0, **more):
    base = {"suite": "s", "metric": "m", "value": value, "low": low, "high": high, "n": 40}
    return base | more


CASES = [
    # limit, to, against, bound, own, difference, production, holds
    ("at_most", 0.1, None, "value", row(0.1), None, None, True),
    ("at_most", 0.1, None, "value", row(0.11), None, None, False),
    ("at_most", 0.1, None, "high", row(0.05, high=0.2), None, None, False),
    ("at_most", 0.1, None, "low", row(0.15, low=0.05), None, None, True),
    ("at_least", 0.9, None, "value", row(0.9), None, None, True),
    ("at_least", 0.9, None, "low", row(0.95, low=0.8), None, None, False),
    ("drop_at_most", 0.02, "none", "value", None, row(0.98 - 1.0), None, True),
    ("drop_at_most", 0.02, "none", "value", None, row(-0.03), None, False),
    ("drop_at_most", 0.02, "none", "low", None, row(-0.01, low=-0.04), None, False),
    ("rise_at_most", 0.02, "none", "value", None, row(0.05), None, False),
    ("rise_at_most", 0.02, "production", "value", row(0.5), None, None, True),
    ("rise_at_most", 0.02, "production", "value", row(0.5), None, [row(0.49)], True),
    ("rise_at_most", 0.02, "production", "value", row(0.5), None, [row(0.4)], False),
    ("drop_at_most", 0.02, "production", "value", row(0.5), None, [row(0.6)], False),
    ("rise_at_most", 0.02, "production", "value", row(0.5), None, [], False),
    ("rise_at_most", 0.02, "production", "value", row(0.5), None, [row(0.5, n=41)], True),
    ("rise_at_most", 0.02, "production", "value", row(0.5), None, [row(0.4, n=41)], False),
    ("at_most", 0.1, None, "value", row(None), None, None, False),
    ("at_most", 0.1, None, "value", row(math.nan), None, None, False),
    ("at_least", 0.1, None, "value", row(math.inf), None, None, False),
    ("at_most", 0.1, None, "high", row(0.0, high=math.nan), None, None, False),
    ("at_most", 0.1, None, "value", None, row(0.0), None, False),
    ("drop_at_most", 0.02, "none", "value", row(1.0), None, None, False),
]


@pytest.mark.parametrize(
    ("limit", "to", "against", "bound", "own", "difference", "production", "holds"), CASES
)
def test_a_rule_holds_or_not(limit, to, against, bound, own, difference, production, holds):
    rule = Rule("s", "m", limit, to, against, bound)
    rows, paired = ([own] if own else []), ([difference] if difference else [])
    verdict = judge([rule], rows, paired, production)
    assert verdict.passed is holds
    assert verdict.checks[0].passed is holds


@pytest.mark.parametrize(
    ("against", "same", "n", "says"),
    [
        ("none", False, 41, "changed by +0 (n = 40)"),
        ("production", True, 40, "changed by +0.5 (n = 40)"),
        ("production", False, 40, "changed by +0.5 (n = 40); unpaired: production was measured on "
         "other samples, n = 40"),
        ("production", True, 41, "changed by +0.5 (n = 40); unpaired: production was measured on "
         "other samples, n = 41"),
    ],
)  # fmt: skip
def test_what_is_compared_with_production_on_other_samples_says_so(against, same, n, says):
    rule = Rule("s", "m", "rise_at_most", 0.02, against)
    production = [row(0.0, n=n)]
    (check,) = judge([rule], [row(0.5)], [row(0.0)], production, same_samples=same).checks
    assert check.passed is (against == "none")
    assert check.says == says


def test_every_failure_is_in_the_message_with_its_number_and_n():
    rules = [Rule("s", "m", "at_most", 0.1), Rule("s", "other", "at_least", 0.5)]
    with pytest.raises(GateFailed) as failed:
        judge(rules, [row(0.25)], [], None).assert_passed("cmrm.toy/3")
    text = str(failed.value)
    assert "s m at most 0.1: measured 0.25 (n = 40)" in text
    assert "s other at least 0.5: missing: no row in the metrics" in text
    assert "production stays where it is" in text


def test_a_row_that_is_there_twice_is_not_a_number_to_trust():
    verdict = judge([Rule("s", "m", "at_most", 0.1)], [row(0.0), row(0.0)], [], None)
    assert "2 rows instead of one" in verdict.checks[0].says


def test_rules_of_params_are_read():
    section = [
        {"suite": "a", "metric": "b", "at_most": 0.1, "bound": "high"},
        {"suite": "a", "metric": "b", "drop_at_most": 0, "against": "none"},
    ]
    assert [str(r) for r in rules_from(section)] == [
        "a b (high end) at most 0.1",
        "a b drop at most 0 against none",
    ]


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"suite": "a", "metric": "b", "at_mots": 1}, r"gate\.0: unknown key \['at_mots'\]"),
        ({"suite": "a", "at_most": 1}, r"\['metric'\] missing"),
        ({"suite": "a", "metric": "b"}, "expected exactly one of"),
        ({"suite": "a", "metric": "b", "at_most": 1, "at_least": 0}, "expected exactly one of"),
        ({"suite": "a", "metric": "b", "at_most": "high"}, "at_most: expected a number"),
        ({"suite": "a", "metric": "b", "at_most": True}, "at_most: expected a number"),
        ({"suite": "a", "metric": "b", "at_most": 1, "bound": "mid"}, "bound: expected one of"),
        ({"suite": "a", "metric": "b", "drop_at_most": 1}, "against: drop_at_most needs one of"),
        ({"suite": "a", "metric": "b", "at_most": 1, "against": "none"}, "is a fixed limit"),
        ("text_image < 0.1", "expected a mapping"),
        (
            {"suite": "a", "metric": "b", "at_most": 10},
            r"10 is outside 0\.\.1.*write 0\.10 for 10 %",
        ),
        ({"suite": "a", "metric": "b", "at_least": -0.1}, r"at_least: -0\.1 is outside 0\.\.1"),
        (
            {"suite": "a", "metric": "b", "drop_at_most": 2, "against": "none"},
            r"drop_at_most: 2 is outside -1\.\.1, and b is a share",
        ),
    ],
)
def test_a_rule_that_cannot_be_read_is_named(item, says):
    with pytest.raises(BadRule, match=says):
        rules_from([item])


def test_a_time_may_be_limited_to_more_than_one_and_a_rise_to_less_than_nothing():
    section = [
        {"suite": "a", "metric": "seconds_per_answer", "at_most": 10},
        {"suite": "a", "metric": "b", "rise_at_most": -0.2, "against": "none"},
    ]
    assert [rule.to for rule in rules_from(section)] == [10, -0.2]


def test_an_empty_gate_is_refused_since_it_would_let_everything_pass():
    with pytest.raises(BadRule, match="expected a list of rules"):
        rules_from([])


def test_the_registry_and_the_library_give_the_undefended_model_one_name():
    assert UNDEFENDED == hauberk.UNDEFENDED
