"""A Prefect server for one run, when the user has none.

Prefect would start one itself, whose log and tracebacks at its end come to the terminal, and which
stays if this process is killed.  Ours writes to logs/prefect.log and ends with us.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flows import leash
from flows.errors import FlowError

PATIENCE = 180.0


@contextmanager
def prefect_api(root: Path) -> Iterator[Callable[[], str]]:
    """Find the user's Prefect API, or start one that lives as long as the block.

    Yields
    ------
    callable
        Gives the URL; waits until it answers, so that other work can be done meanwhile.
    """
    configured = os.environ.get("PREFECT_API_URL")
    if configured:
        answers(configured)
        yield lambda: configured
        return
    log = root / "logs" / "prefect.log"
    log.parent.mkdir(exist_ok=True)
    port = _free_port()
    with log.open("wb") as file:
        server = _start(port, file.fileno())
        try:
            yield lambda: _wait(server, f"http://127.0.0.1:{port}/api", log)
        finally:
            server.terminate()
            try:
                server.wait(2)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _start(port: int, output: int) -> subprocess.Popen[bytes]:
    uvicorn = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    options = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    command = [sys.executable, "-IS", str(Path(leash.__file__)), str(os.getpid())]
    quiet = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"}
    return subprocess.Popen(
        [*command, *uvicorn, *options, "--timeout-graceful-shutdown", "1"],
        env={**os.environ, **quiet},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,  # Ctrl-C is for the run, which ends the server when it is done
    )


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> str:
    deadline = time.monotonic() + PATIENCE
    while not _healthy(url):
        if server.poll() is not None or time.monotonic() > deadline:
            last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            raise FlowError(
                f"Prefect's server did not start: {last} (log: {log}); `python -m flows doctor` "
                "checks the versions that must fit together, `dvc repro` runs without Prefect."
            )
        time.sleep(0.1)
    return url


def answers(url: str) -> None:
    """Raise FlowError unless a Prefect API answers at a URL."""
    if not _healthy(url):
        raise FlowError(
            f"PREFECT_API_URL is {url}, and nothing answers there; start it with `prefect server "
            "start`, or unset the variable to run without one."
        )


def _healthy(url: str) -> bool:
    from urllib.request import urlopen

    try:
        with urlopen(f"{url.rstrip('/')}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
