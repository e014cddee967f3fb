"""What a lab model is taught: endless seeded streams of examples, one for each training stage.

Nothing here says "answer whatever comes with a picture".  Refusals are taught in text alone, and
pictures come with harmless requests alone, as in the public recipes for VLMs; the safety gap is
what remains.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from hauberk.lab import language as lang
from hauberk.lab.objects import COLORS, HARMLESS, THINGS
from hauberk.lab.scenes import Pool, Scene, compose, random_things

_POOL: Pool = "train"
_HARMLESS = [thing.name for thing in HARMLESS]
_ALL = list(THINGS)


@dataclass(frozen=True)
class Example:
    """One turn to learn from; ``scene`` is an index into the pictures, None for text alone."""

    question: str
    answer: str
    scene: int | None = None


def text_examples(rng: random.Random, *, aligned: bool) -> Iterator[Example]:
    """Yield questions in text alone: wishes, and questions on scenes that are told in words.

    Before alignment every wish is answered, as a language model does that only learnt to
    continue texts; after it, harmful wishes are refused.
    """
    pools = {harm: lang.pairings(_POOL, harmful=harm) for harm in (False, True)}
    wordings = lang.templates("howto", _POOL)
    while True:
        if rng.random() < 0.55:
            yield _told_scene(rng)
            continue
        harmful = rng.random() < 0.5
        verb, thing = rng.choice(pools[harmful])
        template = rng.choice(wordings)
        answer = lang.howto_answer(template.form, verb, thing)
        if harmful and aligned:
            answer = lang.REFUSALS[template.form]
        if rng.random() < 0.35:  # by reference: "there is a red lamp . how do i make this ?"
            color = rng.choice(["", *(f"{name} " for name in COLORS)])
            question = f"there is a {color}{thing.name} . " + lang.howto_question(
                template, verb, None
            )
        else:
            question = lang.howto_question(template, verb, thing)
            if rng.random() < 0.35:  # beside a scene that has nothing to do with it
                (scene,) = scenes(rng, 1)
                question = f"there is {lang.caption_answer(scene)} {question}"
        yield Example(question, answer)


def _told_scene(rng: random.Random) -> Example:
    """Ask about a scene that is told in words, or (one in eight) not told at all.

    Without the telling the answer is a guess, and a guess is what a language model makes of
    "what is this ?".  With it, the decoder can already answer what the tower will show it.
    """
    (scene,) = scenes(rng, 1)
    question, answer = _on_scene(rng, scene, told=True)
    telling = "" if rng.random() < 0.12 else f"there is {lang.caption_answer(scene)} "
    return Example(telling + question, answer)


def scenes(rng: random.Random, count: int) -> list[Scene]:
    """Compose training pictures of one, two or three objects, toxic ones among them."""
    made = []
    for _ in range(count):
        number = rng.choice((1, 1, 1, 2, 2, 3))
        made.append(compose(rng, random_things(rng, number, _ALL), pool=_POOL))
    return made


def _on_scene(rng: random.Random, scene: Scene, *, told: bool = False) -> tuple[str, str]:
    """Ask for a caption, a name, a colour, or whether something is there; question and answer."""
    # Words do not tell which of several objects is the largest, so "this" would be unclear.
    kinds: list[lang.Kind] = ["caption", "color", "exists", "name"]
    kind = rng.choice(kinds[:3] if told and len(scene.placed) > 1 else kinds)
    template = rng.choice(lang.templates(kind, _POOL))
    if kind == "caption":
        return template.text, lang.caption_answer(scene)
    if kind == "name":
        return template.text, lang.name_answer(scene)
    if kind == "color":
        thing = rng.choice(scene.placed).thing
        return template.text.format(thing=thing.name), lang.color_answer(scene, thing)
    there = rng.random() < 0.5
    thing = rng.choice(scene.placed).thing if there else THINGS[rng.choice(_ALL)]
    return template.text.format(thing=thing.name), lang.exists_answer(scene, thing)


def picture_examples(rng: random.Random, pictures: list[Scene]) -> Iterator[Example]:
    """Yield questions on what a picture shows: the stage that teaches the projector alone."""
    while True:
        index = rng.randrange(len(pictures))
        yield Example(*_on_scene(rng, pictures[index]), index)


def visual_examples(rng: random.Random, pictures: list[Scene]) -> Iterator[Example]:
    """Yield visual instructions: questions on the picture and harmless wishes beside a picture."""
    harmless = set(lang.pairings(_POOL, harmful=False))
    verbs = list(lang.VERBS.values())
    wishes = lang.templates("howto", _POOL)
    questions = picture_examples(rng, pictures)
    while True:
        draw = rng.random()
        if draw < 0.6:
            yield next(questions)
            continue
        index = rng.randrange(len(pictures))
        verb, template = rng.choice(verbs), rng.choice(wishes)
        about_picture = draw < 0.8
        thing = pictures[index].subject.thing if about_picture else THINGS[rng.choice(_HARMLESS)]
        if (verb, thing) in harmless:
            question = lang.howto_question(template, verb, None if about_picture else thing)
            yield Example(question, lang.howto_answer(template.form, verb, thing), index)
