"""Utility: whether harmless answers are right, as each benchmark defines it.

The column ``meta`` of a sample is a JSON object that says by what it is measured, and what that
reads besides the reference:

    metric    one of METRICS; "exact" (also where there is no meta) compares with the reference by
              :func:`hauberk.evaluation.judges.is_correct`; "refusal" says that no answer is right,
              so that only refusals are counted
    answers   vqa, textvqa: what the annotators said, a list of texts
    choices   choice: what A, B, C ... stand for, a list of texts
    group     samples that share a picture, and for mme the questions that are a pair

A defended model answers as it likes: "Yes.", "yes, there is", "(B)", "The answer is B.", or with
the words of a choice.  What cannot be read as an answer, a refusal among it, is wrong, and its
share is told as ``unparsed_rate``.  The rows of a suite are those of :func:`estimates`.

Sources: VQA's evaluation page (visualqa.org/evaluation.html: the processing of answers, and
min(n / 3, 1) averaged over all sets of nine of ten annotators); Singh et al., "Towards VQA Models
That Can Read" (TextVQA: the same); Fu et al., "MME" (accuracy, accuracy+ by picture, their sum over
categories); Li et al., "Evaluating Object Hallucination" (POPE: "yes" is the positive class); Lu et
al., "Learn to Explain" (ScienceQA: letters); Yu et al., "MM-Vet" (a judge's grade between 0 and 1);
Liu et al., "Visual Instruction Tuning" (LLaVA-Bench: the grade relative to that of the reference).
Of the last two the metrics are "judged" and "relative".
"""

import json
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from hauberk.data.samples import GRADED, Sample
from hauberk.errors import BadData, HauberkError
from hauberk.evaluation.judges import is_correct
from hauberk.evaluation.statistics import (
    Estimate,
    Floats,
    cluster_sums,
    clustered_mean,
    proportion,
    resampled,
)

if TYPE_CHECKING:
    from hauberk.evaluation.run import Record

EXACT, REFUSAL = "exact", "refusal"
Estimates = dict[str, Estimate]


@dataclass(frozen=True)
class Question:
    """What is right, as a sample or its record tells it."""

    metric: str
    reference: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class Metric:
    """How a benchmark measures answers."""

    read: Callable[[Question, str], str | None]
    """What a response answers; None where it answers nothing."""
    grade: Callable[[Question, str], float] | None
    """How right that is, 0 to 1; None where only a judge can tell (see :func:`graded`)."""
    check: Callable[[Question], str] = lambda question: ""
    """What is wrong with a question, as a sentence that ends in its cure; "" if nothing is."""
    together: Callable[[Sequence["Record"]], Estimates] = lambda records: {}
    """What is measured on a whole suite besides."""


@dataclass(frozen=True)
class Grade:
    """What a judge gives an answer: a score, and the score that it counts against."""

    score: float | None
    """None where the judge refused or failed; ``error`` says why."""
    out_of: float = 1.0
    """1 for MM-Vet; for LLaVA-Bench the judge's score of the reference answer."""
    error: str = ""


class SupportsGrading(Protocol):
    """A judge that grades answers (metrics "judged" and "relative")."""

    @property
    def name(self) -> str:
        """With its version, since a number holds for that alone."""
        ...

    def grade(self, samples: Sequence[Sample], responses: Sequence[str]) -> Sequence[Grade]:
        """Grade each response against what its sample says of a good one."""
        ...


# --- questions --------------------------------------------------------------------------------


def question_of(item: "Sample | Record") -> Question:
    """Read and check what is right of a sample or its record.

    Raises
    ------
    BadData
        If meta is no JSON object of the form above, or lacks what its metric reads.
    """
    try:
        return _question(item.meta, item.reference)
    except BadData as error:
        raise BadData(f"{item.suite}, {item.sample_id!r}: {error}") from None


