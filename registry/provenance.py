"""Provenance: what a version was made from, as a tree, and whether it still holds."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry import lineage
from registry.errors import RegistryError, Unverified
from registry.promote import recorded_rows, verify_bytes
from registry.store import Store

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Provenance:
    """A version and what it came from."""

    name: str
    version: str
    aliases: tuple[str, ...]
    tags: dict[str, str]
    stages: lineage.Closure
    roots: tuple[str, ...]
    """The stages the version was published from."""

    def upstream(self, stage: str) -> list[str]:
        """Give the stages whose outputs a stage reads."""
        deps = self.stages[stage]["deps"]
        return [
            name
            for name, entry in self.stages.items()
            if any(lineage.overlap(dep, out) for dep in deps for out in entry["outs"])
        ]

    def as_dict(self) -> dict[str, Any]:
        """Give it as JSON would hold it."""
        return {
            "name": self.name,
            "version": self.version,
            "aliases": list(self.aliases),
            "tags": self.tags,
            "stages": self.stages,
        }


@dataclass(frozen=True)
class Finding:
    """One thing that was verified."""

    what: str
    holds: bool
    says: str


def trace(store: Store, name: str, which: str) -> Provenance:
    """Read what a version was made from.

    Raises
    ------
    NotPublished
        If there is no such version.
    Unverified
        If its record is gone or cannot be read.
    """
    version = store.version(name, which)
    number = str(version.version)
    aliases = tuple(sorted(a for a, v in store.aliases(name).items() if v == number))
    roots = tuple(_tag(version, "dvc.stages").split(","))
    return Provenance(name, number, aliases, dict(version.tags), _closure(store, version), roots)


def verify(store: Store, name: str, which: str) -> list[Finding]:
    """Check a version against everything that was recorded about it.

    What is wrong with it is in the findings; only a version that is not there raises NotPublished.
    """
    version = store.version(name, which)
    commit = version.tags.get("git.snapshot", "none")
    text = None if commit.startswith("none") else lineage.locked_at(store.root, commit)
    where = f"dvc.lock at {commit[:12]}"
    if text is None:
        where = f"recorded dvc.lock (git snapshot: {commit})"

    def lock() -> dict[str, Any]:
        recorded = store.read(version, "lineage/dvc.lock") if text is None else text
        return lineage.parse_lock(recorded)

    def rebuilt() -> lineage.Closure:
        roots = _tag(version, "dvc.stages").split(",")
        return lineage.closure(lock(), roots, _closure(store, version))

    def same(tag: str, made: Callable[[], object]) -> Callable[[], str]:
        return lambda: _same(lineage.digest(made()), _tag(version, tag))

    return [
        _attempt("bytes of the model", lambda: verify_bytes(store, version)),
        _attempt("recorded metrics", lambda: recorded_rows(store, version)),
        _attempt("recorded closure", same("lineage.key", lambda: _closure(store, version))),
        _attempt(where, same("dvc.lock.sha256", lock)),
        _attempt(f"closure in {where}", same("lineage.key", rebuilt)),
    ]


def _closure(store: Store, version: "ModelVersion") -> lineage.Closure:
    try:
        return dict(json.loads(store.read(version, "lineage/closure.json")))
    except (ValueError, TypeError) as error:
        raise Unverified(
            f"{version.name}/{version.version}: its recorded lineage cannot be read ({error}); "
            "restore the artifact store, or publish again."
        ) from None


def _tag(version: "ModelVersion", key: str) -> str:
    if key not in version.tags:
        raise Unverified(
            f"{version.name}/{version.version} has no tag {key}: it was not made by "
            "`python -m flows publish`, or someone took it off; publish again."
        )
    return str(version.tags[key])


def _attempt(what: str, check: Callable[[], object]) -> Finding:
    try:
        says = check()
    except (RegistryError, OSError) as error:
        return Finding(what, False, str(error))
    return Finding(what, True, says if isinstance(says, str) else "as published")


def _same(found: str, recorded: str) -> str:
    if found != recorded:
        raise Unverified(f"recorded {recorded}, found {found}")
    return found[:12]
