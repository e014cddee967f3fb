"""Which answers are shown: a fixed rule, so that nobody picks the nice ones.

Every kind of outcome has its place, failures before successes; within a kind the samples
come suite by suite in the order of a hash of their id.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from hauberk import UNDEFENDED
from tasks.report.comparison import Comparison, Row

AT_MOST = 3
"""So many samples are shown of each kind."""


@dataclass(frozen=True)
class Shown:
    """One sample with the answers of all defenses."""

    sample: Row
    answers: tuple[Row, ...]


@dataclass(frozen=True)
class Kind:
    """One kind of outcome: how many there are, of how many, and a few of them."""

    title: str
    count: int
    of: int
    of_what: str
    shown: tuple[Shown, ...]


def _unsafe(row: Row) -> bool:
    return bool(row["unsafe"])


def _right(row: Row) -> bool:
    return bool(row["correct"])


_HARMFUL, _HARMLESS = "to be refused", "to be answered"
_GROUPS = {"refuse": _HARMFUL, "answer": _HARMLESS}
"""Of what is asked for; one to hedge is neither right nor wrong without a reader."""

KINDS: dict[str, tuple[str, Callable[[Row, Row], bool]]] = {
    "Unsafe before, still unsafe": (_HARMFUL, lambda old, new: _unsafe(old) and _unsafe(new)),
    "Safe before, unsafe now": (_HARMFUL, lambda old, new: not _unsafe(old) and _unsafe(new)),
    "Unsafe before, safe now": (_HARMFUL, lambda old, new: _unsafe(old) and not _unsafe(new)),
    "Right before, wrong or refused now": (
        _HARMLESS,
        lambda old, new: _right(old) and not _right(new),
    ),
    "Wrong before, right now": (_HARMLESS, lambda old, new: not _right(old) and _right(new)),
    "Right before and now": (_HARMLESS, lambda old, new: _right(old) and _right(new)),
}
"""Title -> (which samples, undefended answer and defended answer belong to it)."""


def pick(comparison: Comparison, model: str, defense: str) -> list[Kind]:
    """Sort the samples of a model by what the defense does to them, and show a few of each."""
    pairs: dict[str, list[tuple[Row, Row]]] = {group: [] for group in _GROUPS.values()}
    for new in comparison.responses:
        if (new["model"], new["defense"]) == (model, defense):
            old = comparison.response(model, UNDEFENDED, new)
            if old is not None and new["expected"] in _GROUPS:
                pairs[_GROUPS[new["expected"]]].append((old, new))
    kinds = []
    for title, (group, belongs) in KINDS.items():
        found = [new for old, new in pairs[group] if belongs(old, new)]
        shown = tuple(_shown(comparison, model, row) for row in _first(comparison, found))
        kinds.append(Kind(title, len(found), len(pairs[group]), group, shown))
    return [kind for kind in kinds if kind.of]


def _first(comparison: Comparison, rows: list[Row]) -> list[Row]:
    """Take one of every suite before a second of any."""
    by_suite: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: sha256(str(row["sample_id"]).encode()).digest()):
        by_suite.setdefault(row["suite"], []).append(row)
    rounds = [
        (place, comparison.order(suite), row)
        for suite, members in by_suite.items()
        for place, row in enumerate(members[:AT_MOST])
    ]
    return [row for _, _, row in sorted(rounds, key=lambda item: item[:2])[:AT_MOST]]


def _shown(comparison: Comparison, model: str, row: Row) -> Shown:
    answers = (comparison.response(model, defense, row) for defense in comparison.defenses(model))
    return Shown(row, tuple(answer for answer in answers if answer is not None))
