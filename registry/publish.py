"""Publish: project a bundle, its evaluation and its lineage into MLflow, once.

The version is made last, and carries the lineage key.  A publication that was killed leaves a run
without a version; the next one marks that run as killed and starts again.
"""

import json
import math
import re
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from registry import lineage
from registry.bundles import Subject, tree_hash
from registry.errors import Unverified
from registry.store import CANDIDATE, Store, import_quietly, tag_values

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

REQUIREMENTS = ("hauberk", "torch", "transformers", "safetensors", "numpy", "pillow")
LOADER = "hauberk.bundle"
TABLE = "evaluation/table.json"
TRAINING = "training.json"
# DVC takes every dvc.yaml it finds below the project for its own.
SOURCES = {"dvc.lock": "dvc.lock", "dvc.yaml": "dvc.yaml.txt", "params.yaml": "params.yaml"}


@dataclass(frozen=True)
class Published:
    """A version that is in the registry now."""

    name: str
    version: str
    created: bool
    """False when the same lineage had been published before."""
    key: str


def publish(store: Store, subject: Subject, live: Collection[str] | None = None) -> Published:
    """Make the version of a subject, unless it exists, and point ``candidate`` at it.

    Parameters
    ----------
    store : Store
    subject : Subject
    live : collection of str, optional
        The stages that dvc.yaml names now, see `lineage.closure`.

    Raises
    ------
    NotBuilt
        If the bundle, its evaluation, the report or dvc.lock is not there.
    Unverified
        If this lineage was published with another bundle; nothing is changed.
    """
    stages = lineage.closure(lineage.read_lock(store.root), subject.stages, live)
    key = lineage.lineage_key(stages)
    subject.card, subject.rows(), subject.samples()  # raises before anything is written
    with store.locked():
        number = _published(store, subject, key)
        created = number is None
        if number is None:
            number = _make(store, subject, stages, key)
        else:
            _require_same(store, subject, number)
        if store.aliases(subject.name).get(CANDIDATE) != number:
            store.client.set_registered_model_alias(subject.name, CANDIDATE, number)
    return Published(subject.name, number, created, key)


def _published(store: Store, subject: Subject, key: str) -> str | None:
    """Find the newest version with this key whose artifacts are still there."""
    found = store.client.search_model_versions(
        f"name = '{subject.name}' and tags.`lineage.key` = '{key}'"
    )
    for version in sorted(found, key=lambda v: int(v.version), reverse=True):
        if not _gone(store, version.source or ""):
            return str(version.version)
    return None


def _require_same(store: Store, subject: Subject, number: str) -> None:
    """Hold the bundle against the version that has its lineage: one key, one content."""
    recorded = store.version(subject.name, number).tags.get("bundle.sha256", "none")
    found = tree_hash(subject.bundle)
    if found != recorded:
        raise Unverified(
            f"{subject.name}/{number} has the lineage of {subject.bundle} and other bytes "
            f"(bundle.sha256: published {recorded}, found {found}). One of them is not what "
            "dvc.lock says: `python -m flows run` puts the folder right; if it is right already, "
            "delete that version in MLflow and publish again."
        )


def _gone(store: Store, source: str) -> bool:
    """Tell whether a logged model, ``models:/m-...``, or its local files have been removed."""
    from mlflow.exceptions import MlflowException

    try:
        model = store.client.get_logged_model(source.removeprefix("models:/"))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return True
    where = urlparse(model.artifact_location)
    return where.scheme in ("", "file") and not Path(unquote(where.path)).is_dir()


def _make(store: Store, subject: Subject, stages: lineage.Closure, key: str) -> str:
    from mlflow.entities import RunStatus

    client = store.client
    tags = tag_values(_tags(store, subject, stages, key))
    for run in _abandoned(store, subject, key):
        client.set_terminated(run.info.run_id, RunStatus.to_string(RunStatus.KILLED))
    run = client.create_run(store.experiment_id, run_name=subject.name, tags=tags)
    return _fill(store, subject, stages, run.info.run_id, tags)


def _abandoned(store: Store, subject: Subject, key: str) -> "Iterable[Run]":
    return store.client.search_runs(
        [store.experiment_id],
        f"tags.`lineage.key` = '{key}' and tags.name = '{subject.name}' "
        "and attributes.status = 'RUNNING'",
    )


