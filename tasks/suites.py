"""The suites that params.yaml may name: who asks for which of them, and of what kind each is.

A suite is one of the lab, one that is made by an attack on a model, or one that a data set of
``datasets`` declares.  What those of a data set hold is known only when it is read: until then
their kind is None, and `prepare_data` checks it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hauberk.data.samples import Split
    from tasks.params import Params


@dataclass(frozen=True)
class Kind:
    """What all samples of a suite have in common."""

    expected: str
    """What a safe and useful model does: answer, refuse or hedge."""
    pictured: bool
    """Whether every sample has a picture."""
    told: bool
    """Whether every picture has a caption."""
    graded: bool = False
    """Whether only a grader can say how good an answer is."""


Kinds = Mapping[str, Kind | None]
NOTHING_READ: Mapping[str, Kind] = MappingProxyType({})


@dataclass(frozen=True)
class Wanted:
    """Samples of a suite that a run needs."""

    key: str
    """Of params.yaml, which asks for them."""
    split: "Split"
    suite: str
    size: int
    """How many; of a data set at most."""


def kinds_of(params: "Params", read: Mapping[str, Kind] = NOTHING_READ) -> dict[str, Kind | None]:
    """Give every suite that can be drawn with its kind; ``read`` tells those of data sets."""
    from hauberk.data.lab import SUITES

    return {suite: _lab_kind(suite) for suite in SUITES} | {
        suite: read.get(suite) for told in params.datasets.values() for suite in told.suites
    }


def attacked_kinds(params: "Params", drawn: Kinds) -> dict[str, Kind | None]:
    """Give every suite that is made by an attack; it is of the kind of the one attacked."""
    from hauberk.data.lab import ATTACKED

    return dict.fromkeys(ATTACKED, drawn.get(params.attack.suite))


def wanted(params: "Params") -> list[Wanted]:
    """List what a run draws, each split of a suite once, as large as its largest use."""
    most: dict[tuple[str, str], Wanted] = {}
    for each in _every(params):
        place = each.split, each.suite
        if place not in most or each.size > most[place].size:
            most[place] = each
    return list(most.values())


def _every(params: "Params") -> Iterator[Wanted]:
    """Say of every section what it draws; a suite that is attacked is drawn as it is."""
    from hauberk.data.lab import ATTACKED

    budget, davsp, tga = params.budget, params.davsp, params.tga
    sizes, gated = budget.data, {rule.get("suite") for rule in params.gate}
    test = {"suites": params.suites, "attack.suite": [params.attack.suite]}
    calibration = {
        **{f"defenses.{name}.calibrate_on": d.calibrate_on for name, d in params.defenses.items()},
        "guardalign.calibrate_on": params.guardalign.calibrate_on,
        "davsp.validate_on": davsp.validate_on,
        "tga.validate_on": tga.validate_on,
        "attack.suite": [params.attack.suite] if budget.attack.calibration else [],
    }
    anchor = {
        **{f"defenses.{name}.anchors": d.anchors for name, d in params.defenses.items()},
        "davsp.harm.harmful": davsp.harm.harmful,
        "davsp.harm.harmless": davsp.harm.harmless,
        **{f"gap.{name}": [suite] for name, suite in params.gap.read.items()},
    }
    framed = {"davsp.harmful": davsp.harmful, "davsp.harmless": davsp.harmless}
    projected = {
        "tga.aligned": tga.aligned,
        "tga.answered": tga.answered,
        "tga.index.snippets": tga.index.snippets,
    }
    asked: list[tuple[Split, dict[str, list[str]], int]] = [
        ("test", test, sizes.samples),
        ("calibration", calibration, sizes.calibration),
        ("anchor", anchor, sizes.anchor),
        ("train", framed, budget.frame.samples),
        ("train", projected, budget.projector.samples),
    ]
    for split, sections, size in asked:
        for key, suites in sections.items():
            for suite in (suite for suite in suites if suite not in ATTACKED):
                more = sizes.gated if split == "test" and suite in gated else None
                yield Wanted(key, split, suite, more or size)


@cache
def _lab_kind(suite: str) -> Kind:
    """Tell the kind of a suite of the lab by one sample: all of them are alike."""
    from hauberk.data.lab import build_suite

    (sample,) = build_suite(suite, "calibration", 1, seed=0)
    return Kind(sample.expected, sample.image is not None, bool(sample.caption))
