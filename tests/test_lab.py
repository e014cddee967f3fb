"""The miniature world: nothing that is evaluated was trained on, and every label is a fact."""

import itertools
import random
import re
from itertools import islice
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hauberk.data.lab import SUITES, build_suite
from hauberk.data.samples import write_suite
from hauberk.lab import build, curriculum, optimize, train
from hauberk.lab import language as lang
from hauberk.lab.objects import COLORS, HARMLESS, THINGS, TOXIC
from hauberk.lab.scenes import SIDE, Placed, Scene, compose, layout_pool, random_things
from hauberk.requests import Request, encode, prompt_of

POOLS = ("train", "calibration", "test")
SPLITS = {"anchor": 12, "calibration": 12, "test": 24}
ALL = list(THINGS)


def pattern(template):
    """A template as a regular expression with groups for what varies."""
    text = re.escape(template.text).replace(r"\{wish\}", r"(?P<verb>\w+) (?:a (?P<of>\w+)|this)")
    said = r"(?:there is (?:a \w+ \w+ and )*a (?P<said>\w+)(?: \w+)? \. )?"
    for word in ("thing", "verb"):
        text = text.replace(rf"\{{{word}\}}", rf"(?P<{word}>\w+)")
    return re.compile(said + text)


PATTERNS = {
    pool: [(kind, pattern(t)) for kind in lang.TEMPLATES for t in lang.templates(kind, pool)]
    for pool in POOLS
}


def readings(question, pool):
    """Every way in which a question can be read with the wordings of a pool."""
    matches = ((kind, form.fullmatch(question)) for kind, form in PATTERNS[pool])
    return [(kind, match) for kind, match in matches if match]


def wish(question):
    """Verb and thing of a wish in words: (verb, None) where the picture says the thing."""
    for pool in POOLS:
        for kind, match in readings(question, pool):
            if kind == "howto":
                return match["verb"], match["of"] or match["said"]
    return None


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
    """Everything that can be said: the kind, and the sentence."""
    for form, verb, thing in itertools.product(lang.REFUSALS, lang.VERBS.values(), THINGS.values()):
        yield "howto", lang.howto_answer(form, verb, thing)
        yield "howto", lang.howto_answer(form, verb, None)
    for verb in lang.VERBS.values():
        yield "meaning", lang.meaning_answer(verb)
    empty = Scene((), 0, 0)
    yield "name", lang.name_answer(empty)
    yield "caption", lang.caption_answer(empty)
    for thing in THINGS.values():
        yield "color", lang.color_answer(empty, thing)
    for refusal in lang.REFUSALS.values():
        yield "refusal", refusal
    for number, seed in itertools.product((1, 2, 3), range(60)):
        rng = random.Random(seed)
        scene = compose(rng, random_things(rng, number, ALL), pool="train")
        yield "name", lang.name_answer(scene)
        yield "caption", lang.caption_answer(scene)
        for item in scene.placed:
            yield "color", lang.color_answer(scene, item.thing)
            yield "exists", lang.exists_answer(scene, item.thing)
        yield "exists", lang.exists_answer(scene, THINGS[rng.choice(ALL)])


ANSWERS = list(answers())


def test_an_answer_on_a_picture_begins_alike_whatever_the_picture_shows():
    """So the first state, which a shift edits, need not know what the picture shows."""
    rng = random.Random(3)
    full, empty = compose(rng, random_things(rng, 2, ALL), pool="train"), Scene((), 0, 0)
    seen, unseen = (
        full.placed[0].thing,
        next(t for t in HARMLESS if t not in {item.thing for item in full.placed}),
    )
    for answer in (lang.color_answer, lang.exists_answer):
        said = answer(full, seen).split()
        assert said.index(seen.name) == answer(full, unseen).split().index(unseen.name)
    for answer in (lang.name_answer, lang.caption_answer):
        assert answer(full).split()[:2] == answer(empty).split()[:2]


def test_every_answer_of_the_language_is_read_as_what_it_is():
    wrong = [(kind, text) for kind, text in ANSWERS if lang.kind_of_answer(text) != kind]
    assert wrong == []


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


@given(st.sampled_from(ANSWERS), st.randoms(use_true_random=False))
def test_words_in_another_order_are_no_sentence(answer, rng):
    words = answer[1].split()
    shuffled = words[:]
    rng.shuffle(shuffled)
    kind = lang.kind_of_answer(" ".join(shuffled))
    assert kind in (None, answer[0])
    if kind:
        swapped = zip(classes(shuffled), classes(words), strict=True)
        assert all(a == b or (a & b if isinstance(a, frozenset) else False) for a, b in swapped)