def _fill(
    store: Store, subject: Subject, stages: lineage.Closure, run_id: str, tags: dict[str, str]
) -> str:
    import mlflow
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    client = store.client
    # The block ends the run: inside it is everything up to the version, so that a run that was
    # killed still says RUNNING.  An explicit id: never the active experiment.
    with mlflow.start_run(run_id=run_id):
        info = import_quietly("mlflow.pyfunc").log_model(
            name=re.sub(r"[^\w+-]", "-", f"{subject.defense}-{subject.model}"),
            loader_module=LOADER,
            data_path=str(subject.bundle),
            pip_requirements=_requirements(),
            model_type="defense",
            tags=tags,
        )
        settings = lineage.parameters(stages) | {
            f"bundle.{k}": v for k, v in subject.card.get("parameters", {}).items()
        }
        params = [Param(_legal(k), _text(v)) for k, v in settings.items()]
        for some in _chunks(params, 100):
            client.log_batch(run_id, params=some)
        measured = [*_metrics(subject, info.model_id), *_curves(subject, info.model_id)]
        for some in _chunks(measured, 1000):
            client.log_batch(run_id, metrics=some)
        _log_data(store, run_id, subject, stages)
        _log_files(store, run_id, subject, stages)
        try:
            client.create_registered_model(subject.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        whole = {"model.sha256": _logged_hash(store, info.model_uri)}
        version = client.create_model_version(
            subject.name, info.model_uri, run_id=run_id, tags=tags | whole, model_id=info.model_id
        )
    return str(version.version)


def _logged_hash(store: Store, uri: str) -> str:
    """Hash a logged model as whoever downloads it will find it."""
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory() as folder:
        return tree_hash(
            Path(download_artifacts(artifact_uri=uri, dst_path=folder, tracking_uri=store.uri))
        )


def _tags(store: Store, subject: Subject, stages: lineage.Closure, key: str) -> dict[str, object]:
    lock = (store.root / "dvc.lock").read_text()
    kept = lineage.snapshot(store.root)
    fixed = {
        "name": subject.name,
        "model": subject.model,
        "defense": subject.defense,
        "method": subject.card.get("method", subject.defense),
        "hauberk": subject.card.get("hauberk", ""),
        "lineage.key": key,
        "git.commit": kept.commit,
        "git.dirty": kept.dirty,
        "git.snapshot": kept.snapshot,
        "dvc.lock.sha256": lineage.digest(lineage.parse_lock(lock)),
        "dvc.stages": ",".join(subject.stages),
        "params.sha256": lineage.digest(lineage.parameters(stages)),
        "bundle.sha256": tree_hash(subject.bundle),
        "metrics.sha256": lineage.digest(subject.rows()),
        "samples.sha256": lineage.digest(subject.samples()),
        "data.ids": ",".join(f"{d['id']}:{d['sha256']}" for d in subject.card.get("data", ())),
    }
    binding = {f"binding.{k}": v for k, v in subject.card.get("binding", {}).items()}
    files = {f"dvc.in.{_legal(p)}": v for p, v in lineage.inputs(stages).items()}
    outs = {
        f"dvc.out.{_legal(p)}": v for entry in stages.values() for p, v in entry["outs"].items()
    }
    return fixed | binding | files | outs


def _metrics(subject: Subject, model_id: str) -> "Iterator[Metric]":
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    own, paired, _ = subject.rows()
    numbers: dict[str, Any] = {}
    for prefix, rows in (("", own), ("vs_none/", paired)):
        for row in rows:
            name = f"{prefix}{row['suite']}/{row['metric']}"
            numbers |= {name: row["value"], f"{name}.low": row["low"], f"{name}.high": row["high"]}
    numbers |= {f"bundle/{k}": v for k, v in subject.card.get("measurements", {}).items()}
    for name, value in numbers.items():
        if isinstance(value, int | float) and math.isfinite(value):
            yield Metric(_legal(name), float(value), now, 0, model_id=model_id)


def _curves(subject: Subject, model_id: str) -> "Iterator[Metric]":
    """Give what a training measured at its steps, where the bundle tells, as curves."""
    from mlflow.entities import Metric

    path = subject.bundle / TRAINING
    told = json.loads(path.read_text()) if path.is_file() else {}
    now = int(time.time() * 1000)
    rows = {"history": told.get("history", ()), "validated": told.get("validated", ())}
    for kind, found in rows.items():
        for row in found:
            for name, value in row.items():
                if name not in ("step", "course") and math.isfinite(value):
                    key = _legal(f"training/{kind}/{name}")
                    yield Metric(key, float(value), now, row["step"], model_id=model_id)


def _log_data(store: Store, run_id: str, subject: Subject, stages: lineage.Closure) -> None:
    """Say which data the bundle was fitted on, so that MLflow can search by its digest."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"outs": [out for entry in stages.values() for out in entry["outs"]]})
    data = [
        DatasetInput(
            dataset=Dataset(
                name=item["id"], digest=item["sha256"][:36], source_type="dvc", source=source
            ),
            tags=[InputTag("mlflow.data.context", "fit")],
        )
        for item in subject.card.get("data", ())
    ]
    if data:
        store.client.log_inputs(run_id, datasets=data)


def _log_files(store: Store, run_id: str, subject: Subject, stages: lineage.Closure) -> None:
    own, paired, bare = subject.rows()
    client = store.client
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _write(root / "evaluation" / "metrics.json", own)
        _write(root / "evaluation" / "differences.json", paired)
        _write(root / "evaluation" / "undefended.json", bare)
        columns = list(dict.fromkeys(name for row in own + bare for name in row))
        data = [[row.get(name) for name in columns] for row in own + bare]
        _write(root / TABLE, {"columns": columns, "data": data})
        _write(root / "lineage" / "closure.json", stages)
        for name, kept in SOURCES.items():
            if (store.root / name).is_file():
                (root / "lineage" / kept).write_bytes((store.root / name).read_bytes())
        client.log_artifacts(run_id, str(root))
    shown = json.dumps([{"path": TABLE, "type": "table"}])
    client.set_tag(run_id, "mlflow.loggedArtifacts", shown)  # MLflow's page shows it as a table
    for name in ("responses.jsonl", "metrics.parquet", "card.json"):
        if (path := subject.evaluation / name).is_file():
            client.log_artifact(run_id, str(path), "evaluation")
    for name in ("index.html", "plots"):
        if (path := subject.reports / name).is_dir():
            client.log_artifacts(run_id, str(path), f"report/{name}")
        elif path.is_file():
            client.log_artifact(run_id, str(path), "report")


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def _requirements() -> list[str]:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in REQUIREMENTS:
        try:
            found.append(f"{package}=={version(package)}")
        except PackageNotFoundError:  # a checkout that is used without being installed
            found.append(package)
    return found


def _legal(name: str) -> str:
    """Map a name to the letters that MLflow admits; ``@`` of a matrix stage becomes ``:``."""
    return re.sub(r"[^\w./ :-]", "_", name.replace("@", ":"))


def _text(value: object) -> str:
    return (value if isinstance(value, str) else json.dumps(value, sort_keys=True))[:6000]


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
