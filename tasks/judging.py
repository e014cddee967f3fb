"""The judges of params.yaml, as the stages ask them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tasks.params import Params
from tasks.params_checks import no_grader
from tasks.stage import SCRATCH, release

if TYPE_CHECKING:
    from hauberk.data.samples import Sample
    from hauberk.evaluation.judges import Judge, Outcome
    from hauberk.evaluation.run import Record
    from hauberk.requests import Response

Name = TypeVar("Name")
Place = Literal["first", "second"]
REPLIES = SCRATCH / "judges" / "replies.sqlite"
"""What served judges said, unless their mapping names a file: no stage that is killed, and none
that judges the same answers, pays twice."""


def judge_at(params: Params, place: Place) -> "Judge":
    """Make a judge.

    Raises
    ------
    BadJudge, BadEndpoint
        If a guard's model cannot be loaded, or the key of an endpoint is not set.
    """
    from hauberk.evaluation.judges import judge_of

    return judge_of(_with_replies(getattr(params.judges, place)))


def outcomes(
    judge: "Judge", samples: "Sequence[Sample]", responses: "Sequence[Response]"
) -> "list[Outcome]":
    """Tell what responses to samples do, for a stage that goes on with some of them.

    The judge is that of ``judge_at(params, "first")``.  One that is a model needs memory beside the
    model under test, which such a stage still needs.
    """
    verdicts = judge.judge(samples, [response.text for response in responses])
    return [verdict.outcome for verdict in verdicts]


def answers_it(outcome: "Outcome") -> bool:
    """Tell whether a response is known to be no refusal: what a judge failed on may be one."""
    from hauberk.evaluation.judges import FAILED

    return outcome != "refused" and outcome not in FAILED


def guard_files(params: Params) -> list[tuple[str, int, int]]:
    """Tell the files of the judge whose word counts, if it is a model here: name, size and time."""
    spec = params.judges.first
    folder = Path(spec["path"]) if spec["kind"] == "guard" else None
    files = sorted(folder.rglob("*")) if folder else []
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def check_keys(params: Params) -> None:
    """Find a key that is missing before answers are made that nobody could judge.

    Raises
    ------
    BadEndpoint
        Naming the environment variable that is not set.
    """
    from hauberk.endpoint import key_of

    told = params.judges
    for spec in (told.first, told.second, told.grader or {}):
        key_of(spec.get("api_key_env", ""))


def judged(
    params: Params, runs: "Mapping[Name, list[Record]]", samples: "Sequence[Sample]"
) -> "dict[Name, list[Record]]":
    """Let the judges of params.yaml judge finished runs: name -> records of the same samples.

    One judge at a time is loaded, after what the caller let go of is gone: it may be as large as
    the model under test.  Answers whose metric needs a grader are graded.

    Raises
    ------
    BadParams
        If some need one and ``judges.grader`` names none.
    BadJudge, BadEndpoint
        As :func:`judge_at` does.
    """
    from hauberk.errors import BadParams
    from hauberk.evaluation.judges import grader_of
    from hauberk.evaluation.run import rejudged
    from hauberk.evaluation.utility import graded, needs_grader

    found = dict(runs)
    places: tuple[Place, ...] = ("first", "second")
    for place in places:
        release()
        judge = judge_at(params, place)
        found = {name: rejudged(records, samples, judge, place) for name, records in found.items()}
        del judge
    if suites := sorted({sample.suite for sample in samples if needs_grader(sample)}):
        if params.judges.grader is None:
            raise BadParams(f"{no_grader(suites)}.")
        release()
        grader = grader_of(_with_replies(params.judges.grader))
        found = {name: graded(records, samples, grader) for name, records in found.items()}
    return found


def _with_replies(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Let what is served keep its replies where every stage finds them."""
    if spec["kind"] != "endpoint":
        return dict(spec)
    kept = {"cache": REPLIES, **spec}
    Path(kept["cache"]).parent.mkdir(parents=True, exist_ok=True)
    return kept
