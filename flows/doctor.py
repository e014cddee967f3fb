"""Is this checkout fit to run?  Versions that must fit together, locks, registry, disk."""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from flows import locks

PACKAGES = ("hauberk", "torch", "transformers", "dvc", "prefect", "mlflow", "fastapi", "datasets")
DISK = 2 << 30
FASTAPI = ((0, 139), (0, 151))


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    fit: bool
    says: str


def examine(root: Path) -> Iterator[Finding]:
    """Look at everything; a check that fails says what to do."""
    yield from _versions(root)
    yield _programs()
    yield from _project(root)
    yield _disk(root)
    yield _guarded("prefect", lambda: _prefect())
    yield _guarded("params.yaml", lambda: _params(root))
    yield _guarded("registry", lambda: _registry(root))


def _guarded(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, check())
    except Exception as error:  # a doctor reports what it finds, whatever it is
        return Finding(what, False, str(error).strip() or type(error).__name__)


def _versions(root: Path) -> Iterator[Finding]:
    fit = sys.version_info >= (3, 11)
    yield Finding("python", fit, sys.version.split()[0] + ("" if fit else "; 3.11 is needed"))
    tested = _constraints(root / "constraints.txt")
    for package in PACKAGES:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Finding(package, False, "not installed; `make` installs it")
            continue
        wanted = tested.get(package, version)
        differs = "" if wanted == version else f"; tested with {wanted} (constraints.txt)"
        yield Finding(package, _fits(package, version), f"{version}{differs}")


def _fits(package: str, version: str) -> bool:
    if package != "fastapi":
        return True
    found = tuple(int(part) for part in version.split(".")[:2])
    return FASTAPI[0] <= found < FASTAPI[1]  # Prefect's server cannot be imported outside


def _constraints(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(), re.MULTILINE))


def _programs() -> Finding:
    missing = [name for name in ("/bin/bash", "git") if shutil.which(name) is None]
    says = f"{', '.join(missing)} not found; install it" if missing else "bash, git"
    return Finding("programs", not missing, says)


def _project(root: Path) -> Iterator[Finding]:
    for name in ("dvc.yaml", "params.yaml", ".dvc/config"):
        if not (root / name).is_file():
            yield Finding("project", False, f"{root} has no {name}; start in the project's root")
            return
    yield Finding("project", True, str(root))
    owner = locks.holder(root)
    if owner is not None:
        yield Finding("run", True, f"PID {owner} is running")
        return
    left = locks.leftovers(root)
    says = f"{', '.join(left)}; the next run puts it in order" if left else "none is running"
    yield Finding("run", True, says)


def _disk(root: Path) -> Finding:
    free = shutil.disk_usage(root).free
    says = f"{free / (1 << 30):.1f} GiB free"
    return Finding("disk", free >= DISK, says if free >= DISK else f"{says}; 2 GiB are needed")


def _prefect() -> str:
    from flows.server import answers

    url = os.environ.get("PREFECT_API_URL")
    if not url:
        return "a server of its own for each run (PREFECT_API_URL is not set)"
    answers(url)
    return f"{url} answers"


def _params(root: Path) -> str:
    from flows.parameters import check
    from flows.record import gate_rules, promotions

    settings = check(root)
    rules = gate_rules(root)
    wanted = ", ".join(promotions(root)) or "nothing"
    profile = settings.get("profile", "none")
    return f"profile {profile}; gate of {len(rules)} rules; promotes {wanted}"


def _registry(root: Path) -> str:
    from registry.promote import verify_bytes
    from registry.store import PRODUCTION, open_store

    store = open_store(root)
    said = []
    for name in store.names():
        version = store.aliases(name).get(PRODUCTION)
        if version is None:
            said.append(f"{name} has nothing in production")
        else:
            verify_bytes(store, store.version(name, version))
            said.append(f"{name}/{version} is in production, bytes verified")
    return "; ".join(said) or "nothing is published yet"
