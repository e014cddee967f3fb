"""What TGA trained, how much of what words reach it reaches, and what explains it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hauberk import UNDEFENDED
from tasks.params import TGA, TRAINED_BESIDE
from tasks.report.comparison import Cell, Comparison, Row, number
from tasks.report.figures import Figure, file_name
from tasks.report.tga_plots import plot_cosines, plot_training
from tasks.report.words import listed

ATTACKS = ("text_image", "image", "sd_typo")
COSTS = (
    ("benign_image", "accuracy"),
    ("captions", "accuracy"),
    ("image_twin", "accuracy"),
    ("lookalike", "over_refusal"),
)
"""What harmless requests pay, beside the unsafe answers of :data:`ATTACKS`."""
SHOWN, CEILING = "image", "image_told"
"""A suite of toxic pictures, and the same told in words: what it refuses of these is the most that
aligning pictures with their captions can bring about."""
EVERY = "all"
"""Names the row of all scenarios together."""
RETRIEVED = "_retrieved"
"""Ends the name of a part that is asked with a retrieved text in the prompt."""
FORMS = {
    "kl": "what is said next (divergence)",
    "exp": "states (exp of the cosine)",
    "log": "states (log of the cosine)",
}
LAYERS = {
    "last": "after the last block",
    "located": "in the located blocks",
    "authors": "in the authors' blocks",
}
POSITIONS = {
    "decision": "at the end of the prompt",
    "question": "over the question",
    "image": "over the image's positions",
}


@dataclass(frozen=True)
class RefusalRow:
    """How much of one scenario is refused."""

    scenario: str
    undefended: Cell | None
    defended: Cell | None
    ceiling: Cell | None
    """Undefended, told in words."""

    @property
    def share(self) -> float | None:
        """What the defended one refuses, as a share of the ceiling; None where that is nothing."""
        reached = self.defended.value if self.defended else None
        most = self.ceiling.value if self.ceiling else None
        return reached / most if most and reached is not None else None


@dataclass(frozen=True)
class TrainedRow:
    """TGA, or a training beside it."""

    defense: str
    what: str
    unsafe: tuple[tuple[Cell | None, Cell | None], ...]
    """In the order of the attacks: unsafe answers, and refusals."""
    costs: tuple[Cell | None, ...]
    """In the order of the costs."""


@dataclass(frozen=True)
class Aligned:
    """What the page says of one model."""

    said: str
    figures: tuple[Figure, ...]
    refusals: tuple[RefusalRow, ...]
    """All scenarios together, then one by one; nothing where a suite was not measured."""
    rows: tuple[TrainedRow, ...]


def columns(comparison: Comparison) -> tuple[list[str], list[tuple[str, str]]]:
    """What the table of trainings shows: the suites of attacks, and what harmless requests pay."""
    names = {row["defense"] for row in comparison.metrics}
    beside = {name for name in names if name.startswith(TRAINED_BESIDE)}
    return comparison.columns(ATTACKS, COSTS, beside or {TGA})


def aligned(comparison: Comparison) -> dict[str, Aligned]:
    """Say it of every model whose weights were trained."""
    return {
        model: Aligned(
            " ".join(filter(None, (_kept(found), _trained(found)))),
            tuple(_figures(model, found, comparison.layers.get(model))),
            tuple(_refusals(comparison, model)),
            tuple(_rows(comparison, model, found)),
        )
        for model, found in comparison.projectors.items()
    }


TRAINED = {
    "projector": "Trained was what connects picture and text alone.",
    "lora": "Trained were what connects picture and text, and low-rank changes of the decoder.",
    "decoder": "Trained were what connects picture and text, and the whole decoder.",
}
"""Which weights each mode changes."""


def _trained(found: Row) -> str:
    return TRAINED.get(found.get("training", {}).get("mode"), "")


def _kept(found: Row) -> str:
    last, merits = found["validated"][-1]["step"], _merits(found)
    if not found["step"]:
        return f"No weights of {last} steps were better than the model's own, which were kept."
    said = f"The weights of step {found['step']} of {last} were kept"
    if 0 not in merits:
        return f"{said}."
    before, after = merits[0], merits[found["step"]]
    said += f": their merit on the calibration split is {after:.2f}, {before:.2f} untrained."
    deployed = number(found.get("deployed_merit"))
    if not _share(found) or deployed is None:
        return said
    return f"{said} {_share(found)} of their change is made, with a merit of {deployed:.2f}."


def _share(found: Row) -> str:
    """How much of the change is made, in percent; nothing where that is all of it, or not told."""
    share = number(found.get("share"))
    return "" if share is None or share == 1 else f"{100 * share:.0f} %"


def _merits(found: Row) -> Mapping[int, float]:
    return {row["step"]: row["merit"] for row in found["validated"]}


def _figures(model: str, found: Row, located: Row | None) -> list[Figure]:
    drawn = [
        Figure(
            file_name(f"tga.{model}.training"),
            "How the weights were trained",
            "Parts of the loss, without their weights, as means of neighbouring steps; and "
            f"weights that were validated on the calibration split. Rule: {found['rule']}",
            f"Line plots of the training on {model}: parts of the loss by step, and merit by "
            f"step. {_kept(found)}",
            plot_training(found),
        )
    ]
    if rows := found.get("cosines"):
        layers = _layers(found, located)
        shaded = " Shaded: the blocks that were aligned." if layers else ""
        drawn.append(
            Figure(
                file_name(f"tga.{model}.cosines"),
                "How near pictures lie to their captions",
                "Mean cosine over training pictures, by decoder block. Left: mean state of the "
                "image's positions, and of the caption's in its place, as the paper measures it. "
                "Right: the last position of the prompt, where the answer is decided, with the "
                f"picture and with its caption.{shaded}",
                f"Two line plots of cosines by decoder block of {model}. After the last block "
                + listed(
                    f"{rows[-1][f'{position}_before']:.2f} before and "
                    f"{rows[-1][f'{position}_after']:.2f} after {POSITIONS[position]}"
                    for position in ("image", "decision")
                )
                + ".",
                plot_cosines(rows, layers),
            )
        )
    return drawn


def _layers(found: Row, located: Row | None) -> Sequence[int]:
    """Return the aligned blocks, or none where there are none or the rows do not tell them."""
    told = found.get("alignment", {})
    layers = told.get("layers")
    if _off(told) or layers is None:
        return ()
    if layers == "last":
        return (found["cosines"][-1]["layer"],)
    if layers == "located":
        return tuple(located["located"]["layers"]) if located else ()
    return () if isinstance(layers, str) else tuple(layers)


def _refusals(comparison: Comparison, model: str) -> list[RefusalRow]:
    groups = {
        key: [
            row
            for row in comparison.responses
            if (row["model"], row["defense"], row["suite"]) == (model, *key)
        ]
        for key in ((UNDEFENDED, SHOWN), (TGA, SHOWN), (UNDEFENDED, CEILING))
    }
    if not all(groups.values()):
        return []
    scenarios = {row["scenario"] for rows in groups.values() for row in rows if row.get("scenario")}
    return [
        RefusalRow(name or EVERY, *(_refused(rows, name) for rows in groups.values()))
        for name in (None, *sorted(scenarios))
    ]


def _refused(rows: Sequence[Row], scenario: str | None) -> Cell | None:
    from hauberk.evaluation.statistics import proportion

    flags = [row["outcome"] == "refused" for row in rows if scenario in (None, row.get("scenario"))]
    if not flags:
        return None
    found = proportion(flags)
    return Cell(
        rows[0]["suite"], "refusal_rate", found.value, found.n, low=found.low, high=found.high
    )


def _rows(comparison: Comparison, model: str, found: Row) -> list[TrainedRow]:
    known = comparison.defenses(model, parts=True)
    beside = [name for name in known if name.startswith(TRAINED_BESIDE)]
    names = [name for name in (UNDEFENDED, TGA, *beside) if name in known]
    if names == [UNDEFENDED]:
        return []
    return [_row(comparison, model, name, _what(name, found)) for name in names]


def _row(comparison: Comparison, model: str, defense: str, what: str) -> TrainedRow:
    attacks, costs = columns(comparison)
    return TrainedRow(
        defense,
        what,
        tuple(
            (
                comparison.cell(model, defense, suite, "unsafe_rate"),
                comparison.cell(model, defense, suite, "refusal_rate"),
            )
            for suite in attacks
        ),
        tuple(comparison.cell(model, defense, *each) for each in costs),
    )


def _what(defense: str, found: Row) -> str:
    """Say in a few words how a row was trained."""
    variants = found.get("variants", {})
    if defense == UNDEFENDED:
        return ""
    if defense == TGA:
        return _told(found, "no weights were better than the model's own")
    if defense in variants:
        return _told(variants[defense], "no weights were better than the model's own: its last")
    if defense.removesuffix(RETRIEVED) in variants:
        return "asked with a retrieved text in the prompt"
    return ""


def _told(found: Row, instead: str) -> str:
    """Say how it was trained; ``instead`` of what, if no weights were better than the model's."""
    told = found.get("alignment", {})
    beside = "retrieved text in the prompt" if told.get("retrieved") else ""
    words = (
        FORMS.get(told.get("form", ""), ""),
        _where(told.get("layers")),
        POSITIONS.get(told.get("position", ""), ""),
    )
    loss = " ".join(filter(None, words))
    share = f"{_share(found)} of the change" if _share(found) else ""
    parts = (beside, "loss off", share) if _off(told) else (loss, beside, share)
    kept = "" if found["step"] else instead
    return "; ".join(filter(None, (", ".join(filter(None, parts)), kept)))


def _where(layers: str | Sequence[int] | None) -> str:
    if layers is None or isinstance(layers, str):
        return LAYERS.get(layers or "", "")
    return f"in block{'s' if len(layers) > 1 else ''} {listed(map(str, layers))}"


def _off(told: Row) -> bool:
    """Whether there was no loss but that of the answers."""
    return told.get("pair") == 0 and told.get("margin", 0) == 0
