"""Files and folders that are complete or not there, and what they hold."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write to, which takes the place of ``folder`` when it is complete.

    An error leaves what was there before.  A kill leaves ``folder`` old, new or, between two
    renames, absent, and never in part; what else it leaves stands beside and is swept by the next
    call.
    """
    made, aside = (folder.with_name(folder.name + suffix) for suffix in (".part", ".old.part"))
    for left in (made, aside):
        shutil.rmtree(left, ignore_errors=True)
    made.mkdir(parents=True)
    try:
        yield made
        if folder.exists():
            folder.rename(aside)
        made.rename(folder)
    except BaseException:
        if aside.exists() and not folder.exists():
            aside.rename(folder)
        shutil.rmtree(made, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
