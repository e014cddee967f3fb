"""The plots: each takes the rows it shows and returns a figure, or None where there are none."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hauberk import UNDEFENDED
from tasks.report.comparison import Cell, Comparison, Row, number
from tasks.report.sweeps import Line, bounds_of, every_shift, kind_of, lines, look_of, shift_sweeps
from tasks.report.theme import INK, MUTED, PAPER, as_percent, look, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RATES = {
    "unsafe_rate": ("Unsafe answers", "n_harmful"),
    "accuracy": ("Right answers to benign questions", "n_benign"),
    "over_refusal": ("Over-refusal", "n_benign"),
}
"""Metric of a sweep -> (its title, the number of samples behind it)."""


def plot_alpha(sweep: Row) -> "Figure | None":
    """Draw unsafe rate, utility and over-refusal of every setting against alpha."""
    curves = lines(sweep["rows"], start=sweep.get("undefended"))
    if len({point["alpha"] for curve in curves for point in curve.points}) < 3:
        return None  # one alpha beside undefended is no curve
    figure, axes = panels(len(RATES), height=3.7)
    for axis, (metric, (title, count)) in zip(axes, RATES.items(), strict=True):
        for curve in curves:
            _curve(axis, curve, metric, count)
        _reference(axis, number(sweep.get("undefended", {}).get(metric)))
        for row in sweep["rows"]:
            if row.get("chosen") and number(row.get(metric)) is not None:
                _ring(axis, row["alpha"], row[metric])
        axis.set(title=title, xlabel="α")
        as_percent(axis)
    _legend(figure, axes[0])
    return figure


def plot_agreement(
    channels: Sequence[str], kappas: Mapping[str, Sequence[Cell | None]]
) -> "Figure":
    """Draw kappa with its interval: a row for each channel, a point for each defense."""
    figure, (axis,) = panels(1, height=1.4 + 0.5 * len(channels))
    spread = 0.7 / max(1, len(kappas))
    for place, (defense, cells) in enumerate(kappas.items()):
        colour, marker = look(place)
        points = [
            (row + spread * (place - (len(kappas) - 1) / 2), cell.value, cell.low, cell.high)
            for row, cell in enumerate(cells)
            if cell and cell.value is not None and cell.low is not None and cell.high is not None
        ]
        if points:
            rows, values, lows, highs = zip(*points, strict=True)
            axis.hlines(rows, lows, highs, color=colour, linewidth=1.4)
            label = "undefended" if defense == UNDEFENDED else defense
            axis.plot(values, rows, color=colour, marker=marker, linestyle="", label=label)
    axis.axvline(0, color=MUTED, linewidth=1)
    axis.set_yticks(range(len(channels)), channels)
    axis.set(xlabel="Cohen's kappa", ylim=(len(channels) - 0.5, -0.5))
    axis.set_xlim(right=1.05)
    if axis.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=6)
    return figure


def plot_trade_off(comparison: Comparison, model: str) -> "Figure | None":
    """Draw every shift that was tried by its utility and its unsafe rate."""
    rows = [
        row
        for row in every_shift(comparison, model)
        if number(row.get("accuracy")) is not None and number(row.get("unsafe_rate")) is not None
    ]
    if not rows:
        return None
    figure, axes = panels(2, height=4.6)
    kinds = list(dict.fromkeys(kind_of(row) for row in rows))
    measures = {"accuracy": "right answers to benign questions", "over_refusal": "over-refusal"}
    for axis, (metric, label) in zip(axes, measures.items(), strict=True):
        for kind in kinds:
            members = [row for row in rows if kind_of(row) == kind]
            _cloud(axis, [row for row in members if number(row.get(metric)) is not None], metric)
        for row in rows:
            if row.get("chosen") and number(row.get(metric)) is not None:
                _ring(axis, row[metric], row["unsafe_rate"])
        for sweep in shift_sweeps(comparison, model).values():
            _start(axis, sweep.get("undefended", {}), metric)
        axis.set(xlabel=label, ylabel="unsafe answers")
        as_percent(axis, "xy")
    axes[0].set_title("Best: lower right")
    axes[1].set_title("Best: lower left")
    _legend(figure, axes[0])
    return figure


def plot_layers(comparison: Comparison, model: str) -> "Figure | None":
    """Draw how long the vectors are in each layer, and how far the states really move."""
    measured = {
        defense: sweep
        for (owner, defense), sweep in comparison.sweeps.items()
        if owner == model and sweep.get("layers")
    }
    if not measured:
        return None
    figure, (norms, moved) = panels(2)
    for place, (defense, sweep) in enumerate(measured.items()):
        colour, marker = look(place)
        layers = [row["layer"] for row in sweep["layers"]]
        dash = ("-", "--", ":", "-.")[place % 4]  # the same vectors lie on each other
        style = {"color": colour, "marker": marker, "linestyle": dash, "label": defense}
        norms.plot(layers, [_ratio(row) for row in sweep["layers"]], **style)
        moved.plot(layers, [_nan(row.get("realised")) for row in sweep["layers"]], **style)
        alpha = number(sweep.get("chosen", {}).get("alpha"))
        if alpha is not None:
            moved.axhline(alpha, color=colour, linewidth=1, linestyle=":")
    norms.set(title="Shift, relative to the hidden state", ylabel="|v| / |h|", ylim=(0, None))
    moved.set(title="Realised displacement", ylabel="|h′ − h| / |v|", ylim=(0, None))
    for axis in (norms, moved):
        axis.set_xlabel("decoder block")
        axis.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, norms)
    return figure


def _curve(axis: "Axes", curve: Line, metric: str, count: str) -> None:
    place, solid = curve.look
    (colour, marker), dash = look(place), "-" if solid else (0, (5, 2))
    alphas = [row["alpha"] for row in curve.points]
    values = [_nan(row.get(metric)) for row in curve.points]
    if not curve.leads:
        axis.plot(alphas, values, color=colour, linestyle=dash, linewidth=0.7, alpha=0.45)
        return
    axis.plot(alphas, values, color=colour, linestyle=dash, marker=marker, label=curve.kind)
    bounds = [bounds_of(number(row.get(metric)), row.get(count)) for row in curve.points]
    low, high = ([_nan(b[side] if b else None) for b in bounds] for side in (0, 1))
    axis.fill_between(alphas, low, high, color=colour, alpha=0.09, linewidth=0)


def _cloud(axis: "Axes", rows: list[Row], metric: str) -> None:
    if not rows:
        return
    place, solid = look_of(rows[0])
    colour, marker = look(place)
    axis.scatter(
        [row[metric] for row in rows], [row["unsafe_rate"] for row in rows], marker=marker, s=30,
        facecolors=colour if solid else "none", edgecolors=colour, linewidths=1.2, alpha=0.8,
        label=kind_of(rows[0]),
    )  # fmt: skip


def _reference(axis: "Axes", value: float | None) -> None:
    if value is not None:
        axis.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="undefended")


def _ring(axis: "Axes", x: float, y: float) -> None:
    axis.plot(
        [x], [y], linestyle="none", marker="o", markersize=12, markerfacecolor="none",
        markeredgecolor=INK, markeredgewidth=1.6, label="chosen", zorder=5,
    )  # fmt: skip


def _start(axis: "Axes", undefended: Row, metric: str) -> None:
    x, y = number(undefended.get(metric)), number(undefended.get("unsafe_rate"))
    if x is not None and y is not None:
        axis.plot(
            [x], [y], linestyle="none", marker="X", markersize=10, color=MUTED,
            markeredgecolor=PAPER, label="undefended", zorder=4,
        )  # fmt: skip


def _legend(figure: "Figure", axis: "Axes") -> None:
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        list(unique.values()), list(unique), loc="outside lower center", ncols=min(5, len(unique))
    )


def _ratio(row: Row) -> float:
    vector, state = number(row.get("vector_norm")), number(row.get("state_norm"))
    return float("nan") if vector is None or not state else vector / state


def _nan(value: float | None) -> float:
    known = number(value)
    return float("nan") if known is None else known
