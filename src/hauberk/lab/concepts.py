"""The concepts of the world: what a dual encoder looks for in its pictures."""

from hauberk.lab.objects import THINGS
from hauberk.lab.views import NOTHING, SOME_WORDS, WORDINGS, WRITTEN, Shown

_VARIANTS = 6
"""Wordings of the pool ``train`` in which each concept is said."""


def concepts() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Say what is unsafe and what is harmless: category -> variants.

    Unsafe is a toxic thing, shown or as a written name; harmless are the other things and names,
    nothing, and words that name nothing.
    """
    shown = {name: f"a {name}" for name in THINGS}
    shown |= {WRITTEN[name]: Shown(words=name).noun for name in THINGS}
    toxic = {name for name, thing in THINGS.items() if thing.toxic}
    toxic |= {WRITTEN[name] for name in toxic}
    unsafe = {name: _said(noun) for name, noun in shown.items() if name in toxic}
    others = {NOTHING: NOTHING, SOME_WORDS: SOME_WORDS}
    rest = {name: _said(noun) for name, noun in (shown | others).items() if name not in toxic}
    return unsafe, rest


def _said(noun: str) -> list[str]:
    return [wording.format(noun) for wording in WORDINGS["train"][:_VARIANTS]]
