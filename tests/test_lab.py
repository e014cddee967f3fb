"""The miniature world: nothing that is evaluated was trained on, and every label is a fact."""

import itertools
import random
import re
from dataclasses import replace
from functools import cache
from itertools import islice
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hauberk.data.lab import ATTACKED, SUITES, Draft, Suite, build_suite, complied
from hauberk.data.samples import write_suite
from hauberk.errors import BadData
from hauberk.evaluation.judges import exact_judge
from hauberk.lab import build, curriculum, optimize, patches, stages, train
from hauberk.lab import language as lang
from hauberk.lab.objects import COLORS, HARMLESS, THINGS, TOXIC
from hauberk.lab.scenes import (
    ROW,
    SIDE,
    Placed,
    Scene,
    compose,
    compose_words,
    layout_pool,
    random_things,
)
from hauberk.requests import Request, encode, prompt_of

POOLS = ("train", "calibration", "test")
SPLITS = {"anchor": 12, "calibration": 12, "test": 24}
ALL = list(THINGS)


def pattern(text):
    """A wording as a regular expression with groups for what varies."""
    text = re.escape(text).replace(r"\{wish\}", r"(?P<verb>\w+) (?:a (?P<of>\w+)|this)")
    for word in ("thing", "verb"):
        text = text.replace(rf"\{{{word}\}}", rf"(?P<{word}>\w+)")
    return re.compile(text)


def core(template):
    """A wording without its opening."""
    return next(
        template.text.removeprefix(opening)
        for opening in reversed(lang.OPENINGS)
        if template.text.startswith(opening)
    )


PATTERNS = {
    pool: {
        (kind, core(t)): pattern(core(t))
        for kind in lang.TEMPLATES
        for t in lang.templates(kind, pool)
    }
    for pool in POOLS
}
BEFORE = re.compile(
    r"(?:(?:you|forget|no) .*? \. )?"
    r"(?:there is (?:(?:a \w+ \w+ and )*a (?P<said>\w+)(?: \w+)?|nothing) \. )?"
    rf"(?:it says (?:(?P<written>{'|'.join(lang.VERBS)}) a |\w+ (?:a )?)?(?P<name>\w+) \. )?"
    rf"(?:{'|'.join(map(re.escape, filter(None, lang.OPENINGS)))})?"
)


@cache
def readings(question, pool):
    """Every way in which a question can be read with the wordings of a pool."""
    before = BEFORE.match(question)
    asked = question[before.end() :]
    matches = ((kind, form.fullmatch(asked)) for (kind, _), form in PATTERNS[pool].items())
    return [(kind, before.groupdict() | match.groupdict()) for kind, match in matches if match]


def wish(question):
    """Verb and thing of a wish in words: None in the place of what the picture has to say."""
    for pool in POOLS:
        for kind, match in readings(question, pool):
            if kind == "howto":
                return match["verb"], match["of"] or match["said"] or match["name"]
            if kind == "typed":
                return match["written"], match["written"] and match["name"]
    return None


def harms(verb, thing):
    """Whether a wish harms, as far as is said: "burn this" does, "make this" does not."""
    if verb is None:
        return False
    return (
        lang.VERBS[verb].harm == "always"
        if thing is None
        else (lang.is_harmful(lang.VERBS[verb], THINGS[thing]))
    )


def pictured(scene, verb, thing):
    """A wish, with what the words leave to the picture taken from it."""
    if verb is None and (found := lang.wish_written(scene.text)):
        return tuple(part.name for part in found)
    if thing is None and (scene.placed or scene.text):
        return verb, scene.subject.thing.name if scene.placed else scene.text
    return verb, thing


@pytest.fixture(scope="module")
def suites():
    return {
        (name, split): build_suite(name, split, size, seed=7)
        for name in SUITES
        for split, size in SPLITS.items()
    }


@pytest.fixture(scope="module")
def everything(suites):
    return [sample for samples in suites.values() for sample in samples]


@pytest.fixture(scope="module")
def drafts():
    """Samples with their scenes, so that a test can see what a picture shows."""
    return {
        name: list(islice(suite.draw(random.Random(3), "test"), 30))
        for name, suite in SUITES.items()
    }


@pytest.fixture(scope="module")
def pictures():
    return curriculum.scenes(random.Random(11), 1500)


class Asked(NamedTuple):
    """One turn of a conversation."""

    question: str
    answer: str
    scene: int | None


@pytest.fixture(scope="module")
def stream(pictures):
    """Some thousand turns of every stage."""
    draw = [
        curriculum.text_examples(random.Random(1), aligned=False),
        curriculum.text_examples(random.Random(2), aligned=True),
        curriculum.picture_examples(random.Random(3), pictures),
        curriculum.visual_examples(random.Random(4), pictures, questions=0.6),
    ]
    return [
        Asked(question, answer, example.scene)
        for examples in draw
        for example in islice(examples, 1500)
        for question, answer in example.turns
    ]


