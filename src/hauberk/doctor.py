"""What can be done with a model: where its parts are, and which defense it can have, or why not.

Nothing is decided here.  Every verdict is what the function says that the defense itself calls
before it acts; it is asked of a model without weights (:mod:`hauberk.bare`).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hauberk import anatomy
from hauberk.anatomy import Anatomy, anatomy_of
from hauberk.bare import BareModel, bare_model
from hauberk.defenses.folding import check_exports, check_folds
from hauberk.defenses.prefix_attention import PrefixSetting, check_calibrates
from hauberk.defenses.projector import Part, check_part
from hauberk.defenses.projector_step import check_trains
from hauberk.defenses.shift import ShiftSetting, check_applies
from hauberk.errors import HauberkError, UnknownFamily
from hauberk.pixels import layout_of


@dataclass(frozen=True)
class Finding:
    """Where one part of a model was found."""

    part: str
    place: str
    """Its dotted path below the model, or what stands for one; "" if it was not found."""
    what: str
    """Its class, or why it was not found and what to add."""


@dataclass(frozen=True)
class Verdict:
    """Whether one thing can be done with one defense."""

    defense: str
    action: str
    reason: str
    """Why not; "" if it can."""

    @property
    def possible(self) -> bool:
        """Whether it can."""
        return not self.reason


@dataclass(frozen=True)
class Report:
    """What was found of one model."""

    source: str
    family: str
    architecture: str
    findings: list[Finding]
    verdicts: list[Verdict]

    @property
    def complete(self) -> bool:
        """Whether every part was found that a defense acts on."""
        return all(finding.place for finding in self.findings if finding.part in _NEEDED)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON tells it."""
        verdicts = [asdict(verdict) | {"possible": verdict.possible} for verdict in self.verdicts]
        return asdict(self) | {"complete": self.complete, "verdicts": verdicts}


_NEEDED = ("decoder", "vision tower", "projector", "image token")
"""Without one of them a model has no anatomy; without a layout of pixels it does without some."""


class Patient:
    """A model, with weights or without, and the image processor that stands before it."""

    def __init__(self, model: PreTrainedModel, images: Any) -> None:
        self.model, self.images = model, images

    @cached_property
    def anatomy(self) -> Anatomy:
        """Its parts.

        Raises
        ------
        UnknownFamily
            If one was not found.
        """
        return anatomy_of(self.model)

    def check_frame(self) -> None:
        """Raise :class:`UnknownFamily` unless pixels can be made differentiably."""
        if self.images is None:
            raise UnknownFamily(
                f"no image processor is known for {self.model.config.model_type!r}; give a folder "
                "with its preprocessor_config.json."
            )
        layout_of(type(self.images).__name__)


def _anything(_: Patient) -> None:
    """Acts on pictures and texts before any processor sees them: no model can refuse it."""


_CONSTANT = ShiftSetting(position="all")
"""The shift that biases can hold, if any can."""

CHECKS: tuple[tuple[str, str, Callable[[Patient], None]], ...] = (
    ("cmrm", "per data set", lambda p: check_applies(p.anatomy, ShiftSetting(), p.images)),
    (
        *("cmrm", "per request"),
        lambda p: check_applies(p.anatomy, ShiftSetting(level="sample"), p.images),
    ),
    ("cmrm", "folds", lambda p: check_folds(p.anatomy, _CONSTANT)),
    ("cmrm", "exports", lambda p: check_exports(p.model, _CONSTANT)),
    ("davsp", "applies", _anything),
    ("davsp", "trains", Patient.check_frame),
    ("guardalign", "masks", _anything),
    ("guardalign", "calibrates", lambda p: check_calibrates(p.anatomy, PrefixSetting())),
    ("tga", "projector", lambda p: check_part(Part(), p.model)),
    ("tga", "low rank", lambda p: check_part(Part("lora"), p.model)),
    ("tga", "trains", lambda p: check_trains(p.anatomy)),
    ("tga", "exports", lambda p: check_part(Part(), p.model)),
)
"""Defense, what is done with it, and what refuses that.

* cmrm: one shift for all, or one of every request; kept in biases; as a plain checkpoint
* davsp: a frame that was trained somewhere, which is deployed as a PNG; trained on this model
* guardalign: pictures masked; a prefix that is attended to harder
* tga: weights in place of the projector's, or with low-rank changes of the decoder; trained on this
  model; as a plain checkpoint
"""


def examine(source: str, revision: str | None = None) -> Report:
    """Build a model from its config, without weights, and say what can be done with it.

    Raises
    ------
    BadModel
        As :func:`hauberk.bare.bare_model` does.
    """
    bare = bare_model(source, revision)
    model = bare.model
    return Report(
        source=source,
        family=model.config.model_type,
        architecture=type(model).__name__,
        findings=[*_findings(model), _image_processor(bare)],
        verdicts=verdicts_of(model, bare.images),
    )


def verdicts_of(model: PreTrainedModel, images: Any) -> list[Verdict]:
    """Ask every check of :data:`CHECKS`; ``images`` is the image processor."""
    patient, verdicts = Patient(model, images), []
    for defense, action, check in CHECKS:
        try:
            check(patient)
            reason = ""
        except HauberkError as error:
            reason = str(error)
        verdicts.append(Verdict(defense, action, reason))
    return verdicts


def _findings(model: PreTrainedModel) -> list[Finding]:
    """Look for each part by itself, so that one that is missing hides no other."""

    def placed(part: str, module: nn.Module, what: str = "") -> Finding:
        return Finding(part, anatomy.path_of(model, module), what or type(module).__name__)

    def decoder() -> list[Finding]:
        found, blocks = anatomy.decoder_of(model)
        return [placed("decoder", found), _blocks(blocks), _folds(blocks)]

    def tower() -> list[Finding]:
        return [placed("vision tower", anatomy.vision_tower_of(model))]

    def connectors() -> list[Finding]:
        found = anatomy.connectors_of(model, anatomy.vision_tower_of(model))
        return [Finding("projector", path, type(part).__name__) for path, part in found.items()]

    def token() -> list[Finding]:
        return [Finding("image token", str(anatomy.image_token_of(model)), "id in input_ids")]

    def layout() -> list[Finding]:
        found = anatomy.layout_of(model)
        how = (
            "how the processor lays out pixels" if found else "not known; what needs it is refused"
        )
        return [Finding("pixel layout", found or "", how)]

    looks = dict(zip(_NEEDED, (decoder, tower, connectors, token), strict=True))
    findings = []
    for part, look in (looks | {"pixel layout": layout}).items():
        try:
            findings += look()
        except UnknownFamily as error:
            findings.append(Finding(part, "", str(error)))
    return findings


def _blocks(blocks: tuple[nn.Module, ...]) -> Finding:
    kinds = Counter(type(block).__name__ for block in blocks)
    return Finding(
        "blocks", str(len(blocks)), ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    )


def _folds(blocks: tuple[nn.Module, ...]) -> Finding:
    kinds = Counter(anatomy.fold_site(block).kind for block in blocks)
    told = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    return Finding("places of a bias", str(len(blocks) - kinds["none"]), told)


def _image_processor(bare: BareModel) -> Finding:
    name = "" if bare.images is None else type(bare.images).__name__
    return Finding("image processor", name, bare.images_from)
