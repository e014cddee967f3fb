"""The log of a stage: what it and dvc wrote, how far it is, and why it failed."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

FOLDER = "logs"
TAIL = 4096
KEEP = 1 << 20

_STATUS = re.compile(r"exited with (-?\d+)")
_BUSY = ("Unable to acquire lock", "it is being blocked by")
_DVC = re.compile(r"^(ERROR|WARNING|Running stage|Stage '|>|To track the changes|To enable)")
_BAR = re.compile(r"\d+%\|")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Said:
    """What a failed stage said."""

    status: int | None
    """Exit status of the stage's own process."""
    busy: bool
    """Whether DVC could not get a lock."""
    message: str


class StageLog:
    """``logs/STAGE.log``; a new attempt is appended, an old log is cut at a mebibyte."""

    def __init__(self, root: Path, stage: str) -> None:
        """Name the log of a stage."""
        self.shown = f"{FOLDER}/{stage.replace('/', '-')}.log"
        self.path = root / self.shown
        self._start = 0

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open the log for one attempt."""
        self.path.parent.mkdir(exist_ok=True)
        if self.path.exists() and self.path.stat().st_size > KEEP:
            self.path.replace(self.path.with_suffix(".log.1"))
        with self.path.open("ab") as file:
            file.write(f"\n--- {time.strftime('%Y-%m-%d %H:%M:%S')} ---\n".encode())
            file.flush()
            self._start = file.tell()
            yield file

    def progress(self) -> str:
        """Give the last line that the stage wrote, a progress bar included."""
        with self.path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(self._start, size - TAIL))
            tail = file.read()
        for line in reversed(re.split(r"[\r\n]+", _plain(tail))):
            if line.strip() and not _DVC.match(line):
                return line.strip()
        return ""

    def failure(self) -> Said:
        """Find why the attempt failed: the stage's ``error:`` message, or its traceback's end."""
        with self.path.open("rb") as file:
            file.seek(self._start)
            text = _plain(file.read())
        statuses = _STATUS.findall(text)
        return Said(
            int(statuses[-1]) if statuses else None,
            any(words in text for words in _BUSY),
            _message(text),
        )


def _message(text: str) -> str:
    own = text.partition("\nERROR: failed to reproduce")[0]
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", own)]
    for index in range(len(lines) - 1, -1, -1):
        if lines[index].startswith("error:"):
            return "\n".join(lines[index:]).removeprefix("error:").strip()
    spoken = [
        line for line in lines if line.strip() and not _DVC.match(line) and not _BAR.search(line)
    ]
    if spoken:
        return spoken[-1].strip()
    errors = [line for line in text.splitlines() if line.startswith("ERROR:")]
    return errors[-1].removeprefix("ERROR:").strip() if errors else "it said nothing"


def _plain(data: bytes) -> str:
    return _ESCAPES.sub("", data.decode(errors="replace"))
