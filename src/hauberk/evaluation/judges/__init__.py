"""Judges: from responses to their outcomes, whoever tells them.

A judge is described by a plain mapping with its ``kind``, one of :data:`JUDGES`, and what that kind
may vary:

    kind: keyword
    kind: exact
    kind: guard      and the fields of GuardSetting (hauberk.evaluation.judges.guard)
    kind: endpoint   and the fields of EndpointSetting (hauberk.endpoint) and of ServedJudge
                     (hauberk.evaluation.judges.served)

What is loaded or asked is imported when a judge of its kind is made.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from hauberk.errors import BadJudge
from hauberk.evaluation.judges.verdict import (
    ENDS,
    FAILED,
    UNKNOWN,
    Judge,
    Outcome,
    Shown,
    Verdict,
)
from hauberk.evaluation.judges.words import (
    EXACT,
    KEYWORD,
    REFUSAL_KEYWORDS,
    Degeneration,
    Rule,
    attempt,
    degeneration,
    exact_judge,
    grants,
    is_correct,
    keyword_judge,
    names_its_thing,
    refuses,
)

if TYPE_CHECKING:
    from hauberk.evaluation.judges.asking import Asking
    from hauberk.evaluation.judges.grader import ServedGrader

T = TypeVar("T")
S = TypeVar("S", bound="Asking")
Make = Callable[[], Judge]


def judge_of(spec: Mapping[str, Any]) -> Judge:
    """Make the judge that a mapping describes, as params.yaml holds it.

    Raises
    ------
    BadJudge
        If the kind or a key is unknown, one that is needed is missing, a value is none, or a
        guard's model cannot be loaded.
    BadEndpoint
        If the environment variable with the key of an endpoint is not set.
    """
    return checked(spec)()


def checked(spec: Mapping[str, Any]) -> Make:
    """Check a mapping, and give what makes its judge; nothing is loaded and no key is read.

    Raises
    ------
    BadJudge
        As :func:`judge_of` does, but for a guard's model.
    """
    told = dict(spec)
    kind = told.pop("kind", None)
    if not isinstance(kind, str) or kind not in JUDGES:
        raise BadJudge(f"a judge of kind {kind!r} is not one of {', '.join(JUDGES)}.")
    return JUDGES[kind](told)


def grader_of(spec: Mapping[str, Any]) -> "ServedGrader":
    """Make the grader that a mapping describes: as for a judge of kind endpoint, without rubric.

    Raises
    ------
    BadJudge, BadEndpoint
        As :func:`judge_of` does.
    """
    return checked_grader(spec)()


def checked_grader(spec: Mapping[str, Any]) -> "Callable[[], ServedGrader]":
    """Check a mapping, and give what makes its grader; no key is read.

    Raises
    ------
    BadJudge
        As :func:`checked` does.
    """
    from hauberk.evaluation.judges.grader import ServedGrader

    told = dict(spec)
    if (kind := told.pop("kind", None)) != "endpoint":
        raise BadJudge(f"a grader of kind {kind!r} is not known; endpoint is.")
    return _served(ServedGrader, told)


def _rule(rule: Rule) -> Callable[[dict[str, Any]], Make]:
    def check(told: dict[str, Any]) -> Make:
        _refuse_unknown(rule.name, told, known=())
        return lambda: rule

    return check


def _guard(told: dict[str, Any]) -> Make:
    from hauberk.evaluation.judges.guard import GuardJudge, GuardSetting

    _refuse_unknown("guard", told, known=_names(GuardSetting))
    setting = _made("guard", GuardSetting, told)
    return lambda: GuardJudge.load(setting)


def _endpoint(told: dict[str, Any]) -> Make:
    from hauberk.evaluation.judges.served import ServedJudge

    return _served(ServedJudge, told)


def _served(asking: type[S], told: dict[str, Any]) -> Callable[[], S]:
    from hauberk.endpoint import Endpoint, EndpointSetting

    own = [name for name in _names(asking) if name != "endpoint"]
    _refuse_unknown("endpoint", told, known=(*_names(EndpointSetting), *own))
    ways = {name: told.pop(name) for name in own if name in told}
    setting = _made("endpoint", EndpointSetting, told)
    asked = _made("endpoint", asking, {"endpoint": None, **ways})
    return lambda: replace(asked, endpoint=Endpoint(setting))


JUDGES: dict[str, Callable[[dict[str, Any]], Make]] = {
    "exact": _rule(EXACT),
    "keyword": _rule(KEYWORD),
    "guard": _guard,
    "endpoint": _endpoint,
}
"""What checks a mapping of each kind, without its kind, and gives what makes the judge."""


def _names(setting: Any) -> list[str]:
    return [field.name for field in fields(setting)]


def _refuse_unknown(kind: str, told: Mapping[str, Any], known: Any) -> None:
    # No value is shown: it may be a key that somebody wrote where its variable should stand.
    if unknown := sorted(map(str, told.keys() - set(known))):
        right = ", ".join(sorted(known)) or "nothing else"
        raise BadJudge(
            f"a judge of kind {kind} does not know {', '.join(unknown)}; it knows {right}."
        )


def _made(kind: str, setting: type[T], told: Mapping[str, Any]) -> T:
    needed = {
        field.name
        for field in fields(setting)  # type: ignore[arg-type]
        if field.default is MISSING and field.default_factory is MISSING
    }
    if missing := sorted(needed - told.keys()):
        raise BadJudge(f"a judge of kind {kind} needs {', '.join(missing)}; add it to its mapping.")
    try:
        return setting(**told)
    except ValueError as error:
        raise BadJudge(f"a judge of kind {kind}: {error}") from None


__all__ = [
    "ENDS",
    "FAILED",
    "JUDGES",
    "REFUSAL_KEYWORDS",
    "UNKNOWN",
    "Degeneration",
    "Judge",
    "Outcome",
    "Rule",
    "Shown",
    "Verdict",
    "attempt",
    "checked",
    "checked_grader",
    "degeneration",
    "exact_judge",
    "grader_of",
    "grants",
    "is_correct",
    "judge_of",
    "keyword_judge",
    "names_its_thing",
    "refuses",
]
