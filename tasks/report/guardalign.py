"""What GuardAlign sees in pictures, what a model sees of its prefix, and what its parts do."""

from base64 import b64decode
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hauberk import UNDEFENDED
from tasks.params import GUARDALIGN
from tasks.report.channels import suite_order
from tasks.report.comparison import Cell, Comparison, Row, number
from tasks.report.effects import REST
from tasks.report.figures import Figure, file_name, setting
from tasks.report.guardalign_plots import (
    CROSS,
    LABELS,
    READABLE,
    plot_attention,
    plot_example,
    plot_scale,
    plot_scores,
    span_of,
    written,
)
from tasks.report.words import amount, full, interval

RANKED = {
    "auroc": "ours",
    "auroc_max_cosine": "largest cosine with an unsafe concept",
    "auroc_entropy": "entropy over the unsafe concepts",
    "auroc_as_printed": "transport as the paper prints it",
}
"""What scores patches, in the order of the table."""
MASKED = {
    "Harm masked": ("harm_masked",),
    "Patches masked": ("masked_patches",),
    "Harmless patches masked": ("masked_benign_patches", "masked_beside"),
    "Pictures without anything toxic, touched": ("touched_benign_pictures",),
    "Harmless requests touched, whatever they show": ("touched_harmless_requests",),
}
"""Column -> the metrics that stand in it, of which a suite has one."""
READINGS = {
    "ours": "ours",
    "patches_alone": "patches alone",
    "balanced": "concepts balanced",
    "as_printed": "as printed",
}
"""Readings of the transport that a sweep of grids compares, and how its table calls them."""
SWEPT = {"auroc": "Toxic patches ranked first (AUROC)", "harm_masked": "Harm masked"}
"""What it measures of each."""
ALL_HARMLESS = "all_harmless"
"""As :mod:`hauberk.evaluation.detection` calls it, which needs torch; a test compares the two."""
PARTS = {
    UNDEFENDED: "",
    GUARDALIGN: "masking and prefix",
    "transport_only": "masking alone",
    "prefix_only": "the prefix alone where the whole puts it, attention as it is",
    "prefix_calibrated": "the prefix alone where the whole puts it, attention calibrated",
    "guardalign_literal": "the equations as printed, prefix for all, our patches and share",
    "all_masked": "every picture painted over: no masking hides more",
}
"""The rows of the table of parts, and what each of them is; the last two are no parts."""
ATTACKS = ("image", "image_clutter", "sd_typo", "typographic", "text_image")
COSTS = (
    ("benign_image", "accuracy"),
    ("image_twin", "accuracy"),
    ("lookalike", "accuracy"),
    ("lookalike", "over_refusal"),
)
"""What harmless requests pay, beside the unsafe answers of :data:`ATTACKS`."""


@dataclass(frozen=True)
class Example:
    """One picture, with the scores of its patches and as it is masked."""

    suite: str
    said: str
    picture: bytes
    masked: bytes
    heat: Figure


@dataclass(frozen=True)
class Seen:
    """What one CLIP finds in pictures."""

    sentences: tuple[str, ...]
    ranked: tuple[tuple[str, Cell], ...]
    """What scores patches, and how well."""
    masked: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    """Suite, and its cells in the order of :data:`MASKED`."""
    swept: tuple[tuple[int, tuple[Cell | None, ...]], ...]
    """Patches along a side, and the cells of every reading, measure after measure of
    :data:`SWEPT`."""
    scores: Figure
    scale: Figure
    examples: tuple[Example, ...]

    @property
    def figures(self) -> tuple[Figure, ...]:
        """All that is drawn."""
        return (self.scores, self.scale, *(example.heat for example in self.examples))


@dataclass(frozen=True)
class Attended:
    """How much one model looks at the prefix."""

    figure: Figure
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class PartRow:
    """One part of GuardAlign on one model."""

    defense: str
    what: str
    unsafe: tuple[tuple[Cell | None, Cell | None], ...]
    """In the order of the attacks, with the answers beside the point where they are many."""
    costs: tuple[Cell | None, ...]
    """In the order of the costs."""


def seen(comparison: Comparison) -> dict[str, Seen]:
    """Say it of every CLIP that was measured."""
    return {clip: _seen(clip, found) for clip, found in comparison.detection.items()}


def attended(comparison: Comparison) -> dict[str, Attended]:
    """Say it of every model whose prefix was chosen by a sweep."""
    return {
        model: _attended(model, sweep)
        for (model, _), sweep in comparison.sweeps.items()
        if sweep.get("shares")
    }