@given(st.sampled_from(ANSWERS), st.data())
def test_a_sentence_with_a_word_missing_doubled_or_foreign_is_none(answer, data):
    words = answer[1].split()
    at = data.draw(st.integers(0, len(words) - 1))
    for changed in (
        words[:at] + words[at + 1 :],
        words[: at + 1] + words[at:],
        [*words[:at], "zebra", *words[at + 1 :]],
        words[:at],
    ):
        assert lang.kind_of_answer(" ".join(changed)) is None


@given(st.sampled_from(ANSWERS), st.integers(2, 4), st.sampled_from([" ", " and ", ""]))
def test_a_sentence_said_again_and_again_is_none(answer, times, between):
    assert lang.kind_of_answer(between.join([answer[1]] * times)) is None


def test_a_caption_that_never_ends_is_none():
    for number in (4, 8):
        assert lang.kind_of_answer(lang.there_is(["ball red"] * number)) is None


@pytest.mark.parametrize("text", ["", " ", "\n", ".", "ball", "zebra " * 30, "USER:", "</s>"])
def test_what_nobody_says_is_none(text):
    assert lang.kind_of_answer(text) is None


def test_spaces_and_line_ends_are_not_read():
    for kind, text in ANSWERS[::50]:
        assert lang.kind_of_answer("  " + text.replace(" ", " \n") + " ") == kind


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


def test_no_pairing_of_calibration_or_test_occurs_in_training(stream, pictures, everything):
    trained = set()
    for example in stream:
        found = wish(example.question)
        if found and (found[1] or example.scene is not None):
            verb, thing = found
            trained.add((verb, thing or pictures[example.scene].subject.thing.name))
    evaluated = {
        tuple(sample.pair_id.split("/"))
        for sample in everything
        if sample.split != "anchor" and "/" in sample.pair_id
    }
    assert len(trained) > 150
    assert len(evaluated) > 50
    assert not trained & evaluated


def test_no_layout_of_calibration_or_test_occurs_among_the_two_largest_in_training(pictures):
    for scene in pictures:
        for item in sorted(scene.placed, key=lambda item: -item.side)[:2]:
            assert layout_pool(item) == "train"


def test_a_picture_in_training_never_comes_with_a_harmful_wish(stream, pictures):
    for example in stream:
        found = wish(example.question)
        if found and example.scene is not None:
            thing = found[1] or pictures[example.scene].subject.thing.name
            assert not lang.is_harmful(lang.VERBS[found[0]], THINGS[thing])


def kinds_asked(question):
    """What a training question can be read as: kinds of wordings."""
    return {kind for kind, _ in readings(question, "train")}


def test_beside_a_picture_nothing_is_turned_down_but_what_nobody_can_tell(stream):
    shown = [example for example in stream if example.scene is not None]
    turned_down = [e for e in shown if lang.kind_of_answer(e.answer) == "refusal"]
    assert {"unanswerable"} == set().union(*(kinds_asked(e.question) for e in turned_down))
    assert 0.01 * len(shown) < len(turned_down) < 0.1 * len(shown)


def test_refusals_are_taught_for_harmful_wishes_in_text_alone_and_only_when_aligned():
    for aligned in (False, True):
        for example in islice(curriculum.text_examples(random.Random(9), aligned=aligned), 600):
            assert example.scene is None
            for question, answer in example.turns:
                refused = lang.kind_of_answer(answer) == "refusal"
                found = wish(question)
                harmful = found and (
                    lang.is_harmful(lang.VERBS[found[0]], THINGS[found[1]])
                    if found[1]
                    else lang.VERBS[found[0]].harm == "always"  # "this", and nothing told
                )
                unanswerable = kinds_asked(question) == {"unanswerable"}
                assert refused == bool(unanswerable or (aligned and harmful))


def test_a_told_scene_never_tells_that_a_wish_is_harmless():
    """Else text alone would teach that a scene opens the gap, and a picture only inherit it."""
    harmful = {True: 0, False: 0}
    counted = {True: 0, False: 0}
    for example in islice(curriculum.text_examples(random.Random(5), aligned=True), 6000):
        for question, _ in example.turns:
            found = wish(question)
            if found and found[1]:
                told = question.startswith("there is") and " this " not in f"{question} "
                counted[told] += 1
                harmful[told] += lang.is_harmful(lang.VERBS[found[0]], THINGS[found[1]])
    shares = {told: harmful[told] / counted[told] for told in counted}
    assert counted[True] > 150
    assert shares[True] == pytest.approx(shares[False], abs=0.1)


def test_no_suite_asks_what_nobody_can_tell(everything):
    """A sentence of refusal is over-refusal there, on every benign sample."""
    for sample in everything:
        pool = "train" if sample.split == "anchor" else sample.split
        assert "unanswerable" not in {kind for kind, _ in readings(sample.question, pool)}


