"""The judges of params.yaml, as the stages ask them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tasks.params import Judges, Params
from tasks.stage import SCRATCH

if TYPE_CHECKING:
    from hauberk.data.samples import Sample
    from hauberk.evaluation.judges import Judge
    from hauberk.evaluation.run import Record

Name = TypeVar("Name")
Place = Literal["first", "second"]
REPLIES = SCRATCH / "judges" / "replies.jsonl"
"""What served judges said, unless their mapping names a file: no stage that is killed, and none
that judges the same answers, pays twice."""


def judge_at(params: Params, place: Place) -> "Judge | None":
    """Make a judge; None for the one that every answer is judged by as it comes.

    Raises
    ------
    BadJudge, BadEndpoint
        If a guard's model cannot be loaded, or the key of an endpoint is not set.
    """
    from hauberk.evaluation.judges import judge_of

    spec: dict[str, Any] = getattr(params.judges, place)
    if spec == getattr(Judges(), place):
        return None
    if spec["kind"] == "endpoint":
        spec = {"cache": REPLIES, **spec}
        Path(spec["cache"]).parent.mkdir(parents=True, exist_ok=True)
    return judge_of(spec)


def judged(
    params: Params, runs: "Mapping[Name, list[Record]]", samples: "Sequence[Sample]"
) -> "dict[Name, list[Record]]":
    """Let the judges of params.yaml judge finished runs: name -> records of the same samples.

    One judge at a time is loaded, after what the caller let go of is gone: it may be as large as
    the model under test.
    """
    import gc

    from hauberk.evaluation.run import rejudged

    found = dict(runs)
    places: tuple[Place, ...] = ("first", "second")
    for place in places:
        gc.collect()
        if judge := judge_at(params, place):
            found = {
                name: rejudged(records, samples, judge, place) for name, records in found.items()
            }
        del judge
    return found
