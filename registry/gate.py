"""The gate: bounds that a version must meet before it may go to production.

A rule of params.yaml is one line, and all rules must hold::

    {suite: text_image, metric: unsafe_rate, at_most: 0.10, bound: high}
    {suite: benign_image, metric: accuracy, drop_at_most: 0.02, against: none}
    {suite: text_image, metric: unsafe_rate, rise_at_most: 0.02, against: production}

``bound`` names the number of the row that is held against the limit: ``value``, or the ``low`` or
``high`` end of its interval.  Against ``none`` the paired differences to the undefended model are
used; against ``production`` the difference to the value of the version in production, and the rule
holds when there is none yet.  Where production was measured on other samples (another seed or
profile), the values are compared all the same, and the check says that they are unpaired.  A number
that is missing or NaN never passes.  Pure: no MLflow.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from registry.errors import BadRule, GateFailed

LIMITS = ("at_most", "at_least", "drop_at_most", "rise_at_most")
BOUNDS = ("value", "low", "high")
UNDEFENDED = "none"
"""Names the undefended model, as in the library, which the registry does not know."""
REFERENCES = (UNDEFENDED, "production")
TIMES = ("seconds_per_answer",)
"""Every other metric is a share, from 0 to 1."""
ROUNDING = 1e-9  # 0.98 - 1.00 is -0.020000000000000018

Rows = Sequence[Mapping[str, Any]]
"""Rows of metrics.json or differences.json of one model and one defense."""


@dataclass(frozen=True)
class Rule:
    """One bound."""

    suite: str
    metric: str
    limit: str
    """One of LIMITS."""
    to: float
    against: str | None = None
    """None for a fixed limit, else one of REFERENCES."""
    bound: str = "value"

    def __str__(self) -> str:
        against = "" if self.against is None else f" against {self.against}"
        bound = "" if self.bound == "value" else f" ({self.bound} end)"
        name = f"{self.suite} {self.metric}{bound}"
        return f"{name} {self.limit.replace('_', ' ')} {self.to:g}{against}"


@dataclass(frozen=True)
class Check:
    """One rule, held against the numbers."""

    rule: str
    passed: bool
    measured: float | None
    """The number that was compared with the limit."""
    n: int | None
    """Of how many samples it was measured."""
    says: str
    """The same for a person."""


@dataclass(frozen=True)
class Verdict:
    """All rules, held against the numbers."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every rule holds."""
        return all(check.passed for check in self.checks)

    def summary(self) -> str:
        """Say how many rules hold: "passed 3 of 3"."""
        held = sum(check.passed for check in self.checks)
        return f"{'passed' if self.passed else 'failed'}: {held} of {len(self.checks)} rules hold"

    def as_dict(self) -> dict[str, Any]:
        """Give it as JSON would hold it."""
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}

    def assert_passed(self, name: str) -> None:
        """Raise GateFailed with every rule that does not hold, if one does not."""
        failures = [f"{check.rule}: {check.says}" for check in self.checks if not check.passed]
        if failures:
            raise GateFailed(
                f"{name} does not pass the gate; production stays where it is:\n  "
                + "\n  ".join(failures)
                + "\nImprove the defense, or change `gate` in params.yaml if the limit is wrong."
            )


def rules_from(section: object) -> list[Rule]:
    """Read the `gate` section of params.yaml.

    Raises
    ------
    BadRule
        Naming every rule that cannot be read by its dotted key.
    """
    if not isinstance(section, Sequence) or isinstance(section, str) or not section:
        raise BadRule(f"gate: expected a list of rules, found {section!r}; correct params.yaml.")
    rules, problems = [], []
    for index, item in enumerate(section):
        try:
            rules.append(_rule(item))
        except (ValueError, TypeError) as error:
            problems.append(f"gate.{index}: {error}")
    if problems:
        raise BadRule("params.yaml:\n  " + "\n  ".join(problems))
    return rules


