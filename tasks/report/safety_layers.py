"""Where the refusals of a model live, as a part of the page."""

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.report.comparison import Comparison, Row
from tasks.report.figures import Figure, file_name
from tasks.report.safety_layers_plots import draw, span_of
from tasks.report.words import amount, interval, listed

WAYS = {
    "hidden": "wish hidden in",
    "hidden_from": "wish hidden from here to the last",
    "skipped": "blocks skipped",
    "added": "caption added to the picture",
    "replaced": "caption in place of the picture",
}
KINDS = {"harmful": "harmful text", "harmless": "harmless text", "picture": "toxic picture"}


@dataclass(frozen=True)
class RateRow:
    """How much is refused while something is done to some blocks."""

    way: str
    blocks: str
    kind: str
    located: bool
    rate: Row


@dataclass(frozen=True)
class SafetyLayers:
    """What the page says of one model."""

    sentences: tuple[str, ...]
    figures: tuple[Figure, ...]
    rows: tuple[RateRow, ...]


def safety_layers(comparison: Comparison) -> dict[str, SafetyLayers]:
    """Say it of every model whose layers were looked for."""
    return {model: _said(model, found) for model, found in comparison.layers.items()}


def _said(model: str, found: Row) -> SafetyLayers:
    sentences = (
        _located(found),
        *([_read(found)] if found["words"] else []),
        *([_shown(found)] if found["pictures"] else []),
        *(f"Not measured, {of}: {why}." for of, why in found.get("not_measured", {}).items()),
    )
    return SafetyLayers(sentences, tuple(_figures(model, found)), tuple(_rows(found)))


def _located(found: Row) -> str:
    located = found["located"]
    where, last = _named(located["layers"]), found["blocks"] - 1
    asked = f"Of {located['asked']} harmful requests in words {located['refused']} are refused"
    if located["fallback"]:
        return (
            f"{asked}, none so that the lens could follow it. So no blocks of 0 to {last} were "
            f"located; {where} are where the authors' lie, scaled."
        )
    start, settled = located["start"], located["settled"]
    begun = " or ".join(_token(row) for row in found["tokens"])
    return (
        f"Located: {where} of 0 to {last}. {asked}, {located['counted']} of them begin with "
        f"{begun}; only these count. Refusal starts after block {_after(start)} and is settled "
        f"after block {_after(settled)}: medians, and the 10th and 90th percentiles."
    )


def _token(row: Row) -> str:
    """Write a token, and how many harmless answers begin with it as well."""
    also = f" (so do {100 * row['answered']:.0f} % of harmless answers)" if row["answered"] else ""
    return f"\u201c{row['text']}\u201d{also}"


def _after(spread: Row) -> str:
    """Write after which block something shows: state k is what block k - 1 puts out."""
    median, low, high = (f"{spread[name] - 1:g}" for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def _read(found: Row) -> str:
    """Say in which blocks the wish is read, as masking tells, and whether the lens agrees."""
    words, located = found["words"], set(found["located"]["layers"])
    told = [row["layers"] for row in words["hidden"] if not _apart(row["harmful"], row["harmless"])]
    if told:
        inside = any(set(layers) <= located for layers in told)
        agrees = "which the lens locates as well" if inside else "outside the located blocks"
        tells = (
            f"Harmful wishes are no longer told from harmless ones, as far as the intervals say, "
            f"when they are hidden in {listed(map(_named, told))}, {agrees}."
        )
    else:
        tells = "No one window tells: wherever the wish is hidden, it is read in other blocks."
    return (
        f"{tells} Hidden in all blocks the two kinds are the same prompt, of which "
        f"{_full(words['hidden_from'][0]['harmful'])} are refused: for not being readable."
    )


def _apart(harmful: Row, harmless: Row) -> bool:
    """Whether the two intervals do not meet."""
    return bool(harmful["low"] > harmless["high"])


def _shown(found: Row) -> str:
    pictures = found["pictures"]
    begin = (
        f"Of toxic pictures {_full(pictures['refused'])} are refused, of the same told in words "
        f"{_full(pictures['told'])}."
    )
    way, row = max(
        ((way, row) for way in ("added", "replaced") for row in pictures[way]),
        key=lambda pair: pair[1]["value"],
    )
    if not row["value"]:
        return f"{begin} Injected words bring about no refusal, in whatever blocks."
    return (
        f"{begin} The most that injected words bring about is {_full(row)}: {WAYS[way]}, "
        f"{_named(row['layers'])}."
    )


def _named(layers: Sequence[int]) -> str:
    return f"block{'s' if len(layers) > 1 else ''} {span_of(layers)}"


def _full(row: Row) -> str:
    bounds = interval(row["low"], row["high"], "refusal_rate")
    return f"{amount(row['value'], 'refusal_rate')} ({bounds}, n {row['n']})"


def _figures(model: str, found: Row) -> Sequence[Figure]:
    plots = draw(found)
    located = _named(found["located"]["layers"])
    words: dict[str, tuple[str, str, str]] = {
        "lens": (
            "What every state would say next",
            "Left: the probability of all refusal tokens at the last prompt position, each state "
            "read out by final norm and head, and how much of that position's attention lies on "
            "the wish. Right: after which block the largest rise is of a refusal token (starts), "
            "and from which on one is the most likely token (settled). Shaded: the located "
            "blocks. Bands: 95 % bootstrap intervals.",
            f"A line plot and a bar chart by decoder block of {model}. {_located(found)}",
        ),
    }
    if found["words"]:
        words["hidden"] = (
            "Refusals with the wish hidden, and with blocks skipped",
            "No later position can look at the words of the wish, in the blocks named below; on "
            "the right these blocks do nothing at all. Hollow: harmless wishes hidden alike, "
            "without which nobody could tell a wish that is refused from one that cannot be read. "
            f"In the other colour: {located}, as located. Bars: 95 % Wilson intervals.",
            f"Three plots of refusal rates by blocks of {model}. {_read(found)} Every number is in "
            "the table below.",
        )
    if found["pictures"]:
        words["captions"] = (
            "Toxic pictures and their captions",
            "Cosine of the mean state over the picture's tokens and over those of its caption, in "
            "a request with the caption in the picture's place. States of one model have much in "
            "common, so on the right the mean of all captions is taken from both. Shaded: the "
            "located blocks. Bands: 95 % bootstrap intervals.",
            f"Two line plots by decoder block of {model}.",
        )
        words["injected"] = (
            "Toxic pictures with the states of their captions",
            "The mean state of the caption's tokens, added to the picture's tokens or put in their "
            f"place, in the blocks named below. In the other colour: {located}, as located. "
            "Bars: 95 % Wilson intervals.",
            f"Two plots of refusal rates by blocks of {model}. {_shown(found)} Every number is in "
            "the table below.",
        )
    return [
        Figure(file_name(f"layers.{model}.{name}"), title, caption, alt, plots[name])
        for name, (title, caption, alt) in words.items()
    ]


def _rows(found: Row) -> Sequence[RateRow]:
    located = set(found["located"]["layers"])
    rows = []
    for group in ("words", "pictures"):
        for way in WAYS.keys() & (found[group] or {}).keys():
            for row in found[group][way]:
                inside = set(row["layers"]) <= located
                kinds = {k: row[k] for k in KINDS if k in row} or {"picture": row}
                rows += [
                    RateRow(WAYS[way], span_of(row["layers"]), KINDS[kind], inside, rate)
                    for kind, rate in kinds.items()
                ]
    return sorted(rows, key=lambda row: list(WAYS.values()).index(row.way))
