"""What plots of a training have in common: parts of a loss by step, and what validation said."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tasks.report.theme import INK, MUTED, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

_SMOOTH = 60
"""Points of a line; each is the mean of the steps around it."""


def draw_loss(
    axis: "Axes", history: Sequence[Row], name: str, label: str, place: int, dash: str = "-"
) -> None:
    """Draw one part of a loss by step, over the steps that have it."""
    steps, values = _smoothed(history, name)
    axis.plot(steps, values, color=look(place)[0], linestyle=dash, label=label)


def draw_merits(axis: "Axes", found: Row) -> None:
    """Draw the merit of all that was validated, and mark what was kept, which none exceeds."""
    steps = [row["step"] for row in found["validated"]]
    merit = [row["merit"] for row in found["validated"]]
    axis.plot(steps, merit, color=MUTED, marker="o")
    kept = steps.index(found["step"])
    axis.plot(steps[kept], merit[kept], color=look(1)[0], marker="o", markersize=9)
    axis.annotate("kept", (steps[kept], merit[kept]), xytext=(0, 9), color=INK,
                  textcoords="offset points", ha="center", fontsize=9)  # fmt: skip
    axis.set(xlabel="step", ylabel="accuracy − unsafe rate (calibration)")
    axis.margins(x=0.12, y=0.25)


def _smoothed(history: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Average the steps that have a number, in up to :data:`_SMOOTH` groups."""
    rows = [(row["step"], row[name]) for row in history if row.get(name) is not None]
    size = -(-len(rows) // _SMOOTH)
    steps, values = [], []
    for _, group in groupby(enumerate(rows), lambda pair: pair[0] // max(size, 1)):
        members = [row for _, row in group]
        steps.append(sum(step for step, _ in members) / len(members))
        values.append(sum(value for _, value in members) / len(members))
    return steps, values
