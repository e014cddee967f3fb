"""Evaluation over processes: the same as in one, whatever dies on the way."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from multiprocessing import active_children

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hauberk.bundle import binding_of
from hauberk.data.lab import build_suite
from hauberk.defenses.shift import Shift, ShiftSetting, estimate_shift, sample_shifts
from hauberk.errors import BadData, ShardsFailed
from hauberk.evaluation import shards
from hauberk.evaluation.run import Record, evaluate, read_records, write_records
from hauberk.evaluation.shards import FromDisk, evaluate_sharded, merge, shard_of
from hauberk.requests import respond

BLANK = Record("", "s", "", "tiny", "none", "", "refuse", "", "", "safe", "safe", None, 0.0, 0)
SETTING = {"max_new_tokens": 3, "batch_size": 2, "names": ("tiny", "none")}


@pytest.fixture(scope="module")
def samples():
    return build_suite("text_image", "test", 8, seed=2) + build_suite("text", "test", 8, seed=2)


@pytest.fixture(scope="module")
def alone(tiny, samples, tmp_path_factory):
    """The records of one process."""
    journal = tmp_path_factory.mktemp("alone") / "responses.jsonl"
    return timeless(evaluate(tiny.model, tiny.processor, samples, None, journal=journal, **SETTING))


def timeless(records):
    return [replace(record, seconds=0.0) for record in records]


# --- dividing and merging ---------------------------------------------------------------------


@given(st.lists(st.text(), min_size=1, max_size=30, unique=True), st.integers(1, 8))
def test_every_sample_has_one_shard_that_depends_on_its_id_alone(ids, number):
    found = [shard_of(name, number) for name in ids]
    assert all(0 <= shard < number for shard in found)
    assert found == [shard_of(name, number) for name in ids]


def test_shards_are_of_like_sizes_and_the_same_on_every_machine():
    counts = Counter(shard_of(f"sample-{index}", 4) for index in range(4000))
    assert max(counts.values()) - min(counts.values()) < 150
    assert [shard_of(name, 5) for name in ("a", "b", "c", "d")] == [0, 1, 0, 4]


@given(places=st.lists(st.integers(0, 3), min_size=1, max_size=20), twice=st.booleans())
def test_merging_neither_loses_nor_repeats(places, twice, tmp_path_factory):
    folder = tmp_path_factory.mktemp("journals")
    records = [replace(BLANK, sample_id=str(n), seconds=1.0) for n in range(len(places))]
    paths = []
    for journal in range(4):
        own = [r for r, place in zip(records, places, strict=True) if place == journal or twice]
        own = [replace(record, seconds=float(journal)) for record in own]
        paths.append(write_records(own, folder / f"{journal}.jsonl"))
    merged = merge(paths)
    assert sorted(r.sample_id for r in merged) == sorted(r.sample_id for r in records)


def test_two_answers_of_one_sample_are_an_error_that_names_both_files(tmp_path):
    one = write_records([replace(BLANK, sample_id="x", response="a")], tmp_path / "1.jsonl")
    two = write_records([replace(BLANK, sample_id="x", response="b")], tmp_path / "2.jsonl")
    with pytest.raises(BadData, match=r"1\.jsonl and .*2\.jsonl: different answers of 'x'"):
        merge([one, two])


@pytest.mark.parametrize(("visible", "count", "number", "divided"), [
    (None, 0, 2, [None, None]), (None, 4, 2, ["0,2", "1,3"]), (None, 2, 3, ["0", "1", "0"]),
    ("5,7", 2, 2, ["5", "7"]), ("GPU-a,GPU-b,GPU-c", 3, 1, ["GPU-a,GPU-b,GPU-c"]),
    ("", 0, 1, [None]),
])  # fmt: skip
def test_gpus_are_divided_among_those_that_are_visible(
    monkeypatch, visible, count, number, divided
):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv(shards.GPUS, raising=False)
    if visible is not None:
        monkeypatch.setenv(shards.GPUS, visible)
    assert shards._divided_gpus(number) == divided


# --- what is refused --------------------------------------------------------------------------


def test_what_no_other_process_can_find_is_refused_before_anything_starts(samples, tmp_path):
    with pytest.raises(ValueError, match="give a function of a module or FromDisk"):
        evaluate_sharded(lambda: None, samples, shards=2, folder=tmp_path / "j", **SETTING)
    with pytest.raises(ValueError, match="shards: 0 is wrong, 1 or more is right"):
        evaluate_sharded(print, samples, shards=0, folder=tmp_path / "j", **SETTING)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_run_is_refused(samples, tmp_path):
    write_records([replace(BLANK, model="other", sample_id="x")], tmp_path / "shard-0.jsonl")
    with pytest.raises(BadData, match=r"holds answers of other with none.*a folder of its own"):
        evaluate_sharded(print, samples, shards=2, folder=tmp_path, **SETTING)


@pytest.mark.slow
def test_a_worker_that_cannot_load_says_why(samples, tmp_path):
    with pytest.raises(ShardsFailed, match=r"1 of 1 shards failed:\n  shard 0: .*no such folder"):
        evaluate_sharded(
            FromDisk("/nowhere"), samples[:1], shards=1, folder=tmp_path / "j", **SETTING
        )


# --- real processes ---------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_give_what_one_gives_and_a_finished_run_starts_none(
    lab_folder, samples, alone, tmp_path, monkeypatch
):
    counts = []
    load = FromDisk(lab_folder)
    found = evaluate_sharded(
        load, samples, shards=2, folder=tmp_path, threads=1, progress=counts.append, **SETTING
    )
    assert timeless(found) == alone
    assert sum(counts) == len(samples)
    assert active_children() == []
    lines = [r.sample_id for path in tmp_path.glob("*.jsonl") for r in read_records(path)]
    assert sorted(lines) == sorted(sample.sample_id for sample in samples)
    monkeypatch.setattr(shards, "_Worker", None)  # a worker would now be an error
    again = evaluate_sharded(load, samples[::-1], shards=3, folder=tmp_path, **SETTING)
    assert again == found[::-1]


@pytest.mark.slow
def test_a_shard_that_fails_or_is_killed_costs_no_other_and_a_new_run_goes_on(
    lab_folder, samples, alone, tmp_path
):
    """One of three meets a request that no model can read, another is killed as it works."""
    number = 3
    bad = next(place for place, s in enumerate(samples) if shard_of(s.sample_id, number) == 0)
    given = list(samples)
    given[bad] = replace(given[bad], question="what is in <image> ?")
    killed = []

    def kill_one(count):
        workers = sorted(active_children(), key=lambda child: child.pid)
        if count and not killed:
            killed.append(workers[1].pid)
            os.kill(workers[1].pid, signal.SIGKILL)

    with pytest.raises(ShardsFailed) as caught:
        evaluate_sharded(
            FromDisk(lab_folder), given, shards=number, folder=tmp_path, threads=1,
            progress=kill_one, **SETTING,
        )  # fmt: skip
    told = str(caught.value)
    assert "shard 0: request" in told
    assert "shard 1: its process was killed by SIGKILL" in told
    kept = read_records(tmp_path / "shard-2.jsonl")
    assert len(kept) == sum(shard_of(s.sample_id, number) == 2 for s in samples)
    assert (
        f"{len(merge(list(tmp_path.glob('*.jsonl'))))} of {len(samples)} answers are kept" in told
    )
    journals = {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    with (tmp_path / "shard-2.jsonl").open("ab") as file:
        file.write(b'{"sample_id": "cut')  # as a kill may leave it
    found = evaluate_sharded(
        FromDisk(lab_folder), samples, shards=1, folder=tmp_path, threads=1, **SETTING
    )
    assert timeless(found) == alone
    for path, before in journals.items():
        assert path.read_bytes().startswith(before)


RUN = """
import sys
from pathlib import Path
from hauberk.data.lab import build_suite
from hauberk.evaluation.shards import FromDisk, evaluate_sharded

