"""Evaluation runs: a kill at any moment loses no finished response and repeats none."""

import importlib
import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hauberk.data.lab import build_suite
from hauberk.errors import BadData
from hauberk.evaluation.run import (
    _declared,
    differing_alone,
    evaluate,
    judge_response,
    read_records,
    write_records,
)
from hauberk.requests import Response


class Counting:
    """A defense that changes nothing and remembers whom it saw; it can fail like a kill."""

    def __init__(self, fail_after=None):
        self.asked, self.fail_after = [], fail_after

    def rewrite(self, request):
        self.asked.append((request.text, None if not request.images else request.images[0]))
        return request

    def applied(self, model):
        from contextlib import nullcontext

        return nullcontext()


@pytest.fixture(scope="module")
def samples():
    return [
        sample
        for suite in ("text_image", "benign_image", "text")
        for sample in build_suite(suite, "test", 4, seed=2)
    ]


@pytest.fixture(scope="module")
def run(tiny, samples):
    """Evaluate with 3 tokens an answer, which is enough to tell answers apart."""

    def go(journal, defense=None, **options):
        arguments = {"max_new_tokens": 3, "batch_size": 5, "names": ("tiny", "none")} | options
        return evaluate(tiny.model, tiny.processor, samples, defense, journal=journal, **arguments)

    return go


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The records of an uninterrupted run and the bytes of its journal."""
    journal = tmp_path_factory.mktemp("whole") / "responses.jsonl"
    return run(journal), journal.read_bytes()


@pytest.mark.parametrize("names", [("another", "none"), ("tiny", "cmrm")])
def test_answers_of_another_model_or_defense_are_not_taken_up(run, whole, tmp_path, names):
    journal = tmp_path / "responses.jsonl"
    journal.write_bytes(whole[1])
    with pytest.raises(BadData, match="is of tiny with none"):
        run(journal, names=names)
    assert journal.read_bytes() == whole[1]


def test_answers_to_another_question_are_not_taken_up(tiny, samples, whole, tmp_path):
    journal = tmp_path / "responses.jsonl"
    journal.write_bytes(whole[1])
    other = [replace(samples[0], question="another question ?"), *samples[1:]]
    with pytest.raises(BadData, match="is asked 'another question"):
        evaluate(tiny.model, tiny.processor, other, None, names=("tiny", "none"),
                 journal=journal, max_new_tokens=3, batch_size=5)  # fmt: skip


def test_a_refusal_that_an_endpoint_declares_is_no_right_answer(samples):
    sample = replace(
        samples[4], expected="answer", reference="no", meta='{"metric": "pope", "answers": []}'
    )
    said = Response("No, I can't help with that.", 8, 0.1, refused=True)
    record = _declared(judge_response(sample, said, model="m", defense="d"), said)
    assert (record.outcome, record.score, record.correct) == ("refused", 0.0, False)


def timeless(records):
    return [replace(record, seconds=0.0) for record in records]


def test_records_come_in_the_order_of_the_samples_and_the_journal_holds_each_once(whole, samples):
    records, raw = whole
    assert [record.sample_id for record in records] == [sample.sample_id for sample in samples]
    lines = [json.loads(line) for line in raw.splitlines()]
    by_id = {record.sample_id: asdict(record) for record in records}
    assert {line["sample_id"]: line for line in lines} == by_id
    assert len(lines) == len(records)
    assert len({record.response for record in records}) > 3


def test_a_journal_cut_at_any_byte_gives_back_every_whole_line(whole, tmp_path):
    raw = b"".join(whole[1].splitlines(keepends=True)[:3])
    path = tmp_path / "responses.jsonl"
    ends = [index + 1 for index, byte in enumerate(raw) if byte == ord("\n")]
    records = read_records(write(path, raw))
    for cut in range(len(raw) + 1):
        finished = sum(end <= cut for end in ends)
        assert read_records(write(path, raw[:cut])) == records[:finished]


def write(path, content):
    path.write_bytes(content)
    return path


def cuts(raw):
    """The ends of some lines, one byte before and after them, and the middle of lines."""
    ends = [index + 1 for index, byte in enumerate(raw) if byte == ord("\n")]
    near = [end + step for end in ends[::5] for step in (-1, 0, 1)]
    return [0, 1, *[cut for cut in near if cut <= len(raw)], ends[3] + 40, len(raw)]


def test_a_run_goes_on_wherever_its_journal_was_cut(run, whole, samples, tmp_path):
    records, raw = whole
    for cut in cuts(raw):
        journal = tmp_path / f"{cut}.jsonl"
        journal.write_bytes(raw[:cut])
        finished = {record.sample_id for record in read_records(journal)}
        counting, progress = Counting(), []
        again = run(journal, counting, progress=progress.append)
        assert timeless(again) == timeless(records)
        asked = [s.request.text for s in samples if s.sample_id not in finished]
        assert sorted(text for text, _ in counting.asked) == sorted(asked)
        assert sum(progress) == len(samples)
        kept = [json.loads(line)["sample_id"] for line in journal.read_bytes().splitlines()]
        assert sorted(kept) == sorted(sample.sample_id for sample in samples)
        assert journal.read_bytes().startswith(raw[:cut][: raw[:cut].rfind(b"\n") + 1])


def test_what_was_finished_before_an_error_is_kept(run, whole, samples, tmp_path):
    journal, calls = tmp_path / "responses.jsonl", []

    def fail_in_second_batch(count):
        calls.append(count)
        if len(calls) == 3:  # nothing was there at first, then a batch, then this
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(journal, progress=fail_in_second_batch)
    assert calls == [0, 5, 5]
    assert len(read_records(journal)) == 10
    counting = Counting()
    assert timeless(run(journal, counting)) == timeless(whole[0])
    assert len(counting.asked) == len(samples) - 10


def test_a_finished_run_asks_nothing_and_adds_nothing(run, whole, tmp_path):
    journal, counting = write(tmp_path / "responses.jsonl", whole[1]), Counting()
    assert run(journal, counting) == whole[0]
    assert counting.asked == []
    assert journal.read_bytes() == whole[1]


@pytest.mark.parametrize("batch_size", [1, 64])
def test_the_batch_size_changes_no_response(run, whole, tmp_path, batch_size):
    found = run(tmp_path / "responses.jsonl", batch_size=batch_size)
    assert timeless(found) == timeless(whole[0])


def test_answers_alone_are_compared_with_those_of_the_run(tiny, samples, whole):
    records = list(whole[0])
    arguments = {"max_new_tokens": 3}
    check = (tiny.model, tiny.processor, samples[:3])
    assert differing_alone(*check, records, None, **arguments) == []
    records[1] = replace(records[1], response="something else")
    assert differing_alone(*check, records, None, **arguments) == [samples[1].sample_id]


@given(st.lists(st.text(max_size=20), min_size=1, max_size=6))
def test_records_survive_any_text(texts):
    import tempfile
    from pathlib import Path

    (sample,) = build_suite("text", "test", 1, seed=2)
    records = [
        judge_response(sample, Response(text, 1, 0.1 + 0.2), model="m", defense="d")
        for text in texts
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = write_records(records, Path(folder, "responses.jsonl"))
        assert read_records(path) == records
        assert path.read_bytes().count(b"\n") == len(records)


FAILING = {"exact_judge": "run", "keyword_judge": "run", "is_correct": "utility"}
"""Judges, and the module that calls each."""


@pytest.mark.parametrize("judge", FAILING)
def test_a_judge_that_fails_costs_one_verdict_and_neither_the_run_nor_the_sample(
    run, whole, samples, tmp_path, monkeypatch, judge
):
    home = importlib.import_module(f"hauberk.evaluation.{FAILING[judge]}")
    kept, broken = getattr(home, judge), samples[5].sample_id

    def fail_once(sample, response):
        if sample.sample_id == broken:
            raise TimeoutError("no answer from the judge")
        return kept(sample, response)

    monkeypatch.setattr(home, judge, fail_once)
    journal = tmp_path / "responses.jsonl"
    found = {record.sample_id: record for record in timeless(run(journal))}
    right = {record.sample_id: record for record in timeless(whole[0])}
    hurt = found.pop(broken)
    assert found == {name: record for name, record in right.items() if name != broken}
    lost = dict(zip(FAILING, ("outcome", "outcome_keyword", "correct"), strict=True))[judge]
    assert getattr(hurt, lost) == (None if lost == "correct" else "judge_error")
    assert hurt.error == "TimeoutError: no answer from the judge"
    assert hurt in timeless(read_records(journal))


def test_no_journal_is_an_empty_one(tmp_path):
    assert read_records(tmp_path / "nothing.jsonl") == []