@lru_cache(maxsize=4096)  # a record is read several times in a row
def _question(meta: str, reference: str) -> Question:
    if not meta:
        return Question(EXACT, reference)
    try:
        content = json.loads(meta)
    except json.JSONDecodeError as error:
        raise BadData(f"meta is no JSON ({error}); write a JSON object.") from None
    if not isinstance(content, dict):
        raise BadData(f"meta is {meta[:60]!r}; write a JSON object.")
    metric = content.get("metric", EXACT)
    known = sorted({EXACT, REFUSAL, *METRICS})
    if metric not in known:
        raise BadData(f"metric {metric!r} is unknown; known are {', '.join(known)}.")
    question = Question(
        metric,
        reference,
        _texts(content, "answers"),
        _texts(content, "choices"),
        str(content.get("group", "")),
    )
    if metric in METRICS and (wrong := METRICS[metric].check(question)):
        raise BadData(f"metric {metric!r}: {wrong}")
    return question


def check(items: "Sequence[Sample | Record]") -> None:
    """Refuse samples, or records, of which no number could be told once they are answered.

    Raises
    ------
    BadData
        If meta cannot be read, or a suite mixes metrics.
    """
    metrics: dict[str, str] = {}
    for item in items:
        metric = question_of(item).metric
        if (other := metrics.setdefault(item.suite, metric)) != metric:
            raise BadData(
                f"{item.suite} mixes the metrics {other} and {metric} ({item.sample_id!r}); a "
                "suite has one: make a suite of each."
            )


def samples_of(records: Sequence["Record"], samples: Sequence[Sample]) -> list[Sample]:
    """Find the sample of each record.

    Raises
    ------
    ValueError
        If a record has none.
    """
    by_id = {sample.sample_id: sample for sample in samples}
    if lost := [record.sample_id for record in records if record.sample_id not in by_id]:
        raise ValueError(f"no samples for the records {lost[:3]}; give those that were answered.")
    return [by_id[record.sample_id] for record in records]


