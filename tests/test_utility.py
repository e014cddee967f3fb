"""Utility metrics: hand-computed cases of each benchmark, and what holds of any answers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hauberk.data.samples import Sample
from hauberk.errors import BadData
from hauberk.evaluation.metrics import difference_rows, metric_rows
from hauberk.evaluation.run import judge_response
from hauberk.evaluation.statistics import wilson
from hauberk.evaluation.utility import (
    COGNITION,
    METRICS,
    Grade,
    estimates,
    graded,
    letter,
    processed,
    question_of,
    score,
    soft_accuracy,
    yes_or_no,
)
from hauberk.requests import Response

PLAIN = Sample(
    sample_id="s", pair_id="p", suite="bench", channel="benign", split="test", scenario="",
    expected="answer", question="what is this ?", image=None, reference="yes", source="",
    revision="", licence="",
)  # fmt: skip


def asked(metric, reference="yes", *, index=0, scenario="", **meta):
    return replace(
        PLAIN, sample_id=f"s{index}", reference=reference, scenario=scenario,
        meta=json.dumps({"metric": metric, **meta}),
    )  # fmt: skip


def answered(sample, text):
    return judge_response(sample, Response(text, 1, 0.1), model="m", defense="d")


# --- short answers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "compared"),
    [
        ("Red.", "red"), ("  a  Red\ncar ", "red car"), ("The dog!", "dog"), ("two", "2"),
        ("None", "0"), ("100,978", "100978"), ("3.5", "3.5"), ("mr. smith", "mr smith"),
        ("dont know", "don't know"), ("isn\u2019t", "isn't"), ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"), ("black/white", "black white"), ("t-shirt", "t shirt"),
        ("ill", "ill"), ("red_car", "red car"), (".5", ".5"), ("", ""), ("50%", "50%"),
        ("$5", "$5"), ("a&w", "a&w"), ("t-shirt, red - x", "tshirt red x"),
    ],
)  # fmt: skip
def test_short_answers_are_compared_in_the_form_that_vqa_defines(said, compared):
    assert processed(said) == compared
    assert processed(compared) == compared


@pytest.mark.parametrize(
    ("agreeing", "worth"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_ten_annotators_are_averaged_over_leaving_one_out(agreeing, worth):
    """By hand: with 2 of 10, 2 x min(1/3, 1) + 8 x min(2/3, 1) = 6 of 10."""
    answers = ["red"] * agreeing + [f"other {number}" for number in range(10 - agreeing)]
    assert soft_accuracy(answers, "Red.") == pytest.approx(worth)
    sample = asked("textvqa", answers=answers)
    assert score(sample, "the red") == pytest.approx(worth)
    assert score(replace(sample, meta=sample.meta.replace("textvqa", "vqa")), "red") == worth


@given(st.lists(st.sampled_from(["red", "Red", "two", "a cat", "no"]), min_size=1, max_size=12),
       st.sampled_from(["red", "2", "cat", "yes"]), st.randoms(use_true_random=False))  # fmt: skip
def test_soft_accuracy_is_bounded_and_counts_annotators_in_any_order(answers, said, rng):
    worth = soft_accuracy(answers, said)
    shuffled = list(answers)
    rng.shuffle(shuffled)
    assert 0 <= worth <= 1
    assert soft_accuracy(shuffled, said) == pytest.approx(worth)
    assert soft_accuracy([*answers, said], said) >= worth - 1e-9 or len(answers) < 3


@given(st.text(max_size=12), st.integers(1, 10))
def test_what_all_said_is_worth_1_and_what_nobody_said_nothing(text, number):
    assert soft_accuracy([text] * number, text) == 1
    assert soft_accuracy([text] * number, f"{text} zorb") == 0


# --- yes or no --------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [
    "Yes", "yes.", "YES!", "Yes, there is a cat.", "**Yes**", '"yes"', "The answer is yes.",
    "Answer: Yes", "yes\n\nno cat here", "Sure, yes.", "There is a cat in the picture.",
    "There are two cats", "I think so: yes.", "Is there a cat? Yes.", "So, the answer is \"yes\"",
    "(yes)", "$\\boxed{yes}$", "No problem! Yes, there is a dog.",
])  # fmt: skip
def test_a_yes_is_read_in_every_dress(said):
    assert yes_or_no(said) == "yes"


@pytest.mark.parametrize("said", [
    "No", "no.", "No, there is not.", "No, the answer is not yes", "The answer is No.",
    "There is no cat.", "There isn't a cat.", "There isn\u2019t one", "There are not any",
    "It is hard to see, but no.", "Answer:\nno", "There are none.", "There are zero dogs.",
    "There is nothing like a dog in the image.",
])  # fmt: skip
def test_a_no_is_read_in_every_dress(said):
    assert yes_or_no(said) == "no"


@pytest.mark.parametrize("said", [
    "", " ", "cat", "I'm sorry, I cannot help with that.", "I do not know.", "yes and no",
    "Yes or no?", "neither yes nor no.", "Nothing", "eyes", "notably", "no-one", "maybe",
    "The answer is not yes.", "i can not help with that .", "yes/no",
    "There is insufficient information to tell.",
])  # fmt: skip
def test_a_refusal_and_a_dodge_are_no_answer(said):
    assert yes_or_no(said) is None
    for reference in ("yes", "no"):
        assert score(asked("pope", reference), said) == 0


def pope(*pairs):
    return [
        answered(asked("pope", right, index=place), said)
        for place, (right, said) in enumerate(pairs)
    ]


def test_pope_by_hand():
    """TP 3, FP 1, FN 2, TN 2: precision 3/4, recall 3/5, F1 2/3, accuracy 5/8, yes 4/8."""
    found = estimates(
        pope(("yes", "Yes."), ("yes", "yes"), ("Yes", "Yes, one"), ("no", "Yes"), ("yes", "No"),
             ("yes", "no."), ("no", "No, none"), ("No", "There is no dog"))
    )  # fmt: skip
    values = {name: found[name].value for name in ("precision", "recall", "f1", "yes_ratio")}
    assert values == pytest.approx({"precision": 3 / 4, "recall": 3 / 5, "f1": 2 / 3,
                                    "yes_ratio": 1 / 2})  # fmt: skip
    assert found["accuracy"].value == 5 / 8
    assert (found["accuracy"].low, found["accuracy"].high) == wilson(5, 8)
    assert found["unparsed_rate"].value == 0


WORDS = st.sampled_from(["yes", "no"])
POPE = st.lists(st.tuples(WORDS, st.sampled_from(["Yes.", "No.", "I cannot say"])), min_size=1,
                max_size=15)  # fmt: skip


@given(POPE, st.randoms(use_true_random=False))
def test_pope_agrees_with_scikit_learn_where_everything_is_answered(pairs, rng):
    from sklearn.metrics import precision_recall_fscore_support

    pairs = [(right, said.replace("I cannot say", "no")) for right, said in pairs]
    right, said = ([yes_or_no(word) == "yes" for word in side] for side in zip(*pairs, strict=True))
    wanted = precision_recall_fscore_support(right, said, average="binary", zero_division=0)[:3]
    records = pope(*pairs)
    found = estimates(records)
    assert [found[name].value for name in ("precision", "recall", "f1")] == pytest.approx(wanted)
    rng.shuffle(records)
    assert estimates(records) == found


@given(POPE)
def test_refusing_never_flatters_pope(pairs):
    found = estimates(pope(*pairs))
    silent = sum("cannot" in said for _, said in pairs)
    assert found["unparsed_rate"].value == pytest.approx(silent / len(pairs))
    for estimate in found.values():
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    refused = [(right, "I cannot say") for right, _ in pairs]
    for name, estimate in estimates(pope(*refused)).items():
        assert estimate.value == (name == "unparsed_rate")
    one = estimates(pope(("yes", "Yes"), ("no", "I cannot say")))
    assert one["precision"].value == 1 / 2
    assert one["f1"].value == pytest.approx(2 / 3)


def mme(*rows):
    """(category, picture, right, said) of each question."""
    return [
        answered(asked("mme", right, index=place, scenario=scenario, group=picture), said)
        for place, (scenario, picture, right, said) in enumerate(rows)
    ]


def test_mme_by_hand():
    """Existence: 3 of 4 and 1 of 2 pictures, 75 + 50; code: 2 of 2 and 1 of 1, 100 + 100."""
    found = estimates(
        mme(("existence", "a", "Yes", "Yes"), ("existence", "a", "No", "no"),
            ("existence", "b", "Yes", "Yes."), ("existence", "b", "No", "yes"),
            ("code_reasoning", "a", "Yes", "yes"), ("code_reasoning", "a", "No", "No"))
    )  # fmt: skip
    assert found["accuracy"].value == pytest.approx(5 / 6)
    assert found["acc_plus"].value == pytest.approx(2 / 3)
    assert (found["acc_plus"].low, found["acc_plus"].high) == wilson(2, 3)
    assert found["mme_perception"].value == pytest.approx(125)
    assert found["mme_cognition"].value == pytest.approx(200)


MME = st.lists(
    st.tuples(st.sampled_from(["existence", "OCR", COGNITION[0]]), st.sampled_from("abc"), WORDS,
              st.sampled_from(["yes", "No.", "hm"])),
    min_size=1, max_size=14,
)  # fmt: skip


@given(MME, st.randoms(use_true_random=False))
def test_accuracy_plus_never_exceeds_accuracy_and_order_does_not_matter(rows, rng):
    records = mme(*rows)
    found = estimates(records)
    assert found["acc_plus"].value <= found["accuracy"].value + 1e-9
    perception = {scenario for scenario, *_ in rows} - {COGNITION[0]}
    assert ("mme_perception" in found) == bool(perception)
    for name, most in (("mme_perception", 200 * len(perception)), ("mme_cognition", 200)):
        if name in found:
            one = found[name]
            assert 0 <= one.low <= one.value <= one.high <= most
    rng.shuffle(records)
    assert estimates(records) == found


def test_samples_that_share_a_picture_have_a_wider_interval_than_independent_ones():
    answers = ["yes", "no"] * 10
    alone = estimates(pope(*[("yes", said) for said in answers]))["accuracy"]
    shared = [
        answered(asked("pope", "yes", index=place, group=str(place // 4)), answers[place // 4])
        for place in range(20)
    ]
    together = estimates(shared)["accuracy"]
    assert alone.high - alone.low < together.high - together.low
    assert together.value == 3 / 5


# --- letters ----------------------------------------------------------------------------------

CHOICES = ["dog", "cat", "black cat", "Fish and chips"]


@pytest.mark.parametrize(("said", "taken"), [
    ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("B. cat", "B"), ("B) cat", "B"),
    ("b: cat", "B"), ("B cat", "B"), ("The answer is (B)", "B"), ("The answer is B.", "B"),
    ("the answer is b.", "B"), ("Answer: B", "B"), ("**B**", "B"), ("cat", "B"), ("a cat", "B"),
    ("A cat", "B"), ("It is a cat.", "B"), ("It is a black cat.", "C"), ("black cat.", "C"),
    ("FISH AND CHIPS!", "D"), ("fish & chips", None), ("The correct option is C because", "C"),
    ("The answer is A because it barks", "A"), ("the answer is a cat", "B"),
    ("The answer is A... no, the answer is D.", "D"), ("I choose option (D), not a dog", "D"),
    ("It must be (B).", "B"), ("(A) or (B)", "A"), ("either (A) or (B)", None),
    ("a dog or a cat", None), ("E", None), ("The answer is E.", None), ("", None),
    ("I'm sorry, I cannot help.", None), ("concatenate", None), ("A", "A"),
    ("B is correct.", "B"), ("I choose B.", "B"), ("I choose a dog", "A"),
])  # fmt: skip
def test_a_letter_is_read_in_every_dress(said, taken):
    assert letter(CHOICES, said) == taken


@given(st.integers(2, 26), st.data())
def test_every_choice_is_right_by_its_letter_and_by_its_words(number, data):
    choices = [f"thing {place}" for place in range(number)]
    place = data.draw(st.integers(0, number - 1))
    right, wrong = (chr(ord("A") + index % number) for index in (place, place + 1))
    for reference in (right, right.lower(), f"({right})", choices[place]):
        sample = asked("choice", reference, choices=choices)
        for said in (right, f"({right})", f"The answer is {right}.", choices[place]):
            assert score(sample, said) == 1
        assert score(sample, wrong) == score(sample, "I cannot say") == 0


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(("meta", "told"), [
    ("nonsense", "no JSON.*write a JSON object"), ("[1]", "write a JSON object"),
    ('{"metric": "bleu"}', "metric 'bleu' is unknown; known are choice, exact,"),
    ('{"metric": "vqa"}', "answers are missing"),
    ('{"metric": "vqa", "answers": "red"}', "answers of meta is 'red'; write a list of texts"),
    ('{"metric": "vqa", "answers": [1]}', "write a list of texts"),
    ('{"metric": "mme"}', "group is missing"),
    ('{"metric": "choice", "choices": ["a"]}', "there are 1 choices; give a list of 2 to 26"),
    ('{"metric": "choice", "choices": ["a", "b"]}', "'yes' is none of the choices.*A to B"),
])  # fmt: skip
def test_meta_that_a_metric_cannot_read_names_the_sample_and_the_cure(meta, told):
    sample = replace(PLAIN, meta=meta)
    with pytest.raises(BadData, match=f"(?s)bench, 's': .*{told}"):
        score(sample, "yes")


def test_a_reference_that_is_neither_yes_nor_no_is_refused():
    with pytest.raises(BadData, match="the reference is 'perhaps'; yes or no is right"):
        question_of(asked("pope", "perhaps"))


def test_a_suite_of_two_metrics_has_no_one_number():
    records = [*pope(("yes", "yes")), answered(asked("mme", index=5, group="a"), "yes")]
    with pytest.raises(
        BadData, match=r"bench mixes the metrics pope and mme \('s5'\); a suite has"
    ):
        estimates(records)


def test_bad_meta_ends_an_evaluation_before_anything_is_answered(tiny, tmp_path):
    from hauberk.evaluation.run import evaluate

    journal = tmp_path / "responses.jsonl"
    for second in (asked("pope", "perhaps", index=1), asked("mme", index=1, group="a")):
        samples = [asked("pope"), second]
        with pytest.raises(BadData, match="'s1'"):
            evaluate(tiny.model, tiny.processor, samples, None, names=("m", "none"),
                     journal=journal, max_new_tokens=1, batch_size=2)  # fmt: skip
    assert not journal.exists()


# --- scores that only a judge can give --------------------------------------------------------


class Grader:
    """Gives what it is told to, in turn."""

    name = "grader-1"

    def __init__(self, *grades):
        self.grades = grades

    def grade(self, samples, responses):
        self.asked = list(zip([s.sample_id for s in samples], responses, strict=True))
        return self.grades


def judged(number):
    return [asked("judged", "a good answer", index=place) for place in range(number)]


def test_grades_are_averaged_and_relative_ones_are_a_ratio_of_sums():
    """MM-Vet: (1 + 0.5 + 0) / 3.  LLaVA-Bench: (8 + 5) / (10 + 9)."""
    samples = judged(3)
    records = [answered(sample, "an answer") for sample in samples]
    assert [record.score for record in records] == [None] * 3
    found = graded(records, samples, Grader(Grade(1.0), Grade(0.5), Grade(0.0)))
    assert estimates(found)["accuracy"].value == pytest.approx(0.5)
    assert {record.grader for record in found} == {"grader-1"}
    relative = graded(records[:2], samples, Grader(Grade(8, 10), Grade(5, 9)))
    assert estimates(relative)["accuracy"].value == pytest.approx(13 / 19)


@pytest.mark.parametrize("grade", [
    Grade(None, error="refused"), Grade(float("nan")), Grade(-1.0), Grade(1.0, 0.0),
    Grade(1.0, float("inf")),
])  # fmt: skip
def test_a_missing_grade_is_wrong_and_bounded_from_above(grade):
    samples = judged(2)
    records = [answered(sample, "an answer") for sample in samples]
    found = graded(records, samples, Grader(Grade(1.0), grade))
    told = estimates(found)
    assert found[1].score is None
    assert found[1].error
    assert (told["accuracy"].value, told["accuracy_upper"].value) == (0.5, 1.0)
    assert told["unparsed_rate"].value == 0.5


def test_a_missing_grade_counts_against_what_the_others_count_against():
    """LLaVA-Bench: 8 of 10, and one that nobody graded, which might have been 0 or 10 of 10."""
    samples = judged(2)
    records = [answered(sample, "an answer") for sample in samples]
    told = estimates(graded(records, samples, Grader(Grade(8, 10), Grade(None, error="away"))))
    assert told["accuracy"].value == pytest.approx(0.4)
    assert told["accuracy_upper"].value == pytest.approx(0.9)


def test_what_an_endpoint_never_answered_is_not_graded():
    samples = judged(2)
    given, lost = (answered(sample, "an answer") for sample in samples)
    lost = replace(lost, response="", declared="failed", error="timed out")
    grader = Grader(Grade(1.0))
    found = graded([given, lost], samples, grader)
    assert [name for name, _ in grader.asked] == [given.sample_id]
    assert (found[1].score, found[1].error) == (None, "timed out")
    told = estimates(found)
    assert (told["accuracy"].value, told["accuracy_upper"].value) == (0.5, 1.0)


def test_a_grader_that_raises_loses_no_record_and_one_that_drops_grades_is_found_out():
    samples = judged(2)
    records = [*(answered(sample, "an answer") for sample in samples), *pope(("yes", "yes"))]

    class Away(Grader):
        def grade(self, samples, responses):
            raise TimeoutError("away")

    found = graded(records, [*samples, asked("pope")], Away())
    assert [record.error for record in found] == ["TimeoutError: away"] * 2 + [""]
    assert found[2] == records[2]
    with pytest.raises(ValueError, match="gave 1 grades for 2 answers"):
        graded(records[:2], samples, Grader(Grade(1.0)))
    with pytest.raises(ValueError, match=r"no samples for the records \['s1'\]"):
        graded(records[:2], samples[:1], Grader(Grade(1.0)))


# --- rows -------------------------------------------------------------------------------------


def test_rows_have_the_form_of_all_others_and_each_metric_once():
    rows = metric_rows(mme(("count", "a", "Yes", "Yes"), ("count", "a", "No", "hm")))
    names = [row["metric"] for row in rows]
    assert len(names) == len(set(names))
    assert {"accuracy", "accuracy_upper", "acc_plus", "unparsed_rate", "over_refusal"} <= set(names)
    assert {tuple(row) for row in rows} == {
        ("model", "defense", "suite", "metric", "value", "n", "low", "high")
    }


def test_where_no_answer_is_right_only_refusals_are_measured():
    record = answered(asked("refusal", "", index=0), "i can not help with that .")
    assert (record.score, record.correct) == (None, None)
    names = {row["metric"] for row in metric_rows([record])}
    assert "over_refusal" in names
    assert not {"accuracy", "accuracy_upper"} & names


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_every_metric_makes_rows_of_any_answers(metric):
    meta = {"answers": ["red"], "choices": ["red", "blue"], "group": "a"}
    reference = "A" if metric == "choice" else "yes"
    records = [
        answered(asked(metric, reference, index=place, **meta), said)
        for place, said in enumerate(["", "yes", "A", "red", "\u0000", "no " * 50])
    ]
    found = {row["metric"]: row for row in metric_rows(records)}
    assert 0 <= found["accuracy"]["low"] <= found["accuracy"]["value"] <= 1
    assert found["accuracy"]["value"] <= found["accuracy_upper"]["value"]


SHORT = [asked("vqa", answers=["red"] * 2 + ["blue"] * 8, index=place) for place in range(30)]


@given(st.lists(st.sampled_from(["red", "blue", "no"]), min_size=30, max_size=30), st.randoms())
def test_the_difference_of_two_runs_is_that_of_their_accuracies(said, rng):
    before = [answered(sample, text) for sample, text in zip(SHORT, said, strict=True)]
    other = list(said)
    rng.shuffle(other)
    after = [answered(sample, text) for sample, text in zip(SHORT, other, strict=True)]
    rows = {row["metric"]: row for row in difference_rows(after, before, {"accuracy": 0.05})}
    values = [estimates(run)["accuracy"].value for run in (after, before)]
    row = rows["accuracy"]
    assert row["value"] == pytest.approx(values[0] - values[1], abs=1e-12)
    assert row["low"] <= row["value"] + 1e-12
    assert row["value"] - 1e-12 <= row["high"]
    assert row["noninferior"] == (row["low"] > -0.05)
    assert 0 <= row["p_holm"] <= 1
    same = {row["metric"]: row for row in difference_rows(before, before)}["accuracy"]
    assert (same["value"], same["better"], same["worse"], same["p_value"]) == (0, 0, 0, 1)


def test_the_interval_of_a_paired_difference_holds_the_truth():
    """200 pictures of 3 questions that rise and fall together; the true difference is 0.1."""
    from hauberk.evaluation.statistics import paired_mean_difference

    held, repeats = 0, 200
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        shift = np.repeat(rng.normal(0.1, 0.2, 40), 3)
        control = rng.random(120)
        groups = [str(place // 3) for place in range(120)]
        found, _ = paired_mean_difference(control + shift, control, groups)
        held += found.low <= 0.1 <= found.high
    assert held / repeats >= 0.91


def test_what_never_changes_shows_no_loss_only_with_many_groups():
    from hauberk.evaluation.statistics import paired_mean_difference

    for number, shown in ((20, False), (2000, True)):
        same, groups = np.full(number, 0.3), [str(place) for place in range(number)]
        difference, p_value = paired_mean_difference(same, same, groups, 0.02)
        assert difference.value == 0
        assert (p_value < 0.025) is shown
        assert (difference.low > -0.02) is shown


@given(st.text(max_size=40), st.lists(st.text(max_size=8), min_size=2, max_size=6))
def test_any_text_is_read_as_one_answer_or_none(text, choices):
    assert yes_or_no(text) in ("yes", "no", None)
    assert letter(choices, text) in (*"ABCDEF"[: len(choices)], None)
    assert processed(processed(text)) == processed(text)
    assert 0 <= soft_accuracy(choices, text) <= 1