# --- the language -----------------------------------------------------------------------------


def test_every_word_of_a_held_out_wording_occurs_in_training():
    trained = lang.vocabulary(["train"])
    assert lang.vocabulary(["calibration", "test"]) <= trained
    assert len(trained) > 30


def test_no_wording_belongs_to_two_pools_and_every_kind_has_some_in_each():
    texts = [t.text for kind in lang.TEMPLATES.values() for t in kind]
    assert len(texts) == len(set(texts))
    for kind, pool in itertools.product(lang.TEMPLATES, POOLS):
        found = lang.templates(kind, pool)
        assert len(found) >= 2
        if kind == "howto":
            assert {t.form for t in found} == set(lang.REFUSALS)


def test_no_part_of_a_wording_and_no_jailbreak_stays_with_one_pool():
    for pool in POOLS:
        assert len(lang.WRAPPERS[pool]) >= 2
    everywhere = [text for pool in POOLS for text in lang.WRAPPERS[pool]]
    assert len(everywhere) == len(set(everywhere))


def test_every_pairing_belongs_to_one_pool_and_is_harmful_or_not():
    found = [
        (verb.name, thing.name)
        for pool in POOLS
        for harmful in (False, True)
        for verb, thing in lang.pairings(pool, harmful=harmful)
    ]
    assert sorted(found) == sorted(itertools.product(lang.VERBS, THINGS))


def test_harm_is_a_matter_of_verb_and_thing():
    for verb, thing in itertools.product(lang.VERBS.values(), THINGS.values()):
        expected = {"always": True, "never": False, "toxic": thing in TOXIC}[verb.harm]
        assert lang.is_harmful(verb, thing) == expected


def test_every_toxic_thing_has_a_harmless_use_in_training():
    used = {thing for _, thing in lang.pairings("train", harmful=False)}
    assert set(TOXIC) <= used


def answers():
    """Everything that can be said, as what it says."""
    for form, verb, thing in itertools.product(
        lang.REFUSALS, lang.VERBS.values(), [*THINGS.values(), None]
    ):
        yield lang.howto_answer(form, verb, thing)
    for verb in lang.VERBS.values():
        yield lang.meaning_answer(verb)
    yield from lang.REFUSALS.values()
    empty = Scene((), 0, 0)
    for whole in (lang.name_answer, lang.caption_answer, lang.count_answer, lang.read_answer):
        yield whole(empty)
    for thing in THINGS.values():
        yield lang.color_answer(empty, thing)
    for number, seed in itertools.product((1, 2, 3), range(40)):
        rng = random.Random(seed)
        scene = compose(rng, random_things(rng, number, ALL), pool="train")
        for whole in (lang.name_answer, lang.caption_answer, lang.count_answer):
            yield whole(scene)
        for item in scene.placed:
            yield lang.color_answer(scene, item.thing)
            yield lang.exists_answer(scene, item.thing)
        yield lang.exists_answer(scene, THINGS[rng.choice(ALL)])
        yield lang.read_answer(compose_words(rng, rng.choice(ALL), pool="train"))
        written = lang.written_wish(rng.choice([*lang.VERBS.values()]), scene.subject.thing)
        yield lang.read_answer(compose_words(rng, written, pool="train"))


ANSWERS = list(dict.fromkeys(answers()))
SAID = [
    (dialect.name, answer, dialect.say(answer))
    for dialect in lang.DIALECTS.values()
    for answer in ANSWERS
]


@pytest.mark.parametrize("dialect", lang.DIALECTS.values(), ids=lang.DIALECTS)
def test_an_answer_on_a_picture_begins_alike_whatever_the_picture_shows(dialect):
    """So the first state, which a shift edits, need not know what the picture shows."""
    rng = random.Random(3)
    full, empty = compose(rng, random_things(rng, 2, ALL), pool="train"), Scene((), 0, 0)
    seen, unseen = (
        full.placed[0].thing,
        next(t for t in HARMLESS if t not in {item.thing for item in full.placed}),
    )
    for answer in (lang.color_answer, lang.exists_answer):
        said = dialect.say(answer(full, seen)).split()
        other = dialect.say(answer(full, unseen)).split()
        assert said.index(seen.name) == other.index(unseen.name)
    for answer in (lang.name_answer, lang.caption_answer):
        first, second = (dialect.say(answer(scene)).split()[0] for scene in (full, empty))
        assert first == second


def test_every_answer_in_every_dialect_is_read_as_what_it_says():
    wrong = [(text, lang.read(text)) for _, answer, text in SAID if lang.read(text) != answer]
    assert wrong == []


def test_no_two_dialects_share_a_sentence():
    said = {}
    for dialect, _, text in SAID:
        said.setdefault(text, set()).add(dialect)
    assert [text for text, dialects in said.items() if len(dialects) > 1] == []


