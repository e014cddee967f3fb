"""Evaluation runs: every sample answered once, kept as it is answered, resumable at any moment."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedModel, ProcessorMixin

from hauberk.data.samples import Sample
from hauberk.errors import BadData, HauberkError
from hauberk.evaluation.judges import (
    FAILED,
    UNKNOWN,
    Degeneration,
    Judge,
    Outcome,
    Verdict,
    attempt,
    degeneration,
    exact_judge,
    keyword_judge,
)
from hauberk.evaluation.utility import check, samples_of, score
from hauberk.requests import Response, SupportsDefense, respond


@dataclass(frozen=True)
class Record:
    """One line of responses.jsonl."""

    sample_id: str
    suite: str
    channel: str
    model: str
    defense: str
    question: str
    expected: str
    reference: str
    response: str
    outcome: Outcome
    outcome_keyword: Outcome
    """That of the second judge, whose name is ``second``: the keyword judge was the first to be
    one, and old files call the column so."""
    correct: bool | None
    """Whether the score is 1; None without a score."""
    seconds: float
    tokens: int
    error: str = ""
    """What a judge raised, if one did, or why there is no answer to judge."""
    declared: Literal["", "failed", "refused"] = ""
    """What a served model's endpoint said itself, so that no judge is to be asked: that there is no
    answer, or that this is a refusal."""
    judge: str = "exact"
    """Whose word ``outcome`` is."""
    second: str = "keyword"
    """Whose word ``outcome_keyword`` is."""
    scenario: str = ""
    meta: str = ""
    """The sample's own, so that an answer can be scored again from its record."""
    score: float | None = None
    """See :mod:`hauberk.evaluation.utility`; None where nothing is right or wrong, or no score was
    to be had."""
    out_of: float = 1.0
    """What the score counts against."""
    grader: str = ""
    """Who graded the answer, where only a judge can."""

    @property
    def unknown(self) -> bool:
        """Nobody knows what the answer does: no judge could read it, or the judge failed."""
        return self.outcome in UNKNOWN

    @property
    def unjudged(self) -> bool:
        """The judge failed: it refused, or raised an error."""
        return self.outcome in FAILED

    @property
    def degenerate(self) -> Degeneration | None:
        """In which way the answer is broken; None where it is a sentence, or was not judged."""
        return degeneration(self.response) if self.outcome == "unparsed" else None

    @property
    def unsafe(self) -> bool:
        """A request to refuse whose answer is neither a refusal nor known to be harmless."""
        return self.expected == "refuse" and (self.outcome == "harmful" or self.unknown)

    @property
    def evasive(self) -> bool:
        """A request to refuse whose answer neither refuses nor grants it: beside the point."""
        return self.expected == "refuse" and self.outcome == "safe"

    @property
    def over_refused(self) -> bool:
        """A request to answer that was refused."""
        return self.expected == "answer" and self.outcome == "refused"


def judge_response(sample: Sample, response: Response, *, model: str, defense: str) -> Record:
    """Turn one response into a record, judged by both judges; one that fails ends nothing."""
    outcome, why = attempt(exact_judge, sample, response.text)
    keyword, why_keyword = attempt(keyword_judge, sample, response.text)
    scored, why_score = attempt(score, sample, response.text)
    return Record(
        sample_id=sample.sample_id,
        suite=sample.suite,
        channel=sample.channel,
        model=model,
        defense=defense,
        question=sample.question,
        expected=sample.expected,
        reference=sample.reference,
        response=response.text,
        outcome=outcome or "judge_error",
        outcome_keyword=keyword or "judge_error",
        correct=None if scored is None else scored == 1,
        seconds=response.seconds,
        tokens=response.tokens,
        error=why or why_keyword or why_score,
        scenario=sample.scenario,
        meta=sample.meta,
        score=scored,
    )


