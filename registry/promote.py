"""Promote and roll back: the only code that moves the alias ``production``.

Everything that takes long (gate, bytes, smoke load) happens before the lock; inside it the alias is
read again and moved only if it is still where it was: of several promotions at once one wins and
the others are told.  ``previous`` moves first, so that a crash between the two leaves production
as it was.
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
from registry.bundles import find_bundle, verify_bundle
from registry.errors import Moved, NotPublished, Unverified
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
    """What the smoke load of this version saw."""


def evaluate_gate(store: Store, name: str, which: str, rules: Sequence[Rule]) -> Verdict:
    """Hold the gate against the numbers that were recorded with a version."""
    version = store.version(name, which)
    production = store.aliases(name).get(PRODUCTION)
    own, paired = recorded_rows(store, version)
    reference: Rows | None = None
    if production not in (None, str(version.version)):
        reference, _ = recorded_rows(store, store.version(name, PRODUCTION))
    return judge(rules, own, paired, reference)


def promote(
    store: Store,
    name: str,
    rules: Sequence[Rule],
    *,
    smoke: Smoke,
    which: str = CANDIDATE,
    expect: str | None = None,
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

    Raises
    ------
    GateFailed, SmokeFailed, Unverified
        The version is not fit; production stays where it is.
    Moved
        Production is not, or no longer, at `expect`.
    """
    version = store.version(name, which)
    number = str(version.version)
    current = store.aliases(name).get(PRODUCTION, NONE)
    if expect is not None and current != expect:
        raise _moved(name, expect, current)
    if current == number:
        seen = json.loads(version.tags.get("smoke", "{}"))
        return Promotion(name, number, current, moved=False, loaded=seen)
    verdict = evaluate_gate(store, name, number, rules)
    store.client.set_model_version_tag(name, number, "gate", verdict.summary())
    verdict.assert_passed(f"{name}/{number}")
    verify_bytes(store, version)
    seen = _smoke_once(store, version, smoke)
    with store.locked():
        _compare_and_set(store, name, current, number)
        _sign(store, name, number, current, "gate", verdict.summary())
    return Promotion(name, number, current, moved=True, verdict=verdict, loaded=seen)


def rollback(store: Store, name: str) -> Promotion:
    """Swap ``production`` and ``previous``; the version that leaves is marked as rolled back.

    Raises
    ------
    NotPublished
        If there is no version to return to.
    """
    aliases = store.aliases(name)
    current, target = aliases.get(PRODUCTION, NONE), aliases.get(PREVIOUS, NONE)
    if target in (NONE, current):
        raise NotPublished(
            f"{name}: there is no version to return to (production {current}, previous {target}); "
            f"promote another one: `python -m flows promote {name} --version N`."
        )
    verify_bytes(store, store.version(name, target))
    with store.locked():
        _compare_and_set(store, name, current, target)
        _sign(store, name, target, current, "rollback", "")
        left = json.dumps({"to": target, "by": _who(), "at": _now()})
        store.client.set_model_version_tag(name, current, "rolled_back", left)
    return Promotion(name, target, current, moved=True)


def recorded_rows(store: Store, version: "ModelVersion") -> tuple[Rows, Rows]:
    """Read the metrics and differences that were published with a version.

    Raises
    ------
    Unverified
        If they are not the ones that the version's tag was made from.
    """
    names = ("metrics.json", "differences.json", "undefended.json")
    rows = [json.loads(store.read(version, f"evaluation/{name}")) for name in names]
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
        verify_bundle(find_bundle(Path(path)), version.tags.get("bundle.sha256", ""))


def rolled_back(store: Store, name: str, which: str = CANDIDATE) -> bool:
    """Tell whether a version left production by a rollback: only a person brings it back."""
    return "rolled_back" in store.version(name, which).tags


def _smoke_once(store: Store, version: "ModelVersion", smoke: Smoke) -> dict[str, Any]:
    if version.tags.get("smoke.bundle") == version.tags.get("bundle.sha256"):
        return dict(json.loads(version.tags["smoke"]))
    seen = {**smoke(f"models:/{version.name}/{version.version}"), "at": _now()}
    tags = {"smoke": json.dumps(seen), "smoke.bundle": version.tags.get("bundle.sha256", "")}
    for key, value in tags.items():
        store.client.set_model_version_tag(version.name, version.version, key, value)
    return seen


def _compare_and_set(store: Store, name: str, expected: str, number: str) -> None:
    """Move the aliases; the caller holds the lock."""
    found = store.aliases(name).get(PRODUCTION, NONE)
    if found != expected:
        raise _moved(name, expected, found)
    if expected != NONE:
        store.client.set_registered_model_alias(name, PREVIOUS, expected)
    store.client.set_registered_model_alias(name, PRODUCTION, number)
    found = store.aliases(name).get(PRODUCTION, NONE)
    if found != number:
        raise _moved(name, number, found)


def _sign(store: Store, name: str, number: str, replaced: str, how: str, gate: str) -> None:
    note = {"from": replaced, "by": _who(), "at": _now(), "how": how, "gate": gate}
    store.client.set_model_version_tag(name, number, "promotion", json.dumps(note))
    if how == "gate" and "rolled_back" in store.version(name, number).tags:
        store.client.delete_model_version_tag(name, number, "rolled_back")


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