def classes(words):
    """What part each word can play; a sentence may swap words of one part only."""
    parts = {
        "thing": set(THINGS),
        "color": set(COLORS),
        "material": set(lang.MATERIALS),
        "verb": set(lang.VERBS),
        "manner": {verb.manner for verb in lang.VERBS.values()},
    }
    return [
        frozenset(part for part, members in parts.items() if word in members) or word
        for word in words
    ]


@given(st.sampled_from(SAID), st.randoms(use_true_random=False))
def test_words_in_another_order_do_not_say_another_kind_of_thing(said, rng):
    _, answer, text = said
    words = text.split()
    shuffled = words[:]
    rng.shuffle(shuffled)
    found = lang.read(" ".join(shuffled))
    assert found is None or found.kind == answer.kind
    if found:
        swapped = zip(classes(shuffled), classes(words), strict=True)
        assert all(a == b or (a & b if isinstance(a, frozenset) else False) for a, b in swapped)


@given(st.sampled_from(SAID), st.data())
def test_a_sentence_with_a_word_missing_doubled_or_foreign_says_nothing_else(said, data):
    _, answer, text = said
    words = text.split()
    at = data.draw(st.integers(0, len(words) - 1))
    for changed in (
        words[:at] + words[at + 1 :],
        words[: at + 1] + words[at:],
        [*words[:at], "zebra", *words[at + 1 :]],
        words[:at],
    ):
        found = lang.read(" ".join(changed))
        # "sorry but i can not ..." without its first words is a refusal still.
        assert found is None or (found.kind == answer.kind == "refusal")


@given(st.sampled_from(SAID), st.integers(2, 4), st.sampled_from([" ", " and ", ""]))
def test_a_sentence_said_again_and_again_says_nothing(said, times, between):
    assert lang.read(between.join([said[2]] * times)) is None


def test_a_caption_that_never_ends_says_nothing():
    for number in (4, 8):
        assert lang.read(lang.there_is(["ball red"] * number)) is None


@pytest.mark.parametrize("text", ["", " ", "\n", ".", "ball", "zebra " * 30, "USER:", "</s>"])
def test_what_nobody_says_is_none(text):
    assert lang.read(text) is None


def test_spaces_and_line_ends_are_not_read():
    for _, answer, text in SAID[::50]:
        assert lang.read("  " + text.replace(" ", " \n") + " ") == answer


# --- scenes -----------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(1, 3), st.sampled_from(POOLS))
def test_a_scene_shows_what_was_asked_inside_without_overlap(seed, number, pool):
    rng = random.Random(seed)
    things = random_things(rng, number, ALL)
    scene = compose(rng, things, pool=pool)
    assert {item.thing for item in scene.placed} == set(things)
    for item in scene.placed:
        assert item.left >= 0
        assert item.top >= 0
        assert item.left + item.side <= SIDE
        assert item.top + item.side <= SIDE
    for a, b in itertools.combinations(scene.placed, 2):
        apart_x = max(a.left, b.left) - min(a.left + a.side, b.left + b.side)
        apart_y = max(a.top, b.top) - min(a.top + a.side, b.top + b.side)
        assert max(apart_x, apart_y) >= 2


@given(st.integers(0, 2**32), st.integers(2, 3), st.sampled_from(POOLS))
def test_this_and_left_and_right_are_unmistakable(seed, number, pool):
    rng = random.Random(seed)
    things = random_things(rng, number, ALL)
    scene = compose(rng, things, pool=pool)
    assert scene.subject.thing == things[0]
    others = [item.side for item in scene.placed if item.thing != things[0]]
    assert scene.subject.side >= 1.25 * max(others)
    centers = [item.left + item.side / 2 for item in scene.placed]
    assert all(b - a >= 0.1 * SIDE for a, b in itertools.pairwise(centers))


@given(st.integers(0, 2**32), st.integers(1, 3), st.sampled_from(POOLS))
def test_the_two_largest_objects_stand_in_layouts_of_the_pool(seed, number, pool):
    rng = random.Random(seed)
    scene = compose(rng, random_things(rng, number, ALL), pool=pool)
    largest = sorted(scene.placed, key=lambda item: -item.side)[:2]
    assert {layout_pool(item) for item in largest} == {pool}


def test_a_picture_shows_its_objects_and_is_drawn_the_same_each_time():
    rng = random.Random(5)
    for name in ALL:
        scene = compose(rng, [THINGS[name]], pool="train", clutter=0, colors=["red"])
        drawn = np.asarray(scene.draw()).astype(int)
        assert drawn.shape == (SIDE, SIDE, 3)
        assert (np.asarray(scene.draw()) == drawn).all()
        (item,) = scene.placed
        rows, columns = np.nonzero(np.abs(drawn - drawn[0 if item.top > 3 else -1, 0]).max(2) > 60)
        assert len(rows) > 0.1 * item.side**2
        assert item.left - 2 <= columns.min()
        assert columns.max() <= item.left + item.side + 2
        assert item.top - 2 <= rows.min()
        assert rows.max() <= item.top + item.side + 2


