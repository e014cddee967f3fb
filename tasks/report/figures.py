"""The plots as parts of the page: a file, a caption, and words for those who do not see it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.report.comparison import Comparison, Row, number
from tasks.report.plots import plot_alpha, plot_layers, plot_trade_off
from tasks.report.sweeps import (
    KIND,
    PREFIX,
    SETTING,
    alpha_sweeps,
    bounds_of,
    by_suite,
    every_shift,
    is_prefix,
    is_shift,
)
from tasks.report.theme import drawing, svg
from tasks.report.words import amount, interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


@dataclass(frozen=True)
class Figure:
    """One plot."""

    name: str
    """Its file is plots/NAME.svg."""
    title: str
    caption: str
    alt: str
    svg: str


def figures(comparison: Comparison, model: str) -> list[Figure]:
    """Draw every plot for which a model has numbers."""
    with drawing():
        drawn = [*_alphas(comparison, model), *_overall(comparison, model)]
        return [
            Figure(file_name(name), title, caption, alt, svg(drawing_))
            for name, title, caption, alt, drawing_ in drawn
            if drawing_ is not None
        ]


def setting(row: Row) -> str:
    """Write a setting in words: alpha, or a prefix, and what else it has."""
    if is_prefix(row):
        told = setting_cells(row)
        rest = [f"{title.lower()} {told[title]}" for title in ("Layers", "Fill")]
        begin = [told["Prefix"], told["Placement"], f"γ {told['γ']}", told["Gate"], told["Mode"]]
        return ", ".join([*begin, *rest])
    if not is_shift(row):
        return f"α {row['alpha']:g}, the share of the trained change that is made"
    parts = [f"α {row['alpha']:g}"] if number(row.get("alpha")) is not None else []
    parts += [str(row[name]) for name in KIND if row.get(name) is not None]
    rest = [f"{name} {brief(row[name])}" for name in SETTING if name not in KIND and name in row]
    return ", ".join([*parts, *rest])


def setting_cells(row: Row) -> dict[str, str]:
    """Write a setting as the cells of a table: the head of each column -> what stands there."""
    if not is_prefix(row):
        return {"Setting": setting(row), "α": str(row.get("alpha", ""))}
    told = {
        **row,
        "text": f"“{row['text']}”",  # where it ends in a space, that matters
        "layers": "middle" if row["layers"] is None else row["layers"],
    }
    return {title: brief(told[name]) for name, title in PREFIX.items()}


def brief(value: object) -> str:
    """Write a value of a setting; a long run of layers as its ends, none as all."""
    if value is None:
        return "all"
    if isinstance(value, list | tuple):
        whole = [item for item in value if isinstance(item, int)]
        if len(whole) == len(value) > 2 and whole == list(range(whole[0], whole[-1] + 1)):
            return f"{whole[0]} to {whole[-1]}"
        return ", ".join(map(str, value))
    return str(value)


def measured_setting(row: Row) -> str:
    """Write a setting with what was measured."""
    return f"{setting(row)}: {rates(row)}"


def rates(row: Row) -> str:
    """Write what was measured on calibration, pooled and by suite, an unsafe rate with its cost."""
    parts = []
    for metric, title, count in (
        ("unsafe_rate", "unsafe answers", "n_harmful"),
        ("accuracy", "right answers", "n_benign"),
        ("over_refusal", "over-refusal", "n_benign"),
    ):
        value, n = number(row.get(metric)), row.get(count)
        bounds = interval(*(bounds_of(value, n) or (None, None)), metric)
        suites = ", ".join(f"{name} {amount(on, metric)}" for name, on in by_suite(row, metric))
        inside = f" ({bounds}, n {n}{f'; {suites}' if suites else ''})" if bounds else ""
        parts.append(f"{title} {amount(value, metric)}{inside}")
    return ", ".join(parts)


def _alphas(comparison: Comparison, model: str) -> Iterator[tuple[Any, ...]]:
    for defense, sweep in alpha_sweeps(comparison, model).items():
        split = sweep.get("split", "calibration")
        chosen = [measured_setting(row) for row in sweep["rows"] if row.get("chosen")]
        lines = (
            "A thick line is the setting of its kind that holds the chosen point, or else the best "
            "one; thin lines are the others; α 0 is undefended."
            if any(map(is_shift, sweep["rows"]))
            else "α is the share of the trained change that is made; α 0 is undefended."
        )
        caption = (
            f"Measured on the {split} split, never on test. {lines} Bands: 95 % Wilson intervals. "
            f"Rule: {sweep.get('rule', 'not stated')}"
        )
        alt = (
            f"Three line plots against alpha for {len(sweep['rows'])} settings of {defense} on "
            f"{model}: unsafe answers, right answers, over-refusal. "
            f"Chosen: {'; '.join(chosen) or 'none'}. Every number is in the table below."
        )
        title = f"{defense}: unsafe answers and utility against α ({split} split)"
        yield f"alpha.{model}.{defense}", title, caption, alt, plot_alpha(sweep)


def _overall(comparison: Comparison, model: str) -> Iterator[tuple[str, str, str, str, Any]]:
    settings = every_shift(comparison, model)
    trade_off: Drawing | None = plot_trade_off(comparison, model)
    yield (
        f"trade-off.{model}",
        "The whole trade-off",
        "Every shift that was tried: α, compose, layers, level. The ring is what was chosen, the "
        "cross is undefended. The numbers of samples and the intervals are in the table below.",
        f"Two scatter plots of {len(settings)} shifts on {model}: unsafe answers against right "
        "answers to benign questions, and against over-refusal. "
        "Every number is in the table below.",
        trade_off,
    )
    yield (
        f"layers.{model}",
        "The shift, layer by layer",
        "Left: length of the shift vector relative to the hidden state. Right: how far the states "
        "really move when the chosen setting is applied, in lengths of the vector; the dotted line "
        "is the α that was asked for. Above it, layers add up what earlier ones have moved.",
        f"Two line plots by decoder block on {model}: {_layers_in_words(comparison, model)}",
        plot_layers(comparison, model),
    )


def _layers_in_words(comparison: Comparison, model: str) -> str:
    parts = []
    for (owner, defense), sweep in comparison.sweeps.items():
        moved = [number(row.get("realised")) for row in sweep.get("layers", ())]
        known = [value for value in moved if value is not None]
        if owner == model and known:
            parts.append(
                f"{defense} moves the states by {min(known):.2f} to {max(known):.2f} lengths"
            )
    return "; ".join(parts) or "no displacement measured"


def file_name(name: str) -> str:
    """Make a name one that every file system takes."""
    return re.sub(r"[^\w.+-]", "-", name)
