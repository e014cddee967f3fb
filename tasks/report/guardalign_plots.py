"""The plots of GuardAlign: scores of patches, also over a picture, and attention on the prefix."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from tasks.report.theme import INK, MUTED, drawing, look, panels, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable

Row = Mapping[str, Any]

UNSAFE_TO_SAFE = (
    "#7f3b08", "#b35806", "#e08214", "#fdb863", "#fee0b6",
    "#e3ecf5", "#c3d6ea", "#9fbddb", "#7aa2ca", "#5486b8",
)  # fmt: skip
"""Orange and blue, which every common kind of colour vision tells apart, and paler where it is
safe.  What is up to the threshold has the first half, whatever the scores are."""
BLACK, WHITE = "#000000", "#ffffff"
"""On a picture, which is the same on light and on dark paper."""
LABELS = {1: "toxic", 0: "", -1: "part"}
"""What a patch holds, as it stands under its score."""
READABLE = 4
"""Up to so many patches along a side, their scores are written into them."""
CROSS = "×"
"""Stands on a toxic patch where there are more."""
KINDS = {"toxic": (4, "-"), "benign": (0, "--")}
"""Whose scores are drawn: the place of a look, and a dash."""


def plot_scores(found: Row) -> str:
    """Draw how the scores of toxic and of harmless patches are spread, and where masking ends."""
    from matplotlib.ticker import PercentFormatter
    from numpy import histogram_bin_edges

    with drawing():
        figure, (axis,) = panels(1, height=3.2)
        scores, threshold = found["scores"], found["threshold"]
        edges = histogram_bin_edges([*scores["toxic"], *scores["benign"]], 40)
        for kind, (place, dash) in KINDS.items():
            values, (colour, _) = scores[kind], look(place)
            label = f"{'harmless' if kind == 'benign' else kind} patches (n {len(values)})"
            shares = [1 / len(values)] * len(values)
            drawn = {"bins": edges, "weights": shares, "color": colour}
            axis.hist(values, histtype="stepfilled", alpha=0.25, **drawn)
            axis.hist(values, histtype="step", linestyle=dash, linewidth=1.8, **drawn)
            axis.plot([], [], color=colour, linestyle=dash, label=label)
        axis.axvline(threshold, color=INK, linewidth=1.2)
        for side, text in (("right", "masked ←  "), ("left", "  → kept")):
            axis.text(
                threshold, 1.02, text, ha=side, va="bottom", color=INK, fontsize=9,
                transform=axis.get_xaxis_transform(),
            )  # fmt: skip
        axis.set(xlabel="score (lower is more unsafe)", ylabel="share of the patches")
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.legend(loc="best")
        return svg(figure)


def span_of(found: Row) -> float:
    """Tell how far from the threshold the scores of the examples reach."""
    scores = (score for example in found["examples"] for score in example["scores"])
    return max((abs(score - found["threshold"]) for score in scores), default=0) or 1.0


def plot_scale(threshold: float, span: float) -> str:
    """Draw which colour means which score."""
    with drawing():
        figure, (axis,) = panels(1, height=0.75)
        bar = figure.colorbar(_colours(threshold, span), cax=axis, orientation="horizontal")
        steps = len(UNSAFE_TO_SAFE) // 2
        bar.set_ticks([threshold + span * step / steps for step in range(-steps, steps + 1)])
        bar.ax.xaxis.set_major_formatter(lambda score, _: written(score))
        bar.ax.axvline(threshold, color=BLACK, linewidth=3)
        return svg(figure)


def plot_example(example: Row, grid: int, threshold: float, span: float) -> str:
    """Draw the scores of patches over their picture; what is masked has a frame."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from PIL import Image

    with drawing(), Image.open(BytesIO(example["picture"])) as picture:
        figure = Figure(figsize=(3, 3 * picture.height / picture.width))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.imshow(
            picture.convert("RGB"), extent=(0, grid, grid, 0), aspect="auto", interpolation="none"
        )
        axis.axis("off")
        colours = _colours(threshold, span)
        patches = zip(example["scores"], example["hidden"], example["labels"], strict=True)
        for place, (score, hidden, label) in enumerate(patches):
            top, left = divmod(place, grid)
            colour = colours.to_rgba(score)
            axis.add_patch(Rectangle((left, top), 1, 1, facecolor=colour, alpha=0.6, linewidth=0))
            if hidden:
                _frame(axis, left, top, 1 / grid)
            if grid <= READABLE:
                _write(axis, left + 0.5, top + 0.46, written(score), 44 / grid)
                _write(axis, left + 0.5, top + 0.74, LABELS[label], 26 / grid)
            elif label == 1:
                _write(axis, left + 0.5, top + 0.5, CROSS, 90 / grid)
        return svg(figure)


def plot_attention(shares: Sequence[Row]) -> str:
    """Draw how much of the attention lies on the prefix, block by block."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    with drawing():
        figure, (axis,) = panels(1, height=3)
        layers = [row["layer"] for row in shares]
        for place, (name, dash) in enumerate({"calibrated": "-", "plain": "--"}.items()):
            colour, marker = (MUTED, "s") if name == "plain" else look(place)
            nothing = dict.fromkeys(("value", "low", "high"), float("nan"))
            found = [row[name] or nothing for row in shares]
            values = [each["value"] for each in found]
            reach = [
                [each["value"] - each["low"] for each in found],
                [each["high"] - each["value"] for each in found],
            ]
            axis.errorbar(
                layers, values, yerr=reach, color=colour, marker=marker, linestyle=dash, capsize=3,
                label="without calibration" if name == "plain" else "with calibration",
            )  # fmt: skip
        axis.set(xlabel="decoder block", ylabel="attention on the prefix", ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))  # whole percents
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.legend(loc="best")
        return svg(figure)


def written(score: float) -> str:
    """Write a score, with a real minus sign and never as minus nothing."""
    return f"{score:.1f}".replace("-0.0", "0.0").replace("-", "\N{MINUS SIGN}")


def _colours(threshold: float, span: float) -> "ScalarMappable":
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import CenteredNorm, ListedColormap

    norm = CenteredNorm(vcenter=threshold, halfrange=span)
    return ScalarMappable(norm, ListedColormap(UNSAFE_TO_SAFE))


def _frame(axis: "Axes", left: int, top: int, scale: float) -> None:
    """Draw a black frame with a white seam, which is seen on any picture."""
    from matplotlib.patches import Rectangle

    for colour, width in ((WHITE, 12 * scale), (BLACK, 7 * scale)):
        axis.add_patch(
            Rectangle((left + 0.09, top + 0.09), 0.82, 0.82, fill=False, edgecolor=colour,
                      linewidth=width, joinstyle="miter")
        )  # fmt: skip


def _write(axis: "Axes", x: float, y: float, text: str, size: float) -> None:
    from matplotlib.patheffects import withStroke

    axis.text(
        x, y, text, ha="center", va="center", color=BLACK, fontsize=size, fontweight="bold",
        path_effects=[withStroke(linewidth=size / 5, foreground=WHITE)],
    )  # fmt: skip
