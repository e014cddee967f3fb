"""Promote and roll back: the only code that moves the alias ``production``.

Everything that takes long (gate, bytes, smoke load) happens before the lock; inside it the alias is
read again and moved only if it is still where it was: of several promotions at once one wins and
the others are told.

The order of the writes is such that a process may be killed between any two.  Before
``production`` moves to a version, its tag ``promotion`` says what a rollback returns to; before a
rollback takes it away again, it is marked ``rolled_back``.  The alias ``previous`` repeats the tag
for a person and is written last.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from getpass import getuser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry import lineage
from registry.bundles import verify_model
from registry.errors import Moved, NotPublished, RolledBack, Unverified
from registry.gate import Rows, Rule, Verdict, judge
from registry.store import CANDIDATE, PREVIOUS, PRODUCTION, Store

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

NONE = "none"
Smoke = Callable[[str], Mapping[str, Any]]
"""Loads ``models:/NAME/VERSION`` in a clean process and says what it saw; raises SmokeFailed."""


@dataclass(frozen=True)
class Promotion:
    """Where production is now."""

    name: str
    version: str
    replaced: str
    """The version that was in production before, "none" for none."""
    moved: bool
    """False when the version was in production already."""
    verdict: Verdict | None = None
    loaded: dict[str, Any] = field(default_factory=dict)
    """What the smoke load saw, by which this version came to production, and when."""


def evaluate_gate(store: Store, name: str, which: str, rules: Sequence[Rule]) -> Verdict:
    """Hold the gate against the numbers that were recorded with a version."""
    version = store.version(name, which)
    production = store.aliases(name).get(PRODUCTION)
    own, paired = recorded_rows(store, version)
    if production in (None, str(version.version)):
        return judge(rules, own, paired, None)
    other = store.version(name, production)
    reference, _ = recorded_rows(store, other)
    same = version.tags.get("samples.sha256") == other.tags.get("samples.sha256")
    return judge(rules, own, paired, reference, same_samples=same)


def promote(
    store: Store,
    name: str,
    rules: Sequence[Rule],
    *,
    smoke: Smoke,
    which: str = CANDIDATE,
    expect: str | None = None,
    unattended: bool = False,
) -> Promotion:
    """Move ``production`` to a version that passes the gate and can be loaded.

    Parameters
    ----------
    store : Store
    name : str
        The registered model.
    rules : sequence of Rule
        The gate.
    smoke : callable
        See `Smoke`; not asked again for a version that has passed it.
    which : str
        A version number or an alias.
    expect : str, optional
        The version that must be in production, "none" for none.  Default: the one that is there
        when the call begins.
    unattended : bool
        No person asked for this version: one that was rolled back does not return.  When a person
        does, the mark is taken off.

    Raises
    ------
    GateFailed, SmokeFailed, Unverified
        The version is not fit; production stays where it is.
    NotPublished
        There is no such model or version, or `expect` is no version number.
    RolledBack
        The version, or another with its bytes, was rolled back, and nobody asks for it.
    Moved
        Production is not, or no longer, at `expect`.
    """
    if expect is not None and expect != NONE and not expect.isdecimal():
        raise NotPublished(
            f"expect: {expect!r} is no version number; write the number of the version that must "
            f"be in production, or {NONE!r} for none."
        )
    version = store.version(name, which)
    number = str(version.version)
    current = store.aliases(name).get(PRODUCTION, NONE)
    if expect is not None and current != expect:
        raise _moved(name, expect, current)
    marked = rolled_back(store, name, number)  # read after `current`: a rollback marks, then moves
    if unattended and marked:
        raise _stays_away(name, number, marked, current)
    if current == number:
        with store.locked():
            _unmark(store, name, marked)
        seen = json.loads(version.tags.get("smoke", "{}"))
        return Promotion(name, number, current, moved=False, loaded=seen)
    verdict = evaluate_gate(store, name, number, rules)
    store.client.set_model_version_tag(name, number, "gate", verdict.summary())
    verdict.assert_passed(f"{name}/{number}")
    verify_bytes(store, version)
    seen = _load(store, version, smoke)
    with store.locked():
        _require_production(store, name, current)
        _unmark(store, name, marked)
        before = _before(store, version, current)
        note = {"from": current, "back": before, "by": _who(), "at": _now()}
        note |= {"gate": verdict.summary()}
        store.client.set_model_version_tag(name, number, "promotion", json.dumps(note))
        _move(store, name, number, before)
    return Promotion(name, number, current, moved=True, verdict=verdict, loaded=seen)


def rollback(store: Store, name: str, *, smoke: Smoke) -> Promotion:
    """Return ``production`` to the version before; the one that leaves is marked ``rolled_back``.

    Raises
    ------
    NotPublished
        If there is no such model, or no version to return to.
    RolledBack
        If that version was rolled back itself.
    SmokeFailed, Unverified
        If that version does not load, or its bytes are not those that were published.
    Moved
        If someone else moved production meanwhile.
    """
    store.require(name)
    current = store.aliases(name).get(PRODUCTION, NONE)
    target = NONE if current == NONE else _back(store.version(name, current))
    other = _instead(store, name, current)
    if target == NONE:
        raise NotPublished(f"{name}: nothing to return to (production {current}); {other}")
    if marked := rolled_back(store, name, target):
        raise RolledBack(
            f"{name}/{current} would return to version {target}, and version {marked[0]} with the "
            f"same bytes was rolled back; {other}"
        )
    version = store.version(name, target)
    verify_bytes(store, version)
    seen = _load(store, version, smoke)
    with store.locked():
        _require_production(store, name, current)
        left = json.dumps({"to": target, "by": _who(), "at": _now()})
        store.client.set_model_version_tag(name, current, "rolled_back", left)
        _move(store, name, target, _back(version))
    return Promotion(name, target, current, moved=True, loaded=seen)


def recorded_rows(store: Store, version: "ModelVersion") -> tuple[Rows, Rows]:
    """Read the metrics and differences that were published with a version.

    Raises
    ------
    Unverified
        If they are not the ones that the version's tag was made from.
    """
    names = ("metrics.json", "differences.json", "undefended.json")
    texts = [store.read(version, f"evaluation/{name}") for name in names]
    try:
        rows = [json.loads(text) for text in texts]
    except ValueError:
        rows = []
    if lineage.digest(rows) != version.tags.get("metrics.sha256"):
        raise Unverified(
            f"{version.name}/{version.version}: the recorded metrics are not those that were "
            "published (tag metrics.sha256); publish again."
        )
    return rows[0], rows[1]


def verify_bytes(store: Store, version: "ModelVersion") -> None:
    """Download a version and compare its bytes with what was recorded."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    uri = f"models:/{version.name}/{version.version}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = download_artifacts(artifact_uri=uri, dst_path=folder, tracking_uri=store.uri)
        except (MlflowException, OSError) as error:
            raise Unverified(
                f"{uri} cannot be downloaded ({error}); restore the artifact store, or publish "
                "again: `python -m flows publish`."
            ) from None
        verify_model(Path(path), version.tags)