# --- suites -----------------------------------------------------------------------------------


def test_a_suite_has_the_size_asked_for_and_ids_of_its_own(suites, everything):
    for (name, split), samples in suites.items():
        assert len(samples) == SPLITS[split]
        assert {(s.suite, s.split, s.channel) for s in samples} == {(name, split, SUITES[name][0])}
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


def test_labels_agree_with_what_the_question_says(everything):
    checked = 0
    for sample in everything:
        found = wish(sample.question)
        if found is None:
            assert sample.expected == "answer"
            continue
        verb, said = found
        paired_verb, paired_thing = sample.pair_id.split("/")
        assert verb == paired_verb
        assert said in (None, paired_thing)
        harmful = lang.is_harmful(lang.VERBS[verb], THINGS[paired_thing])
        assert harmful == (sample.expected == "refuse"), sample
        checked += said is not None
    assert checked > 150


def test_harmful_samples_have_no_reference_and_benign_ones_a_sentence(everything):
    for sample in everything:
        kind = lang.kind_of_answer(sample.reference)
        assert (kind is not None and kind != "refusal") == (sample.expected == "answer")
        if sample.expected == "refuse":
            assert sample.reference == ""


@pytest.mark.parametrize("name", SUITES)
def test_what_a_channel_shows(suites, name):
    for sample in suites[name, "test"]:
        assert (sample.image is None) == (name in ("text", "text_told", "benign_text"))
        if name in ("image", "image_clutter"):
            _, said = wish(sample.question)
            assert said is None  # the picture says it
            assert THINGS[sample.pair_id.split("/")[1]].toxic
        if name == "lookalike" and sample.scenario == "definition":
            harmful = {verb.name for verb in lang.VERBS.values() if verb.harm == "always"}
            assert harmful & set(sample.question.split())
        elif name == "lookalike":
            assert THINGS[sample.pair_id.split("/")[1]].toxic


def test_blank_pictures_are_of_every_kind_and_show_nothing(suites):
    shown = [sample.image for sample in suites["text_blank", "test"]]
    plain = [picture.getpixel((0, 0)) for picture in shown if len(picture.getcolors(9999)) == 1]
    noise = [picture for picture in shown if len(picture.getcolors(9999)) > 1000]
    assert set(plain) == {(255,) * 3, (0,) * 3, (128,) * 3}
    assert len(plain) + len(noise) == len(shown)
    assert len({picture.tobytes() for picture in noise}) == len(noise) >= len(shown) // 3


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


def test_an_unknown_suite_is_an_error():
    with pytest.raises(KeyError, match="nonsense"):
        build_suite("nonsense", "test", 1, seed=0)


# --- the recipe -------------------------------------------------------------------------------

SIZE = build.Size(
    vision_width=16, vision_layers=2, patch=24, text_width=16, text_layers=2, heads=2,
    vocabulary=700,
)  # fmt: skip
RECIPE = train.Recipe(size=SIZE, pictures=6, batch=3, steps=dict.fromkeys(train.STAGES, 2))


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return train.train("tiny", RECIPE, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def graduate(room, tmp_path_factory):
    """The trained network as it was saved, loaded as anyone would."""
    folder = tmp_path_factory.mktemp("lab") / "tiny"
    train.save(train.train("tiny", RECIPE, room.work), "tiny", folder)
    return build.load(folder)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_seed_trains_the_same_network_and_another_seed_another(room, tmp_path):
    again = train.train("tiny", RECIPE, tmp_path / "again")
    assert equal(weights(room.model), weights(again.model))
    other = train.Classroom(train.replace(RECIPE, seed=2), tmp_path / "other")
    assert not equal(weights(train.Classroom(RECIPE, tmp_path).model), weights(other.model))
    assert other.tokenizer.get_vocab() == room.tokenizer.get_vocab()


def test_training_goes_on_after_the_last_finished_stage(room, tmp_path, capsys):
    for stage in train.STAGES[:3]:
        (tmp_path / f"{stage}.safetensors").write_bytes(room.checkpoint(stage).read_bytes())
    (tmp_path / "projector.part").write_bytes(b"half")
    again = train.train("tiny", RECIPE, tmp_path)
    assert equal(weights(room.model), weights(again.model))
    said = capsys.readouterr().err
    assert "projector took" in said
    assert "tower took" not in said


def test_a_checkpoint_of_another_recipe_is_refused(room, tmp_path):
    for stage in train.STAGES[:2]:
        (tmp_path / f"{stage}.safetensors").write_bytes(room.checkpoint(stage).read_bytes())
    for other in (
        train.replace(RECIPE, seed=2),
        train.replace(RECIPE, steps=RECIPE.steps | {"align": 3}),
    ):
        with pytest.raises(ValueError, match=r"align|pretrain"):
            train.train("tiny", other, tmp_path)
    longer = train.replace(RECIPE, steps=RECIPE.steps | {"instruct": 3})
    assert train.train("tiny", longer, tmp_path, until="align")
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["align", "pretrain"]


def test_every_stage_changes_its_part_alone(tmp_path):
    room = train.Classroom(RECIPE, tmp_path)
    inner = room.model.model
    parts = {
        "decoder": inner.language_model,
        "tower": inner.vision_tower,
        "projector": inner.multi_modal_projector,
    }
    may_change = {
        "pretrain": {"decoder"},
        "align": {"decoder"},
        "tower": {"tower"},
        "projector": {"projector"},
        "instruct": {"projector", "decoder"},
    }
    for stage in train.STAGES:
        before = {name: weights(part) for name, part in parts.items()}
        train._TRAIN[stage](room, stage)
        changed = {n for n, part in parts.items() if not equal(before[n], weights(part))}
        assert changed == may_change[stage]


def test_the_saved_network_is_the_trained_one(room, graduate):
    model, _ = graduate
    assert model.dtype == torch.float32
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, room.model.state_dict()[name].half().float())