def _declared(record: Record, response: Response) -> Record:
    """Let a record say what the endpoint of a served model said itself."""
    if response.error:
        unknown: Outcome = "judge_error"
        return replace(
            record, outcome=unknown, outcome_keyword=unknown, correct=None, score=None,
            error=response.error, declared="failed",
        )  # fmt: skip
    if response.refused:
        return replace(
            record, outcome="refused", outcome_keyword="refused", declared="refused",
            correct=None if record.correct is None else False,
            score=None if record.score is None else 0.0,
        )  # fmt: skip
    return record


def rejudged(
    records: Sequence[Record],
    samples: Sequence[Sample],
    judge: Judge,
    place: Literal["first", "second"],
) -> list[Record]:
    """Let another judge take a place in finished records: the first, or the second beside it.

    All answers are judged at once, after the model under test is done, so that a judge may be as
    large as it and may batch.  A judge that raises loses no record: each is a ``judge_error``.
    What an endpoint declared itself stays as it is, and so does what this judge has judged.

    Parameters
    ----------
    records, samples : of the same ids, in any order

    Raises
    ------
    ValueError
        If a record has no sample, or the judge returns another number of verdicts.
    """
    outcome, name = _PLACES[place]
    named: dict[str, Any] = {name: judge.name}
    asked = [
        record
        for record in records
        if not record.declared
        and (getattr(record, name) != judge.name or getattr(record, outcome) in FAILED)
    ]
    questions = samples_of(asked, samples)
    try:
        verdicts = judge.judge(questions, [record.response for record in asked])
    except HauberkError:  # a key, an address: what a user can cure, before anything is counted
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        verdicts = [Verdict("judge_error", error=why)] * len(asked)
    if len(verdicts) != len(asked):
        raise ValueError(
            f"{judge.name} gave {len(verdicts)} verdicts on {len(asked)} responses; one each is "
            "right."
        )
    said = {record.sample_id: one for record, one in zip(asked, verdicts, strict=True)}
    return [
        _with_verdict(record, said[record.sample_id], outcome, name, judge.name)
        if record.sample_id in said
        else replace(record, **named)
        for record in records
    ]


_PLACES = {"first": ("outcome", "judge"), "second": ("outcome_keyword", "second")}
"""Where a record keeps what a judge said, and its name."""


def _with_verdict(record: Record, verdict: Verdict, outcome: str, name: str, judge: str) -> Record:
    changed: dict[str, Any] = {outcome: verdict.outcome, name: judge}
    (other,) = {place for place, _ in _PLACES.values()} - {outcome}
    before = record.error if getattr(record, other) in FAILED else ""  # that of the other judge
    error = verdict.error
    if verdict.outcome not in get_args(Outcome):
        error = f"{judge} said {verdict.outcome!r}; one of {', '.join(get_args(Outcome))} is right."
        changed[outcome] = "judge_error"
    return replace(record, error=error or before, **changed)


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    defense: SupportsDefense | None,
    *,
    names: tuple[str, str],
    journal: Path,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], Any] = lambda _: None,
) -> list[Record]:
    """Answer and judge ``samples`` by a model that runs here: see :func:`evaluate_through`."""
    return evaluate_through(
        partial(respond, model, processor),
        samples,
        defense,
        names=names,
        journal=journal,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )


def evaluate_through(
    answer: Callable[..., list[Response]],
    samples: Sequence[Sample],
    defense: SupportsDefense | None,
    *,
    names: tuple[str, str],
    journal: Path | None,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], Any] = lambda _: None,
) -> list[Record]:
    """Answer and judge ``samples``, going on where an earlier run stopped.

    Parameters
    ----------
    answer : answers requests as :func:`hauberk.respond` does when its model and processor are told,
        such as :meth:`hauberk.target.Target.respond`
    names : model and defense, as they stand in the records
    journal : JSON lines file that holds what is finished; a line that was cut short by a kill is
        dropped, and no sample with a whole line is answered again.  What an endpoint left without
        an answer is not among it, so that another run asks for it again.  None where ``answer``
        itself keeps what it was told, as an endpoint with a cache does
    progress : called with the number of newly finished samples

    Returns
    -------
    list of Record
        In the order of ``samples``.

    Raises
    ------
    BadData
        Before anything is answered, if nothing could be told of a suite: see
        :func:`hauberk.evaluation.utility.check`.
    """
    check(samples)
    done = taken_up(read_records(journal), samples, names, journal) if journal else {}
    open_samples = [sample for sample in samples if sample.sample_id not in done]
    progress(len(samples) - len(open_samples))
    with _appending(journal) as append:

        def keep(indices: Sequence[int], responses: Sequence[Response]) -> None:
            for index, response in zip(indices, responses, strict=True):
                sample = open_samples[index]
                record = judge_response(sample, response, model=names[0], defense=names[1])
                done[record.sample_id] = record = _declared(record, response)
                if not response.error:
                    append(record)
            progress(len(indices))

        answer(
            [sample.request for sample in open_samples],
            defense,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_batch=keep,
        )
    return [done[sample.sample_id] for sample in samples]


def taken_up(
    records: Sequence[Record], samples: Sequence[Sample], names: tuple[str, str], where: Path
) -> dict[str, Record]:
    """Take up what an earlier run finished, by id.

    Raises
    ------
    BadData
        If it asked something else, or asked another model or defense; ``where`` it was kept.
    """
    done = {record.sample_id: record for record in records}
    for sample in samples:
        if record := done.get(sample.sample_id):
            asked = (*names, sample.suite, sample.question, sample.reference, sample.meta)
            told = (record.model, record.defense, record.suite, record.question)
            if asked != (*told, record.reference, record.meta):
                raise BadData(
                    f"{where}: the answer to {sample.sample_id!r} is of {record.model} with "
                    f"{record.defense}, to {record.question[:60]!r}; {names[0]} with {names[1]} is "
                    f"asked {sample.question[:60]!r}. Keep answers elsewhere, or delete these."
                )
    return done


def differing_alone(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    records: Sequence[Record],
    defense: SupportsDefense | None,
    *,
    max_new_tokens: int,
) -> list[str]:
    """Answer samples again, one by one; return the ids whose batched answer was another.

    Batching is only an economy if it changes no answer, so every evaluation checks some.
    """
    batched = {record.sample_id: record.response for record in records}
    differing = []
    for sample in samples:
        (alone,) = respond(
            model, processor, [sample.request], defense, max_new_tokens=max_new_tokens, batch_size=1
        )
        if alone.text != batched[sample.sample_id]:
            differing.append(sample.sample_id)
    return differing


def read_records(path: Path) -> list[Record]:
    """Read a responses.jsonl; a last line that was cut short is left out.

    Raises
    ------
    BadData
        If a whole line is no record, naming it.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [_record(line, f"{path}:{n}") for n, line in enumerate(lines[:-1], 1) if line]


def _record(line: bytes, where: str) -> Record:
    try:
        return Record(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise BadData(
            f"{where}: no record of an answer ({error}); give a responses.jsonl as an evaluation "
            "writes it, or delete this one and evaluate again."
        ) from None


def write_records(records: Sequence[Record], path: Path) -> Path:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))
    return path


def by_suite(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Group records by suite, in the order of the suites' names."""
    ordered = sorted(records, key=lambda record: record.suite)
    return [(suite, list(group)) for suite, group in groupby(ordered, lambda r: r.suite)]


@contextmanager
def _appending(path: Path | None) -> Iterator[Callable[[Record], None]]:
    if path is None:
        yield lambda record: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        # Cut a line that a kill left unfinished, so that the next one starts on its own.
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)

        def append(record: Record) -> None:
            file.write(json.dumps(asdict(record)).encode() + b"\n")
            file.flush()

        yield append
        os.fsync(file.fileno())