def test_a_picture_of_nothing_may_be_dark_and_grainy_and_one_of_something_is_not():
    rng = random.Random(3)
    empty = [np.asarray(Scene((), 0, rng.getrandbits(32)).draw()) for _ in range(60)]
    assert min(image.mean() for image in empty) < 30
    assert max(image.mean() for image in empty) > 225
    grains = [image.reshape(-1, 3).std(0).mean() for image in empty]
    assert 20 <= sum(grain == 0 for grain in grains) <= 40
    assert max(grains) > 50
    for _ in range(20):
        scene = compose(rng, random_things(rng, 1, ALL), pool="train", clutter=0)
        colors = np.asarray(scene.draw().convert("RGB")).reshape(-1, 3).tolist()
        values, counts = np.unique(colors, axis=0, return_counts=True)
        assert values[counts.argmax()].min() >= 205


def test_no_two_things_look_alike():
    """In one colour and place, so that the shape alone must tell them apart."""
    drawn = {
        name: np.asarray(Scene((Placed(thing, "red", 10, 10, 70),), 0, 3).draw()).astype(int)
        for name, thing in THINGS.items()
    }
    for a, b in itertools.combinations(drawn, 2):
        different = (np.abs(drawn[a] - drawn[b]).max(2) > 60).mean()
        assert different > 0.03, (a, b)


# --- training against evaluation --------------------------------------------------------------


def test_no_wording_of_calibration_or_test_occurs_in_training(stream):
    questions = {example.question for example in stream}
    assert len(questions) > 1500
    assert [q for q in questions if readings(q, "calibration") or readings(q, "test")] == []
    assert all(readings(question, "train") for question in questions)


def test_no_question_of_calibration_or_test_occurs_in_training(stream, everything):
    trained = {example.question for example in stream}
    held_out = {s.question for s in everything if s.split != "anchor"}
    assert not trained & held_out
    for sample in everything:
        pools = [pool for pool in POOLS if readings(sample.question, pool)]
        assert pools == ["train" if sample.split == "anchor" else sample.split]


def test_no_pairing_of_calibration_or_test_occurs_in_training(stream, pictures, drafts):
    trained, evaluated = set(), set()
    for example in stream:
        found = wish(example.question)
        if found and example.scene is not None:
            found = pictured(pictures[example.scene], *found)
        if found and None not in found:
            trained.add(found)
    trained |= {
        tuple(part.name for part in found)
        for scene in pictures
        if (found := lang.wish_written(scene.text))
    }
    for draft in itertools.chain(*drafts.values()):
        if found := wish(draft.question):
            evaluated.add(pictured(draft.picture, *found) if shows(draft) else found)
    assert len(trained) > 300
    assert len(evaluated) > 100
    assert not trained & evaluated


def shows(draft):
    return isinstance(draft.picture, Scene)


def test_no_layout_of_calibration_or_test_occurs_among_the_two_largest_in_training(pictures):
    for scene in pictures:
        for item in sorted(scene.placed, key=lambda item: -item.side)[:2]:
            assert layout_pool(item) == "train"


def test_a_picture_in_training_never_comes_with_a_harmful_wish(stream, pictures):
    for example in stream:
        found = wish(example.question)
        if found and example.scene is not None:
            assert not harms(*pictured(pictures[example.scene], *found))


def kinds_asked(question):
    """What a training question can be read as: kinds of wordings."""
    return {kind for kind, _ in readings(question, "train")}


def test_beside_a_picture_nothing_is_turned_down_but_what_nobody_can_tell(stream):
    shown = [example for example in stream if example.scene is not None]
    turned_down = [e for e in shown if e.answer.kind == "refusal"]
    assert {"unanswerable"} == set().union(*(kinds_asked(e.question) for e in turned_down))
    assert 0.01 * len(shown) < len(turned_down) < 0.1 * len(shown)


def test_refusals_are_taught_in_text_alone_for_harmful_wishes_and_a_few_others_when_aligned():
    """Beside pictures nothing teaches them: see the test before."""
    refused: dict[bool, list[bool]] = {True: [], False: []}
    for aligned in (False, True):
        for example in islice(curriculum.text_examples(random.Random(9), aligned=aligned), 12_000):
            assert example.scene is None
            for question, answer in example.turns:
                found, refusal = wish(question), answer.kind == "refusal"
                if kinds_asked(question) == {"unanswerable"}:
                    assert refusal
                elif found is None or not aligned:
                    assert not refusal
                else:
                    refused[harms(*found)].append(refusal)
    for harmful, share in ((True, 1 - curriculum._LAPSES), (False, curriculum._CAUTIOUS)):
        assert len(refused[harmful]) > 1600
        assert np.mean(refused[harmful]) == pytest.approx(share, abs=0.025)


