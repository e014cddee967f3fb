"""How plots look, on light and on dark paper.

A plot is drawn once, in the colours of light paper.  In the SVG each of them is then a variable
that a media query sets, so that the same file follows its reader's choice.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER, INK, MUTED, RULE = "#fffffe", "#1a2430", "#5a6673", "#d9dee3"
SERIES = ("#1f6f8b", "#c4591b", "#3f8f4f", "#8457a6", "#b0344f", "#7a6a1c")
"""Told apart in every common kind of colour vision; lines differ in their markers as well."""
MARKERS = ("o", "s", "^", "D", "v", "P")

DARK = {
    PAPER: "#171d23", INK: "#e8ecef", MUTED: "#9aa7b3", RULE: "#36414b",
    "#1f6f8b": "#5cb3d0", "#c4591b": "#f0935a", "#3f8f4f": "#7cc98b",
    "#8457a6": "#bd95dd", "#b0344f": "#ee7d95", "#7a6a1c": "#cdbb62",
}  # fmt: skip

STYLE: Mapping[str, object] = {
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER,
    "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.labelsize": 9.5, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "legend.frameon": False, "legend.fontsize": 9,
    "lines.linewidth": 1.8, "lines.markersize": 4.5,
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"],
    "svg.fonttype": "path", "svg.hashsalt": "hauberk",
}  # fmt: skip


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in our colours while the ``with`` block runs."""
    import matplotlib

    with matplotlib.rc_context(dict(STYLE)):  # type: ignore[arg-type]
        yield


def panels(count: int, height: float = 3.2) -> tuple["Figure", list["Axes"]]:
    """Make a figure with panels side by side, without pyplot and so without global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def look(place: int) -> tuple[str, str]:
    """Colour and marker of the series at this place."""
    return SERIES[place % len(SERIES)], MARKERS[place % len(MARKERS)]


def as_percent(axis: "Axes", sides: str = "y") -> None:
    """Write the ticks of an axis as percent of the samples, from 0 to 100."""
    from matplotlib.ticker import PercentFormatter

    for side in sides:
        scale = axis.yaxis if side == "y" else axis.xaxis
        scale.set_major_formatter(PercentFormatter(1, decimals=0))
        (axis.set_ylim if side == "y" else axis.set_xlim)(-0.03, 1.03)


def svg(figure: "Figure") -> str:
    """Write a figure as SVG: the same bytes for the same figure, colours as variables."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for place, colour in enumerate(DARK):
        text = text.replace(colour, f"var(--c{place})")
    light = "".join(f"--c{place}:{colour};" for place, colour in enumerate(DARK))
    dark = "".join(f"--c{place}:{colour};" for place, colour in enumerate(DARK.values()))
    style = (
        f"<style>:root{{{light}}}"
        f"@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"
        f"@media print{{:root{{{light}}}}}</style>"
    )
    return re.sub(r"(<svg[^>]*>)", lambda match: match[1] + style, text, count=1)
