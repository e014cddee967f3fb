"""The plots of TGA: how its weights were trained, and how near pictures lie to their captions."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.report.theme import MUTED, drawing, look, panels, svg
from tasks.report.training_plots import draw_loss, draw_merits

Row = Mapping[str, Any]

ANSWERS = "answers"
FORMS = {
    "kl": "divergence from the caption (nats)",
    "exp": "exp(−cosine) to the caption",
    "log": "−log cosine to the caption",
}
"""What the pair term of a form is."""
POSITIONS = {"image": "Over the image's positions", "decision": "At the end of the prompt"}
"""Where cosines were measured; rows have POSITION_before and POSITION_after."""


def plot_training(found: Row) -> str:
    """Draw the parts of the loss by step, each on its own scale, and what validation said."""
    titles = {
        ANSWERS: ("Answers that are to stay", "loss (nats a token)"),
        "pair": ("Pictures and their captions", FORMS.get(_form(found), "pair term")),
    }
    parts = [name for name in titles if _measured(found["history"], name)]
    with drawing():
        figure, axes = panels(len(parts) + 1, height=3.2)
        for name, axis in zip(parts, axes, strict=False):
            title, label = titles[name]
            draw_loss(axis, found["history"], name, title, 0)
            axis.set(title=title, xlabel="step", ylabel=label)
            axis.set_ylim(bottom=0)
        draw_merits(axes[-1], found)
        axes[-1].set(title="What validation said", ylabel="accuracy − unsafe rate")
        return svg(figure)


def plot_cosines(rows: Sequence[Row], layers: Sequence[int] = ()) -> str:
    """Draw the cosine of pictures and captions by block, without the weights and with them.

    ``layers`` are those that were aligned, where that is known; they are shaded.
    """
    blocks = [row["layer"] for row in rows]
    with drawing():
        figure, axes = panels(len(POSITIONS), height=3.4)
        for axis, (position, title) in zip(axes, POSITIONS.items(), strict=True):
            for place, (when, label) in enumerate(
                (("before", "the model's own weights"), ("after", "with TGA's"))
            ):
                colour, marker = look(place)
                values = [row[f"{position}_{when}"] for row in rows]
                axis.plot(blocks, values, color=colour, marker=marker, label=label,
                          linestyle="-" if when == "after" else "--")  # fmt: skip
            for layer in layers:
                axis.axvspan(layer - 0.5, layer + 0.5, color=MUTED, alpha=0.12, linewidth=0)
            axis.set(title=title, xlabel="decoder block", ylabel="cosine to the caption")
            axis.locator_params(axis="x", integer=True)
        axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        return svg(figure)


def _form(found: Row) -> str:
    return str(found.get("alignment", {}).get("form"))


def _measured(history: Sequence[Row], name: str) -> bool:
    return any(row.get(name) is not None for row in history)