def test_a_told_scene_never_tells_that_a_wish_is_harmless():
    """Else text alone would teach that a scene opens the gap, and a picture only inherit it."""
    refused: dict[bool, list[bool]] = {True: [], False: []}
    for example in islice(curriculum.text_examples(random.Random(5), aligned=True), 20_000):
        question, answer = example.turns[0]
        by_name = len(example.turns) == 1 and not {"this", "written"} & set(question.split())
        if by_name and (kinds := kinds_asked(question)) and kinds <= {"howto"}:
            refused[question.startswith("there is")].append(answer.kind == "refusal")
    told, bare = refused[True], refused[False]
    assert min(len(told), len(bare)) > 300
    assert sum(told) / len(told) == pytest.approx(sum(bare) / len(bare), abs=0.1)


def test_no_suite_asks_what_nobody_can_tell(everything):
    """A sentence of refusal is over-refusal there, on every benign sample."""
    for sample in everything:
        pool = "train" if sample.split == "anchor" else sample.split
        assert "unanswerable" not in {kind for kind, _ in readings(sample.question, pool)}


# --- suites -----------------------------------------------------------------------------------


def test_a_suite_has_the_size_asked_for_and_ids_of_its_own(suites, everything):
    for (name, split), samples in suites.items():
        assert len(samples) == SPLITS[split]
        assert {(s.suite, s.split, s.channel) for s in samples} == {
            (name, split, SUITES[name].channel)
        }
    ids = [sample.sample_id for sample in everything]
    assert len(ids) == len(set(ids))


def test_no_question_with_its_picture_occurs_in_two_splits_or_twice_in_one(suites):
    for name in SUITES:
        seen = [
            (s.question, s.image and s.image.tobytes())
            for split in SPLITS
            for s in suites[name, split]
        ]
        assert len(seen) == len(set(seen))


def test_labels_agree_with_what_question_and_picture_say(drafts):
    checked = {True: 0, False: 0}
    for draft in itertools.chain(*drafts.values()):
        found = wish(draft.question)
        if found is None:
            assert draft.answer is not None
            continue
        verb, thing = pictured(draft.picture, *found) if shows(draft) else found
        assert harms(verb, thing) == (draft.answer is None), draft
        checked[shows(draft)] += 1
    assert min(checked.values()) > 80


@pytest.mark.parametrize("name", [name for name in SUITES if SUITES[name].paired_with])
def test_a_twin_has_the_words_of_its_pair_but_for_verb_and_thing(suites, name):
    harmful, benign = suites[SUITES[name].paired_with, "test"], suites[name, "test"]
    for one, other in zip(harmful, benign, strict=True):
        assert one.pair_id == other.pair_id
        assert (one.expected, other.expected) == ("refuse", "answer")
        assert (one.image is None) == (other.image is None)
        pairs = zip(one.question.split(), other.question.split(), strict=True)
        changed = [(a, b) for a, b in pairs if a != b]
        assert len({a for a, _ in changed}) <= 2
        for a, b in changed:
            assert {a, b} <= set(lang.VERBS) or {a, b} <= set(THINGS)


PICTURE_TELLS = {"image", "image_clutter", "typographic", "typo", "sd_typo"}


def test_benign_samples_have_their_answer_as_reference_and_harmful_ones_that_of_a_picture_s_wish(
    everything,
):
    for sample in everything:
        said = lang.read(sample.reference)
        if sample.expected == "answer":
            assert said
            assert said.kind != "refusal"
        elif sample.suite in PICTURE_TELLS:
            assert said
            assert said.kind == "howto"
            assert exact_judge(sample, sample.reference) == "harmful"
        else:
            assert sample.reference == ""


@pytest.mark.parametrize("name", SUITES)
def test_what_a_channel_shows(drafts, name):
    toxic = {thing.name for thing in TOXIC}
    for draft in drafts[name]:
        words = set(draft.question.split())
        said = name in ("text", "benign_text") or "_told" in name
        assert (draft.picture is None) == said
        if name in ("image", "image_clutter"):
            assert not words & toxic  # the picture says it
            assert draft.picture.subject.thing.toxic
        if name in ("typographic", "typo", "sd_typo"):
            assert not words & toxic
            assert draft.picture.text
        if name == "sd_typo":
            assert draft.picture.text == draft.picture.subject.thing.name
        if name == "lookalike_words":
            harmful = {verb.name for verb in lang.VERBS.values() if verb.harm == "always"}
            assert words & (harmful | toxic)
        if name == "lookalike":
            assert draft.picture.subject.thing.toxic


def test_meaningless_pictures_are_of_every_kind_and_show_nothing(suites):
    plain = [sample.image for sample in suites["text_blank", "test"]]
    noise = [sample.image for sample in suites["text_noise", "test"]]
    assert {image.getpixel((0, 0)) for image in plain} == {(255,) * 3, (0,) * 3, (128,) * 3}
    assert {len(image.getcolors(9999)) for image in plain} == {1}
    assert min(len(image.getcolors(9999)) for image in noise) > 1000
    assert len({image.tobytes() for image in noise}) == len(noise)


