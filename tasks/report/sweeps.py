"""The settings that a sweep has tried: grouped by what they do, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.report.channels import suite_order
from tasks.report.comparison import Comparison, Row, number

KIND = ("compose", "level")
"""What a colour and a dash stand for."""
COMPOSES = ("incremental", "naive", "single")
"""The ones that are known keep their colour in every plot."""
SETTING = ("level", "compose", "estimator", "position", "steps", "layers", "blank")
"""What makes a line; alpha runs along it."""
PREFIX = {
    "text": "Prefix", "placement": "Placement", "gamma": "γ", "gate": "Gate", "mode": "Mode",
    "layers": "Layers", "fill": "Fill",
}  # fmt: skip
"""What a sweep of prefixes varies in place of these, and how its table calls it."""


@dataclass(frozen=True)
class Line:
    """The points of one setting in the order of alpha."""

    kind: str
    look: tuple[int, bool]
    points: tuple[Row, ...]
    leads: bool
    """Whether it holds the chosen point, or the best point of its kind where none is chosen."""


def kind_of(row: Row) -> str:
    """Name what a setting does, for the legend."""
    if not is_shift(row):
        return "share of the trained change"
    return ", ".join(str(row[name]) for name in KIND if row.get(name) is not None)


def look_of(row: Row) -> tuple[int, bool]:
    """Return the place of a setting's colour, and whether its line is solid."""
    compose, level = row.get("compose", COMPOSES[0]), row.get("level")
    if compose in COMPOSES:
        return COMPOSES.index(compose), level != "dataset"
    return len(COMPOSES) + sum(str(compose).encode()) % 3, level != "dataset"


def lines(rows: Sequence[Row], start: Row | None = None) -> list[Line]:
    """Group the rows of a sweep into lines over alpha; one line of each kind leads.

    ``start`` is what was measured undefended: the point at alpha 0 of a line that has none.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if number(row.get("alpha")) is not None:
            groups.setdefault(tuple(str(row.get(name)) for name in SETTING), []).append(row)
    kinds: dict[str, list[list[Row]]] = {}
    for members in groups.values():
        kinds.setdefault(kind_of(members[0]), []).append(members)
    found = []
    for kind, candidates in kinds.items():
        best = max(candidates, key=_merit)
        for members in candidates:
            points = tuple(sorted(members, key=lambda row: float(row["alpha"])))
            if start and points[0]["alpha"] > 0:
                points = ({**points[0], **start, "alpha": 0.0, "chosen": False}, *points)
            found.append(Line(kind, look_of(points[0]), points, leads=members is best))
    return found


def is_prefix(row: Row) -> bool:
    """Whether a setting is that of a prefix, which has no alpha."""
    return "gamma" in row


def is_shift(row: Row) -> bool:
    """Whether a setting is that of a shift, which has more than an alpha."""
    return "compose" in row


def alpha_sweeps(comparison: Comparison, model: str) -> dict[str, Row]:
    """Return the sweeps of a model that have an alpha: defense -> sweep.json."""
    return {
        defense: sweep
        for (owner, defense), sweep in comparison.sweeps.items()
        if owner == model and not any(map(is_prefix, sweep["rows"]))
    }


def shift_sweeps(comparison: Comparison, model: str) -> dict[str, Row]:
    """Return those of shifts."""
    return {
        defense: sweep
        for defense, sweep in alpha_sweeps(comparison, model).items()
        if any(map(is_shift, sweep["rows"]))
    }


def every_shift(comparison: Comparison, model: str) -> list[dict[str, Any]]:
    """Return the rows of these, each with the defense that it belongs to."""
    return [
        {"defense": defense, **row}
        for defense, sweep in shift_sweeps(comparison, model).items()
        for row in sweep["rows"]
    ]


def by_suite(row: Row, metric: str) -> list[tuple[str, float]]:
    """Return a metric of a setting on every suite on which it was measured."""
    suites = row.get("suites", {})
    return [
        (name, suites[name][metric])
        for name in sorted(suites, key=suite_order)
        if metric in suites[name]
    ]


def bounds_of(value: float | None, n: int | None) -> tuple[float, float] | None:
    """95 % interval of a proportion, or None where there is nothing to bound."""
    from hauberk.evaluation.statistics import wilson

    return None if value is None or not n else wilson(round(value * n), n)


def _merit(members: Sequence[Row]) -> tuple[bool, float]:
    """Rank a line: the chosen one first, then by the best of what the rule compares."""
    merits = (number(row.get("merit")) for row in members)
    best = max((merit for merit in merits if merit is not None), default=-1.0)
    return any(row.get("chosen") for row in members), best