def columns(comparison: Comparison) -> tuple[list[str], list[tuple[str, str]]]:
    """What the table of parts shows: the suites of attacks, and what harmless requests pay."""
    return comparison.columns(ATTACKS, COSTS, PARTS.keys() - {UNDEFENDED, GUARDALIGN})


def parts(comparison: Comparison) -> dict[str, list[PartRow]]:
    """Return the rows of every model that has GuardAlign or a part of it."""
    found = {}
    for model in comparison.models:
        known = comparison.defenses(model, parts=True)
        rows = [_part(comparison, model, name) for name in PARTS if name in known]
        if any(row.defense != UNDEFENDED for row in rows):
            found[model] = rows
    return found


def _part(comparison: Comparison, model: str, defense: str) -> PartRow:
    def cell(suite: str, metric: str) -> Cell | None:
        return comparison.cell(model, defense, suite, metric)

    attacks, costs = columns(comparison)
    beside = (cell(suite, "evasion_rate") for suite in attacks)
    unsafe = zip((cell(suite, "unsafe_rate") for suite in attacks), map(_many, beside), strict=True)
    return PartRow(defense, PARTS[defense], tuple(unsafe), tuple(cell(*each) for each in costs))


def _many(cell: Cell | None) -> Cell | None:
    return cell if cell and cell.value is not None and cell.value > REST else None


def _seen(clip: str, found: Row) -> Seen:
    cells = {(row["suite"], row["metric"]): _cell(row) for row in found["rows"]}
    suites = sorted({suite for suite, _ in cells}, key=suite_order)
    ranks = {metric: cell for (_, metric), cell in cells.items() if metric in RANKED}
    masked = [
        (suite, tuple(_first(cells, suite, metrics) for metrics in MASKED.values()))
        for suite in suites
    ]
    span = span_of(found)
    return Seen(
        sentences=tuple(_sentences(ranks, masked)),
        ranked=tuple((name, ranks[metric]) for metric, name in RANKED.items() if metric in ranks),
        masked=tuple((suite, row) for suite, row in masked if any(row)),
        swept=tuple(_swept(found["grids"])),
        scores=_scores(clip, found),
        scale=_scale(clip, found, span),
        examples=tuple(
            _example(clip, place, row, found, span)
            for place, row in enumerate(found["examples"], 1)
        ),
    )


def _cell(row: Row) -> Cell:
    value, low, high = (number(row[name]) for name in ("value", "low", "high"))
    return Cell(row["suite"], row["metric"], value, row["n"], low, high)


def _swept(rows: Sequence[Row]) -> Iterator[tuple[int, tuple[Cell | None, ...]]]:
    known = {(row["grid"], row["reading"]): row for row in rows}
    for grid in sorted({row["grid"] for row in rows}):
        cells = (
            _cell({"suite": reading, "metric": metric, **known[grid, reading][metric]})
            if (grid, reading) in known
            else None
            for metric in SWEPT
            for reading in READINGS
        )
        yield grid, tuple(cells)


def _first(cells: dict[tuple[str, str], Cell], suite: str, metrics: Iterable[str]) -> Cell | None:
    return next((cells[suite, name] for name in metrics if (suite, name) in cells), None)


def _sentences(
    ranks: dict[str, Cell], masked: Sequence[tuple[str, tuple[Cell | None, ...]]]
) -> Iterable[str]:
    """Say how well patches are told apart, and what masking them does at best and at worst."""
    if ours := ranks.get("auroc"):
        yield (
            f"On {ours.suite}, toxic patches are told from harmless ones with an AUROC of "
            f"{full(ours)}."
        )
    hidden = [cell for _, (cell, *_) in masked if cell and cell.value is not None]
    if hidden:
        best, worst = (pick(hidden, key=lambda cell: cell.value) for pick in (max, min))
        yield (
            f"All that is toxic is masked at best in {full(best)} of the pictures of {best.suite}, "
            f"at worst in {full(worst)} of those of {worst.suite}."
        )
    if clean := [cell for _, (*_, cell, _) in masked if cell]:
        yield f"Of pictures without anything toxic, {full(clean[0])} lose a patch."
    asked = {cell.suite: cell for _, (*_, cell) in masked if cell and cell.value is not None}
    if whole := asked.pop(ALL_HARMLESS, None):
        parts = sorted(asked.values(), key=lambda cell: -(cell.value or 0))
        yield (
            "A CLIP sees no question, so what is toxic is masked in harmless requests as well: of "
            f"these, whatever they show, {full(whole)} lose a patch, suite by suite "
            f"{'; '.join(f'{cell.suite} {full(cell)}' for cell in parts)}."
        )