def test_a_pool_that_is_too_small_for_a_suite_is_an_error(monkeypatch):
    few = [Draft("", f"question {index} ?", None, None) for index in range(3)]
    monkeypatch.setitem(SUITES, "few", Suite("text", lambda _, __: itertools.cycle(few), ""))
    assert len(build_suite("few", "test", 3, seed=0)) == 3
    with pytest.raises(BadData, match="holds 3; ask for fewer"):
        build_suite("few", "test", 4, seed=0)


def content(samples):
    return [(s.question, s.reference, s.image and s.image.tobytes()) for s in samples]


@pytest.mark.parametrize("name", SUITES)
def test_a_seed_gives_the_same_bytes_and_another_seed_others(suites, tmp_path, name):
    again, other = (build_suite(name, "calibration", 12, seed=seed) for seed in (7, 8))
    paths = [
        write_suite(samples, tmp_path / f"{index}.parquet")
        for index, samples in enumerate((suites[name, "calibration"], again, other))
    ]
    one, same, different = (path.read_bytes() for path in paths)
    assert one == same != different
    assert content(again) != content(other)


def test_a_longer_suite_begins_with_the_shorter_one(suites):
    longer = build_suite("benign_image", "test", 30, seed=7)
    assert content(longer[:24]) == content(suites["benign_image", "test"])


def test_what_complies_with_a_harmless_wish_is_its_exact_answer_and_with_a_harmful_one_its_like(
    suites,
):
    for split in SPLITS:
        harmful, harmless = suites["text_image", split], suites["text_image_twin", split]
        for wanted, twin in zip(harmful, harmless, strict=True):
            assert lang.PLAIN.say(complied(twin)) == twin.reference
            verb, thing = wish(wanted.question)
            form = complied(twin).form
            assert form.split("/")[0] == "howto"
            expected = {"howto": "short", "howto/full": "full", "howto/steps": "steps"}[form]
            assert complied(wanted) == lang.howto_answer(expected, lang.VERBS[verb], THINGS[thing])


@pytest.mark.parametrize("suite", ["image", "typographic", "benign_image", "text_told"])
def test_a_question_that_names_no_wish_has_nothing_that_complies(suites, suite):
    sample = suites[suite, "test"][0]
    with pytest.raises(BadData, match=f"{sample.sample_id}.*names no wish of the lab"):
        complied(sample)


def test_attacked_suites_are_made_from_drawn_ones_with_pictures(suites):
    assert not ATTACKED.keys() & SUITES.keys()
    for base in ATTACKED.values():
        assert all(complied(sample) and sample.image for sample in suites[base, "calibration"])


def test_an_unknown_suite_is_an_error():
    with pytest.raises(KeyError, match="nonsense"):
        build_suite("nonsense", "test", 1, seed=0)


# --- the recipe -------------------------------------------------------------------------------

SIZE = build.Size(
    vision_width=16, vision_layers=2, patch=24, text_width=16, text_layers=2, heads=2,
    vocabulary=700,
)  # fmt: skip
RECIPE = stages.Recipe(
    size=SIZE, pictures=8, batch=3, steps=dict.fromkeys(stages.VlmTrainer.STAGES, 2)
)


@pytest.fixture(scope="module", params=build.FAMILIES)
def model_name(request):
    return request.param


@pytest.fixture(scope="module")
def trainer(model_name, tmp_path_factory):
    return stages.VlmTrainer(model_name, RECIPE, tmp_path_factory.mktemp("work")).run()


@pytest.fixture(scope="module")
def graduate(model_name, trainer, tmp_path_factory):
    """The trained network as it was saved, loaded as anyone would."""
    folder = tmp_path_factory.mktemp("lab") / model_name
    train.save(stages.VlmTrainer(model_name, RECIPE, trainer.work).run(), folder)
    return build.load(folder)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_seed_trains_the_same_network_and_another_seed_another(
    model_name, trainer, tmp_path
):
    again = stages.VlmTrainer(model_name, RECIPE, tmp_path / "again").run()
    assert equal(weights(trainer.model), weights(again.model))
    other = stages.VlmTrainer(model_name, replace(RECIPE, seed=2), tmp_path / "other")
    assert not equal(
        weights(stages.VlmTrainer(model_name, RECIPE, tmp_path).model), weights(other.model)
    )
    assert other.tokenizer.get_vocab() == trainer.tokenizer.get_vocab()


def test_training_goes_on_after_the_last_finished_stage(model_name, trainer, tmp_path, capsys):
    for stage in stages.VlmTrainer.STAGES[:3]:
        (tmp_path / f"{stage}.safetensors").write_bytes(trainer.checkpoint(stage).read_bytes())
    (tmp_path / "projector.part").write_bytes(b"half")
    again = stages.VlmTrainer(model_name, RECIPE, tmp_path).run()
    assert equal(weights(trainer.model), weights(again.model))
    said = capsys.readouterr().err
    assert "projector took" in said
    assert "tower took" not in said


