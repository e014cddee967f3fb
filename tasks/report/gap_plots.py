"""The plots of a model's safety gap: unsafe answers, and the states behind them."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks.report.theme import INK, MUTED, as_percent, drawing, look, panels, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

GROUPS = {
    "harmful_text": ("harmful text", 4),
    "benign_text": ("harmless text", 0),
    "harmful_image": ("harmful text, picture", 3),
    "benign_image": ("harmless text, picture", 2),
    "harmful_blank": ("harmful text, blank picture", 1),
}
"""Requests in the words of the plots, and the place of their look."""
RATES = {
    ("text", "unsafe_rate"): ("unsafe answers on text", 4),
    ("text_blank", "unsafe_rate"): ("unsafe answers on text_blank", 4),
    ("text_image", "unsafe_rate"): ("unsafe answers on text_image", 4),
    ("benign_image", "accuracy"): ("right answers on benign_image", 0),
    ("lookalike", "over_refusal"): ("over-refusal on lookalike", 1),
    ("benign_image", "over_refusal"): ("over-refusal on benign_image", 1),
}
"""Suite and metric -> how it is written, from above, and the place of its look."""
_METRICS = {
    "unsafe_rate": ("unsafe answers", 4),
    "accuracy": ("right answers", 0),
    "over_refusal": ("over-refusal", 1),
}
"""The same of suites of data sets, by metric."""
_REFERENCE: Mapping[str, Any] = {"color": MUTED, "linewidth": 1, "linestyle": (0, (4, 3))}


def draw(document: Row, points: Sequence[Row]) -> dict[str, str]:
    """Draw every plot: its name -> SVG, the same bytes for the same numbers.

    Parameters
    ----------
    document : gap.json
    points : the rows of states.parquet
    """
    with drawing():
        figures = {
            "rates": _rates(document),
            "states": _states(document, points),
            "direction": _direction(document),
        }
        if line(document, "at_end", "caption"):  # or no picture is told in words
            figures["alignment"] = _alignment(document)
        return {name: svg(figure) for name, figure in figures.items()}


def shown_rates(document: Row) -> list[tuple[str, int, Row]]:
    """Give every rate in words, the place of its look, and the rate: those of the lab first."""
    found = {(row["suite"], row["metric"]): row for row in document["rates"] if row["n"]}
    of_data = {
        (suite, metric): (f"{told} on {suite}", place)
        for metric, (told, place) in _METRICS.items()
        for suite, measured in found
        if measured == metric and (suite, metric) not in RATES
    }
    return [(*how, found[key]) for key, how in (RATES | of_data).items() if key in found]


def shown_blocks(document: Row) -> list[int]:
    """Return the blocks whose states are drawn: the middle one and the last."""
    count = len(document["explained"])
    return sorted({count // 2, count - 1})


def telling_blocks(document: Row) -> list[int]:
    """Return the blocks whose axis tells texts apart that it was not fitted on, beyond chance.

    In any other one there is no direction to speak of, and so no place on it.
    """
    return [row["block"] for row in line(document, "auroc", "text") if row["low"] > 0.5]


def line(document: Row, measure: str, group: str) -> list[Row]:
    """Find what was measured of a group, block by block."""
    return [r for r in document["layers"] if (r["measure"], r["group"]) == (measure, group)]


def _rates(document: Row) -> "Figure":
    figure, (axis,) = panels(1, height=2.6)
    shown = shown_rates(document)
    for height, (_, place, row) in enumerate(shown):
        colour, marker = look(place)
        reach = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
        axis.errorbar(
            row["value"], height, xerr=reach, color=colour, marker=marker, markersize=6, capsize=3
        )
    axis.set_yticks(range(len(shown)), [f"{label}  (n {row['n']})" for label, _, row in shown])
    verdict = document["verdict"]
    axis.set(ylim=(len(shown) - 0.5, -0.5), title=verdict[0].upper() + verdict[1:])
    as_percent(axis, "x")
    return figure


def _states(document: Row, points: Sequence[Row]) -> "Figure":
    blocks = shown_blocks(document)
    figure, axes = panels(len(blocks), height=4.6)
    for axis, block in zip(axes, blocks, strict=True):
        middles = {}
        for group, (label, place) in GROUPS.items():
            members = [p for p in points if p["group"] == group and p["block"] == block]
            xs, ys = ([point[side] for point in members] for side in ("x", "y"))
            middles[group] = sum(xs) / len(xs), sum(ys) / len(ys)
            colour, marker = look(place)
            axis.plot(
                xs, ys, linestyle="none", marker=marker, markeredgecolor=colour,
                markerfacecolor=colour if group.endswith("text") else "none",
                label=f"{label} (n {len(members)})",
            )  # fmt: skip
        arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", middles["harmful_image"], middles["harmful_text"], arrowprops=arrow)
        first, second = (
            f"{100 * share:.0f} % of variance" for share in document["explained"][block]
        )
        axis.set(
            title=f"Decoder block {block}",
            xlabel=f"first component, {first}",
            ylabel=f"second component, {second}",
        )
        axis.tick_params(labelbottom=False, labelleft=False)  # the unit of a state means nothing
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _direction(document: Row) -> "Figure":
    figure, (scores, areas) = panels(2, height=4.2)
    telling = telling_blocks(document)
    for group, (label, place) in GROUPS.items():
        _curve(scores, line(document, "score", group), label, place, telling)
    if not telling:
        says = "no block tells other texts apart"
        scores.text(0.5, 0.5, says, ha="center", color=MUTED, transform=scores.transAxes)
    _curve(areas, line(document, "auroc", "text"), "text", 0)
    _curve(areas, line(document, "auroc", "image"), "text with a picture", 3)
    areas.axhline(0.5, label="by chance", **_REFERENCE)
    scores.set(title="From harmless (0) to harmful text (1)", ylabel="place on the refusal axis")
    areas.set(title="Harmful told from harmless", ylabel="AUROC", ylim=(None, 1.02))
    return _finish(document, figure, [scores, areas])


def _alignment(document: Row) -> "Figure":
    figure, (over, end, margins) = panels(3, height=4.2)
    for axis, measure in ((over, "over_image"), (end, "at_end")):
        _curve(axis, line(document, measure, "caption"), "its caption", 0)
        _curve(axis, line(document, measure, "other_caption"), "another's caption", 1)
    _curve(end, line(document, "at_end", "blank"), "a blank picture", 3)
    _curve(margins, line(document, "over_image", "margin"), "over the tokens", 5)
    _curve(margins, line(document, "at_end", "margin"), "at the last position", 2)
    margins.axhline(0, **_REFERENCE)
    over.set(title="Picture and words, over tokens", ylabel="cosine")
    end.set(title="Picture or words, last position", ylabel="cosine")
    margins.set(title="Its caption minus another's", ylabel="difference of cosines")
    return _finish(document, figure, [over, end, margins])


def _finish(document: Row, figure: "Figure", axes: Sequence["Axes"]) -> "Figure":
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set(xlabel="decoder block", xlim=(-0.3, len(document["explained"]) - 0.7))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=8.5)
    return figure


def _curve(
    axis: "Axes", rows: Sequence[Row], label: str, place: int, blocks: Collection[int] | None = None
) -> None:
    """Draw values with their intervals, in all blocks or only in some."""
    shown = [row for row in rows if blocks is None or row["block"] in blocks]
    places, values, low, high = (
        [row[name] for row in shown] for name in ("block", "value", "low", "high")
    )
    colour, marker = look(place)
    axis.plot(places, values, color=colour, marker=marker, label=f"{label} (n {rows[0]['n']})")
    axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
