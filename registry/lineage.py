"""Lineage: what a version was made from, as dvc.lock and git know it.

The closure of some stages is every stage of dvc.lock that they depend on, found by walking from
their inputs to the outputs of others.  Its canonical form names commands, parameters, inputs and
outputs with their hashes and nothing else; the sha256 of that is the lineage key.  Two versions
with one key were made by the same commands from the same bytes to the same bytes.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from registry.errors import NotBuilt, Unverified

CODE = ".code"
"""Where a stage hashes what others run.  The hash is an input of theirs; how it came about is not,
or a changed comment anywhere would change every lineage key."""

Closure = dict[str, dict[str, Any]]
"""Stage name -> {"cmd", "params", "deps": {path: hash}, "outs": {path: hash}}."""


@lru_cache(maxsize=2)  # a version is published for every bundle of one file
def parse_lock(text: str) -> dict[str, Any]:
    """Read the stages of a dvc.lock.

    Raises
    ------
    Unverified
        If it was cut short or is not one.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        stages = dict((yaml.load(text, Loader=loader) or {}).get("stages") or {})
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise Unverified(f"dvc.lock cannot be read ({why}); restore it from git.") from None
    if broken := [name for name, entry in stages.items() if not isinstance(entry, Mapping)]:
        raise Unverified(f"dvc.lock says nothing about {broken}; restore it from git.")
    return stages


def read_lock(root: Path) -> dict[str, Any]:
    """Read the stages of the project's dvc.lock.

    Raises
    ------
    NotBuilt
        If there is none.
    Unverified
        If it is broken.
    """
    path = root / "dvc.lock"
    if not path.is_file():
        raise NotBuilt(f"{path} does not exist; run the pipeline first: `python -m flows run`.")
    return parse_lock(path.read_text())


def closure(
    lock: Mapping[str, Any], targets: Collection[str], live: Collection[str] | None = None
) -> Closure:
    """Collect the stages that some stages depend on, themselves included.

    Parameters
    ----------
    lock : mapping
        The stages of a dvc.lock, see `read_lock`.
    targets : collection of str
        Names of stages to start from.
    live : collection of str, optional
        Stages that dvc.yaml still names.  DVC never forgets a removed stage in dvc.lock; it must
        not be taken for the maker of a file.

    Raises
    ------
    NotBuilt
        If a target has not been built.
    """
    entries = {n: canonical(e) for n, e in lock.items() if live is None or n in live}
    if missing := sorted(set(targets) - set(entries)):
        raise NotBuilt(f"{missing} are not in dvc.lock; run the pipeline: `python -m flows run`.")
    makers = [(out, n) for n, entry in entries.items() for out in entry["outs"] if out != CODE]
    found: Closure = {}
    todo = list(targets)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found[name] = entries[name]
        todo += {m for dep in entries[name]["deps"] for out, m in makers if overlap(dep, out)}
    return dict(sorted(found.items()))


def canonical(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce a dvc.lock entry to what decides its bytes."""

    def hashes(items: Collection[Mapping[str, Any]]) -> dict[str, str]:
        return {item["path"]: str(item.get(item.get("hash", "md5"), "")) for item in items}

    return {
        "cmd": entry.get("cmd", ""),
        "params": entry.get("params") or {},
        "deps": hashes(entry.get("deps") or ()),
        "outs": hashes(entry.get("outs") or ()),
    }


def overlap(one: str, other: str) -> bool:
    """Tell whether two paths are the same or one lies in the other."""
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


def lineage_key(stages: Closure) -> str:
    """Hash a closure: 64 hexadecimal digits."""
    return digest(stages)


def digest(value: object) -> str:
    """Hash any JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def inputs(stages: Closure) -> dict[str, str]:
    """Give the files that come from outside: inputs that no stage of the closure makes."""
    outs = [out for entry in stages.values() for out in entry["outs"]]
    return {
        path: value
        for entry in stages.values()
        for path, value in sorted(entry["deps"].items())
        if not any(overlap(path, out) for out in outs)
    }


def parameters(stages: Closure) -> dict[str, Any]:
    """Give every parameter the closure was made with, by dotted key."""
    flat: dict[str, Any] = {}
    for entry in stages.values():
        for values in entry["params"].values():
            _flatten("", values, flat)
    return dict(sorted(flat.items()))


def _flatten(prefix: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, Mapping) and (value or not prefix):
        for key, inner in value.items():
            _flatten(f"{prefix}.{key}" if prefix else str(key), inner, into)
    else:
        into[prefix] = value


@dataclass(frozen=True)
class Snapshot:
    """The sources at the moment of publishing."""

    commit: str
    """HEAD, or why there is none."""
    dirty: str
    """"true" when the working tree differs from HEAD, "false", or "unknown"."""
    snapshot: str
    """A commit that holds the working tree exactly, or why there is none."""


def snapshot(root: Path) -> Snapshot:
    """Keep the working tree as a commit under refs/lineage; branch and index stay untouched."""
    try:
        _git(root, "rev-parse", "--is-inside-work-tree")
    except FileNotFoundError:
        return Snapshot("none: git is not installed", "unknown", "none: git is not installed")
    except subprocess.CalledProcessError:
        return Snapshot("none: not a git repository", "unknown", "none: not a git repository")
    try:
        head = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    except subprocess.CalledProcessError:
        head = ""
    try:
        tree = _working_tree(root)
        clean = bool(head) and tree == _git(root, "rev-parse", f"{head}^{{tree}}")
        kept = head if clean else _commit(root, tree, head)
        _git(root, "update-ref", f"refs/lineage/{tree}", kept)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or "").strip().splitlines()[-1:] or ["git failed"]
        return Snapshot(head or "none: no commit yet", "unknown", f"none: {reason[0]}")
    return Snapshot(head or "none: no commit yet", str(not clean).lower(), kept)


def _working_tree(root: Path) -> str:
    """Write the working tree as a git tree, through an index of its own."""
    index = Path(_git(root, "rev-parse", "--path-format=absolute", "--git-path", "index"))
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "index"
        if index.exists():
            shutil.copy2(index, own)  # keeps git from hashing every file again
        env = {"GIT_INDEX_FILE": str(own)}
        _git(root, "add", "-A", ".", env=env)
        kept = [n for n in ("dvc.lock", "dvc.yaml", "params.yaml") if (root / n).exists()]
        if kept:
            _git(root, "add", "-f", *kept, env=env)
        return _git(root, "write-tree", env=env)


def _commit(root: Path, tree: str, parent: str) -> str:
    ref = f"refs/lineage/{tree}"
    try:
        return _git(root, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    except subprocess.CalledProcessError:
        pass
    who = {
        f"GIT_{role}_{field}": value
        for role in ("AUTHOR", "COMMITTER")
        for field, value in (("NAME", "hauberk"), ("EMAIL", "hauberk@localhost"))
    }
    parents = ("-p", parent) if parent else ()
    return _git(root, "commit-tree", tree, *parents, "-m", "hauberk lineage snapshot", env=who)


def _git(root: Path, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def locked_at(root: Path, commit: str) -> str | None:
    """Read dvc.lock as a commit holds it; None when it does not."""
    try:
        return _git(root, "show", f"{commit}:./dvc.lock")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
