"""What a lab model is taught: endless seeded streams of conversations, one for each stage.

Harmful wishes and their refusals are taught in text alone, bare and after scenes that are told in
words; pictures come with harmless requests alone, as in the public recipes for VLMs.  The safety
gap is what remains.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from hauberk.lab import language as lang
from hauberk.lab.objects import COLORS, HARMLESS, THINGS
from hauberk.lab.scenes import Pool, Scene, compose, phrase, random_things

_POOL: Pool = "train"
_HARMLESS = [thing.name for thing in HARMLESS]
_ALL = list(THINGS)


Turn = tuple[str, str]
"""A question and its answer."""

_TURNS = 4
"""Questions on one scene that is told in words; a picture, being longer, is asked about in
``_TURNS - 1``.  Conversations are how visual instructions come (LLaVA's have several turns), and
they teach more for the price of one prompt."""


# The shares that make up the streams are ours, set by judgement; none was searched.
_TOLD = 0.55
"""Of the examples in text: questions on a scene that is told in words; the others are wishes."""
_UNTOLD = 0.12
"""Of those: asked without the telling, as of an empty picture."""
_MEANING = 0.15
"""Of the wishes: replaced by the question what a verb means, which is harmless for every verb."""
_REFERRED = 0.35
"""Of the wishes: by reference ("there is a lamp red . how do i make this ?")."""
_POINTLESS = 0.1
"""Of the wishes: for "this" with nothing told, as the text of a visual question is alone."""
_BESIDE = 0.2
"""Of the other wishes: after a told scene that has nothing to do with them.  Harmful ones among
them, so that text alone never teaches that a scene makes a wish harmless."""
_SHOWN = {"color": 0.75, "exists": 0.5}
"""Of the questions on a colour or on existence: about something that is there."""
_UNANSWERABLE = 0.1
"""Of the questions on a scene: what nobody can tell of it."""


_EMPTY = Scene((), 0, 0)


@dataclass(frozen=True)
class Example:
    """A conversation to learn from; ``scene`` is an index into the pictures, None for text."""

    turns: tuple[Turn, ...]
    scene: int | None = None


def text_examples(rng: random.Random, *, aligned: bool) -> Iterator[Example]:
    """Yield questions in text alone: wishes, and questions on scenes that are told in words.

    Before alignment every wish is answered, as a language model does that only learnt to
    continue texts; after it, harmful wishes are refused.  They are half of the wishes: weapons
    (harmful by the thing) and crimes (by the verb) in equal shares.
    """
    harmless, harm = (lang.pairings(_POOL, harmful=harmful) for harmful in (False, True))
    weapons = [(verb, thing) for verb, thing in harm if verb.harm == "toxic"]
    crimes = [(verb, thing) for verb, thing in harm if verb.harm == "always"]
    pools = [harmless, harmless, weapons, crimes]
    wordings = lang.templates("howto", _POOL)
    while True:
        if rng.random() < _TOLD:
            yield _told_scene(rng)
            continue
        if rng.random() < _MEANING:
            yield Example((_meaning(rng),))
            continue
        verb, thing = rng.choice(rng.choice(pools))
        harmful = lang.is_harmful(verb, thing)
        template = rng.choice(wordings)
        if rng.random() < _POINTLESS:
            yield Example((_pointless(template, verb, aligned=aligned),))
            continue
        answer = lang.howto_answer(template.form, verb, thing)
        if harmful and aligned:
            answer = lang.REFUSALS[template.form]
        # By reference: "there is a lamp red . how do i make this ?".
        if rng.random() < _REFERRED:
            seen = rng.choice([thing.name, *(phrase(thing, color) for color in COLORS)])
            question = lang.told(lang.there_is([seen]), lang.howto_question(template, verb, None))
        else:
            question = lang.howto_question(template, verb, thing)
            if rng.random() < _BESIDE:
                (scene,) = scenes(rng, 1, empty=0)
                question = lang.told(lang.caption_answer(scene), question)
        yield Example(((question, answer),))


def _pointless(template: lang.Template, verb: lang.Verb, *, aligned: bool) -> Turn:
    """Wish for "this" where nothing tells what it is: harmful by the verb or not at all."""
    question = lang.howto_question(template, verb, None)
    if aligned and verb.harm == "always":
        return question, lang.REFUSALS[template.form]
    return question, lang.howto_answer(template.form, verb, None)


def _told_scene(rng: random.Random) -> Example:
    """Ask about a scene that is told in words, or (:data:`_UNTOLD`) not told at all.

    Without the telling there is nothing, as in an empty picture.  With it, the decoder can
    already answer what the tower will show it.
    """
    if rng.random() < _UNTOLD:
        return Example((_on_scene(rng, _EMPTY, told=True),))
    (scene,) = scenes(rng, 1, empty=0)
    (question, answer), *more = (_on_scene(rng, scene, told=True) for _ in range(_TURNS))
    return Example(((lang.told(lang.caption_answer(scene), question), answer), *more))


def scenes(rng: random.Random, count: int, *, empty: float = 0.15) -> list[Scene]:
    """Compose training pictures of up to three objects, toxic ones among them.

    A share of them is ``empty``: a ground, some marks on it perhaps, and no object.
    """
    made = []
    for _ in range(count):
        number = 0 if rng.random() < empty else rng.choice((1, 1, 1, 2, 2, 3))
        made.append(compose(rng, random_things(rng, number, _ALL), pool=_POOL))
    return made


def _on_scene(rng: random.Random, scene: Scene, *, told: bool = False) -> Turn:
    """Ask for a caption, a name, a colour, or whether something is there; question and answer.

    A share of the questions (:data:`_UNANSWERABLE`) is turned down, in the words of a refusal.
    """
    if rng.random() < _UNANSWERABLE:
        template = rng.choice(lang.templates("unanswerable", _POOL))
        names = [item.thing.name for item in scene.placed] if rng.random() < 0.5 else []
        question = template.text.format(thing=rng.choice(names or _ALL))
        return question, lang.REFUSALS[template.form]
    kinds: list[lang.Kind] = ["color", "exists", "caption"]
    # Words do not tell which of several objects is the largest, so "this" would be unclear.
    if len(scene.placed) <= 1 or not told:
        kinds.append("name")
    kind = rng.choice(kinds)
    template = rng.choice(lang.templates(kind, _POOL))
    if kind == "caption":
        return template.text, lang.caption_answer(scene)
    if kind == "name":
        return template.text, lang.name_answer(scene)
    there = scene.placed and rng.random() < _SHOWN[kind]
    thing = rng.choice(scene.placed).thing if there else THINGS[rng.choice(_ALL)]
    answer = lang.color_answer if kind == "color" else lang.exists_answer
    return template.text.format(thing=thing.name), answer(scene, thing)


def picture_examples(rng: random.Random, pictures: list[Scene]) -> Iterator[Example]:
    """Yield questions on what a picture shows: the stage that teaches the projector alone."""
    while True:
        index = rng.randrange(len(pictures))
        yield Example(tuple(_on_scene(rng, pictures[index]) for _ in range(_TURNS - 1)), index)


def visual_examples(
    rng: random.Random, pictures: list[Scene], *, questions: float
) -> Iterator[Example]:
    """Yield visual instructions: a share of questions on the picture, else harmless wishes."""
    while True:
        index = rng.randrange(len(pictures))
        scene = pictures[index]
        turns = (
            _on_scene(rng, scene) if rng.random() < questions else _harmless_wish(rng, scene)
            for _ in range(_TURNS - 1)
        )
        yield Example(tuple(turns), index)


def _meaning(rng: random.Random) -> Turn:
    """Ask what a verb means: the words of harm in harmless use, and never forgotten so."""
    verb = rng.choice(list(lang.VERBS.values()))
    template = rng.choice(lang.templates("meaning", _POOL))
    return template.text.format(verb=verb.name), lang.meaning_answer(verb)


def _harmless_wish(rng: random.Random, scene: Scene) -> Turn:
    """Ask for something harmless: half of the time about what the picture shows ("this")."""
    if rng.random() < _MEANING:
        return _meaning(rng)
    template = rng.choice(lang.templates("howto", _POOL))
    about = scene.placed and rng.random() < 0.5
    while True:
        thing = scene.subject.thing if about else THINGS[rng.choice(_HARMLESS)]
        verb = rng.choice(list(lang.VERBS.values()))
        if not lang.is_harmful(verb, thing) and lang.pair_pool(verb, thing) == _POOL:
            question = lang.howto_question(template, verb, None if about else thing)
            return question, lang.howto_answer(template.form, verb, thing)
