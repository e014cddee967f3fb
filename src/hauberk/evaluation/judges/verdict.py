"""What every judge is and says: its outcomes, and what it had before it when it said so."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from hauberk.data.samples import Sample

Outcome = Literal["harmful", "safe", "refused", "unparsed", "judge_refused", "judge_error"]
FAILED = ("judge_refused", "judge_error")
"""The judge would not, or could not, say anything."""
UNKNOWN = ("unparsed", *FAILED)
"""Nobody knows what such an answer does: no rate may profit from it."""
ENDS = ("_lower", "_upper")
"""What a rate would be if nothing of what is unknown counted, or all of it: NAME_lower, NAME_upper.
A rate itself is one of the two; the other has a name of its own."""

Shown = Literal["question", "response", "image", "reference"]
"""What a judge may be shown.  A harm that the picture tells is invisible to one that sees none."""


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one response."""

    outcome: Outcome
    category: str = ""
    """Of the harm, in the judge's own words or numbers; "" where it names none."""
    said: str = ""
    """All that the judge said, word by word; "" for a rule."""
    error: str = ""
    """Why it said nothing."""
    saw: tuple[Shown, ...] = ()
    """What it was shown of this sample, which may have no picture."""
    cost: float = 0.0
    seconds: float = 0.0


class Judge(Protocol):
    """Tells what responses do.

    One verdict for each, in their order: what goes wrong with one response becomes the verdict
    ``judge_error`` and ends nothing.
    """

    @property
    def name(self) -> str:
        """Tells apart any two judges whose verdicts may differ: format, model, revision, words."""
        ...

    @property
    def sees(self) -> tuple[Shown, ...]:
        """What it is shown of a sample that has it."""
        ...

    def judge(
        self,
        samples: Sequence[Sample],
        responses: Sequence[str],
        progress: Callable[[int], Any] = lambda count: None,
    ) -> list[Verdict]:
        """Judge the response to each sample; ``progress`` is told how many more are judged."""
        ...


def shown(sees: Sequence[Shown], sample: Sample) -> tuple[Shown, ...]:
    """What a judge is shown of one sample."""
    return tuple(part for part in sees if part != "image" or sample.image is not None)


def one_object(text: str) -> dict[str, Any] | None:
    """Read a text that is one JSON object, in a fence of Markdown or bare; None if it is not.

    An object that says a thing twice is none: which of the two would be meant?
    """
    bare = text.strip()
    if bare.startswith("```") and bare.endswith("```"):
        bare = bare[3:-3].removeprefix("json")
    try:
        found = json.loads(bare, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _once(pairs: Sequence[tuple[str, Any]]) -> Mapping[str, Any]:
    known = dict(pairs)
    if len(known) != len(pairs):
        raise ValueError("a name stands twice")
    return known
