"""The plots of where refusal lives: the lens, hidden wishes, captions, and injected words."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks.report.theme import MUTED, as_percent, drawing, look, panels, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_REFERENCE: Mapping[str, Any] = {"color": MUTED, "linewidth": 1, "linestyle": (0, (4, 3))}
_LOCATED = 1
"""The place of the look of what is located; 0 is that of the rest."""


def draw(found: Row) -> dict[str, str]:
    """Draw the plots of what a layers.json has: name -> SVG."""
    with drawing():
        figures = {"lens": _lens(found)}
        if found["words"]:
            figures["hidden"] = _hidden(found)
        if found["pictures"]:
            figures |= {"captions": _captions(found), "injected": _injected(found)}
        return {name: svg(figure) for name, figure in figures.items()}


def _lens(found: Row) -> "Figure":
    figure, (shares, counts) = panels(2, height=3.9)
    # State k is what block k - 1 puts out; the embeddings stand before block 0.
    _curve(shares, found["lens"]["share"], "refusal as next token", 1, begin=-1)
    _curve(shares, found["attention"], "attention on the wish", 0)
    as_percent(shares)
    shares.set(title="The last prompt position", ylabel="share")
    places = [state - 1 for state in range(len(found["lens"]["start"]))]
    for shift, (name, place) in ((-0.2, ("start", 1)), (0.2, ("settled", 0))):
        colour, _ = look(place)
        at = [place + shift for place in places]
        hatch = "//" if name == "settled" else ""
        label = {"start": "starts", "settled": "is settled"}[name]
        counts.bar(at, found["lens"][name], 0.4, facecolor=colour if not hatch else "none",
                   edgecolor=colour, hatch=hatch, label=label)  # fmt: skip
    counts.set(title="After which block refusal shows", ylabel="requests")
    for axis in (shares, counts):
        _blocks(axis, found, begin=-1)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return figure


def _hidden(found: Row) -> "Figure":
    figure, axes = panels(3, height=3.9)
    words = found["words"]
    titles = {
        "hidden": "Wish hidden in these blocks",
        "hidden_from": "Wish hidden from here on",
        "skipped": "These blocks skipped",
    }
    for axis, (way, title) in zip(axes, titles.items(), strict=True):
        _points(axis, found, words[way], "harmful", "harmful")
        if "harmless" in words[way][0]:
            _points(axis, found, words[way], "harmless", "harmless", shift=0.12)
        axis.axhline(words["untouched"]["harmful"]["value"], label="harmful, untouched",
                     **_REFERENCE)  # fmt: skip
        axis.set(title=title, ylabel="refused" if axis is axes[0] else "")
        _windows(axis, words[way], onward=way == "hidden_from")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), fontsize=8.5)
    return figure


def _captions(found: Row) -> "Figure":
    figure, axes = panels(2, height=3.6)
    told = (
        ("cosine", "As they are", "cosine of picture and caption"),
        ("centred", "Without the mean of all captions", ""),
    )
    for axis, (name, title, label) in zip(axes, told, strict=True):
        _curve(axis, found["alignment"][name], "picture and its caption", 0)
        axis.axhline(0, **_REFERENCE)
        axis.set(title=title, ylabel=label)
        _blocks(axis, found)
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def _injected(found: Row) -> "Figure":
    figure, axes = panels(2, height=3.7)
    pictures = found["pictures"]
    for axis, (way, title) in zip(
        axes, (("added", "Words added"), ("replaced", "Words in place of the picture")), strict=True
    ):
        _points(axis, found, pictures[way], None, "toxic pictures")
        axis.axhline(pictures["told"]["value"], label="the same told in words", **_REFERENCE)
        axis.set(title=title, ylabel="refused" if axis is axes[0] else "")
        _windows(axis, pictures[way])
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return figure


def _points(
    axis: "Axes", found: Row, rows: Sequence[Row], kind: str | None, label: str, shift: float = 0.0
) -> None:
    """Draw a rate for each window, with its interval, those of located blocks in another colour."""
    located = set(found["located"]["layers"])
    _, marker = look(3 if kind == "harmless" else 0)
    named = set()
    for place, row in enumerate(rows):
        rate = row if kind is None else row[kind]
        inside = set(row["layers"]) <= located
        colour, _ = look(_LOCATED if inside else 0)
        reach = [[rate["value"] - rate["low"]], [rate["high"] - rate["value"]]]
        says = f"{label}, located" if inside else label
        axis.errorbar(
            place + shift, rate["value"], yerr=reach, color=colour, marker=marker, markersize=6,
            markerfacecolor="none" if kind == "harmless" else colour, capsize=3,
            label=None if says in named else f"{says} (n {rate['n']})",
        )  # fmt: skip
        named.add(says)


def _windows(axis: "Axes", rows: Sequence[Row], *, onward: bool = False) -> None:
    """Name the windows below an axis of rates."""
    names = [span_of(row["layers"], onward=onward) for row in rows]
    axis.set_xticks(range(len(rows)), names)
    axis.set(xlabel="decoder blocks", xlim=(-0.5, len(rows) - 0.3))
    as_percent(axis)


def span_of(layers: Sequence[int], *, onward: bool = False) -> str:
    """Write consecutive blocks: "3", "3–4", or, to the last one, "3…"."""
    if onward:
        return f"{layers[0]}…"
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"


def _blocks(axis: "Axes", found: Row, begin: int = 0) -> None:
    """Number the blocks, and shade the located ones."""
    layers, count = found["located"]["layers"], found["blocks"]
    colour, _ = look(_LOCATED)
    axis.axvspan(layers[0] - 0.5, layers[-1] + 0.5, color=colour, alpha=0.1, linewidth=0)
    names = ["emb."] * (begin < 0) + [str(block) for block in range(count)]
    axis.set_xticks(range(begin, count), names)
    axis.set(xlabel="decoder block", xlim=(begin - 0.6, count - 0.4))


def _curve(axis: "Axes", rows: Sequence[Row], label: str, place: int, begin: int = 0) -> None:
    if not rows:
        return
    colour, marker = look(place)
    places = range(begin, begin + len(rows))
    values, low, high = ([row[name] for row in rows] for name in ("value", "low", "high"))
    axis.plot(places, values, color=colour, marker=marker, label=f"{label} (n {rows[0]['n']})")
    axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
