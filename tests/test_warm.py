"""Warm stages: a fork does what the process would have done, and both end together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.warm import SOCKET, forked

ROOT = Path(__file__).resolve().parents[1]
CLIENT = "import sys; from tasks.warm import forked; sys.exit(forked('job', sys.argv[1:]))"
SERVER = "import tasks.warm as warm; warm.LIBRARIES = {libraries}; warm.serve({path!r})"
JOB = """
import os, sys, time
print("job", sys.argv[1:], os.getcwd(), os.environ["MINE"], "{socket}" in os.environ, flush=True)
print("said", file=sys.stderr)
if sys.argv[1] == "wait":
    open("pid", "w").write(str(os.getpid()))
    time.sleep(60)
if sys.argv[1] == "fail":
    raise KeyError("on purpose")
raise SystemExit(int(sys.argv[1]))
"""


def python(code, *arguments, folder, **environment):
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), str(folder)])
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=folder, text=True,
        env=os.environ | {"PYTHONPATH": paths, "MINE": "mine"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def warm(tmp_path):
    """A client that finds a server, in a folder with a job."""
    (tmp_path / "job.py").write_text(JOB.format(socket=SOCKET))
    path = str(tmp_path / "socket")
    libraries = ("json", "no_such_library")
    server = python(SERVER.format(libraries=libraries, path=path), folder=tmp_path)
    wait_for(Path(path).exists)
    yield lambda *arguments: python(CLIENT, *arguments, folder=tmp_path, **{SOCKET: path})
    server.kill()
    server.communicate()


def wait_for(what):
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("status", [0, 1, 75])
def test_a_fork_has_arguments_folder_environment_streams_and_status_of_its_stage(
    warm, tmp_path, status
):
    stage = warm(str(status), "more")
    said, errors = stage.communicate()
    assert said == f"job ['{status}', 'more'] {tmp_path} mine False\n"
    assert errors == "said\n"
    assert stage.returncode == status


def test_an_error_in_a_fork_is_told_where_its_stage_would_have_told_it(warm):
    stage = warm("fail")
    _, errors = stage.communicate()
    assert stage.returncode == 1
    assert "KeyError: 'on purpose'" in errors


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_stage_that_is_ended_ends_its_fork_and_the_server_serves_on(warm, tmp_path, how):
    stage = warm("wait")
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    stage.send_signal(how)
    stage.communicate()
    pid = (tmp_path / "pid").read_text()
    wait_for(lambda: gone(pid))
    again = warm("0")
    again.communicate()
    assert again.returncode == 0


def test_a_fork_that_is_killed_kills_its_stage_by_the_same_signal(warm, tmp_path):
    stage = warm("wait")
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    stage.communicate()
    assert stage.returncode == -signal.SIGKILL


def test_a_stage_that_nobody_takes_over_works_by_itself(tmp_path, monkeypatch):
    """The server dies before it has read what it was asked."""
    import socket
    import threading

    path = tmp_path / "socket"
    monkeypatch.setenv(SOCKET, str(path))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def hang_up():
            listening.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        assert forked("no_such_module", []) is None
        thread.join()


def test_a_stage_does_not_wait_for_ever_to_be_taken_over(tmp_path, monkeypatch):
    import socket

    from tasks import warm

    path = tmp_path / "socket"
    monkeypatch.setenv(SOCKET, str(path))
    monkeypatch.setattr(warm, "PATIENCE", 0.05)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        assert forked("no_such_module", []) is None


def test_the_flow_names_the_socket_as_the_stages_look_for_it():
    from flows.settings import WARM

    assert WARM == SOCKET


def test_where_nobody_answers_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.delenv(SOCKET, raising=False)
    assert forked("no_such_module", []) is None
    monkeypatch.setenv(SOCKET, str(tmp_path / "none"))
    assert forked("no_such_module", []) is None
