"""The stages of dvc.yaml: their order, and what is stale about each.

dvc.yaml is the only graph; it is read through DVC, so that matrices and parameters mean what they
mean to ``dvc repro``.  Everything here happens in this process and starts none.
"""

import fnmatch
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.errors import BadPipeline, UnknownStage

if TYPE_CHECKING:
    from dvc.repo import Repo

LOCK_PATIENCE = 60.0
_FEW = 8
"""Stages; asking DVC for as many by name takes it as long as for all 64 of this project."""
_IN_PROCESS = threading.RLock()  # DVC's own state is not made for threads


@dataclass(frozen=True)
class Stage:
    """One stage, as DVC resolves it."""

    name: str
    upstream: tuple[str, ...]
    outs: tuple[str, ...]
    """Paths, relative to the project."""


class Graph:
    """The stages of a project, upstream first."""

    def __init__(self, root: Path) -> None:
        """Read dvc.yaml.

        Raises
        ------
        BadPipeline
            If DVC cannot read it.
        """
        self.root = root.resolve()
        self._repo = _open(self.root)
        self.stages = _stages(self._repo)

    def select(self, patterns: Collection[str]) -> list[str]:
        """Give the stages that patterns name, with everything upstream, in order.

        Parameters
        ----------
        patterns : collection of str
            A stage (``evaluate@lab-llava-cmrm``), all items of one (``evaluate``), or a glob
            (``*@lab-llava-*``).  None at all: every stage.

        Raises
        ------
        UnknownStage
            If a pattern names none.
        """
        if not patterns:
            return list(self.stages)
        wanted: set[str] = set()
        for pattern in patterns:
            found = [n for n in self.stages if n == pattern or n.split("@")[0] == pattern]
            found = found or fnmatch.filter(self.stages, pattern)
            if not found:
                raise UnknownStage(_unknown(pattern, self.stages))
            wanted.update(found)
        todo = list(wanted)
        while todo:
            for name in self.stages[todo.pop()].upstream:
                if name not in wanted:
                    wanted.add(name)
                    todo.append(name)
        return [name for name in self.stages if name in wanted]

    def reasons(self, names: Collection[str] | None = None) -> dict[str, list[str]]:
        """Say why stages are stale; a stage without an entry is up to date.

        Only what a stage itself can see is named: a stage whose inputs have not been made again
        yet shows no reason, see `plan`.
        """
        from dvc.exceptions import DvcException
        from dvc.lock import LockError

        deadline = time.monotonic() + LOCK_PATIENCE
        wanted = set(self.stages if names is None else names)
        # DVC reads dvc.yaml and dvc.lock once for all stages, but once more for each that is named.
        targets = list(wanted) if len(wanted) <= _FEW else None
        while True:
            try:
                with _IN_PROCESS:
                    status = self._repo.status(targets=targets)
                return {n: _reasons(changes) for n, changes in status.items() if n in wanted}
            except LockError as error:  # another stage is writing dvc.lock at this moment
                if time.monotonic() > deadline:
                    raise BadPipeline(f"DVC is busy: {error}; try again.") from None
                time.sleep(0.1)
            except DvcException as error:
                raise BadPipeline(_first_line(error)) from None

    def plan(self, names: Collection[str]) -> dict[str, tuple[str, list[str]]]:
        """Give each stage a state with reasons: ``unchanged``, ``stale`` or ``follows``.

        A stage follows when something upstream of it is stale: whether it runs depends on
        whether its inputs come out different.
        """
        reasons = self.reasons(names)
        planned: dict[str, tuple[str, list[str]]] = {}
        for name in names:
            above = [u for u in self.stages[name].upstream if planned[u][0] != "unchanged"]
            if name in reasons:
                planned[name] = ("stale", reasons[name])
            elif above:
                planned[name] = ("follows", [f"upstream: {', '.join(above)}"])
            else:
                planned[name] = ("unchanged", [])
        return planned

    def close(self) -> None:
        """Close what DVC keeps open."""
        with _IN_PROCESS:
            self._repo.close()


def _open(root: Path) -> "Repo":
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        return Repo(str(root))
    except DvcException as error:
        raise BadPipeline(f"{_first_line(error)}; start in the root of the project.") from None


def _stages(repo: "Repo") -> dict[str, Stage]:
    from dvc.exceptions import DvcException

    try:
        with _IN_PROCESS:
            graph = repo.index.graph
    except DvcException as error:
        raise BadPipeline(f"dvc.yaml: {_first_line(error)}") from None
    found = {
        stage.addressing: Stage(
            stage.addressing,
            tuple(sorted(up.addressing for up in graph.successors(stage))),
            tuple(str(out.def_path) for out in stage.outs),
        )
        for stage in graph.nodes
        if Path(stage.path).parent == Path(repo.root_dir)  # one dvc.yaml is the whole graph
    }
    if not found:
        raise BadPipeline(f"{repo.root_dir} has no stage; write them to dvc.yaml.")
    return _ordered(found)


def _ordered(stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """Sort upstream first; stages that do not depend on each other stay as dvc.yaml has them."""
    done: dict[str, Stage] = {}

    def visit(name: str) -> None:
        for upstream in stages[name].upstream:
            if upstream not in done:
                visit(upstream)
        done.setdefault(name, stages[name])

    for name in stages:
        visit(name)
    return done


def _reasons(changes: Collection[Any]) -> list[str]:
    """Turn DVC's status of one stage into sentences: "modified: params.yaml defenses.cmrm"."""
    said = []
    for change in changes:
        if isinstance(change, str):
            said.append(change)
            continue
        for kind, items in change.items():
            for path, what in items.items():
                if isinstance(what, Mapping):  # parameters, by key
                    said += [f"{how} parameter {key}" for key, how in what.items()]
                else:
                    said.append(f"{what} {'output' if 'outs' in kind else 'input'} {path}")
    return said


def _unknown(pattern: str, stages: Collection[str]) -> str:
    import difflib

    names = dict.fromkeys([*(s.split("@")[0] for s in stages), *stages])
    near = difflib.get_close_matches(pattern, list(names), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(stages)}."
    return f"no stage is called {pattern!r}; {hint} `python -m flows plan` lists them."


def _first_line(error: BaseException) -> str:
    cause = error.__cause__
    said = [str(error).strip(), str(cause).strip() if cause else ""]
    return ": ".join(dict.fromkeys(line.splitlines()[0] for line in said if line))
