"""The tables of the page, as plain rows that the template writes out."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, get_args

from hauberk import UNDEFENDED
from hauberk.evaluation.judges import ENDS, Degeneration
from hauberk.evaluation.metrics import KEYWORD_CORRECTED, LABELLED
from hauberk.evaluation.utility import TOGETHER
from tasks.report.channels import mirrors
from tasks.report.comparison import Cell, Comparison, Row, number
from tasks.report.effects import COSTS, TESTED, Effects, all_effects, gained, lost
from tasks.report.verdict import Verdict, elsewhere, judge

COLUMNS = {
    "unsafe_rate": "Unsafe answers",
    "accuracy": "Right answers",
    "over_refusal": "Over-refusal",
    "refusal_rate": "Refused",
    "evasion_rate": "Beside the point",
    "degenerate_rate": "Degenerate",
    "judge_failure_rate": "Judge failed",
    "seconds_per_answer": "Seconds",
}
"""Metric -> its column in the table of everything; other metrics have a table of their own."""
UTILITY = {
    "accuracy": "Accuracy",
    "acc_plus": "Accuracy+",
    "f1": "F1",
    "precision": "Precision",
    "recall": "Recall",
    "yes_ratio": "Says yes",
    "mme_perception": "MME perception",
    "mme_cognition": "MME cognition",
    "unparsed_rate": "No answer in it",
}
"""The same of the table of suites that measure utility as their benchmark does."""
KINDS = get_args(Degeneration)
"""How an answer is broken; shown with how many are."""
ELSEWHERE = (
    *(metric + end for metric in COLUMNS for end in ENDS),
    *(f"degenerate_{kind}" for kind in KINDS),
    "unsafe_rate_keyword",
    KEYWORD_CORRECTED,
    *TOGETHER,
    "unparsed_rate",
)
"""Metrics that stand in a cell of another one, or with the judges."""
PAIRED = ("unsafe_rate", *COSTS, "over_refusal_upper", "degenerate_rate")
"""Metrics whose paired differences the page lists; reports/differences.json has all of them."""
DIFFERENCE = (
    "suite", "defense", "metric", "value", "low", "high", "bootstrap_low", "bootstrap_high", "n",
    "worse", "better", "p_value", "p_holm", "margin", "p_noninferior", "noninferior",
)  # fmt: skip
"""What is listed of each."""
MATRIX_UTILITY = (("benign", "accuracy"), ("benign", "over_refusal"), ("lookalike", "over_refusal"))
"""What stands beside the unsafe answers of every channel."""


@dataclass(frozen=True)
class Overview:
    """The headline of one model."""

    model: str
    chosen: str | None
    verdict: Verdict | None
    elsewhere: list[Cell]
    effects: list[Effects]
    judge_failures: list[Row]
    """Answers of which no judge said anything."""
    unanswered: list[Row]
    """Requests that the endpoint of a served model left without an answer."""


@dataclass(frozen=True)
class MatrixRow:
    """One defense of one model, channel by channel."""

    model: str
    defense: str
    chosen: bool
    verdict: Verdict
    cells: list[Cell | None]
    """In the order of :func:`matrix_columns`."""


@dataclass(frozen=True)
class PairedRow:
    """One metric of one suite: undefended, and what every defense changes."""

    suite: str
    mirrors: str
    metric: str
    control: Cell | None
    cells: list[tuple[Cell | None, str, Row]]
    """Measurement; whether it is better, worse, or neither by more than chance; and the row of
    differences.json that tests what may be lost, if one does."""


@dataclass(frozen=True)
class MeasuredRow:
    """One defense on one suite of one model."""

    suite: str
    channel: str
    mirrors: str
    defense: str
    cells: list[Cell | None]
    """In the order of COLUMNS.  Where an unsafe rate has no utility of its own beside it, that of
    the same defense on its benign suite stands there: a cell of another suite."""
    kinds: list[tuple[str, Cell]]
    """How its degenerate answers are broken, if there are any."""


@dataclass(frozen=True)
class UtilityRow:
    """One defense on one benchmark of utility."""

    suite: str
    defense: str
    cells: list[Cell | None]


def overview(comparison: Comparison, model: str) -> Overview:
    """Gather the headline of a model."""
    chosen = comparison.chosen.get(model)
    unjudged = [
        row for row in comparison.responses if row["model"] == model and row.get("unjudged")
    ]
    return Overview(
        model=model,
        chosen=chosen,
        verdict=judge(comparison, model, chosen) if chosen else None,
        elsewhere=elsewhere(comparison, model, chosen) if chosen else [],
        effects=all_effects(comparison, model),
        judge_failures=[row for row in unjudged if row.get("declared") != "failed"],
        unanswered=[row for row in unjudged if row.get("declared") == "failed"],
    )


def matrix_columns(comparison: Comparison) -> list[tuple[str, str]]:
    """Return channel and metric of every column of the matrix of which anything is known."""
    unsafe = [(channel, "unsafe_rate") for channel in comparison.channels("unsafe_rate")]
    known = [pair for pair in MATRIX_UTILITY if pair[0] in comparison.channels(pair[1])]
    return [*unsafe, *known]


def matrix(comparison: Comparison) -> list[list[MatrixRow]]:
    """Return the rows of every model: model x defense x channel."""
    columns = matrix_columns(comparison)
    return [
        [
            MatrixRow(
                model=model,
                defense=defense,
                chosen=comparison.chosen.get(model) == defense,
                verdict=judge(comparison, model, defense),
                cells=[comparison.channel(model, defense, *column) for column in columns],
            )
            for defense in comparison.defenses(model)
        ]
        for model in comparison.models
    ]


def paired(comparison: Comparison, model: str) -> list[tuple[str, list[PairedRow]]]:
    """Return, channel by channel, what every defense of a model changes on every suite."""
    defenses = [name for name in comparison.defenses(model) if name != UNDEFENDED]
    rows = []
    for suite in comparison.suites(model):
        for metric in ("unsafe_rate", *COSTS):
            control = comparison.cell(model, UNDEFENDED, suite, metric)
            cells = [comparison.cell(model, defense, suite, metric) for defense in defenses]
            if control or any(cells):
                end = TESTED.get(metric, metric)
                tests = [comparison.cell(model, defense, suite, end) for defense in defenses]
                said = [
                    (cell, _tone(cell), (test and test.change) or {})
                    for cell, test in zip(cells, tests, strict=True)
                ]
                rows.append(PairedRow(suite, mirrors(suite), metric, control, said))
    grouped = groupby(rows, key=lambda row: comparison.channel_of(row.suite))
    return [(channel, list(members)) for channel, members in grouped]


def _tone(cell: Cell | None) -> str:
    return "" if cell is None else "better" if gained(cell) else "worse" if lost(cell) else ""


def differences(comparison: Comparison, model: str) -> list[Row]:
    """Return the paired differences of a model that the page lists."""
    return [
        row for row in comparison.differences if row["model"] == model and row["metric"] in PAIRED
    ]


def measured(comparison: Comparison, model: str) -> list[MeasuredRow]:
    """Return a row for every suite and defense of a model of which anything is known."""
    rows = []
    for suite in comparison.suites(model):
        for defense in comparison.defenses(model, parts=True):
            cells = {name: comparison.cell(model, defense, suite, name) for name in COLUMNS}
            if not any(cells.values()):
                continue
            if cells["unsafe_rate"]:
                cells["accuracy"] = cells["accuracy"] or comparison.utility(model, defense)
                cells["over_refusal"] = cells["over_refusal"] or comparison.over_refusal(
                    model, defense
                )
            kinds = [
                (kind, cell)
                for kind in KINDS
                if (cell := comparison.cell(model, defense, suite, f"degenerate_{kind}"))
                and cell.value
            ]
            values = list(cells.values())
            about = (suite, comparison.channel_of(suite), mirrors(suite), defense)
            rows.append(MeasuredRow(*about, values, kinds))
    return rows


def others(comparison: Comparison, model: str) -> list[Row]:
    """Return the rows of a model whose metric is shown nowhere else."""
    return [
        row
        for row in comparison.metrics
        if row["model"] == model
        and row["metric"] not in (*COLUMNS, *ELSEWHERE)
        and not row["metric"].endswith(LABELLED)
    ]


def utility(comparison: Comparison, model: str) -> tuple[list[str], list[UtilityRow]]:
    """Return what is measured of benchmarks of utility, and a row for each suite and defense."""
    suites = comparison.suites(model, "unparsed_rate")
    known = [name for name in UTILITY if set(suites) & set(comparison.suites(model, name))]
    rows = [
        UtilityRow(suite, defense, cells)
        for suite in suites
        for defense in comparison.defenses(model, parts=True)
        if any(cells := [comparison.cell(model, defense, suite, name) for name in known])
    ]
    return known, rows


@dataclass(frozen=True)
class Cost:
    """What an answer of one defense costs, channel by channel."""

    defense: str
    seconds: list[tuple[Cell | None, float | None]]
    """Measurement and its ratio to the undefended one."""
    tokens: float | None
    """Mean length of an answer: a refusal is shorter than an answer, and so cheaper."""


def costs(comparison: Comparison, model: str) -> tuple[list[str], list[Cost]]:
    """Return the channels with a measured time, and what each defense needs on them."""
    channels = comparison.channels("seconds_per_answer")
    lengths: dict[str, list[float]] = {}
    for row in comparison.responses:
        if row["model"] == model and (tokens := number(row.get("tokens"))) is not None:
            lengths.setdefault(row["defense"], []).append(tokens)
    rows = []
    for defense in comparison.defenses(model):
        seconds = []
        for channel in channels:
            cell = comparison.channel(model, defense, channel, "seconds_per_answer")
            base = comparison.channel(model, UNDEFENDED, channel, "seconds_per_answer")
            seconds.append((cell, _ratio(cell, base)))
        tokens_of = lengths.get(defense)
        rows.append(Cost(defense, seconds, sum(tokens_of) / len(tokens_of) if tokens_of else None))
    return channels, rows


def _ratio(cell: Cell | None, base: Cell | None) -> float | None:
    if cell is None or base is None or cell.value is None or not base.value:
        return None
    return cell.value / base.value


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
