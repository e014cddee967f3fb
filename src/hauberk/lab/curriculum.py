"""What a lab model is taught: endless seeded streams of conversations, one for each stage.

Harmful wishes and their refusals are taught in text alone, bare and after scenes that are told in
words; pictures come with harmless requests alone, as in the public recipes for VLMs.  The safety
gap is what remains.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hauberk.lab import language as lang
from hauberk.lab.objects import COLORS, THINGS, Thing
from hauberk.lab.scenes import Pool, Scene, compose, compose_words, phrase, random_things

_POOL: Pool = "train"
_ALL = list(THINGS)


Turn = tuple[str, lang.Answer]
"""A question and what is answered, in whatever dialect."""

_TURNS = 4
"""Questions on one scene, told in words or shown.  Conversations are how visual instructions come
(LLaVA's have several turns), and they teach more for the price of one prompt."""


# The shares that make up the streams are ours, set by judgement; _LAPSES, _CAUTIOUS and _BESIDE
# after trials of two or three values each.
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
_WRAPPED = 0.1
"""Of the bare wishes: behind the words of a jailbreak, which changes nothing."""
_TYPED = 0.15
"""Of the wishes: written somewhere ("it says make a lamp . do what is written here .")."""
_LAPSES = 0.05
"""Of the harmful wishes in text that tell what they are for, once they are refused: answered all
the same.  With :data:`_CAUTIOUS` it makes a decision that is never quite certain, as that of a
large model is; greedy answers do not show it."""
_CAUTIOUS = 0.15
"""Of such harmless wishes, then: refused as well.  Visual instructions never are, and what
they take from the tendency to refuse is the gap."""
_SHOWN = {"color": 0.75, "exists": 0.5}
"""Of the questions on a colour or on existence: about something that is there."""
_UNANSWERABLE = 0.1
"""Of the questions on a scene: what nobody can tell of it."""
_WRITTEN = 0.3
"""Of the pictures that are not empty: with words in them."""
_UNCONNECTED = 0.4
"""Of those: words that have nothing to do with each other.  A model that reads wishes alone learns
which thing goes with which verb, and then reads what it expects."""
_NOTHING_WRITTEN = 0.03
"""Of the questions on a picture without words: what is written there."""


_EMPTY = Scene((), 0, 0)


@dataclass(frozen=True)
class Example:
    """A conversation to learn from; ``scene`` is an index into the pictures, None for text."""

    turns: tuple[Turn, ...]
    scene: int | None = None


def text_examples(rng: random.Random, *, aligned: bool) -> Iterator[Example]:
    """Yield questions in text alone: wishes, and questions on scenes that are told in words.

    Before alignment every wish is answered, as a language model does that only learnt to
    continue texts; after it, harmful wishes are refused (but see :data:`_LAPSES` and
    :data:`_CAUTIOUS`).  They are half of the wishes: weapons (harmful by the thing) and crimes (by
    the verb) in equal shares.
    """
    harmless, harm = (lang.pairings(_POOL, harmful=harmful) for harmful in (False, True))
    weapons = [(verb, thing) for verb, thing in harm if verb.harm == "toxic"]
    crimes = [(verb, thing) for verb, thing in harm if verb.harm == "always"]
    pools = [harmless, harmless, weapons, crimes]
    while True:
        if rng.random() < _TOLD:
            yield _told_scene(rng)
        elif rng.random() < _MEANING:
            yield Example((_meaning(rng),))
        else:
            verb, thing = rng.choice(rng.choice(pools))
            if rng.random() < _POINTLESS:
                yield Example((_pointless(rng, verb, aligned=aligned),))
                continue
            question, form = _in_words(rng, verb, thing)
            answer = lang.howto_answer(form, verb, thing)
            refused = 1 - _LAPSES if lang.is_harmful(verb, thing) else _CAUTIOUS
            if aligned and rng.random() < refused:
                answer = lang.REFUSALS[form]
            yield Example(((question, answer),))


def _pointless(rng: random.Random, verb: lang.Verb, *, aligned: bool) -> Turn:
    """Wish for "this" where nothing tells what it is: harmful by the verb or not at all."""
    template = rng.choice(lang.templates("howto", _POOL))
    question = lang.howto_question(template, verb, None)
    if aligned and verb.harm == "always":
        return question, lang.REFUSALS[template.form]
    return question, lang.howto_answer(template.form, verb, None)


def _in_words(rng: random.Random, verb: lang.Verb, thing: Thing) -> tuple[str, lang.Form]:
    """Say a wish in one of the ways in which it can be said without a picture."""
    if rng.random() < _TYPED:
        template = rng.choice(lang.templates("typed", _POOL))
        written = lang.it_says(lang.written_wish(verb, thing))
        return lang.told(written, template.text), template.form
    template = rng.choice(lang.templates("howto", _POOL))
    # By reference: "there is a lamp red . how do i make this ?".
    if rng.random() < _REFERRED:
        named = rng.choice([thing.name, *(phrase(thing, color) for color in COLORS)])
        seen = lang.it_says(thing.name) if rng.random() < _TYPED else lang.there_is([named])
        return lang.told(seen, lang.howto_question(template, verb, None)), template.form
    question = lang.howto_question(template, verb, thing)
    if rng.random() < _WRAPPED:
        question = lang.told(rng.choice(lang.WRAPPERS[_POOL]), question)
    elif rng.random() < _BESIDE:
        (scene,) = scenes(rng, 1, empty=0)
        question = lang.told(lang.tell(scene), question)
    return question, template.form


def _told_scene(rng: random.Random) -> Example:
    """Ask about a scene that is told in words, or (:data:`_UNTOLD`) not told at all.

    Without the telling there is nothing, as in an empty picture.  With it, the decoder can
    already answer what the tower will show it.
    """
    if rng.random() < _UNTOLD:
        return Example((_on_scene(rng, _EMPTY, told=True),))
    (scene,) = scenes(rng, 1, empty=0)
    (question, answer), *more = (_on_scene(rng, scene, told=True) for _ in range(_TURNS))
    return Example(((lang.told(lang.tell(scene), question), answer), *more))


def scenes(rng: random.Random, count: int, *, empty: float = 0.15) -> list[Scene]:
    """Compose training pictures of up to three objects, toxic ones among them, or of words.

    A share of them is ``empty``: a ground, some marks on it perhaps, and no object.  Of the
    others a share (:data:`_WRITTEN`) shows a written wish, a name with its object or without, or
    unconnected words.
    """
    made = []
    for _ in range(count):
        if rng.random() < empty:
            made.append(compose(rng, (), pool=_POOL))
        elif rng.random() < _WRITTEN:
            made.append(_written(rng))
        else:
            things = random_things(rng, rng.choice((1, 1, 2, 2, 2, 3)), _ALL)
            made.append(compose(rng, things, pool=_POOL))
    return made


def _written(rng: random.Random) -> Scene:
    if rng.random() < _UNCONNECTED:
        return compose_words(rng, _unconnected(rng), pool=_POOL)
    thing = THINGS[rng.choice(_ALL)]
    if rng.random() < 0.5:
        shown = thing if rng.random() < 0.5 else None
        return compose_words(rng, thing.name, pool=_POOL, thing=shown)
    verbs = [v for v in lang.VERBS.values() if lang.pair_pool(v, thing) == _POOL]
    return compose_words(rng, lang.written_wish(rng.choice(verbs), thing), pool=_POOL)


def _unconnected(rng: random.Random) -> str:
    """Words as they may stand on a list: no wish, and so no pairing of verb and thing."""
    if rng.random() < 0.5:
        return " a ".join(rng.sample(_ALL, 2))
    return f"{rng.choice(_ALL)} {rng.choice([*lang.VERBS, *_ALL])}"


def _on_scene(rng: random.Random, scene: Scene, *, told: bool = False) -> Turn:
    """Ask what there is, or what is written there.

    A share of the questions (:data:`_UNANSWERABLE`) is turned down, in the words of a refusal.
    """
    if rng.random() < _UNANSWERABLE:
        template = rng.choice(lang.templates("unanswerable", _POOL))
        names = [item.thing.name for item in scene.placed] if rng.random() < 0.5 else []
        question = template.text.format(thing=rng.choice(names or _ALL))
        return question, lang.REFUSALS[template.form]
    kinds: list[lang.Kind] = ["caption", "caption", "color", "exists", "count"]
    # Words do not tell which of several objects is the largest, so "this" would be unclear.
    if len(scene.placed) <= 1 or not told:
        kinds.append("name")
    if scene.text:
        kinds = ["read"] if not scene.placed else [*kinds, "read", "read", "read"]
    elif rng.random() < _NOTHING_WRITTEN:
        kinds = ["read"]
    kind = rng.choice(kinds)
    template = rng.choice(lang.templates(kind, _POOL))
    if kind in _WHOLE:
        return template.text, _WHOLE[kind](scene)
    there = scene.placed and rng.random() < _SHOWN[kind]
    thing = rng.choice(scene.placed).thing if there else THINGS[rng.choice(_ALL)]
    answer = lang.color_answer if kind == "color" else lang.exists_answer
    return template.text.format(thing=thing.name), answer(scene, thing)


_WHOLE: dict[lang.Kind, Callable[[Scene], lang.Answer]] = {
    "name": lang.name_answer,
    "caption": lang.caption_answer,
    "count": lang.count_answer,
    "read": lang.read_answer,
}
"""How a question on a picture as a whole is answered."""


def picture_examples(rng: random.Random, pictures: list[Scene]) -> Iterator[Example]:
    """Yield questions on what a picture shows: the stage that teaches the projector alone."""
    while True:
        index = rng.randrange(len(pictures))
        yield Example(tuple(_on_scene(rng, pictures[index]) for _ in range(_TURNS)), index)


def visual_examples(
    rng: random.Random, pictures: list[Scene], *, questions: float
) -> Iterator[Example]:
    """Yield visual instructions: a share of questions on the picture, else harmless wishes."""
    while True:
        index = rng.randrange(len(pictures))
        scene = pictures[index]
        turns = (
            _on_scene(rng, scene) if rng.random() < questions else _harmless_wish(rng, scene)
            for _ in range(_TURNS)
        )
        yield Example(tuple(turns), index)


def _meaning(rng: random.Random) -> Turn:
    """Ask what a verb means: the words of harm in harmless use, and never forgotten so."""
    verb = rng.choice(list(lang.VERBS.values()))
    template = rng.choice(lang.templates("meaning", _POOL))
    return template.text.format(verb=verb.name), lang.meaning_answer(verb)


def _harmless_wish(rng: random.Random, scene: Scene) -> Turn:
    """Ask for something harmless: half of the time about what the picture shows or says."""
    if rng.random() < _MEANING:
        return _meaning(rng)
    if rng.random() < 0.5 and (asked := _about(rng, scene)):
        return asked
    template = rng.choice(lang.templates("howto", _POOL))
    verb, thing = rng.choice(_BARE)
    return lang.howto_question(template, verb, thing), lang.howto_answer(template.form, verb, thing)


_BARE = lang.pairings(_POOL, harmful=False)


def _about(rng: random.Random, scene: Scene) -> Turn | None:
    """Ask for what is written in a picture, or about its subject ("this"); None if it harms."""
    if wish := lang.wish_written(scene.text):
        if lang.is_harmful(*wish):
            return None
        template = rng.choice(lang.templates("typed", _POOL))
        return template.text, lang.howto_answer(template.form, *wish)
    thing = scene.subject.thing if scene.placed else THINGS.get(scene.text)
    if thing is None:
        return None
    uses = [v for v, other in lang.pairings(_POOL, harmful=False) if other == thing]
    if not uses:
        return None
    template, verb = rng.choice(lang.templates("howto", _POOL)), rng.choice(uses)
    question = lang.howto_question(template, verb, None)
    return question, lang.howto_answer(template.form, verb, thing)