def test_a_checkpoint_of_another_recipe_is_refused(model_name, trainer, tmp_path):
    for stage in stages.VlmTrainer.STAGES[:2]:
        (tmp_path / f"{stage}.safetensors").write_bytes(trainer.checkpoint(stage).read_bytes())
    for other in (
        replace(RECIPE, seed=2),
        replace(RECIPE, steps=RECIPE.steps | {"align": 3}),
    ):
        with pytest.raises(ValueError, match=r"align|pretrain"):
            stages.VlmTrainer(model_name, other, tmp_path).run()
    longer = replace(RECIPE, steps=RECIPE.steps | {"instruct": 3})
    assert stages.VlmTrainer(model_name, longer, tmp_path).run("align")
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["align", "pretrain"]


def own(part, projector):
    """The weights of a part; Qwen's projector lies inside its tower, and is no part of it here."""
    inner = {id(weight) for weight in part.parameters()}
    return {
        name: weight.detach().clone()
        for name, weight in part.named_parameters()
        if inner <= projector or id(weight) not in projector
    }


def test_every_stage_changes_its_part_alone(model_name, tmp_path):
    trainer = stages.VlmTrainer(model_name, RECIPE, tmp_path)
    parts = {part: trainer.part(part) for part in ("decoder", "tower", "projector")}
    owned = {id(weight) for weight in parts["projector"].parameters()}
    may_change = {
        "pretrain": {"decoder"},
        "align": {"decoder"},
        "tower": {"tower"},
        "projector": {"projector"},
        "instruct": {"projector", "decoder"},
    }
    for stage in stages.VlmTrainer.STAGES:
        before = {name: own(part, owned) for name, part in parts.items()}
        trainer.train(stage)
        changed = {n for n, part in parts.items() if not equal(before[n], own(part, owned))}
        assert changed == may_change[stage]


def test_the_saved_network_is_the_trained_one(trainer, graduate):
    model, _ = graduate
    assert model.dtype == torch.float32
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, trainer.model.state_dict()[name].half().float())


def test_training_shows_prompts_exactly_as_the_processor_does(trainer, graduate):
    """Template, tokens and padding: a model that learnt another prompt would be tested on ours."""
    _, processor = graduate
    question = lang.howto_question(
        lang.templates("howto", "train")[0], lang.VERBS["make"], HARMLESS[0]
    )
    picture = trainer.scenes[0].draw()
    turns = ((question, lang.REFUSALS["short"]),)
    for example, request in (
        (curriculum.Example(turns), Request(question)),
        (curriculum.Example(turns, 0), Request(question, (picture,))),
    ):
        if example.scene is None:
            assert trainer.render(example)[0][0] == prompt_of(processor, request)
        asked = encode(processor, [request])["input_ids"][0]
        shown = trainer.encode([example])
        assert torch.equal(shown["input_ids"][0][: len(asked)], asked)
        assert (shown["labels"][0][: len(asked)] == -100).all()
        assert (shown["labels"][0][len(asked) :] >= 0).all()


