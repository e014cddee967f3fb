"""The driver: runs stages as processes that end with it.

A stage is asked in this process whether it is stale.  If it is, ``dvc repro --single-item`` runs it
in a process group of its own, and what came of it is read from facts: a receipt that the stage left
means that it ran, no receipt that DVC restored its outputs from the cache.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from flows import leash, locks
from flows.errors import StageFailed, Transient
from flows.graph import Graph
from flows.logs import StageLog
from flows.settings import WARM, stage_environment

POLL = 0.1
GRACE = 3.0
KEEP_EVERY = 15.0
"""Seconds between copies of dvc.lock; to see that one is whole takes some tenths of a second."""
EX_TEMPFAIL = 75

Outcome = Literal["Skipped", "Cached", "Completed"]
"""Unchanged; outputs restored from DVC's cache; ran."""


@dataclass(frozen=True)
class Event:
    """Something a person may want to see."""

    stage: str
    state: str
    """waiting, running, Skipped, Cached, Completed, Failed, retrying, upstream failed, or
    interrupted."""
    seconds: float = 0.0
    says: str = ""


Listener = Callable[[Event], None]


@dataclass
class Driver:
    """Runs the stages of one project; made by `driving`."""

    graph: Graph
    owner: locks.Owner
    receipts: Path
    jobs: int
    listen: Listener
    _warm: subprocess.Popen[bytes] | None = None
    _warmed: bool = False
    _running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _stopping: bool = False
    _kept: float = 0.0
    """When dvc.lock was copied last, on the monotonic clock."""

    def __post_init__(self) -> None:
        """Make one slot a job."""
        self._slots = threading.BoundedSemaphore(self.jobs)

    def run(self, name: str) -> Outcome:
        """Bring one stage up to date; its upstream stages are.

        Raises
        ------
        StageFailed
            With the stage's own message; `Transient` if it may be tried again.
        """
        if not self.graph.reasons([name]):
            self.listen(Event(name, "Skipped"))
            return "Skipped"
        with self._slots:
            start = time.monotonic()
            self.listen(Event(name, "running"))
            log = StageLog(self.graph.root, name)
            try:
                status = self._repro(name, log, start)
                if status != 0:
                    raise self._failure(name, log, status)
            except StageFailed as error:
                took = time.monotonic() - start
                if self.stopping:
                    self.listen(Event(name, "interrupted", took))
                else:
                    self.listen(Event(name, "Failed", took, str(error)))
                raise
        self._keep_lock()
        outcome: Outcome = "Completed" if self._receipt(name) else "Cached"
        self.listen(Event(name, outcome, time.monotonic() - start))
        return outcome

    @property
    def stopping(self) -> bool:
        """Whether the run is being ended: what fails now is interrupted and no failure."""
        return self._stopping

    def stop(self) -> None:
        """End every stage that runs, and start none any more."""
        with self._guard:
            self._stopping = True
            running = list(self._running.values())
        # An interrupt lets dvc take its entries out of its lock; what ignores it is killed.
        for how, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, GRACE)):
            for process in running:
                _signal_group(process.pid, how)
            deadline = time.monotonic() + patience
            while any(p.poll() is None for p in running) and time.monotonic() < deadline:
                time.sleep(0.05)
        if self._warm is not None:
            running.append(self._warm)
        for process in running:  # a leader may be gone before its children
            _signal_group(process.pid, signal.SIGKILL)
        if self._warm is not None:
            self._warm.wait()

    def _repro(self, name: str, log: StageLog, start: float) -> int:
        dvc = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
        command = [sys.executable, "-IS", str(Path(leash.__file__)), str(os.getpid()), *dvc]
        self._receipt(name)  # one of an earlier attempt says nothing about this one
        self._warm_up()
        with log.open() as file:
            process = self._start(command, file.fileno())
            try:
                while process.poll() is None:
                    time.sleep(POLL)
                    self.listen(Event(name, "running", time.monotonic() - start, log.progress()))
            finally:
                if process.poll() is None:
                    _signal_group(process.pid, signal.SIGKILL)
                    process.wait()
                with self._guard:
                    del self._running[process.pid]
        return process.returncode

    def _keep_lock(self) -> None:
        """Copy dvc.lock now and then: what a copy lacks DVC restores from its cache of runs."""
        with self._guard:
            due = time.monotonic() - self._kept > KEEP_EVERY
            if due:
                self._kept = time.monotonic()
        if due:
            locks.keep_dvc_lock(self.graph.root)

    def _warm_up(self) -> None:
        """Start the process that stages fork from, unless it was started."""
        with self._guard:
            if self._warmed or self._stopping:
                return
            self._warmed = True
        # In a thread that lives as long: the kernel ends a process on a leash with the thread that
        # started it, and those that run stages come and go.
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        server = f"from tasks.warm import serve; serve({str(self._socket)!r})"
        command = [sys.executable, "-IS", str(Path(leash.__file__)), str(os.getpid())]
        with self._guard:
            if self._stopping:
                return
            self._warm = subprocess.Popen(
                [*command, sys.executable, "-c", server],
                cwd=self.graph.root,
                env=stage_environment(self.receipts, self.owner.mark),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._warm.wait()

    @property
    def _socket(self) -> Path:
        return self.receipts / ".warm"

    def _start(self, command: list[str], output: int) -> subprocess.Popen[bytes]:
        with self._guard:
            if self._stopping:
                raise StageFailed("the run is being stopped.")
            process = subprocess.Popen(
                command,
                cwd=self.graph.root,
                env=stage_environment(self.receipts, self.owner.mark) | {WARM: str(self._socket)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            self._running[process.pid] = process
        return process

    def _receipt(self, name: str) -> bool:
        path = self.receipts / name
        found = path.exists()
        path.unlink(missing_ok=True)
        return found

    def _failure(self, name: str, log: StageLog, status: int) -> StageFailed:
        if self.stopping:
            return StageFailed(f"{name} was interrupted.\nlog: {log.shown}")
        said = log.failure()
        if number := _killed_by(said.status if said.status is not None else status):
            return StageFailed(
                f"{name} was killed by signal {number} ({_why_killed(number)}); run again, "
                f"finished parts are kept.\nlog: {log.shown}"
            )
        kind = Transient if said.status == EX_TEMPFAIL or said.busy else StageFailed
        how = f"exit status {said.status}" if said.status is not None else f"dvc: {status}"
        return kind(f"{name} failed ({how}): {said.message}\nlog: {log.shown}")


@contextmanager
def driving(
    root: Path,
    *,
    jobs: int = 2,
    listen: Listener | None = None,
    first: Callable[[], object] | None = None,
) -> Iterator[Driver]:
    """Own the project and run its stages; whatever still runs at the end is ended.

    Parameters
    ----------
    root : Path
        The project.
    jobs : int
        How many stages may run side by side.
    listen : callable, optional
        Is told what happens, from several threads.
    first : callable, optional
        Called when the project is owned and before dvc.yaml and params.yaml are read: the place to
        change them.

    Raises
    ------
    AlreadyRunning
        If another run owns the project.
    """
    if jobs < 1:
        raise StageFailed(f"jobs is {jobs}; at least one stage must be able to run.")
    with locks.owning(root) as owner, tempfile.TemporaryDirectory() as receipts:
        if first is not None:
            first()
        graph = Graph(root)
        driver = Driver(graph, owner, Path(receipts), jobs, listen or _silent)
        try:
            yield driver
        finally:
            driver.stop()
            locks.keep_dvc_lock(graph.root)
            graph.close()


def _killed_by(status: int) -> int | None:
    """Give the signal that an exit status stands for, as Python writes it or as a shell does."""
    number = -status if status < 0 else status - 128
    return number if number in signal.valid_signals() else None


def _why_killed(number: int) -> str:
    if number == signal.SIGKILL:
        return "out of memory, or by hand"
    return signal.strsignal(number) or "unknown"


def _silent(event: Event) -> None:
    pass


def _signal_group(group: int, how: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, how)
