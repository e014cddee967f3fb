"""How the sets of utility are asked, and what their tables have in common."""

from collections import Counter
from collections.abc import Sequence

from hauberk.data.sources.source import Option
from hauberk.data.tables import Row

_SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
"""Both as LLaVA-1.5 was trained and is evaluated with them: Liu et al., "Improved Baselines with
Visual Instruction Tuning", CVPR 2024, arXiv:2310.03744; others follow it."""
PROMPT = {"prompt": Option("short", ("short", "plain"), "whether to ask for a word or phrase")}
"""The option of a set whose answers are a word or phrase."""


def ended(question: str, prompt: str) -> str:
    """Ask for a short answer, or as the data set asks."""
    return f"{question}{_SHORT}" if prompt == "short" else question


def key_of(row: str, prompt: str) -> str:
    """Name a row by how it is asked, as its answers to one question are no answers to another."""
    return f"{prompt}-{row}"


def answers_of(row: Row) -> list[str]:
    """Hand out the answers of several people: texts, or objects with an ``answer``.

    Some may be blank, as those of people who had nothing to say are; not all of them.
    """
    value = row.values.get("answers")
    objects = isinstance(value, list) and value and isinstance(value[0], dict)
    answers = (
        [answer.any_text("answer") for answer in row.rows("answers")]
        if objects
        else row.texts("answers")
    )
    if not any(map(str.strip, answers)):
        raise row.wrong("'answers' is empty, as in splits whose answers are kept secret")
    return answers


def most_common(answers: Sequence[str]) -> str:
    """Find what most of them say who say something; among equals the first."""
    return Counter(filter(str.strip, answers)).most_common(1)[0][0]


def yes_or_no(row: Row, column: str) -> str:
    """Hand out an answer that is yes or no, in small letters."""
    answer = row.text(column).strip().lower()
    if answer not in ("yes", "no"):
        raise row.wrong(f"{column!r} is {answer!r}; it must be yes or no")
    return answer