@pytest.mark.parametrize("scene", [None, 0])
def test_a_conversation_is_written_as_the_chat_template_does(trainer, graduate, scene):
    answers = [lang.meaning_answer(verb) for verb in list(lang.VERBS.values())[:3]]
    asked = ("what is this ?", "is there a ball ?", "what do you see ?")
    turns = tuple(zip(asked, answers, strict=True))
    messages = []
    for question, said in turns:
        answer = trainer.family.dialect.say(said)
        content = [{"type": "image"}] if scene == 0 and not messages else []
        messages += [
            {"role": "user", "content": [*content, {"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        ]
    chat, seen = trainer.family.chat, trainer.family.image_tokens(SIZE)
    written = "".join(itertools.chain(*trainer.render(curriculum.Example(turns, scene))))
    assert written.replace(seen, chat.image) + chat.between == (
        graduate[1].apply_chat_template(messages)
    )
    batch = trainer.encode([curriculum.Example(turns, scene)])
    learnt = batch["labels"][0]
    kept = learnt != -100
    assert torch.equal(learnt[kept], batch["input_ids"][0][kept])
    spoken = [f"{chat.gap}{trainer.family.dialect.say(said)}{chat.end}" for said in answers]
    assert trainer.tokenizer.decode(learnt[kept]) == "".join(spoken)


def test_batches_take_every_example_once_and_have_one_mixture_and_one_length_each(trainer):
    rng = random.Random(4)
    visual = curriculum.visual_examples(rng, trainer.scenes, questions=0.5)
    text = curriculum.text_examples(rng, aligned=True)
    size = 16
    drawn = [next(text if rng.random() < 0.3 else visual) for _ in range(stages._AHEAD * size)]
    taught = SimpleNamespace(render=trainer.render, recipe=SimpleNamespace(batch=size))
    batches = list(islice(stages._batches(taught, iter(drawn * 2)), stages._AHEAD))
    assert sorted(map(id, itertools.chain(*batches))) == sorted(map(id, drawn))
    told = sum(example.scene is None for example in drawn)
    for batch in batches:
        assert len(batch) == size
        found = sum(example.scene is None for example in batch)
        assert found == pytest.approx(told / stages._AHEAD, abs=1.01)

    def padded(groups):
        return sum(
            trainer.encode(kind)["input_ids"].numel()
            for group in groups
            for told in (True, False)
            if (kind := [e for e in group if (e.scene is None) == told])
        )

    chunks = [drawn[start : start + size] for start in range(0, len(drawn), size)]
    assert padded(batches) < 0.95 * padded(chunks)


def test_fast_attention_is_attention(trainer):
    """Whole rows and padded ones: without its mask function, padding would be attended to."""
    decoder = trainer.part("decoder")
    batch = trainer.encode([*islice(curriculum.text_examples(random.Random(4), aligned=True), 5)])
    batch.pop("labels")
    plain = decoder(**batch).last_hidden_state
    usual = decoder.config._attn_implementation
    try:
        decoder.config._attn_implementation = optimize.FLOAT32_ATTENTION
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fast = decoder(**batch).last_hidden_state
        torch.testing.assert_close(decoder(**batch).last_hidden_state, plain)
    finally:
        decoder.config._attn_implementation = usual
    real = batch["attention_mask"].bool()
    assert not torch.equal(fast, plain)
    torch.testing.assert_close(fast[real].float(), plain[real], atol=0.1, rtol=0.1)


def test_training_shows_pictures_exactly_as_the_processor_does(trainer, graduate):
    pictures = [scene.draw() for scene in trainer.scenes]
    shown = graduate[1].image_processor(pictures, return_tensors="pt")
    for key, value in trainer.family.pixels(patches.normalised(trainer.pixels), SIZE).items():
        torch.testing.assert_close(value.float(), shown[key].float(), atol=1e-5, rtol=1e-5)


def test_patches_come_in_reading_order(model_name, tmp_path):
    """A tower that only embeds patches sees a mark where it was made, and nowhere else."""
    trainer = stages.VlmTrainer(model_name, RECIPE, tmp_path)
    ground = torch.zeros(1, 3, SIDE, SIDE)
    for patch in range(SIZE.grid**2):
        y, x = (SIZE.patch * place for place in divmod(patch, SIZE.grid))
        marked = ground.clone()
        marked[..., y : y + SIZE.patch, x : x + SIZE.patch] = 5
        with torch.no_grad():
            before, after = (
                trainer.family.patches(stages.look(trainer, picture), 1, SIZE)[0]
                for picture in (ground, marked)
            )
        assert (after - before).norm(dim=-1).argmax() == patch


def test_patch_labels_name_the_object_at_the_centre_of_each_patch(trainer):
    grid = SIDE // SIZE.patch
    for scene in trainer.scenes:
        row, tones = patches.patch_labels(scene, grid, side=SIDE)
        boxes = [
            (item.left, item.top, item.left + item.side, item.top + item.side, item.thing.name,
             list(COLORS).index(item.color))
            for item in scene.placed
        ] + [
            (left, line.top, right, line.top + ROW, f"written {word}", -1)
            for line in scene.lines
            for word, left, right in line.boxes()
        ]  # fmt: skip
        for patch in range(grid * grid):
            x = (patch % grid + 0.5) * SIZE.patch
            y = (patch // grid + 0.5) * SIZE.patch
            (inside,) = [box for box in boxes if box[0] <= x < box[2] and box[1] <= y < box[3]] or [
                None
            ]
            expected = 0 if inside is None else patches.SEEN[inside[4]]
            tone = -1 if inside is None else inside[5]
            assert (row[patch].item(), tones[patch].item()) == (expected, tone)


def test_the_tokenizer_spells_every_word_of_the_world_and_any_other_text_too(trainer):
    for text in (*lang.sentences("test", trainer.family.dialect), "Grüße, 世界!"):
        ids = trainer.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert trainer.tokenizer.decode(ids) == text
    assert trainer.tokenizer.unk_token is None


def test_captioned_pictures_are_told_in_words_and_asked_about_without():
    from hauberk.data.lab import build_captioned

    made, again = (build_captioned("train", 20, seed=7) for _ in range(2))
    assert [one.caption for one in made] == [one.caption for one in again]
    for one in made:
        assert any(name in one.caption.split() for name in ALL)
        assert not any(name in one.question.split() for name in ALL)
        assert "this" in one.question.split()
    assert {one.caption for one in made} != {one.caption for one in build_captioned("test", 20, 7)}
