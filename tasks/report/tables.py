"""The tables of the page, as plain rows that the template writes out."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hauberk import UNDEFENDED
from tasks.report.comparison import Cell, Comparison, Row, number, suite_order
from tasks.report.verdict import ATTACK, BASELINE, Verdict, elsewhere, judge

COLUMNS = {
    "unsafe_rate": "Unsafe answers",
    "accuracy": "Exact answers",
    "over_refusal": "Over-refusal",
    "refusal_rate": "Refused",
    "evasion_rate": "Beside the point",
    "degenerate_rate": "Degenerate",
    "unsafe_rate_lower": "Unsafe, at least",
    "unsafe_rate_keyword": "Unsafe by keywords",
    "seconds_per_answer": "Seconds",
}
"""Metric -> its column in the table of everything; other metrics have a table of their own."""


@dataclass(frozen=True)
class Overview:
    """The headline of one model."""

    model: str
    chosen: str | None
    verdict: Verdict | None
    elsewhere: list[Cell]
    suites: list[str]
    """Suites with an unsafe rate, the two of the headline first."""
    rows: list["OverviewRow"]


@dataclass(frozen=True)
class OverviewRow:
    """One defense in the headline."""

    defense: str
    unsafe: list[Cell | None]
    utility: Cell | None
    over_refusal: Cell | None
    seconds: Cell | None
    verdict: Verdict


@dataclass(frozen=True)
class MeasuredRow:
    """One defense on one suite of one model."""

    model: str
    suite: str
    defense: str
    cells: list[Cell | None]
    """In the order of COLUMNS.  Where an unsafe rate has no utility of its own beside it, that of
    the same defense on its benign suite stands there: a cell of another suite."""


@dataclass(frozen=True)
class Disagreement:
    """What two judges said of the answers of one defense."""

    defense: str
    expected: str
    exact: str
    counts: list[int]
    """In the order of the keyword judge's outcomes."""
    n: int
    agree: int


def overview(comparison: Comparison, model: str) -> Overview:
    """Gather the headline of a model."""
    suites = sorted(
        comparison.suites(model, "unsafe_rate"),
        key=lambda suite: (suite not in (BASELINE, ATTACK), suite_order(suite)),
    )
    chosen = comparison.chosen.get(model)
    rows = [
        OverviewRow(
            defense=defense,
            unsafe=[comparison.cell(model, defense, suite, "unsafe_rate") for suite in suites],
            utility=comparison.utility(model, defense),
            over_refusal=comparison.over_refusal(model, defense),
            seconds=comparison.cell(model, defense, ATTACK, "seconds_per_answer"),
            verdict=judge(comparison, model, defense),
        )
        for defense in comparison.defenses(model)
    ]
    return Overview(
        model=model,
        chosen=chosen,
        verdict=judge(comparison, model, chosen) if chosen else None,
        elsewhere=elsewhere(comparison, model, chosen) if chosen else [],
        suites=suites,
        rows=rows,
    )


def measured(comparison: Comparison) -> list[MeasuredRow]:
    """Return a row for every model, suite and defense of which anything is known."""
    rows = []
    for model in comparison.models:
        for suite in comparison.suites(model):
            for defense in comparison.defenses(model):
                cells = {name: comparison.cell(model, defense, suite, name) for name in COLUMNS}
                if not any(cells.values()):
                    continue
                if any(cell for name, cell in cells.items() if name.startswith("unsafe")):
                    cells["accuracy"] = cells["accuracy"] or comparison.utility(model, defense)
                    cells["over_refusal"] = cells["over_refusal"] or comparison.over_refusal(
                        model, defense
                    )
                rows.append(MeasuredRow(model, suite, defense, list(cells.values())))
    return rows


def others(comparison: Comparison) -> list[Cell | Row]:
    """Return the rows whose metric has no column of its own."""
    return [row for row in comparison.metrics if row["metric"] not in COLUMNS]


def judges(comparison: Comparison, model: str) -> tuple[list[str], list[Disagreement]]:
    """Count how often the keyword judge says something else than the exact one.

    Returns
    -------
    outcomes : list of str
        What the keyword judge said, by name: the columns.
    rows : list of Disagreement
        One for each defense, kind of sample and outcome of the exact judge.
    """
    judged = [
        row
        for row in comparison.responses
        if row["model"] == model and row.get("outcome_keyword") is not None
    ]
    outcomes = sorted({row["outcome_keyword"] for row in judged})
    counts: dict[tuple[str, str, str], Counter[str]] = {}
    for row in judged:
        key = (row["defense"], row["expected"], row["outcome"])
        counts.setdefault(key, Counter())[row["outcome_keyword"]] += 1
    order = {name: place for place, name in enumerate(comparison.defenses(model))}
    rows = [
        Disagreement(
            *key,
            counts=[found[name] for name in outcomes],
            n=found.total(),
            agree=found[key[2]],
        )
        for key, found in sorted(
            counts.items(), key=lambda item: (order.get(item[0][0], len(order)), item[0][1:])
        )
    ]
    return outcomes, rows


@dataclass(frozen=True)
class Cost:
    """What an answer of one defense costs, suite by suite."""

    defense: str
    seconds: list[tuple[Cell | None, float | None]]
    """Measurement and its ratio to the undefended one."""
    tokens: float | None
    """Mean length of an answer: a refusal is shorter than an answer, and so cheaper."""


def costs(comparison: Comparison, model: str) -> tuple[list[str], list[Cost]]:
    """Return the suites with a measured time, and what each defense needs on them."""
    suites = comparison.suites(model, "seconds_per_answer")
    rows = []
    for defense in comparison.defenses(model):
        seconds = []
        for suite in suites:
            cell = comparison.cell(model, defense, suite, "seconds_per_answer")
            base = comparison.cell(model, UNDEFENDED, suite, "seconds_per_answer")
            known = cell and base and cell.value is not None and base.value
            seconds.append((cell, cell.value / base.value if known else None))
        lengths = [
            tokens
            for row in comparison.responses
            if (row["model"], row["defense"]) == (model, defense)
            and (tokens := number(row.get("tokens"))) is not None
        ]
        rows.append(Cost(defense, seconds, sum(lengths) / len(lengths) if lengths else None))
    return suites, rows


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested parameters to dotted keys, as messages about params.yaml name them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{name}."))
        else:
            found[name] = value
    return found
