"""The MLflow store: where it lies, opening it once, and the names of things in it.

Without configuration the store is ``sqlite:///mlflow.db`` in the project's root, which is also what
MLflow itself takes for a process that starts there: a downstream service finds
``models:/cmrm.lab-llava@production`` without any setting.  ``MLFLOW_TRACKING_URI`` overrides it.

Nothing here uses MLflow's active experiment: set from several processes at once it sends runs to
the wrong experiment without a word.  Experiments and runs are always named by id.
"""

import fcntl
import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import NotPublished, Unreachable, Unverified

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

EXPERIMENT = "hauberk"
CANDIDATE, PRODUCTION, PREVIOUS = "candidate", "production", "previous"
HEALTH_TIMEOUT = 2.0

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True)
class Store:
    """One MLflow store, as a project sees it."""

    root: Path
    """The project: artifacts of a local store lie below it."""
    uri: str
    """Tracking URI."""
    experiment_id: str
    """The one experiment that holds the runs."""

    @cached_property
    def client(self) -> "MlflowClient":
        """MLflow's client of this store."""
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the only right to change versions and aliases, on this host."""
        with _flock(_lock_path(self.root, self.uri)):
            yield

    def aliases(self, name: str) -> dict[str, str]:
        """Map each alias of a registered model to its version; empty for an unknown model."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_registered_model(name).aliases
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise
        return {alias: str(version) for alias, version in found.items()}

    def require(self, name: str) -> None:
        """Raise NotPublished, with the known names, if there is no such registered model."""
        known = self.names()
        if name not in known:
            raise NotPublished(
                f"{name}: there is no such registered model; known are "
                f"{', '.join(known) or 'none'}; `python -m flows publish` publishes what is built."
            )

    def version(self, name: str, which: str) -> "ModelVersion":
        """Find a version by alias or number.

        Raises
        ------
        NotPublished
            If the model, the alias or the version is unknown.
        """
        from mlflow.exceptions import MlflowException

        aliases = self.aliases(name)
        number = aliases.get(which, which)
        if not number.isdigit():
            self.require(name)
            raise NotPublished(
                f"{name}@{which}: there is no such alias; known are {sorted(aliases) or 'none'}; "
                f"publish first (`python -m flows publish`) or name a version ({name}/1)."
            )
        try:
            return self.client.get_model_version(name, number)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self.require(name)
            raise NotPublished(
                f"{name}/{number}: there is no such version; `python -m flows lineage` lists what "
                "is published, `python -m flows publish` publishes what is built."
            ) from None

    def read(self, version: "ModelVersion", path: str) -> str:
        """Read a text that was published with a version.

        Raises
        ------
        Unverified
            If it is gone.
        """
        from mlflow.exceptions import MlflowException

        try:
            with tempfile.TemporaryDirectory() as folder:
                found = self.client.download_artifacts(version.run_id, path, folder)
                return Path(found).read_text()
        except (MlflowException, OSError) as error:
            raise Unverified(
                f"{version.name}/{version.version}: its artifact {path} cannot be read ({error}); "
                "restore the artifact store, or publish and promote again in a new registry."
            ) from None

    def names(self) -> list[str]:
        """List the registered models."""
        return sorted(model.name for model in self.client.search_registered_models())


def tracking_uri(root: Path) -> str:
    """Give the user's MLFLOW_TRACKING_URI, or the database in the project's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve() / 'mlflow.db'}"


def open_store(root: Path) -> Store:
    """Open the store and make what it needs, once, however many processes do so.

    Raises
    ------
    Unreachable
        If the store is a server that does not answer within two seconds.
    """
    uri = tracking_uri(root)
    _preflight(uri)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    mlflow = import_quietly("mlflow")
    if not uri.startswith("http"):
        import_quietly("mlflow.store.tracking.sqlalchemy_store")
    for chatty in ("mlflow", "alembic", "huey"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    mlflow.set_tracking_uri(uri)
    # A fresh database migrated by two processes at once fails in all but one of them.
    with _flock(_lock_path(root, uri)):
        identity = _experiment(mlflow.MlflowClient(tracking_uri=uri), root.resolve(), uri)
    return Store(root=root.resolve(), uri=uri, experiment_id=identity)


def _experiment(client: "MlflowClient", root: Path, uri: str) -> str:
    """Find or make the experiment; a project that was moved needs one for its new place."""
    if uri.startswith(("http://", "https://")):
        found = client.get_experiment_by_name(EXPERIMENT)
        return found.experiment_id if found else client.create_experiment(EXPERIMENT)
    where = (root / "mlartifacts").as_uri()
    for name in (EXPERIMENT, f"{EXPERIMENT} in {root}"):
        found = client.get_experiment_by_name(name)
        if found is None:
            return client.create_experiment(name, artifact_location=where)
        if found.artifact_location == where:
            break
    return found.experiment_id


def import_quietly(module: str) -> Any:
    """Import a part of MLflow without the warnings it raises about itself while it loads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def _preflight(uri: str) -> None:
    """Ask a server for its health first: MLflow itself waits four minutes for a dead one."""
    if not uri.startswith(("http://", "https://")):
        return
    from urllib.error import HTTPError
    from urllib.request import urlopen

    try:
        with urlopen(f"{uri.rstrip('/')}/health", timeout=HEALTH_TIMEOUT):
            pass
    except HTTPError:
        return  # it answers; whether it lets us in is for the call itself to say
    except OSError as error:
        raise Unreachable(
            f"MLFLOW_TRACKING_URI is {uri}, and nothing answers there ({error}); start the server, "
            "or unset the variable to use mlflow.db in the project."
        ) from None


def _lock_path(root: Path, uri: str) -> Path:
    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///"))
        return database.with_name(f"{database.name}.lock")
    return root / "mlflow.lock"


@contextmanager
def _flock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # freed by the kernel, however the process ends
        yield


def tag_values(tags: Mapping[str, object]) -> dict[str, str]:
    """Turn values into what MLflow stores in a tag: text of at most 5000 characters."""
    return {key: str(value)[:5000] for key, value in tags.items()}
