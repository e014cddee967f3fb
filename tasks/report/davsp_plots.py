"""The plots of DAVSP: how a frame was trained, and what it does to the scores of requests."""

from collections.abc import Mapping
from typing import Any

from tasks.report.theme import INK, drawing, look, panels, svg
from tasks.report.training_plots import draw_loss, draw_merits

Row = Mapping[str, Any]

LOSSES = {
    "hinge_harmful": ("harmful, below the high threshold", "-"),
    "hinge_harmless": ("harmless, above the low threshold", "--"),
    "answer": ("answers (nats a token)", ":"),
}
"""What is drawn of a step: in words, with a dash."""
KINDS = {"harmful": 1, "harmless": 0}
"""Whose scores are drawn, and the place of a look."""


def plot_training(found: Row) -> str:
    """Draw the parts of the loss by step, and what validation said of some frames."""
    with drawing():
        figure, (losses, merits) = panels(2, height=3.2)
        for place, (name, (title, dash)) in enumerate(LOSSES.items()):
            draw_loss(losses, found["history"], name, title, place, dash)
        losses.set(xlabel="step", ylabel="mean of a batch", ylim=(0, None))
        figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        draw_merits(merits, found)
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