def tell(count):
    print("finished", count, flush=True)

if __name__ == "__main__":
    evaluate_sharded(FromDisk(sys.argv[1]), build_suite("text", "test", 4000, seed=2), shards=1,
                     folder=Path(sys.argv[2]), names=("tiny", "none"), max_new_tokens=8,
                     batch_size=2, progress=tell)
"""


@pytest.mark.slow
def test_workers_end_when_the_one_that_started_them_is_killed(lab_folder, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(lab_folder), str(tmp_path / "journals")],
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        assert parent.stdout.readline() == "finished 0\n"
        assert parent.stdout.readline() == "finished 2\n"  # a worker is at work
        children = psutil.Process(parent.pid).children(recursive=True)
        assert children
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    limit = time.monotonic() + 20
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert read_records(tmp_path / "journals" / "shard-0.jsonl")


def test_a_defended_model_is_loaded_with_its_bundle(tiny, lab_folder, tmp_path):
    plain, processor, nothing = FromDisk(lab_folder)()
    assert nothing is None
    setting = ShiftSetting(compose="incremental", alpha=1.5)
    shifts = sample_shifts(plain, processor, tiny.pictured)
    defense = Shift(estimate_shift(shifts), setting, processor)
    bundle = defense.save(tmp_path / "bundle", binding_of(plain, processor), data=[])
    model, processor, loaded = FromDisk(lab_folder, bundle, {"dtype": "float32"})()
    said = [
        [r.text for r in respond(model, processor, tiny.pictured, one, max_new_tokens=6)]
        for one in (defense, loaded, None)
    ]
    assert said[0] == said[1] != said[2]
