"""Names of concepts for a bank: the lab's, and a list for pictures of the real world.

A name is what fills the gap of a template.  GuardAlign (arXiv:2602.24027) lists its own categories
in an appendix.  The real ones here are not they: they follow the scenarios of MM-SafetyBench (Liu
et al., ECCV 2024) and the classes of SPA-VL (Zhang et al., CVPR 2025) in short and neutral words,
as many as make the printed threshold meaningful
(see :data:`hauberk.defenses.patch_transport.AS_PRINTED`).
"""

from dataclasses import dataclass

from hauberk.lab.language import VERBS
from hauberk.lab.objects import THINGS, TOXIC_CATEGORIES
from hauberk.lab.views import CATEGORIES, NOTHING, WORDINGS, Shown, nouns_of


@dataclass(frozen=True)
class Concepts:
    """What :func:`hauberk.concepts.build_bank` encodes."""

    categories: tuple[str, ...]
    reference: tuple[str, ...]
    templates: tuple[str, ...]


_STEP = 5
"""Of the lab's wordings for training every fifth, 5 of 23: our choice, of several variants without
the time that all of them take."""


def lab_concepts() -> Concepts:
    """Name what the lab's world holds, shown and written; wordings of the pool ``train``.

    Unsafe are toxic things by name and by category, written names of toxic things and written verbs
    that harm whatever they are done to, as those are what ``typographic`` shows.  Everything else
    in the world competes with them but ``some words``: lab-clip calls a cut word that, and it would
    take the place of every word that a patch shows in part.
    """
    shown = {f"a {name}": thing.toxic for name, thing in THINGS.items()}
    shown |= {nouns_of(name)[0]: name in TOXIC_CATEGORIES for name in CATEGORIES}
    written = {Shown(words=name).noun: thing.toxic for name, thing in THINGS.items()}
    written |= {Shown(words=name).noun: verb.harm == "always" for name, verb in VERBS.items()}
    toxic = shown | written
    return Concepts(
        categories=tuple(noun for noun, harms in toxic.items() if harms),
        reference=(*(noun for noun, harms in toxic.items() if not harms), NOTHING),
        templates=tuple(WORDINGS["train"][::_STEP]),
    )


REAL = Concepts(
    categories=(
        "a gun",
        "a knife used as a weapon",
        "a bomb",
        "an explosion",
        "illegal drugs",
        "drug use",
        "blood and injury",
        "physical violence",
        "a dead body",
        "self-harm",
        "animal cruelty",
        "nudity",
        "sexual content",
        "child abuse",
        "a hate symbol",
        "a terrorist",
        "a burglary",
        "a computer hacker",
        "financial fraud",
        "a private document",
    ),
    reference=(
        "a person",
        "a group of people",
        "an animal",
        "a plant",
        "food",
        "a drink",
        "a building",
        "a room",
        "furniture",
        "a vehicle",
        "a street",
        "a landscape",
        "the sky",
        "water",
        "clothing",
        "an electronic device",
        "a tool",
        "a toy",
        "a chart or diagram",
        "a page of text",
        "a plain background",
    ),
    templates=(
        "a photo of {}.",
        "an image of {}.",
        "a picture that shows {}.",
        "a close-up of {}.",
        "a drawing of {}.",
    ),
)
"""20 unsafe categories, 21 harmless ones, 5 templates.  Never measured here: no CLIP of the real
world is among the lab's models, so even the order of the settings is open.  The threshold is set on
harmless pictures of the user's own: see ``benign_pictures`` in params.yaml."""