def _scores(clip: str, found: Row) -> Figure:
    threshold = found["threshold"]
    lost = {
        kind: f"{sum(score <= threshold for score in scores)} of {len(scores)}"
        for kind, scores in found["scores"].items()
    }
    said = (
        f"Up to the threshold of {written(threshold)} lie {lost['toxic']} toxic and "
        f"{lost['benign']} harmless patches."
    )
    return Figure(
        file_name(f"guardalign.{clip}.scores"),
        "Scores of toxic and of harmless patches",
        f"Toxic patches of cluttered pictures, and harmless patches of pictures of harmless "
        f"requests. {said} The threshold was set on other pictures, of the calibration pool.",
        f"Two histograms of the scores that {clip} gives to patches. {said}",
        plot_scores(found),
    )


def _scale(clip: str, found: Row, span: float) -> Figure:
    threshold = found["threshold"]
    toxic, part = f"“{LABELS[1]}”", f"; with “{LABELS[-1]}”, too little to say"
    if found["grid"] > READABLE:
        toxic, part = CROSS, ""
    low, middle, high = map(written, (threshold - span, threshold, threshold + span))
    return Figure(
        file_name(f"guardalign.{clip}.scale"),
        "The colours of the scores",
        "Orange is up to the threshold, and so unsafe; blue is above it. A frame is round what is "
        f"masked. A patch with {toxic} holds so much of a toxic thing or word that it should be "
        f"masked{part}.",
        f"A scale of colours from {low}, dark orange, most unsafe, over the threshold {middle} to "
        f"{high}, blue, least.",
        plot_scale(threshold, span),
    )


def _example(clip: str, place: int, row: Row, found: Row, span: float) -> Example:
    grid, scores, labels = found["grid"], row["scores"], row["labels"]
    hit = [hidden for label, hidden in zip(labels, row["hidden"], strict=True) if label == 1]
    toxic = f"{sum(hit)} of {len(hit)} toxic" if hit else "none is toxic"
    said = f"masked: {sum(row['hidden'])} of {len(scores)} patches, {toxic}"
    picture = b64decode(row["picture"])
    heat = Figure(
        file_name(f"guardalign.{clip}.example-{place}"),
        "Scores",
        said,
        f"Scores of its {grid} by {grid} patches, row by row: {_by_row(scores, labels, grid)}; "
        f"{said}.",
        plot_example({**row, "picture": picture}, grid, found["threshold"], span),
    )
    return Example(row["suite"], said, picture, b64decode(row["masked"]), heat)


def _by_row(scores: Sequence[float], labels: Sequence[int], grid: int) -> str:
    """Write scores row by row, or only their ends where they are too many to listen to."""
    if grid > READABLE:
        return f"from {written(min(scores))} to {written(max(scores))}"
    patches = [
        written(score) + (f" ({LABELS[label]})" if LABELS[label] else "")
        for score, label in zip(scores, labels, strict=True)
    ]
    rows = (patches[start : start + grid] for start in range(0, len(patches), grid))
    return "; ".join(map(", ".join, rows))


def _attended(model: str, sweep: Row) -> Attended:
    rows = tuple(sweep["shares"])
    chosen = setting(next(row for row in sweep["rows"] if row["chosen"]))
    known = [row for row in rows if None not in (row["plain"], row["calibrated"])]
    most = max(known, key=_moved, default=None)
    said = "No block has causal self-attention." if most is None else (
        f"Calibration changes most in block {most['layer']}: from {_share(most['plain'])} to "
        f"{_share(most['calibrated'])}; n {most['plain']['n']}."
    )  # fmt: skip
    figure = Figure(
        file_name(f"guardalign.{model}.attention"),
        "How much of the attention lies on the prefix",
        f"The prefix that was chosen: {chosen}. Of what stands behind it, in the question and in "
        "the answer, the mean share of the attention, over heads and over requests of the "
        "calibration split that get the prefix, their pictures masked as the model sees them; the "
        "same answers are read both times. Bars and brackets: 95 % intervals (Student's t, over "
        f"requests). {said}",
        f"Two lines by decoder block of {model}, without and with calibration. {said} Every number "
        "is in the table below.",
        plot_attention(rows),
    )
    return Attended(figure, rows)


def _moved(row: Row) -> float:
    return abs(row["calibrated"]["value"] - row["plain"]["value"])


def _share(found: Row) -> str:
    bounds = interval(found["low"], found["high"], "share")
    return f"{amount(found['value'], 'share')} ({bounds})"
