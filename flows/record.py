"""From finished stages to the registry: publish every bundle, promote what params.yaml names."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.errors import BadPipeline, Stale
from flows.graph import Graph
from flows.parameters import read
from hauberk import UNDEFENDED
from registry.bundles import BANK, Subject
from registry.errors import GateFailed, RolledBack, SmokeFailed
from registry.gate import Rule, rules_from
from registry.promote import Promotion, promote
from registry.publish import Published, publish

if TYPE_CHECKING:
    from flows.driver import Driver
    from registry.store import Store

REPORTS = "reports"
SMOKE_PATIENCE = 300.0
_BUNDLE = re.compile(r"^artifacts/([^/]+)/([^/]+)/bundle$")


@dataclass(frozen=True)
class Record:
    """What a run left in the registry."""

    states: dict[str, str] = field(default_factory=dict)
    """Stage -> Skipped, Cached or Completed."""
    published: tuple[Published, ...] = ()
    promoted: tuple[Promotion, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    """Registered model -> why its candidate did not go to production."""

    def with_states(self, states: dict[str, str]) -> "Record":
        """Give the same with the states of the stages."""
        return replace(self, states=states)


def subjects(graph: Graph) -> list[Subject]:
    """Find what can be published: each bundle that dvc.yaml makes and evaluates."""
    makers = {out: stage.name for stage in graph.stages.values() for out in stage.outs}
    found = []
    for out in makers:
        if match := _BUNDLE.match(out):
            model, defense = match.groups()
            evaluation = f"artifacts/{model}/{defense}/evaluation"
            bare = f"artifacts/{model}/{UNDEFENDED}/evaluation"
            measured = (evaluation,) if defense == BANK else (evaluation, bare)
            if missing := [path for path in (*measured, REPORTS) if path not in makers]:
                raise BadPipeline(
                    f"{out} cannot be published: no stage of dvc.yaml makes {' or '.join(missing)}."
                )
            stages = tuple(makers[path] for path in measured)
            root = graph.root
            folders = {"bundle": root / out, "evaluation": root / evaluation}
            found.append(Subject(model, defense, stages=stages, reports=root / REPORTS, **folders))
    return found


def gate_rules(root: Path) -> list[Rule]:
    """Read the gate of params.yaml."""
    return rules_from(read(root).get("gate"))


def promotions(root: Path) -> list[str]:
    """Read which registered models of params.yaml go to production through the gate."""
    wanted = (read(root).get("registry") or {}).get("promote") or {}
    pairs = [(m, [d] if isinstance(d, str) else d) for m, d in wanted.items()]
    return [f"{defense}.{model}" for model, defenses in pairs for defense in defenses]


def publish_all(driver: "Driver") -> Record:
    """Publish every bundle; one that was published before costs a look-up.

    It takes the driver, which owns the project: no stage writes while the folders are read.

    Raises
    ------
    Stale
        If a folder, or anything it was made from, is not what dvc.lock says.
    """
    from registry.store import open_store

    found = _fresh_subjects(driver.graph)
    return Record(published=_publish(open_store(driver.graph.root), driver.graph, found))


def record_all(driver: "Driver") -> Record:
    """Publish every bundle, see `publish_all`, and move production where the gate allows it.

    Refused is only what a measurement or a person has decided (GateFailed, RolledBack); a version
    that does not load, bytes that differ and a registry that someone else moves fail the run.
    """
    from registry.store import open_store

    graph = driver.graph
    rules, wanted = gate_rules(graph.root), promotions(graph.root)
    found = _fresh_subjects(graph)
    store = open_store(graph.root)
    published = _publish(store, graph, found)
    promoted, refused = [], []
    for name in wanted:
        try:
            done = promote(store, name, rules, smoke=smoke_load(store.root), unattended=True)
            promoted.append(done)
        except (GateFailed, RolledBack) as error:
            refused.append((name, str(error)))
    return Record(published=published, promoted=tuple(promoted), refused=tuple(refused))


def _fresh_subjects(graph: Graph) -> list[Subject]:
    """Find the subjects; their lineage is read from dvc.lock, so the folders must be its."""
    found = subjects(graph)
    report = [stage.name for stage in graph.stages.values() if REPORTS in stage.outs]
    needed = {name for subject in found for name in subject.stages}
    stale = graph.reasons(graph.select([*needed, *report])) if found else {}
    if stale:
        lines = (f"{name}: {'; '.join(why)}" for name, why in stale.items())
        raise Stale(
            "nothing is published, since these stages are not up to date:\n  "
            + "\n  ".join(lines)
            + "\nBring them up to date and publish: `python -m flows run`."
        )
    return found


def _publish(store: "Store", graph: Graph, found: list[Subject]) -> tuple[Published, ...]:
    return tuple(publish(store, subject, live=list(graph.stages)) for subject in found)


def smoke_load(root: Path, patience: float = SMOKE_PATIENCE) -> Callable[[str], Mapping[str, Any]]:
    """Give the check that a version answers: loaded as a downstream service does, elsewhere.

    Parameters
    ----------
    root : Path
        The project.
    patience : float
        Seconds after which a version that says nothing has failed.
    """

    def check(uri: str) -> Mapping[str, Any]:
        # models:/DEFENSE.MODEL/VERSION; a defense's name holds no dot, a model's may
        model = uri.removeprefix("models:/").rpartition("/")[0].partition(".")[2]
        params = read(root)
        settings = params.get("models", {}).get(model)
        if settings is None:
            raise SmokeFailed(f"{uri}: params.yaml has no model {model!r} to load it on.")
        asked = [uri, Path(params["checkpoints"], model), settings.get("revision") or "main"]
        asked = [*map(str, asked), str(settings.get("dtype") or "auto")]
        here = str(Path(__file__).parents[1])
        paths = [str(root), here, *filter(None, [os.environ.get("PYTHONPATH")])]
        try_it = f"Try it: python -m flows.smoke {' '.join(asked)}"
        try:
            done = subprocess.run(
                [sys.executable, "-m", "flows.smoke", *asked],
                cwd=root,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                capture_output=True,
                text=True,
                timeout=patience,
            )
        except subprocess.TimeoutExpired:
            raise SmokeFailed(f"{uri} has not answered after {patience:g} s.\n{try_it}") from None
        if done.returncode != 0:
            said = _said(done.stderr)
            raise SmokeFailed(
                f"{uri} cannot be loaded and asked in a clean process: {said}\n{try_it}"
            )
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))

    return check


def _said(text: str) -> str:
    """Give a whole message of ours, or the last line of a traceback."""
    _, ours, message = f"\n{text.strip()}".rpartition("\nerror: ")
    return message if ours else message.rpartition("\n")[2] or "it said nothing"
