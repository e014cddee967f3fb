"""Where the judges disagree, what a correction makes of it, and what wordings do to harm."""

from collections import Counter
from dataclasses import dataclass

from hauberk import UNDEFENDED
from hauberk.evaluation.metrics import FORMS, KEYWORD_CORRECTED
from tasks.report.channels import ALL, suite_order
from tasks.report.comparison import Cell, Comparison, Row, number
from tasks.report.words import amount, full


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


@dataclass(frozen=True)
class Corrected:
    """The unsafe rate of one defense on one suite: exact, by keywords, and those corrected."""

    suite: str
    defense: str
    exact: Cell | None
    keyword: Cell | None
    corrected: Cell


@dataclass(frozen=True)
class Worded:
    """Unsafe answers of one defense on one suite, by the form that was asked for."""

    suite: str
    defense: str
    cells: tuple[tuple[Cell | None, str], ...]
    """In the order of :data:`hauberk.evaluation.metrics.FORMS`, each with what is taken away of
    what was unsafe undefended."""


@dataclass(frozen=True)
class Judged:
    """The judges on one model."""

    outcomes: list[str]
    """What the keyword judge said, by name: the columns."""
    rows: list[Disagreement]
    """One for each defense, kind of sample and outcome of the exact judge."""
    corrected: list[Corrected]
    sentence: str
    """What the correction is worth, as far as the exact judge tells."""
    worded: list[Worded]
    """Of suites whose pictures alone tell the wish."""


def judged(comparison: Comparison, model: str) -> Judged:
    """Compare the judges on a model."""
    corrected = _corrected(comparison, model)
    sentence = _worth(comparison, model, corrected)
    worded = _worded(comparison, model)
    return Judged(*_disagreements(comparison, model), corrected, sentence, worded)


def _worded(comparison: Comparison, model: str) -> list[Worded]:
    order = {name: place for place, name in enumerate(comparison.defenses(model))}
    found = {
        (row["suite"], row["defense"], row["form"]): row
        for row in comparison.forms
        if row["model"] == model and row["defense"] in order
    }
    keys = sorted({key[:2] for key in found}, key=lambda key: (suite_order(key[0]), order[key[1]]))
    return [Worded(*key, tuple(_form(found.get((*key, form))) for form in FORMS)) for key in keys]


def _form(row: Row | None) -> tuple[Cell | None, str]:
    if row is None:
        return None, ""
    value, low, high = (number(row[name]) for name in ("value", "low", "high"))
    cell = Cell(row["suite"], row["metric"], value, row["n"], low, high)
    taken = row["taken_away"]
    if row["defense"] == UNDEFENDED or taken is None:
        return cell, ""
    return cell, f"{amount(abs(taken), 'share')} {'taken away' if taken >= 0 else 'added'}"


def _disagreements(comparison: Comparison, model: str) -> tuple[list[str], list[Disagreement]]:
    order = {name: place for place, name in enumerate(comparison.defenses(model))}
    found = [
        row
        for row in comparison.responses
        if row["model"] == model
        and row["defense"] in order
        and row.get("outcome_keyword") is not None
    ]
    outcomes = sorted({row["outcome_keyword"] for row in found})
    counts: dict[tuple[str, str, str], Counter[str]] = {}
    for row in found:
        key = (row["defense"], row["expected"], row["outcome"])
        counts.setdefault(key, Counter())[row["outcome_keyword"]] += 1
    rows = [
        Disagreement(
            *key,
            counts=[said[name] for name in outcomes],
            n=said.total(),
            agree=said[key[2]],
        )
        for key, said in sorted(counts.items(), key=lambda item: (order[item[0][0]], item[0][1:]))
    ]
    return outcomes, rows


def _corrected(comparison: Comparison, model: str) -> list[Corrected]:
    return [
        Corrected(
            suite,
            defense,
            comparison.cell(model, defense, suite, "unsafe_rate"),
            comparison.cell(model, defense, suite, "unsafe_rate_keyword"),
            cell,
        )
        for suite in comparison.suites(model, KEYWORD_CORRECTED)
        for defense in comparison.defenses(model)
        if (cell := comparison.cell(model, defense, suite, KEYWORD_CORRECTED)) is not None
    ]


def _worth(comparison: Comparison, model: str, corrected: list[Corrected]) -> str:
    """Say how good the keyword judge is, and how often the corrected interval holds the truth."""
    finds = comparison.cell(model, UNDEFENDED, ALL, "keyword_sensitivity")
    clears = comparison.cell(model, UNDEFENDED, ALL, "keyword_specificity")
    if finds is None or clears is None:
        return ""
    known = [row for row in corrected if row.corrected.value is not None]
    text = (
        f"On the labelled half it finds {full(finds)} of the unsafe answers and clears "
        f"{full(clears)} of the others."
    )
    if not known and (finds.value or 0) + (clears.value or 0) <= 1:
        return f"{text} That is no better than chance, so nothing can be corrected."
    if not known:
        return f"{text} No answer is left to correct."
    plain = sum(_holds(row.keyword, row.exact) for row in known)
    held = sum(_holds(row.corrected, row.exact) for row in known)
    return (
        f"{text} Of {len(known)} rates, its interval holds the exact one in {plain}, the corrected "
        f"interval in {held}."
    )


def _holds(interval: Cell | None, value: Cell | None) -> bool:
    if interval is None or value is None or value.value is None:
        return False
    if interval.low is None or interval.high is None:
        return False
    return interval.low <= value.value <= interval.high
