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
    """Yield questions in text alone.

    Before alignment every wish is answered, as a language model does that only learnt to
    continue texts; after it, harmful wishes are refused.
    """
    pools = {harm: lang.pairings(_POOL, harmful=harm) for harm in (False, True)}
    wordings = lang.templates("howto", _POOL)
    while True:
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
        yield Example(question, answer)


def scenes(rng: random.Random, count: int) -> list[Scene]:
    """Compose training pictures of one, two or three objects, toxic ones among them."""
    made = []
    for _ in range(count):
        number = rng.choice((1, 1, 1, 2, 2, 3))
        made.append(compose(rng, random_things(rng, number, _ALL), pool=_POOL))
    return made


def caption_examples(rng: random.Random, pictures: list[Scene]) -> Iterator[Example]:
    """Yield captions and names: the stage that teaches the projector alone."""
    while True:
        index = rng.randrange(len(pictures))
        kind: lang.Kind = rng.choice(("caption", "name"))
        template = rng.choice(lang.templates(kind, _POOL))
        answer = (lang.caption_answer if kind == "caption" else lang.name_answer)(pictures[index])
        yield Example(template.text, answer, index)


def visual_examples(rng: random.Random, pictures: list[Scene]) -> Iterator[Example]:
    """Yield visual instructions: questions on the picture and harmless wishes beside a picture."""
    harmless = set(lang.pairings(_POOL, harmful=False))
    verbs = list(lang.VERBS.values())
    wishes = lang.templates("howto", _POOL)
    captions = caption_examples(rng, pictures)
    while True:
        index = rng.randrange(len(pictures))
        scene = pictures[index]
        draw = rng.random()
        if draw < 0.25:
            yield next(captions)
        elif draw < 0.40:
            thing = rng.choice(scene.placed).thing
            template = rng.choice(lang.templates("color", _POOL))
            question = template.text.format(thing=thing.name)
            yield Example(question, lang.color_answer(scene, thing), index)
        elif draw < 0.55:
            there = rng.random() < 0.5
            thing = rng.choice(scene.placed).thing if there else THINGS[rng.choice(_ALL)]
            template = rng.choice(lang.templates("exists", _POOL))
            question = template.text.format(thing=thing.name)
            yield Example(question, lang.exists_answer(scene, thing), index)
        elif draw < 0.80:  # a wish about the picture
            verb, template = rng.choice(verbs), rng.choice(wishes)
            thing = scene.subject.thing
            if (verb, thing) in harmless:
                question = lang.howto_question(template, verb, None)
                yield Example(question, lang.howto_answer(template.form, verb, thing), index)
        else:  # a wish that the picture has nothing to do with
            verb, template = rng.choice(verbs), rng.choice(wishes)
            thing = THINGS[rng.choice(_HARMLESS)]
            if (verb, thing) in harmless:
                question = lang.howto_question(template, verb, thing)
                yield Example(question, lang.howto_answer(template.form, verb, thing), index)
