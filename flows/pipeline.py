"""The pipeline as a Prefect flow: a stage is a task, dvc.yaml says in which order.

Prefect keeps no results and caches nothing: what is up to date is for DVC to say.  The states that
its server shows are Skipped (unchanged), Cached (restored by DVC), Completed (ran), Failed, and
for what could not run, "Skipped: upstream failed".
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import allow_failure, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.driver import Driver, Event, driving
from flows.errors import RunFailed, StageFailed, Transient
from flows.record import Record, publish_all, record_all

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun

Recorder = Callable[[Driver], Record]
"""Hands finished stages to the registry."""

NAME = "pipeline"
UPSTREAM_FAILED = "Skipped: upstream failed"
RETRY_DELAYS = (2.0, 10.0)
DELIVERY = 5.0
SAYS = {"Skipped": "unchanged", "Cached": "restored from the cache", "Completed": "ran"}

# A task that waits for its upstream holds a thread; how many stages run is for the driver to say.
_THREADS: Any = ThreadPoolTaskRunner(max_workers=256)


@flow(name=NAME, task_runner=_THREADS, persist_result=False)
def pipeline(
    profile: str | None = None,
    jobs: int = 2,
    stages: list[str] | None = None,
    promote: bool = True,
) -> dict[str, str]:
    """Bring the stages up to date, publish and promote: what a deployment runs.

    Parameters
    ----------
    profile : str, optional
        Written to params.yaml as `profile` first.
    jobs : int
        How many stages may run side by side.
    stages : list of str, optional
        Only these and what is upstream of them; nothing is published then.
    promote : bool
        False: publish only.
    """
    from flows.display import showing
    from flows.parameters import choose

    root = Path.cwd()
    first = partial(choose, root, profile)
    with showing() as listen, driving(root, jobs=jobs, listen=listen, first=first) as driver:
        names = driver.graph.select(stages or [])
        hand_over = record_all if promote else publish_all
        record = _body(driver, names, record=None if stages else hand_over)
    if record.refused:
        raise RunFailed("\n".join(why for _, why in record.refused))
    return record.states


def run_with_prefect(
    driver: Driver,
    names: Sequence[str],
    url: str,
    *,
    record: Recorder | None,
    delays: Sequence[float] = RETRY_DELAYS,
) -> Record:
    """Run stages as a flow of the Prefect API at a URL, see `server.prefect_api`.

    Raises
    ------
    RunFailed
        If a stage failed, with the message of each.
    """

    @flow(name=NAME, task_runner=_THREADS, persist_result=False)
    def here() -> Record:
        return _body(driver, names, record=record, delays=delays)

    # The heartbeat's thread sleeps for a second, which the end of a flow would wait for.
    with temporary_settings({PREFECT_API_URL: url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        try:
            return here()
        finally:
            _deliver()


def _deliver() -> None:
    """Send what Prefect keeps in queues, before a server that lives for the run ends."""
    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=DELIVERY, at_exit=False)


def _body(
    driver: Driver,
    names: Sequence[str],
    *,
    record: Recorder | None,
    delays: Sequence[float] = RETRY_DELAYS,
) -> Record:
    """Submit a task a stage, wait for all, then hand the results to the registry."""
    run = _Run(driver)
    stage = _stage_task(run, delays)
    futures: dict[str, Any] = {}
    try:
        for name in names:
            above = [futures[u] for u in driver.graph.stages[name].upstream if u in futures]
            futures[name] = stage.with_options(name=name).submit(
                name, wait_for=[allow_failure(future) for future in above]
            )
        for future in futures.values():
            future.wait()
    except BaseException:
        driver.stop()
        raise
    states = {name: str(future.state.name) for name, future in futures.items()}
    run.raise_failures()
    for future in futures.values():
        future.result()  # a state that none of the above has seen must not pass for success
    if record is None:
        return Record(states=states)
    recorded: Record = _record_task(driver, record).submit().result()
    return recorded.with_states(states)


def _record_task(driver: Driver, record: Recorder) -> Any:
    @task(name="publish and promote" if record is record_all else "publish", **_PLAIN)
    def hand_over() -> "State[Record]":
        made = record(driver)
        says = "; ".join(why for _, why in made.refused)
        return Completed(name="Refused" if made.refused else "Recorded", message=says, data=made)

    return hand_over


_PLAIN: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}


class _Run:
    """What the tasks of one flow know of each other."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.failed: dict[str, str] = {}
        self.closed: set[str] = set()
        self.guard = threading.Lock()

    def blockers(self, name: str) -> list[str]:
        """Give the upstream stages that failed or could not run."""
        with self.guard:
            gone = {*self.failed, *self.closed}
            return [u for u in self.driver.graph.stages[name].upstream if u in gone]

    def raise_failures(self) -> None:
        if self.failed:
            skipped = f"\nnot run: {', '.join(sorted(self.closed))}" if self.closed else ""
            raise RunFailed("\n".join(self.failed.values()) + skipped)


def _stage_task(run: _Run, delays: Sequence[float]) -> Any:
    def again(task: Any, task_run: "TaskRun", state: "State[Any]") -> bool:
        """Decide on another attempt; Prefect asks only while attempts are left."""
        retrying = isinstance(state.data, Transient)
        if retrying:
            run.driver.listen(Event(task.name, "retrying", says=str(state.data).splitlines()[0]))
        return retrying

    @task(retries=len(delays), retry_delay_seconds=list(delays), retry_condition_fn=again, **_PLAIN)
    def bring_up_to_date(name: str) -> "State[str]":
        if blockers := run.blockers(name):
            with run.guard:
                run.closed.add(name)
            says = f"upstream failed: {', '.join(blockers)}"
            if run.driver.stopping:
                run.driver.listen(Event(name, "interrupted"))
            else:
                run.driver.listen(Event(name, "upstream failed", says=says))
            return Failed(
                name=UPSTREAM_FAILED, message=says
            )  # Cancelled would leave those below open
        try:
            outcome = run.driver.run(name)
        except StageFailed as error:
            with run.guard:
                run.failed[name] = str(error)
            raise
        with run.guard:
            run.failed.pop(name, None)  # an earlier attempt
        return Completed(name=outcome, message=SAYS[outcome], data=outcome)

    return bring_up_to_date
