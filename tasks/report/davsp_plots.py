"""The plots of DAVSP: how a frame was trained, and what it does to the scores of requests."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from tasks.report.theme import INK, MUTED, drawing, look, panels, svg

Row = Mapping[str, Any]

LOSSES = {
    "hinge_harmful": ("harmful, below the high threshold", "-"),
    "hinge_harmless": ("harmless, above the low threshold", "--"),
    "answer": ("answers (nats a token)", ":"),
}
"""What is drawn of a step: in words, with a dash."""
_SMOOTH = 60
"""Points of a line; each is the mean of the steps around it."""
KINDS = {"harmful": 1, "harmless": 0}
"""Whose scores are drawn, and the place of a look."""


def plot_training(found: Row) -> str:
    """Draw the parts of the loss by step, and what validation said of some frames."""
    with drawing():
        figure, (losses, merits) = panels(2, height=3.2)
        for place, (name, (title, dash)) in enumerate(LOSSES.items()):
            steps, values = _smoothed(found["history"], name)
            colour, _ = look(place)
            losses.plot(steps, values, color=colour, linestyle=dash, label=title)
        losses.set(xlabel="step", ylabel="mean of a batch", ylim=(0, None))
        losses.legend(loc="best")
        steps = [row["step"] for row in found["validated"]]
        merit = [row["merit"] for row in found["validated"]]
        merits.plot(steps, merit, color=MUTED, marker="o")
        kept = steps.index(found["step"])
        merits.plot(steps[kept], merit[kept], color=look(1)[0], marker="o", markersize=9)
        merits.annotate("kept", (steps[kept], merit[kept]), xytext=(0, -16), color=INK,
                        textcoords="offset points", ha="center", fontsize=9)  # fmt: skip
        merits.set(xlabel="step", ylabel="accuracy − unsafe rate (calibration)")
        merits.margins(y=0.25)
        return svg(figure)


def plot_shifted(found: Row) -> str:
    """Draw the scores of harmful and of harmless requests, under both frames."""
    from numpy import concatenate, histogram_bin_edges

    with drawing():
        figure, axes = panels(2, height=3.0)
        scores, goal = found["scores"], found["goal"]
        every = concatenate([values for kind in scores.values() for values in kind.values()])
        edges = histogram_bin_edges(every, 40)
        for axis, when in zip(axes, ("before", "after"), strict=True):
            for kind, place in KINDS.items():
                values, (colour, _) = scores[kind][when], look(place)
                shares = [1 / len(values)] * len(values)
                dash = "--" if kind == "harmless" else "-"
                drawn = {"bins": edges, "weights": shares, "color": colour}
                axis.hist(values, histtype="stepfilled", alpha=0.25, **drawn)
                axis.hist(values, histtype="step", linestyle=dash, linewidth=1.8, **drawn)
                axis.plot([], [], color=colour, linestyle=dash, label=f"{kind} (n {len(values)})")
            for bound in (goal["low"], goal["high"]):
                axis.axvline(bound, color=INK, linewidth=1)
            axis.set_title("untrained frame" if when == "before" else "trained frame")
            axis.set(xlabel=f"score after block {goal['layer']}", ylabel="share of the requests")
        axes[1].sharey(axes[0])
        axes[0].legend(loc="best")
        return svg(figure)


def _smoothed(history: list[Row], name: str) -> tuple[list[float], list[float]]:
    """Average the steps that have a number, in up to :data:`_SMOOTH` groups."""
    rows = [(row["step"], row[name]) for row in history if name in row]
    size = -(-len(rows) // _SMOOTH)
    steps, values = [], []
    for _, group in groupby(enumerate(rows), lambda pair: pair[0] // max(size, 1)):
        members = [row for _, row in group]
        steps.append(sum(step for step, _ in members) / len(members))
        values.append(sum(value for _, value in members) / len(members))
    return steps, values