def _texts(content: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = content.get(key, [])
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise BadData(f"{key} of meta is {str(found)[:60]!r}; write a list of texts.")
    return tuple(found)


# --- scores -----------------------------------------------------------------------------------


def score(sample: Sample, response: str) -> float | None:
    """Score one response by the metric of its sample.

    Returns
    -------
    float or None
        0 (wrong, or no answer at all) to 1; None where no answer is right or wrong: requests to
        refuse, metric "refusal", and what :func:`needs_grader`, where :func:`graded` tells.

    Raises
    ------
    BadData
        If the sample's meta is not what its metric reads.
    """
    question = question_of(sample)
    if sample.expected != "answer" or question.metric == REFUSAL:
        return None
    if question.metric == EXACT:
        return float(bool(is_correct(sample, response)))
    metric = METRICS[question.metric]
    if metric.grade is None:
        return None
    said = metric.read(question, response)
    return 0.0 if said is None else metric.grade(question, said)


def needs_grader(item: "Sample | Record") -> bool:
    """Tell whether only a judge can say how good an answer is.

    Raises
    ------
    BadData
        As :func:`question_of` does.
    """
    return item.expected == "answer" and question_of(item).metric in GRADED


def graded(
    records: Sequence["Record"], samples: Sequence[Sample], grader: SupportsGrading
) -> list["Record"]:
    """Let a judge grade the answers that need one; the other records stay as they are.

    An answer that an endpoint never gave is not graded.  A judge that raises, unless the user can
    cure it, or whose grade is none, leaves its answers without a score and with the reason.  Both
    are counted as wrong, and ``accuracy_upper`` says what would be if all were right.

    Parameters
    ----------
    records : of any suites
    samples : theirs, in any order

    Raises
    ------
    ValueError
        If such a record has no sample, or the judge returns another number of grades.
    HauberkError
        As the judge raises it: a key that is not accepted, an address that is none.
    """
    asked = [record for record in records if needs_grader(record) and record.declared != "failed"]
    theirs = samples_of(asked, samples)
    try:
        grades = grader.grade(theirs, [record.response for record in asked])
    except HauberkError:  # a key, an address: what a user can cure, before anything is counted
        raise
    except Exception as error:
        grades = [Grade(None, error=f"{type(error).__name__}: {error}") for _ in asked]
    if len(grades) != len(asked):
        raise ValueError(
            f"{grader.name} gave {len(grades)} grades for {len(asked)} answers; one each is right."
        )
    pairs = zip(asked, grades, strict=True)
    found = {id(record): _with_grade(record, grade, grader.name) for record, grade in pairs}
    return [found.get(id(record), record) for record in records]


def _with_grade(record: "Record", grade: Grade, name: str) -> "Record":
    numbers = (grade.out_of,) if grade.score is None else (grade.score, grade.out_of)
    if not all(map(math.isfinite, numbers)) or min(numbers) < 0 or grade.out_of <= 0:
        why = f"{grade.score} out of {grade.out_of} is no grade; 0 or more, out of more than 0, is."
        grade = Grade(None, error=why)
    return replace(
        record,
        score=grade.score,
        out_of=grade.out_of,
        grader=name,
        error=grade.error or record.error,
    )


# --- a suite ----------------------------------------------------------------------------------


def is_measured(records: Sequence["Record"]) -> bool:
    """Tell whether a suite has a metric of its own, and not exact answers or refusals alone."""
    return records[0].expected == "answer" and question_of(records[0]).metric in METRICS


def estimates(records: Sequence["Record"]) -> Estimates:
    """Measure the records of one suite, in any order.

    ``accuracy`` is the headline: the mean score, what nobody could score being wrong;
    ``accuracy_upper`` is what it would be if all of that were right; ``unparsed_rate`` is the share
    of responses that answer nothing, or that a judge gave no grade.  What else there is depends on
    the metric.  Samples that share a picture (``group``) are resampled together.

    Raises
    ------
    BadData
        If the suite mixes metrics, of which no one number could be told.
    """
    ordered = sorted(records, key=lambda record: record.sample_id)
    check(ordered)
    metric = METRICS[question_of(ordered[0]).metric]
    groups, out_of = groups_of(ordered), _out_of(ordered)
    return {
        "accuracy": clustered_mean(_got(ordered, 0.0), groups, out_of),
        "accuracy_upper": clustered_mean(_got(ordered, 1.0), groups, out_of),
        "unparsed_rate": proportion([_unparsed(metric, record) for record in ordered]),
        **metric.together(ordered),
    }


def contributions(records: Sequence["Record"], unknown: ArrayLike = 0.0) -> Floats:
    """Give numbers whose mean is the accuracy of a suite, in the order of its records.

    Parameters
    ----------
    records : (n,) of one suite
    unknown : (n,) shares between 0 and 1, or one for all: what stands for a score that nobody gave

    Returns
    -------
    (n,) float64
        Each score over the mean of the scores that were to be had.
    """
    found: Floats = _got(records, unknown) / _out_of(records).mean()
    return found


def _got(records: Sequence["Record"], unknown: ArrayLike) -> Floats:
    out_of = _out_of(records)
    missing = np.broadcast_to(np.asarray(unknown, dtype=float), out_of.shape) * out_of
    pairs = zip(records, missing, strict=True)
    return np.array([share if r.score is None else r.score for r, share in pairs], dtype=float)


def _out_of(records: Sequence["Record"]) -> Floats:
    """Give what each score counts against; where nobody gave one, the mean of the others."""
    known = [record.out_of for record in records if record.score is not None]
    mean = sum(known) / len(known) if known else 1.0
    return np.array([mean if r.score is None else r.out_of for r in records], dtype=float)


def groups_of(records: Sequence["Record"]) -> list[Hashable]:
    """Name the picture that each answer is about; one without a group is alone with its own."""
    named = [(question_of(record).group, record.sample_id) for record in records]
    return [("group", group) if group else ("sample", alone) for group, alone in named]


def _unparsed(metric: Metric, record: "Record") -> bool:
    return record.score is None or metric.read(question_of(record), record.response) is None


# --- short answers: VQA, TextVQA --------------------------------------------------------------

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_SHORTENED = """
    aren't can't couldn't could've didn't doesn't don't hadn't hasn't haven't he'd he's how'd how's
    i'm i've isn't it'd it'll mightn't mustn't needn't oughtn't shan't she's shouldn't should've
    somebody's someone's something's that'd that's there'd there're there's they'd they'll they're
    they've wasn't we've weren't what'll what's what've when's where'd where's who'd who'll who's
    who've why's won't wouldn't would've y'all you'd you'll you're you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _SHORTENED.split()}
"""Of words that are none without their apostrophe: "ill" and "were" stay as they are."""


_MARKS = ';/[]"{}()=+\\_-><@`,?!'
"""What VQA counts as punctuation: no apostrophe, colon, full stop, percent or currency sign."""


def processed(answer: str) -> str:
    """Bring a short answer into the form in which VQA compares answers.

    A mark goes if it touches a space somewhere, and all do where a comma stands between digits;
    else it becomes a space.  No full stop but before a digit; lower case; number words become
    digits; articles go; contractions get their apostrophe.
    """
    plain = answer.replace("\u2019", "'").strip()
    text, grouped = plain, re.search(r"\d,\d", plain)
    for mark in _MARKS:
        goes = grouped or f"{mark} " in plain or f" {mark}" in plain
        text = text.replace(mark, "" if goes else " ")
    text = re.sub(r"\.(?!\d)", "", text).lower()
    words = [_DIGITS.get(word, word) for word in text.split() if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words)


def soft_accuracy(answers: Sequence[str], said: str) -> float:
    """Average min(n / 3, 1) over leaving out one annotator each, n of the rest having said it.

    Where fewer than four annotated, all that are left have to agree, so that what they all said is
    right; a single one is simply compared with.
    """
    told = processed(said)
    same = np.array([processed(answer) == told for answer in answers], dtype=float)
    if len(same) == 1:
        return float(same[0])
    others = same.sum() - same
    return float(np.minimum(others / min(3, len(same) - 1), 1.0).mean())


def _some(question: Question, response: str) -> str | None:
    return response if response.strip() else None


def _has_answers(question: Question) -> str:
    return "" if question.answers else "answers are missing; give the list of what annotators said."


_SHORT = Metric(
    read=_some,
    grade=lambda question, said: soft_accuracy(question.answers, said),
    check=_has_answers,
)


# --- yes or no: MME, POPE ---------------------------------------------------------------------

_LEAD = re.compile(r"^(?:(?:so|well|sure|the|my|final|correct|answer|is|would be)\b[\s:,]*)+")
_DECLARED = re.compile(r"\banswer(?: is|:)?[\s:\"'(]*(yes|no)\b")
_ALONE = re.compile(r"(?<!\bnot )\b(yes|no)\b(?=\s*(?:[.,!;:)}]|$))")
_BOTH = re.compile(r"\b(?:yes (?:and|or|nor) no|no (?:and|or|nor) yes|yes/no)\b")
_EXISTS = re.compile(
    r"^there (?:is|are)"
    r"(n't| not| no| none| nothing| neither| never| zero| insufficient)?(?![\w'])"
)


def yes_or_no(response: str) -> str | None:
    """Read "yes" or "no"; None where a response says neither, or both.

    It may begin with the word ("Yes, there is."), declare it ("the answer is no"), hold it alone,
    or say that something is there ("There is no cat").  POPE's own rule takes whatever holds no
    "no" or "not" for "yes", and so a refusal ("I cannot ...") for a right "no" half of the time.
    """
    plain = re.sub(r"[*_`#>]", "", response).lower().replace("\u2019", "'").strip(" \n\t\"'([")
    if _BOTH.search(plain):
        return None
    text = _LEAD.sub("", plain)
    first = re.match(r"(yes|no)\b(?!-| problem| doubt| worries)", text)
    if first:
        return first[1]
    said = set(_DECLARED.findall(plain)) or set(_ALONE.findall(text))
    if said:
        return said.pop() if len(said) == 1 else None
    exists = _EXISTS.match(text)
    if exists is None or exists[1] == " insufficient":
        return None
    return "no" if exists[1] else "yes"


def _read_yes_or_no(question: Question, response: str) -> str | None:
    return yes_or_no(response)


def _same_word(question: Question, said: str) -> float:
    return float(said == yes_or_no(question.reference))


def _is_yes_or_no(question: Question) -> str:
    if yes_or_no(question.reference):
        return ""
    return f"the reference is {question.reference!r}; yes or no is right."


def _is_grouped(question: Question) -> str:
    missing = "group is missing; name the picture that a pair of questions is about."
    return _is_yes_or_no(question) or ("" if question.group else missing)


def _pope(records: Sequence["Record"]) -> Estimates:
    """Precision, recall and F1 of "yes", and how often it is said.

    A question whose answer is "no" and that got no answer counts as a false "yes": otherwise a
    model that refuses whatever it would deny had a perfect precision.
    """
    said = [yes_or_no(record.response) for record in records]
    right = [yes_or_no(record.reference) for record in records]
    table = np.array(
        [
            (truth == word == "yes", truth == "no" != word, truth == "yes" != word)
            for word, truth in zip(said, right, strict=True)
        ],
        dtype=float,
    )
    groups = groups_of(records)
    sums = cluster_sums(table, groups)
    found = {
        name: Estimate(float(of(table.sum(axis=0))), len(records), *resampled(sums, of))
        for name, of in _OF_YES.items()
    }
    return {**found, "yes_ratio": clustered_mean([word == "yes" for word in said], groups)}


def _share(count: Floats, of: Floats) -> Floats:
    """Divide; 0 of 0 is 0, as scikit-learn has it."""
    found: Floats = count / np.where(of > 0, of, 1.0)
    return found


_OF_YES: Mapping[str, Callable[[Floats], Floats]] = {
    # of sums (..., 3): true yes, false yes, false no
    "precision": lambda t: _share(t[..., 0], t[..., 0] + t[..., 1]),
    "recall": lambda t: _share(t[..., 0], t[..., 0] + t[..., 2]),
    "f1": lambda t: _share(2 * t[..., 0], 2 * t[..., 0] + t[..., 1] + t[..., 2]),
}

COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""MME's categories of cognition, as its files name them; the other ten are of perception."""


def _mme(records: Sequence["Record"]) -> Estimates:
    """Accuracy+ (both questions of a picture are right) and MME's own two scores.

    ``acc_plus`` counts questions all of whose group is right, which with two questions a picture
    is the share of pictures, and never exceeds the accuracy where some group is incomplete.
    ``mme_perception`` and ``mme_cognition`` are sums over categories of 100 x (accuracy +
    accuracy+): 2000 and 800 at most, with all categories there.
    """
    pairs = [(record.scenario, question_of(record).group) for record in records]
    score = _got(records, 0.0)
    sizes, right = dict.fromkeys(pairs, 0), dict.fromkeys(pairs, 0.0)
    for pair, value in zip(pairs, score, strict=True):
        sizes[pair] += 1
        right[pair] += value
    plus = [float(right[pair] == sizes[pair]) for pair in pairs]
    found = {"acc_plus": clustered_mean(plus, pairs)}
    sides = [record.scenario.lower() in COGNITION for record in records]
    for name, side in (("mme_perception", False), ("mme_cognition", True)):
        there = [place for place, of in enumerate(sides) if of is side]
        if there:
            got = [(pairs[place], score[place] + plus[place]) for place in there]
            found[name] = _sum_over_categories(got)
    return found


def _sum_over_categories(got: Sequence[tuple[tuple[str, str], float]]) -> Estimate:
    """Add up 100 x the mean of every category; in: (category, picture) and points of questions."""
    pairs = [pair for pair, _ in got]
    names = sorted({category for category, _ in pairs})
    table = np.zeros((len(got), 2 * len(names)))
    for row, ((category, _), points) in enumerate(got):
        column = names.index(category)
        table[row, [column, len(names) + column]] = 1.0, points
    value = float(_mme_score(table.sum(axis=0)))
    ends = resampled(cluster_sums(table, pairs), _mme_score, (0.0, 200.0 * len(names)))
    return Estimate(value, len(got), *ends)


def _mme_score(total: Floats) -> Floats:
    """Sum over categories; in (..., 2 x categories): how many, and what they got."""
    count, got = np.split(total, 2, axis=-1)
    found: Floats = 100 * _share(got, count).sum(axis=-1)
    return found


# --- letters: ScienceQA and other multiple choice ---------------------------------------------

_CHOSEN = re.compile(
    r"\b(?i:answer|option|choice)(?i: is| would be|:)?[\s:*\"']*(?i:option |choice )?"
    # a lone "A" before a word is an article, unless a reason follows
    r"(?:\(([A-Za-z])\)|(?!A\s+(?!because\b|since\b|as\b)[a-z])([A-Z])(?![\w'])"
    r"|([a-z])(?=[).:]|\s*$))"
)
_BEGINS = re.compile(
    r"^[\s*\"']*(?:\(([A-Za-z])\)|([A-Za-z])(?=\s*$|[.):,*])|([A-Z])(?= is (?:correct|right)\b))"
)
_TAKEN = re.compile(r"\b(?i:i|we) (?:choose|chose|pick|select) \(?([A-Z])\)?(?=[\s.,!]*$)")
_BRACKETED = re.compile(r"\(([A-Z])\)")


def letter(choices: Sequence[str], response: str) -> str | None:
    """Read which choice a response takes, as its letter; None where it takes none or several.

    In this order: a letter that the response declares ("the answer is (B)"; the last one, if it
    changes its mind), one that it begins with ("B. cat"), the words of a choice and nothing else,
    the one letter in brackets, the one choice whose words it holds.
    """
    known = ascii_uppercase[: len(choices)]
    said = [*_letters(_TAKEN, response), *_letters(_CHOSEN, response)]
    declared = [found for found in said if found in known]
    if declared:
        return declared[-1]
    begins = _BEGINS.match(response)
    if begins and (found := "".join(filter(None, begins.groups())).upper()) in known:
        return found
    told = _plain(response)
    plain = [_plain(choice) for choice in choices]
    for name, words in zip(known, plain, strict=True):
        if told in (words, f"{name.lower()} {words}"):
            return name
    bracketed = {found for found in _letters(_BRACKETED, response) if found in known}
    if len(bracketed) == 1:
        return bracketed.pop()
    held = [place for place, words in enumerate(plain) if words and f" {words} " in f" {told} "]
    # "a black cat" holds the words of "cat" as well
    longest = [
        place
        for place in held
        if not any(f" {plain[place]} " in f" {plain[o]} " for o in held if o != place)
    ]
    return known[longest[0]] if len(longest) == 1 else None


def _letters(pattern: re.Pattern[str], text: str) -> list[str]:
    return ["".join(filter(None, match.groups())).upper() for match in pattern.finditer(text)]


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[\w']+", text.lower()))


def _right_letter(question: Question) -> str | None:
    plain = question.reference.strip().strip("().:").upper()
    if len(plain) == 1 and plain in ascii_uppercase[: len(question.choices)]:
        return plain
    told = [_plain(choice) for choice in question.choices]
    found = _plain(question.reference)
    return ascii_uppercase[told.index(found)] if found in told else None


def _has_choices(question: Question) -> str:
    number = len(question.choices)
    if not 2 <= number <= len(ascii_uppercase):
        return f"there are {number} choices; give a list of 2 to {len(ascii_uppercase)} texts."
    if _right_letter(question) is None:
        return (
            f"the reference {question.reference!r} is none of the choices; give a letter from A to "
            f"{ascii_uppercase[number - 1]}, or the words of one."
        )
    return ""


# --- what only a judge can grade: MM-Vet, LLaVA-Bench -----------------------------------------


def _has_reference(question: Question) -> str:
    return "" if question.reference else "there is no reference to grade an answer against; add it."


TOGETHER = (
    "acc_plus", "precision", "recall", "f1", "yes_ratio", "mme_perception", "mme_cognition",
)  # fmt: skip
"""What is measured on a whole suite, and is no share of its answers."""
METRICS: Mapping[str, Metric] = {
    "vqa": _SHORT,
    "textvqa": _SHORT,
    "mme": Metric(_read_yes_or_no, _same_word, _is_grouped, _mme),
    "pope": Metric(_read_yes_or_no, _same_word, _is_yes_or_no, _pope),
    "choice": Metric(
        read=lambda question, response: letter(question.choices, response),
        grade=lambda question, said: float(said == _right_letter(question)),
        check=_has_choices,
    ),
    **dict.fromkeys(GRADED, Metric(read=_some, grade=None, check=_has_reference)),
}
"""The one place to add a metric."""
