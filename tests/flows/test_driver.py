"""The driver: states from receipts, messages from stages, one owner, nothing left behind."""

import json
import os
import shutil
import threading

import psutil
import pytest

from flows import locks
from flows.driver import Event, driving
from flows.errors import AlreadyRunning, BadPipeline, StageFailed, Transient, UnknownStage

SHIFT = "estimate_shift@toy-cmrm"


def bring(toy, *names: str) -> dict[str, str]:
    with driving(toy.root) as driver:
        return {name: driver.run(name) for name in driver.graph.select(names)}


def test_a_stage_ran_or_was_restored_or_is_unchanged(toy):
    assert set(bring(toy).values()) == {"Completed"}
    assert len(toy.ran()) == 5
    assert set(bring(toy).values()) == {"Skipped"}
    toy.set("alpha: 1", "alpha: 2")
    states = bring(toy)
    assert states == {
        "prepare_data": "Skipped",
        SHIFT: "Completed",
        "evaluate_undefended@toy": "Skipped",
        "evaluate@toy-cmrm": "Skipped",  # the bundle came out with the same bytes
        "compare": "Skipped",
    }
    toy.set("alpha: 2", "alpha: 1")
    assert bring(toy)[SHIFT] == "Cached"
    assert toy.ran() == [SHIFT]


def test_lost_outputs_come_back_from_the_cache_and_nothing_runs(built):
    shutil.rmtree(built.root / "artifacts")
    states = bring(built)
    assert set(states.values()) == {"Cached", "Skipped"}
    assert built.ran() == []
    assert (built.root / "artifacts" / "toy" / "cmrm" / "bundle" / "card.json").exists()


def test_the_plan_gives_reasons_and_what_follows(built):
    built.set("alpha: 1", "alpha: 2")
    with driving(built.root) as driver:
        planned = driver.graph.plan(driver.graph.select([]))
    assert planned["prepare_data"] == ("unchanged", [])
    assert planned[SHIFT] == ("stale", ["modified parameter defenses.cmrm"])
    assert planned["compare"] == ("follows", [f"upstream: {SHIFT}, evaluate@toy-cmrm"])


def test_a_stage_that_fails_speaks_for_itself(toy):
    toy.order("prepare_data", error="seed 7 is odd;\nwrite 8 in params.yaml.", exit=1)
    with pytest.raises(StageFailed) as failed:
        bring(toy, "prepare_data")
    assert not isinstance(failed.value, Transient)
    assert str(failed.value) == (
        "prepare_data failed (exit status 1): seed 7 is odd;\nwrite 8 in params.yaml.\n"
        "log: logs/prepare_data.log"
    )


def test_a_traceback_is_shown_by_its_last_line(toy):
    toy.order("prepare_data", crash=True)
    with pytest.raises(StageFailed, match="RuntimeError: boom"):
        bring(toy, "prepare_data")
    assert "Traceback" in (toy.root / "logs" / "prepare_data.log").read_text()


def test_a_stage_that_was_killed_says_by_what_and_shows_no_progress_bar(toy):
    toy.order("prepare_data", kill=9)
    with pytest.raises(StageFailed) as failed:
        bring(toy, "prepare_data")
    assert str(failed.value) == (
        "prepare_data was killed by signal 9 (out of memory, or by hand); run again, finished "
        "parts are kept.\nlog: logs/prepare_data.log"
    )


def test_a_progress_bar_is_no_message(toy):
    toy.order("prepare_data", exit=1, bar=True)
    with pytest.raises(StageFailed, match=r"\(exit status 1\): prepare_data: 1 of 2"):
        bring(toy, "prepare_data")


def test_exit_status_75_asks_to_be_tried_again(toy):
    toy.order("prepare_data", exit=75)
    with pytest.raises(Transient):
        bring(toy, "prepare_data")


def test_progress_is_what_the_stage_wrote_last(toy):
    toy.order("prepare_data", sleep=0.5)
    heard: list[Event] = []
    with driving(toy.root, listen=heard.append) as driver:
        driver.run("prepare_data")
    assert "prepare_data: 1 of 2" in {event.says for event in heard}
    assert [heard[0].state, heard[-1].state] == ["running", "Completed"]


def test_a_second_driver_is_refused_by_name(toy):
    with driving(toy.root):
        assert locks.holder(toy.root) == os.getpid()
        with (
            pytest.raises(AlreadyRunning, match=rf"PID {os.getpid()}, since .*`kill"),
            driving(toy.root),
        ):
            pass
    assert locks.holder(toy.root) is None


def test_stopping_ends_the_stage_and_its_group(toy, children):
    toy.order("prepare_data", sleep=60)
    failed: list[BaseException] = []

    def run(driver) -> None:
        try:
            driver.run("prepare_data")
        except StageFailed as error:
            failed.append(error)

    heard: list[Event] = []
    with driving(toy.root, listen=heard.append) as driver:
        thread = threading.Thread(target=run, args=[driver])
        thread.start()
        pid = toy.pid("prepare_data")
        driver.stop()
        thread.join(30)  # the stage itself would take a minute
        assert not thread.is_alive()
    assert "was interrupted" in str(failed[0])
    assert heard[-1].state == "interrupted"
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=5)
    assert not psutil.pid_exists(pid)  # waited for: a killed process stays until it is reaped
    assert not (toy.root / "artifacts" / "data").exists()


@pytest.mark.parametrize("text", ["", "{", '{"write": 3}', "living"])
def test_a_broken_or_stale_lock_of_dvc_is_put_in_order(toy, text):
    info = {"pid": os.getpid(), "cmd": "dvc repro"}  # alive, and no dvc: a number used again
    if text == "living":
        text = json.dumps({"write": {str(toy.root / "artifacts/data"): info}, "read": {}})
    path = toy.root / ".dvc" / "tmp" / "rwlock"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert bring(toy, "prepare_data") == {"prepare_data": "Completed"}


@pytest.mark.parametrize(
    "after", ["", "schema", "stages:", "stages:\n", "  cmd: ", "outs:\n", "size: "]
)
def test_a_dvc_lock_that_was_cut_short_is_restored(toy, after):
    bring(toy)
    toy.ran()
    path = toy.root / "dvc.lock"
    whole = path.read_text()
    path.write_text(whole[: whole.rindex(after) + len(after)] if after else "")
    assert set(bring(toy).values()) == {"Skipped"}
    assert toy.ran() == []
    assert path.read_text() == whole


def test_a_dvc_lock_in_the_middle_of_a_merge_is_left_to_a_person(toy):
    bring(toy, "prepare_data")
    path = toy.root / "dvc.lock"
    merging = f"<<<<<<< HEAD\n{path.read_text()}=======\n>>>>>>> other\n"
    path.write_text(merging)
    with pytest.raises(BadPipeline):
        bring(toy, "prepare_data")
    assert path.read_text() == merging


def test_stages_are_selected_by_name_group_or_glob_with_what_they_need(toy):
    with driving(toy.root) as driver:
        select = driver.graph.select
        assert select([]) == list(driver.graph.stages)
        assert select(["estimate_shift"]) == ["prepare_data", SHIFT]
        assert select(["*_undefended@*"]) == ["prepare_data", "evaluate_undefended@toy"]
        with pytest.raises(UnknownStage, match=r"'evalute'; did you mean evaluate"):
            select(["evalute"])
