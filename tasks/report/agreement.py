"""Whether the two judges agree: beyond chance, by channel, and with what people said."""

from dataclasses import dataclass

from hauberk.evaluation.metrics import LABELLED
from tasks.report.channels import ALL, CHANNELS
from tasks.report.comparison import Cell, Comparison, Row, number
from tasks.report.figures import Figure, file_name
from tasks.report.plots import plot_agreement
from tasks.report.theme import drawing, svg
from tasks.report.words import amount, full


@dataclass(frozen=True)
class Agreed:
    """The two judges on one model."""

    judge: str
    second: str
    channels: list[str]
    """The columns; the last one is of all of them."""
    rows: list[tuple[str, list[tuple[Cell, Cell] | None]]]
    """Defense, and on each channel kappa and the share of equal outcomes."""
    figure: Figure


@dataclass(frozen=True)
class Labelled:
    """A rate as one judge counts it, and corrected by what people said."""

    suite: str
    defense: str
    rate: str
    judge: str
    counted: Cell | None
    corrected: Cell


def agreed(comparison: Comparison) -> dict[str, Agreed]:
    """Compare the judges on every model of which agreement.json tells."""
    found = comparison.agreement.get("channels", ())
    models = [model for model in comparison.models if any(row["model"] == model for row in found)]
    return {model: _agreed(comparison, model) for model in models}


def _agreed(comparison: Comparison, model: str) -> Agreed:
    own = [row for row in comparison.agreement["channels"] if row["model"] == model]
    cells = {(row["defense"], row["channel"], row["metric"]): _cell(row) for row in own}
    known = {row["channel"] for row in own}
    channels = [channel for channel in (*CHANNELS, ALL) if channel in known]

    def pair(defense: str, channel: str) -> tuple[Cell, Cell] | None:
        both = [cells.get((defense, channel, name)) for name in ("judge_kappa", "judge_agreement")]
        return None if both[0] is None or both[1] is None else (both[0], both[1])

    rows = [
        (defense, [pair(defense, channel) for channel in channels])
        for defense in comparison.defenses(model)
        if any(key[0] == defense for key in cells)
    ]
    judge, second = own[0]["judge"], own[0]["second"]
    return Agreed(judge, second, channels, rows, _figure(model, judge, second, channels, rows))


def _cell(row: Row) -> Cell:
    value, low, high = (number(row[name]) for name in ("value", "low", "high"))
    return Cell(row["channel"], row["metric"], value, row["n"], low, high)


def _figure(
    model: str,
    judge: str,
    second: str,
    channels: list[str],
    rows: list[tuple[str, list[tuple[Cell, Cell] | None]]],
) -> Figure:
    kappas = {defense: [pair and pair[0] for pair in pairs] for defense, pairs in rows}
    told = [
        f"{defense} on {channel} {full(kappa)}"
        for defense, cells in kappas.items()
        for channel, kappa in zip(channels, cells, strict=True)
        if kappa and kappa.value is not None
    ]
    with drawing():
        drawn = svg(plot_agreement(channels, kappas))
    return Figure(
        file_name(f"agreement.{model}"),
        f"{judge} and {second}: agreement beyond chance",
        "Cohen's kappa of the two judges on the same answers, with 95 % intervals: 1 where they "
        "always agree, 0 where they agree as often as chance would have it. There is no point "
        "where one of them always says the same.",
        f"Kappa by channel and defense on {model}: {'; '.join(told) or 'nowhere defined'}.",
        drawn,
    )


def labelled(comparison: Comparison, model: str) -> list[Labelled]:
    """List the rates that people's labels correct, suite by suite."""
    order = {name: place for place, name in enumerate(comparison.defenses(model))}
    found = []
    for row in comparison.metrics:
        rate = next((r for r in ("unsafe_rate", "over_refusal") if row["metric"].startswith(r)), "")
        if row["model"] != model or not row["metric"].endswith(LABELLED):
            continue
        judge = row["metric"].removeprefix(f"{rate}_").removesuffix(LABELLED)
        suite, defense = row["suite"], row["defense"]
        counted = comparison.cell(model, defense, suite, f"{rate}_{judge}") or comparison.cell(
            model, defense, suite, rate
        )
        cell = comparison.cell(model, defense, suite, row["metric"])
        if cell is not None and defense in order:
            found.append(Labelled(suite, defense, rate, judge, counted, cell))
    suites = comparison.suites(model)
    return sorted(found, key=lambda one: (suites.index(one.suite), order[one.defense], one.judge))


def says(cell: Cell) -> str:
    """Write a kappa; where one of the judges always says the same there is none."""
    return "undefined" if cell.value is None else amount(cell.value, cell.metric)