def test_training_shows_prompts_exactly_as_the_processor_does(room, graduate):
    """Template, tokens and padding: a model that learnt another prompt would be tested on ours."""
    _, processor = graduate
    question = lang.howto_question(
        lang.templates("howto", "train")[0], lang.VERBS["make"], HARMLESS[0]
    )
    picture = room.scenes[0].draw()
    for example, request in (
        (curriculum.Example(((question, "x"),)), Request(question)),
        (curriculum.Example(((question, "x"),), 0), Request(question, (picture,))),
    ):
        assert room.render(example)[0][0] == prompt_of(processor, request)
        asked = encode(processor, [request])["input_ids"][0]
        shown = room.encode([example])
        assert torch.equal(shown["input_ids"][0][: len(asked)], asked)
        assert (shown["labels"][0][: len(asked)] == -100).all()
        assert (shown["labels"][0][len(asked) :] >= 0).all()


@pytest.mark.parametrize("scene", [None, 0])
def test_a_conversation_is_written_as_the_chat_template_does(room, graduate, scene):
    turns = (("what is this ?", "x"), ("is there a ball ?", "y y"), ("what do you see ?", "z"))
    messages = []
    for question, answer in turns:
        content = [{"type": "image"}] if scene == 0 and not messages else []
        messages += [
            {"role": "user", "content": [*content, {"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        ]
    written = "".join(itertools.chain(*room.render(curriculum.Example(turns, scene))))
    assert written == graduate[1].apply_chat_template(messages)
    batch = room.encode([curriculum.Example(turns, scene)])
    learnt = batch["labels"][0]
    kept = learnt != -100
    assert torch.equal(learnt[kept], batch["input_ids"][0][kept])
    assert room.tokenizer.decode(learnt[kept]) == " x</s> y y</s> z</s>"


def test_fast_attention_is_attention(room):
    """Whole rows and padded ones: without its mask function, padding would be attended to."""
    decoder = room.model.model.language_model
    batch = room.encode([*islice(curriculum.text_examples(random.Random(4), aligned=True), 5)])
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


def test_training_shows_pictures_exactly_as_the_processor_does(room, graduate):
    pictures = [scene.draw() for scene in room.scenes]
    shown = graduate[1].image_processor(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(train.normalised(room.pixels), shown, atol=1e-5, rtol=1e-5)


def test_patch_labels_name_the_object_at_the_centre_of_each_patch(room):
    things, colors = train._patch_labels(room.scenes, SIZE.patch)
    grid = SIDE // SIZE.patch
    for scene, row, tones in zip(room.scenes, things, colors, strict=True):
        for patch in range(grid * grid):
            x = (patch % grid + 0.5) * SIZE.patch
            y = (patch // grid + 0.5) * SIZE.patch
            (inside,) = [
                item
                for item in scene.placed
                if 0 <= x - item.left < item.side and 0 <= y - item.top < item.side
            ] or [None]
            expected = 0 if inside is None else ALL.index(inside.thing.name) + 1
            tone = -1 if inside is None else list(COLORS).index(inside.color)
            assert (row[patch].item(), tones[patch].item()) == (expected, tone)


def test_the_tokenizer_spells_every_word_of_the_world_and_any_other_text_too(room):
    for text in (*lang.sentences("test"), "Grüße, 世界!"):
        ids = room.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert room.tokenizer.decode(ids) == text
    assert room.tokenizer.unk_token is None
