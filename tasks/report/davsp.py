"""What a trained frame is, what it does to requests, and what it does elsewhere."""

from base64 import b64decode
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hauberk import UNDEFENDED
from tasks.params import DAVSP, PROMPT_PARTS, TRANSFERRED
from tasks.report.comparison import Cell, Comparison, Row
from tasks.report.davsp_plots import plot_shifted, plot_training
from tasks.report.figures import Figure, file_name

PARTS = {
    UNDEFENDED: "",
    DAVSP: "frame and prefix",
    "davsp_border_only": "the frame alone",
    "davsp_prefix_only": "the prefix alone",
    "guardalign+davsp": "GuardAlign's mask, then frame and prefix",
    "davsp+cmrm": "frame and prefix, then CMRM's shift",
}
"""The rows of the table of parts, and what each of them is; frames of other models follow."""
ATTACKS = ("text_image", "text_blank", "image", "sd_typo")
COSTS = (
    ("benign_image", "accuracy"),
    ("image_twin", "accuracy"),
    ("lookalike", "accuracy"),
    ("lookalike", "over_refusal"),
)
"""What harmless requests pay, beside the unsafe answers of :data:`ATTACKS`."""
SCALES = {
    "span": "0 is the mean of the harmless requests that the vector was fitted on, 1 that of the "
    "harmful ones.",
    "raw": "Scores are lengths along the vector, in units of this model's states.",
}
"""What the scores of a vector mean."""


@dataclass(frozen=True)
class Prompted:
    """The frame of one model."""

    said: str
    frame: bytes
    example: bytes
    figures: tuple[Figure, Figure]
    attacked: tuple[tuple[int, tuple[Cell | None, Cell | None]], ...]
    """By radius: unsafe answers to attacked pictures, undefended and in the frame."""


@dataclass(frozen=True)
class PromptRow:
    """One part of DAVSP, or a frame of another model, on one model."""

    defense: str
    what: str
    unsafe: tuple[Cell | None, ...]
    """In the order of the attacks."""
    costs: tuple[Cell | None, ...]
    """In the order of the costs."""


def prompted(comparison: Comparison) -> dict[str, Prompted]:
    """Say it of every model that has a frame."""
    return {model: _prompted(model, found) for model, found in comparison.frames.items()}


def columns(comparison: Comparison) -> tuple[list[str], list[tuple[str, str]]]:
    """What the table of parts shows: the suites of attacks, and what harmless requests pay."""
    return comparison.columns(ATTACKS, COSTS, PROMPT_PARTS)


def prompt_parts(comparison: Comparison) -> dict[str, list[PromptRow]]:
    """Return the rows of every model that has DAVSP or a part of it."""
    found = {}
    for model in (name for name in comparison.models if name not in comparison.served):
        known = comparison.defenses(model, parts=True)
        named = PARTS | {
            name: f"the frame and prefix of {name.removeprefix(TRANSFERRED)}"
            for name in known
            if name.startswith(TRANSFERRED)
        }
        rows = [
            _row(comparison, model, name, what) for name, what in named.items() if name in known
        ]
        if any(row.defense != UNDEFENDED for row in rows):
            found[model] = rows
    return found


def transfer(comparison: Comparison) -> list[tuple[str, list[tuple[Cell | None, ...]]]]:
    """Where each frame was trained -> what it does on each model, in the order of the models.

    The diagonal is what a frame does on its own model, on all of its test samples; the last row is
    no frame.
    """
    if not any(name.startswith(TRANSFERRED) for m in comparison.models
               for name in comparison.defenses(m, parts=True)):  # fmt: skip
        return []
    tried = {name for model in comparison.models for name in comparison.defenses(model, parts=True)}
    joint = sorted(
        n.removeprefix(TRANSFERRED) for n in tried if "+" in n and n.startswith(TRANSFERRED)
    )
    here = [model for model in comparison.models if model not in comparison.served]
    sources = [*here, *joint, UNDEFENDED]
    return [
        (source, [_transferred(comparison, source, target) for target in comparison.models])
        for source in sources
    ]


def _transferred(comparison: Comparison, source: str, target: str) -> tuple[Cell | None, ...]:
    if source == UNDEFENDED:
        defense = UNDEFENDED
    else:
        defense = DAVSP if source == target else f"{TRANSFERRED}{source}"
    unsafe = comparison.cell(target, defense, comparison.deciding.attack, "unsafe_rate")
    tried = {  # all of a column are of one suite
        row["suite"]
        for row in comparison.metrics
        if row["model"] == target and row["defense"].startswith(TRANSFERRED)
    }
    return unsafe, comparison.utility(target, defense, tried or None)


def _row(comparison: Comparison, model: str, defense: str, what: str) -> PromptRow:
    def cells(pairs: Sequence[tuple[str, str]]) -> tuple[Cell | None, ...]:
        return tuple(comparison.cell(model, defense, *pair) for pair in pairs)

    attacks, costs = columns(comparison)
    unsafe = cells([(suite, "unsafe_rate") for suite in attacks])
    return PromptRow(defense, what, unsafe, cells(costs))


def _prompted(model: str, found: Row) -> Prompted:
    goal, history = found["goal"], found["history"]
    last = found["validated"][-1]["step"]
    after = {kind: sorted(values["after"]) for kind, values in found["scores"].items()}
    reached = {
        "harmful": _share(after["harmful"], lambda score: score >= goal["high"]),
        "harmless": _share(after["harmless"], lambda score: score <= goal["low"]),
    }
    ends = (
        f"{reached['harmful']} of the harmful requests score {goal['high']:.2f} or more with the "
        f"frame, {reached['harmless']} of the harmless ones {goal['low']:.2f} or less."
    )
    spared = sum(row["backward"] == 0 for row in history)
    curve = Figure(
        file_name(f"davsp.{model}.training"),
        "How the frame was trained",
        "Left: parts of the loss, without their weights, as means of neighbouring steps. Right: "
        f"frames that were validated on the calibration split. Rule: {found['rule']}",
        f"Two line plots of the training of a frame on {model}: parts of the loss by step, and "
        f"merit by step. Kept was the frame of step {found['step']} of {last}.",
        plot_training(found),
    )
    scores = Figure(
        file_name(f"davsp.{model}.scores"),
        "What the frame does to the scores of requests",
        f"Requests that it was trained on. {SCALES[goal['score']]} Lines are the two thresholds. "
        f"{ends}",
        f"Two pairs of histograms of scores on {model}, with an untrained and with the trained "
        f"frame. {ends}",
        plot_shifted(found),
    )
    skipped = f" In {spared} of {len(history)} steps nothing was left to gain." if spared else ""
    kept = (
        f"The frame of step {found['step']} of {last} was kept."
        if found["step"]
        else f"No frame of {last} steps was better than the untrained one, which was kept."
    )
    said = kept + skipped
    return Prompted(
        said,
        b64decode(found["frame"]),
        b64decode(found["example"]),
        (curve, scores),
        _attacked(found["attacked"]),
    )


def _attacked(rows: Sequence[Row]) -> tuple[tuple[int, tuple[Cell | None, Cell | None]], ...]:
    cells = {
        (row["epsilon"], row["defense"]): Cell(
            row["suite"], row["metric"], row["value"], row["n"], row["low"], row["high"]
        )
        for row in rows
    }
    radii = sorted({radius for radius, _ in cells})
    return tuple((r, (cells.get((r, UNDEFENDED)), cells.get((r, DAVSP)))) for r in radii)


def _share(values: Sequence[float], holds: Callable[[float], bool]) -> str:
    return f"{sum(map(holds, values))} of {len(values)}"