def rolled_back(store: Store, name: str, which: str = CANDIDATE) -> list[str]:
    """Give the versions with the bytes of this one, itself included, that were rolled back.

    The bytes count and not the number: evaluated again, they are another version.
    """
    version = store.version(name, which)
    found = store.client.search_model_versions(
        f"name = '{name}' and tags.`bundle.sha256` = '{version.tags.get('bundle.sha256', '')}' "
        "and tags.rolled_back LIKE '%'"
    )
    return sorted((str(v.version) for v in found), key=int)


def _load(store: Store, version: "ModelVersion", smoke: Smoke) -> dict[str, Any]:
    """Load a version anew, however often it was: model and packages may be others by now."""
    seen = {**smoke(f"models:/{version.name}/{version.version}"), "at": _now()}
    note = json.dumps(seen)
    store.client.set_model_version_tag(version.name, version.version, "smoke", note)
    return seen


def _require_production(store: Store, name: str, expected: str) -> None:
    """Raise Moved unless production is where it was; the caller holds the lock."""
    found = store.aliases(name).get(PRODUCTION, NONE)
    if found != expected:
        raise _moved(name, expected, found)


def _move(store: Store, name: str, number: str, before: str) -> None:
    """Move the aliases; the caller holds the lock."""
    store.client.set_registered_model_alias(name, PRODUCTION, number)
    _require_production(store, name, number)
    if before != NONE:
        store.client.set_registered_model_alias(name, PREVIOUS, before)
    elif PREVIOUS in store.aliases(name):
        store.client.delete_registered_model_alias(name, PREVIOUS)


def _before(store: Store, version: "ModelVersion", current: str) -> str:
    """Give what a rollback of a version returns to, if it takes the place of `current`.

    The first of `current`, what that one returns to, and so on, with other bytes and no mark.
    """
    own, passed = version.tags.get("bundle.sha256"), {NONE}
    while current not in passed:
        passed.add(current)
        found = store.version(version.name, current)
        marked = rolled_back(store, version.name, current)
        if not marked and found.tags.get("bundle.sha256") != own:
            return current
        current = _back(found)
    return NONE


def _back(version: "ModelVersion") -> str:
    return str(json.loads(version.tags.get("promotion", "{}")).get("back", NONE))


def _instead(store: Store, name: str, current: str) -> str:
    """Say which versions a person may promote where a rollback has none to return to."""
    found = {str(v.version) for v in store.client.search_model_versions(f"name = '{name}'")}
    others = sorted(found - {current}, key=int)
    if not others:
        return "there is no other version; publish another one: `python -m flows run`."
    known = " or ".join(others)
    return f"promote another one: `python -m flows promote {name} --version N`, N being {known}."


def _unmark(store: Store, name: str, marked: Sequence[str]) -> None:
    for number in marked:
        store.client.delete_model_version_tag(name, number, "rolled_back")


def _stays_away(name: str, number: str, marked: Sequence[str], current: str) -> RolledBack:
    keep = f"`python -m flows promote {name} --version {number}`"
    if current == number:
        return RolledBack(
            f"{name}/{number} is in production, though it was rolled back: that was interrupted. "
            f"Finish it: `python -m flows rollback {name}`; or keep the version: {keep}."
        )
    same = "" if number in marked else f" has the bytes of version {marked[0]}, which"
    return RolledBack(
        f"{name}/{number}{same} left production by a rollback and does not come back by itself; "
        f"if it should: {keep}."
    )


def _moved(name: str, expected: str, found: str) -> Moved:
    return Moved(
        f"{name}@{PRODUCTION} is at version {found}, expected {expected}: someone else moved it. "
        "Look at what is there (`python -m flows lineage`) and promote again if it is still right."
    )


def _who() -> str:
    try:
        return getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return "unknown"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
