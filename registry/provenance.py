"""Provenance: what a version was made from, as a tree, and whether it still holds."""

import json
from dataclasses import dataclass
from typing import Any

from registry import lineage
from registry.errors import RegistryError
from registry.promote import recorded_rows, verify_bytes
from registry.store import Store


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
    """Read what a version was made from."""
    version = store.version(name, which)
    number = str(version.version)
    aliases = tuple(sorted(a for a, v in store.aliases(name).items() if v == number))
    stages: lineage.Closure = json.loads(store.read(version, "lineage/closure.json"))
    roots = tuple(version.tags.get("dvc.stages", "").split(","))
    return Provenance(name, number, aliases, dict(version.tags), stages, roots)


def verify(store: Store, name: str, which: str) -> list[Finding]:
    """Check a version against everything that was recorded about it; nothing is raised."""
    version = store.version(name, which)
    tags = version.tags
    findings = [
        _attempt("bytes of the bundle", lambda: verify_bytes(store, version)),
        _attempt("recorded metrics", lambda: recorded_rows(store, version)),
    ]
    stages: lineage.Closure = json.loads(store.read(version, "lineage/closure.json"))
    findings.append(_equal("recorded closure", lineage.lineage_key(stages), tags["lineage.key"]))
    commit = tags.get("git.snapshot", "none")
    text = None if commit.startswith("none") else lineage.locked_at(store.root, commit)
    where = f"dvc.lock at {commit[:12]}"
    if text is None:
        where = f"recorded dvc.lock (git snapshot: {commit})"
        text = store.read(version, "lineage/dvc.lock")
    lock = lineage.parse_lock(text)
    findings.append(_equal(where, lineage.digest(lock), tags["dvc.lock.sha256"]))
    try:
        rebuilt = lineage.closure(lock, tags["dvc.stages"].split(","), stages)
        findings.append(_equal(f"closure in {where}", lineage.digest(rebuilt), tags["lineage.key"]))
    except RegistryError as error:
        findings.append(Finding(f"closure in {where}", False, str(error)))
    return findings


def _attempt(what: str, check: Any) -> Finding:
    try:
        check()
    except (RegistryError, OSError) as error:
        return Finding(what, False, str(error))
    return Finding(what, True, "as published")


def _equal(what: str, found: str, expected: str) -> Finding:
    if found == expected:
        return Finding(what, True, f"{found[:12]}")
    return Finding(what, False, f"recorded {expected}, found {found}")
