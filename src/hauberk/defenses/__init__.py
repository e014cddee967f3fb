"""The defenses: one file each, and one line in :data:`DEFENSES`."""

from pathlib import Path
from typing import TYPE_CHECKING

from hauberk.bundle import check_binding, read_card
from hauberk.concepts import METHOD as CONCEPT_BANK
from hauberk.defenses.guardalign import GuardAlign
from hauberk.defenses.projector import Projector
from hauberk.defenses.protocol import Defense, Undefended
from hauberk.defenses.safety_prompt import SafetyPrompt
from hauberk.defenses.shift import Shift
from hauberk.defenses.stack import Stack
from hauberk.errors import BadBundle, UnsupportedRequest

_TEXT_INDEX = "text-index"
"""The method of hauberk.retrieval, by name: stages that retrieve nothing do not depend on it."""

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from hauberk.bundle import Card

DEFENSES: dict[str, type[Defense]] = {
    "cmrm": Shift,
    "davsp": SafetyPrompt,
    "guardalign": GuardAlign,
    "tga": Projector,
}


def load(
    folder: Path | str,
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    *,
    clip: Path | str | None = None,
) -> Defense:
    """Load a bundle for a model: verified, bound, ready to be applied.

    Parameters
    ----------
    folder : a bundle, or an MLflow model downloaded from the registry
    model, processor : what the bundle was made for
    clip : where the CLIP lies that some defenses look at pictures with, a folder or the name of a
        repository; None for where the bundle's card says.  A defense that needs none makes nothing
        of it, so that a service may name its CLIP whatever is in production

    Raises
    ------
    BadBundle, TamperedBundle, WrongModel
        If it is no bundle, was changed, or was made for something else.
    MissingClip
        If it needs a CLIP that cannot be loaded.
    """
    home, card = read_card(Path(folder))
    defense = _class_of(home, card)
    check_binding(card, model, processor)
    if issubclass(defense, GuardAlign):  # the only one that looks at pictures with a CLIP
        return defense.load(home, card, model, processor, clip=clip)
    return defense.load(home, card, model, processor)


def read(folder: Path | str, *, clip: Path | str | None = None) -> SafetyPrompt | GuardAlign:
    """Read a bundle for a model that is served elsewhere: verified, and bound to no model.

    Only what works on requests alone can be read so.  Nobody can check here that the model behind
    an endpoint is the one that the bundle was made for: its card says which that is.

    Parameters
    ----------
    folder, clip : as those of :func:`load`

    Raises
    ------
    BadBundle, TamperedBundle, MissingClip
        As :func:`load` does.
    UnsupportedRequest
        If it changes the model.
    """
    home, card = read_card(Path(folder))
    defense = _class_of(home, card)
    if issubclass(defense, GuardAlign):
        return defense.read(home, card, clip=clip)
    if issubclass(defense, SafetyPrompt):
        return defense.read(home, card)
    raise UnsupportedRequest(
        f"{home}: a bundle of {card.method} changes the model, so that nothing guards one that is "
        "served elsewhere; load it with the model: hauberk.load(folder, model, processor)."
    )


def _class_of(home: Path, card: "Card") -> type[Defense]:
    if card.method == CONCEPT_BANK:
        raise BadBundle(
            f"{home} is a concept bank, which defends nothing by itself; read it with "
            "hauberk.concepts.ConceptBank.load(folder, clip, processor), or load a GuardAlign."
        )
    if card.method == _TEXT_INDEX:
        raise BadBundle(
            f"{home} is an index of texts, which defends nothing by itself; read it with "
            "hauberk.retrieval.TextIndex.load(folder, clip, processor), or load a tga bundle."
        )
    if card.method not in DEFENSES:
        raise BadBundle(
            f"{home}: method {card.method!r} is not one of {sorted(DEFENSES)}; "
            f"the bundle was written by hauberk {card.hauberk}."
        )
    return DEFENSES[card.method]


__all__ = [
    "DEFENSES",
    "Defense",
    "GuardAlign",
    "Projector",
    "SafetyPrompt",
    "Shift",
    "Stack",
    "Undefended",
    "load",
    "read",
]
