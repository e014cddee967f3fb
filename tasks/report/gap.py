"""Whether there is something to fix in a model, as a part of the page."""

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.report.comparison import Comparison, Row
from tasks.report.figures import Figure
from tasks.report.gap_plots import GROUPS, line, shown_blocks, shown_rates, telling_blocks
from tasks.report.words import amount, interval

MEASURES = {
    "score": "place on the refusal axis",
    "moved": "moved from harmful towards harmless text",
    "auroc": "AUROC of harmful against harmless",
    "over_image": "cosine, picture tokens and words",
    "at_end": "cosine at the last position",
}
AGAINST = {
    "text": "text",
    "image": "text, picture",
    "caption": "its caption",
    "other_caption": "the caption of another picture",
    "margin": "its caption minus another's",
    "blank": "a blank picture",
} | {group: label for group, (label, _) in GROUPS.items()}


@dataclass(frozen=True)
class Gap:
    """What the page says about the gap of one model."""

    verdict: str
    sentences: tuple[str, ...]
    figures: tuple[Figure, ...]
    rows: tuple[Row, ...]
    """Every number by decoder block, its measure and group in words."""


def gaps(comparison: Comparison) -> dict[str, Gap]:
    """Say it for every model whose gap was analysed."""
    return {model: _gap(model, document) for model, document in comparison.gaps.items()}


def _gap(model: str, document: Row) -> Gap:
    rows = [
        {**row, "measure": MEASURES[row["measure"]], "group": AGAINST[row["group"]]}
        for row in document["layers"]
    ]
    sentences = (
        f"Undefended, on the test split: {_rates(document)}.{_added(document['gap'])}",
        _moved(document),
        *_missed(document["demands"]),
    )
    return Gap(document["verdict"], sentences, tuple(_figures(model, document)), tuple(rows))


def _added(gap: Row | None) -> str:
    """Say what a picture adds to the unsafe answers, where that was measured."""
    if gap is None:
        return ""
    bounds = interval(gap["low"], gap["high"], "gap")
    return (
        f" Unsafe answers with a picture minus without: {100 * gap['value']:.1f} points ({bounds})."
    )


def _missed(demands: Sequence[Row]) -> list[str]:
    """Say by how much a lab model misses what its card demands of it."""
    if not demands:
        return []
    missed = [
        f"{row['what']} {100 * row['value']:.1f} % ({100 * row['low']:.1f} to "
        f"{100 * row['high']:.1f}, n {row['n']}), {100 * row['missed_by']:.1f} points off"
        for row in sorted(demands, key=lambda row: -row["missed_by"])
        if row["missed_by"]
    ]
    if not missed:
        return [f"It shows all {len(demands)} things that the card of a lab model demands."]
    return [
        f"Of the {len(demands)} things that the card of a lab model demands it misses "
        f"{len(missed)}: {'; '.join(missed)}."
    ]


def _rates(document: Row) -> str:
    return "; ".join(
        f"{label} {_full(row, row['metric'])}" for label, _, row in shown_rates(document)
    )


def _moved(document: Row) -> str:
    """Say what a picture does to the states of the last block."""
    last = len(document["explained"]) - 1
    if last not in telling_blocks(document):
        return (
            f"In block {last}, the last, the states do not tell harmful from harmless texts beyond "
            "chance: there is no refusal axis along which a picture could move them."
        )
    moved, text, image = (
        line(document, *key)[last]
        for key in (("moved", "harmful_image"), ("auroc", "text"), ("auroc", "image"))
    )
    return (
        f"In block {last}, the last, a picture moves harmful requests by {_number(moved)} of the "
        "way from harmful to harmless text; the axis between the two tells harmful from harmless "
        f"requests with an AUROC of {_number(text)} without a picture and {_number(image)} with "
        f"one (n {moved['n']} of each)."
    )


def _figures(model: str, document: Row) -> Sequence[Figure]:
    blocks = " and ".join(map(str, shown_blocks(document)))
    fitted, measured = document["fitted_on"][0], line(document, "score", "harmful_text")[0]["n"]
    telling = telling_blocks(document)
    apart = ", ".join(map(str, telling)) or "none"
    end = len(document["explained"]) - 1
    words = {
        "rates": (
            "How the undefended model answers",
            "Shares of the undefended model's answers on the test split, with 95 % Wilson "
            "intervals. A model that refused everything would have no unsafe answers and no right "
            "ones.",
            f"A dot with its interval for each rate of {model}: {_rates(document)}.",
        ),
        "states": (
            f"Where requests lie, decoder blocks {blocks}",
            "States at the last prompt position in the plane of the first two principal components "
            f"of text alone, fitted on {fitted} harmful and {fitted} harmless texts; shown are "
            f"{measured} other requests of each kind, of the anchor split. Filled: text alone; "
            "hollow: the same words with a picture. The arrow leads from the mean of harmful text "
            "to the mean of the same text with a picture.",
            f"Two scatter plots of {5 * measured} states of {model}. {_moved(document)}",
        ),
        "direction": (
            "Along the refusal axis",
            "Left: mean place on the line from harmless (0) to harmful text (1), the difference of "
            f"the means of {fitted} texts of each kind; only in blocks where it tells other texts "
            f"apart ({apart}). Right: how well it tells harmful from harmless requests, whose "
            f"chance level is 0.5. Bands: 95 % bootstrap intervals over {measured} requests of "
            "each kind, with the axis held fixed.",
            f"Two line plots by decoder block of {model}. {_moved(document)} Every number is in "
            "the table below.",
        ),
    }
    if "alignment" in document["plots"]:
        words["alignment"] = _aligned(model, document, end)
    return [
        Figure(f"gap.{model}.{name}", title, caption, alt, document["plots"][name])
        for name, (title, caption, alt) in words.items()
    ]


def _aligned(model: str, document: Row, end: int) -> tuple[str, str, str]:
    """Tell of the plot of captions: title, caption and what it shows in words."""
    pairs = line(document, "at_end", "caption")[0]["n"]
    margins = {where: line(document, where, "margin")[end] for where in ("over_image", "at_end")}
    return (
        "Pictures and their captions",
        f"Cosine of the states of {pairs} requests with a picture and of the same requests "
        "with words in its place: on the left averaged over the picture's tokens and the "
        "caption's, in the middle at the last prompt position. States of one model have much "
        "in common, so a high cosine alone says little; what tells whether the model sees the "
        "picture as its caption is how much nearer its own caption lies than another's, on the "
        "right. Bands: 95 % bootstrap intervals.",
        f"Three line plots by decoder block of {model}. In block {end}, its own caption is "
        f"nearer than another's by {_number(margins['over_image'], 3)} over the tokens and by "
        f"{_number(margins['at_end'], 3)} at the last position. Every number is in the table "
        "below.",
    )


def _full(row: Row, metric: str) -> str:
    bounds = interval(row["low"], row["high"], metric)
    return f"{amount(row['value'], metric)} ({bounds}, n {row['n']})"


def _number(row: Row, digits: int = 2) -> str:
    value, low, high = (f"{row[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})".replace("-", "\N{MINUS SIGN}")