def _rule(item: object) -> Rule:
    if not isinstance(item, Mapping):
        raise TypeError(f"expected a mapping such as {{suite: ..., metric: ...}}, found {item!r}")
    known = {"suite", "metric", "against", "bound", *LIMITS}
    if unknown := sorted(set(item) - known):
        raise ValueError(f"unknown key {unknown}; known are {sorted(known)}")
    if missing := sorted({"suite", "metric"} - set(item)):
        raise ValueError(f"{missing} missing")
    limits = [limit for limit in LIMITS if limit in item]
    if len(limits) != 1:
        raise ValueError(f"expected exactly one of {list(LIMITS)}, found {limits or 'none'}")
    limit, bound, against = limits[0], item.get("bound", "value"), item.get("against")
    to = item[limit]
    if isinstance(to, bool) or not isinstance(to, int | float) or not math.isfinite(to):
        raise ValueError(f"{limit}: expected a number, found {to!r}")
    if bound not in BOUNDS:
        raise ValueError(f"bound: expected one of {list(BOUNDS)}, found {bound!r}")
    relative = limit in ("drop_at_most", "rise_at_most")
    lowest = -1 if relative else 0
    if item["metric"] not in TIMES and not lowest <= to <= 1:
        raise ValueError(
            f"{limit}: {to!r} is outside {lowest}..1, and {item['metric']} is a share; "
            "write 0.10 for 10 %"
        )
    if relative and against not in REFERENCES:
        raise ValueError(f"against: {limit} needs one of {list(REFERENCES)}, found {against!r}")
    if not relative and against is not None:
        raise ValueError(f"against: {limit} is a fixed limit; remove `against: {against}`")
    return Rule(item["suite"], item["metric"], limit, float(to), against, bound)


def judge(
    rules: Sequence[Rule],
    metrics: Rows,
    differences: Rows,
    production: Rows | None,
    *,
    same_samples: bool = True,
) -> Verdict:
    """Hold the rules against the numbers of one version.

    Parameters
    ----------
    rules : sequence of Rule
        All of them must hold.
    metrics, differences : sequence of mapping
        The version's own rows, and its paired differences to the undefended model.
    production : sequence of mapping or None
        The rows of the version in production; None when there is none.
    same_samples : bool
        Whether these were measured on the samples that `metrics` were measured on; if not, the
        checks say so.
    """
    checks = (_check(rule, metrics, differences, production, same_samples) for rule in rules)
    return Verdict(tuple(checks))


def _check(
    rule: Rule, metrics: Rows, differences: Rows, production: Rows | None, same_samples: bool
) -> Check:
    if rule.against == "production" and production is None:
        return Check(str(rule), True, None, None, "there is no version in production yet")
    unpaired = ""
    try:
        row = _find(differences if rule.against == UNDEFENDED else metrics, rule)
        measured = _number(row, rule.bound, rule)
        if rule.against == "production":
            assert production is not None
            reference = _find(production, rule, "of production")
            measured -= _number(reference, "value", rule)
            unpaired = _unpaired(row, reference, same_samples)
    except LookupError as error:
        return Check(str(rule), False, None, None, str(error.args[0]))
    compared = -measured if rule.limit == "drop_at_most" else measured
    short = rule.to - compared if rule.limit == "at_least" else compared - rule.to
    passed = short <= ROUNDING
    return Check(str(rule), passed, measured, row.get("n"), _says(rule, row, measured) + unpaired)


def _find(rows: Rows, rule: Rule, whose: str = "") -> Mapping[str, Any]:
    found = [r for r in rows if r.get("suite") == rule.suite and r.get("metric") == rule.metric]
    if len(found) != 1:
        kind = "differences to undefended" if rule.against == UNDEFENDED else "metrics"
        count = "no row" if not found else f"{len(found)} rows instead of one"
        raise LookupError(f"missing: {count} in the {kind} {whose}".rstrip())
    return found[0]


def _number(row: Mapping[str, Any], bound: str, rule: Rule) -> float:
    value = row.get(bound)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise LookupError(f"missing: {bound} of {rule.suite} {rule.metric} is {value!r}")
    return float(value)


def _unpaired(row: Mapping[str, Any], other: Mapping[str, Any], same: bool) -> str:
    if same and row.get("n") == other.get("n"):
        return ""
    n = "" if other.get("n") is None else f", n = {other['n']}"
    return f"; unpaired: production was measured on other samples{n}"


def _says(rule: Rule, row: Mapping[str, Any], measured: float) -> str:
    n = "" if row.get("n") is None else f" (n = {row['n']})"
    if rule.against is None:
        return f"measured {measured:.4g}{n}"
    return f"changed by {measured:+.4g}{n}"
