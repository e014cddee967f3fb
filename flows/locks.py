"""One run at a time, and what a run that was killed leaves behind.

A run holds a lock that the kernel frees however the process ends.  Into the lock file it writes a
mark of its own, which every process it starts carries in its environment.  The next run finds by
that mark whatever outlived a run that was killed: not a process number, which another process may
have by then.  A process without the mark is never touched.
"""

import contextlib
import fcntl
import itertools
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.errors import AlreadyRunning, BadPipeline

MARK = "HAUBERK_RUN"
LOCK = Path(".dvc/tmp/driver.lock")
RWLOCK = Path(".dvc/tmp/rwlock")
KEPT = Path(".dvc/tmp/dvc.lock.kept")
BROKEN = Path(".dvc/tmp/dvc.lock.broken")
GRACE = 2.0


@dataclass(frozen=True)
class Owner:
    """The run that owns a project."""

    mark: str
    swept: tuple[str, ...]
    """What an earlier run had left and this one put in order, for a person."""


@contextlib.contextmanager
def owning(root: Path) -> Iterator[Owner]:
    """Own the project while the block runs.

    Raises
    ------
    AlreadyRunning
        If another run owns it.
    """
    path = root / LOCK
    if not (root / ".dvc").is_dir():
        raise BadPipeline(f"{root} has no .dvc folder; start in the root of the project.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _already_running(path) from None
        swept = [
            *_end_orphans(_read(path).get("mark")),
            *_clear_rwlock(root / RWLOCK),
            *_restore_dvc_lock(root),
        ]
        mark = uuid.uuid4().hex
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "mark": mark, "since": time.time()}))
        file.flush()
        yield Owner(mark, tuple(swept))
        file.truncate(0)


def holder(root: Path) -> int | None:
    """Give the PID of the run that owns the project, None when no run does."""
    path = root / LOCK
    if not path.exists():
        return None
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(_read(path).get("pid", 0))
    return None


def leftovers(root: Path) -> list[str]:
    """Say what a run that was killed has left; the next run puts it in order."""
    mark = _read(root / LOCK).get("mark")
    left = [f"PID {process.pid} of a run that was killed" for process in marked(mark or "-")]
    return [*left, *(["a stale .dvc/tmp/rwlock"] if _stale(root / RWLOCK) else [])]


def _already_running(path: Path) -> AlreadyRunning:
    owner = _read(path)
    since = time.strftime("%H:%M:%S", time.localtime(owner.get("since", 0)))
    return AlreadyRunning(
        f"another run owns this project: PID {owner.get('pid', 'unknown')}, since {since}; wait "
        f"until it ends, or stop it with `kill {owner.get('pid', 'PID')}` and run again."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # empty, or cut short by a crash
        return {}


def marked(mark: str) -> list[Any]:
    """Find the living processes that carry a mark, this one left out."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            ours = process.pid != os.getpid() and process.environ().get(MARK) == mark
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):  # gone, or another user's
            continue
    return found


def _end_orphans(mark: str | None) -> list[str]:
    import psutil

    orphans = marked(mark) if mark else []
    said = [f"ended PID {p.pid}, left by a run that was killed" for p in orphans]
    for process in orphans:
        _signal(process, "terminate")
    _, stubborn = psutil.wait_procs(orphans, timeout=GRACE)
    for process in stubborn:
        _signal(process, "kill")
    psutil.wait_procs(stubborn, timeout=GRACE)
    return said


def _signal(process: Any, how: str) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        getattr(process, how)()


def keep_dvc_lock(root: Path) -> None:
    """Copy dvc.lock, unless it is broken or being written: DVC writes it in place."""
    text = _text(root / "dvc.lock")
    if not _is_whole(text):
        return
    own = root / f"{KEPT}.{threading.get_ident()}"
    own.write_text(text)
    own.replace(root / KEPT)


def _restore_dvc_lock(root: Path) -> list[str]:
    """Put the last whole dvc.lock in the place of one that was cut short."""
    path = root / "dvc.lock"
    text, kept = _text(path), _text(root / KEPT)
    conflict = "<<<<<<< " in text  # a merge is for a person to finish
    if not path.is_file() or _is_whole(text) or not kept or conflict:
        keep_dvc_lock(root)
        return []
    path.replace(root / BROKEN)
    own = root / f"{KEPT}.{threading.get_ident()}"
    own.write_text(kept)
    own.replace(path)
    return [f"restored dvc.lock, which was cut short (the broken one is {BROKEN})"]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):  # not there, or cut within a letter
        return ""


def _is_whole(text: str) -> bool:
    """Tell whether DVC can read a dvc.lock; it ends each line that it writes."""
    import yaml
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        COMPILED_LOCKFILE_SCHEMA(yaml.load(text, Loader=loader))
    except (yaml.YAMLError, Invalid):
        return False
    return text.endswith("\n")


def _clear_rwlock(path: Path) -> list[str]:
    """Remove DVC's own lock when it is broken or when no dvc process holds it any more."""
    if not _stale(path):
        return []
    path.unlink(missing_ok=True)
    return ["removed a stale .dvc/tmp/rwlock"]


def _stale(path: Path) -> bool:
    try:
        held = json.loads(path.read_text())
        writers, readers = held.get("write", {}).values(), held.get("read", {}).values()
        pids = {int(info["pid"]) for info in itertools.chain(writers, *readers)}
    except OSError:
        return False
    except (ValueError, TypeError, AttributeError, KeyError):  # cut short by a crash
        return True
    return bool(pids) and not any(_is_dvc(pid) for pid in pids)


def _is_dvc(pid: int) -> bool:
    import psutil

    try:
        return any(Path(word).name == "dvc" for word in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False
