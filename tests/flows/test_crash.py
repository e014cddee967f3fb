"""A run that is killed: nothing outlives it, nothing is half-written, running again completes."""

import signal
import time
from collections.abc import Callable

import psutil
import pytest

SHIFT = "estimate_shift@toy-cmrm"


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def env(api) -> dict[str, str]:
    return {"PREFECT_API_URL": api}


def test_after_kill_9_in_a_stage_running_again_completes(built, children, env):
    """The toy's stage does not ask to die with its parent, so it goes on: an orphan."""
    built.set("alpha: 1", "alpha: 2")
    built.order(SHIFT, sleep=600)
    run = built.start("run", SHIFT, **env)
    children.append(run)
    orphan = built.pid(SHIFT)
    parent = psutil.Process(orphan).parent()
    run.send_signal(signal.SIGKILL)
    run.wait()
    wait_for(lambda: not alive(parent.pid))  # dvc ends with the run
    assert alive(orphan)
    assert not (built.root / "artifacts/toy/cmrm/bundle").exists()

    again = built.flows("run", SHIFT, **env)
    assert again.returncode == 0, again.stderr
    assert f"ended PID {orphan}" in again.stderr
    assert not alive(orphan)
    assert built.ran() == [SHIFT, SHIFT]
    assert (built.root / "artifacts/toy/cmrm/bundle/card.json").exists()
    assert built.flows("plan", SHIFT).stdout.endswith("Nothing to do.\n")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_ends_its_stages_first(built, children, env, how):
    built.set("alpha: 1", "alpha: 2")
    built.order(SHIFT, sleep=600)
    run = built.start("run", SHIFT, **env)
    children.append(run)
    stage = built.pid(SHIFT)
    run.send_signal(how)
    assert run.wait(60) != 0  # and not after the ten minutes that the stage would take
    assert not alive(stage)
    said = run.stderr.read()
    assert "Traceback" not in said
    assert f"{SHIFT}  interrupted" in said
    assert "failed" not in said


def test_a_second_run_is_refused_while_the_first_goes_on(built, children, env):
    built.set("alpha: 1", "alpha: 2")
    built.order(SHIFT, sleep=600)
    run = built.start("run", SHIFT, **env)
    children.append(run)
    built.pid(SHIFT)
    before = (built.root / "params.yaml").read_text()
    second = built.flows("run", "--profile", "full", **env)
    assert second.returncode == 1
    assert (built.root / "params.yaml").read_text() == before  # they are those of the first
    assert f"another run owns this project: PID {run.pid}" in second.stderr
    assert built.flows("plan").returncode == 1
    run.terminate()
    run.wait(30)
    assert built.ran() == [SHIFT]
