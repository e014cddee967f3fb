"""A toy pipeline on real DVC: five stages of milliseconds whose behaviour a test can set."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from registry.store import import_quietly

ROOT = Path(__file__).parents[2]

DVC_YAML = """
stages:
  prepare_data:
    cmd: python stage.py artifacts/data
    params: [seed]
    outs: [artifacts/data]
  estimate_shift:
    matrix: {model: "${models}", defense: "${defenses}"}
    cmd: python stage.py artifacts/${item.model}/${item.defense}/bundle
    params: ["defenses.${item.defense}"]
    deps: [artifacts/data]
    outs: ["artifacts/${item.model}/${item.defense}/bundle"]
  evaluate_undefended:
    matrix: {model: "${models}"}
    cmd: python stage.py artifacts/${item.model}/none/evaluation
    deps: [artifacts/data]
    outs: ["artifacts/${item.model}/none/evaluation"]
  evaluate:
    matrix: {model: "${models}", defense: "${defenses}"}
    cmd: python stage.py artifacts/${item.model}/${item.defense}/evaluation
    deps: [artifacts/data, "artifacts/${item.model}/${item.defense}/bundle"]
    outs: ["artifacts/${item.model}/${item.defense}/evaluation"]
  compare:
    cmd: python stage.py reports
    deps: [artifacts]
    outs: [reports]
"""

PARAMS = """# numbers of the toy
seed: 0
profile: quick  # or full
profiles: {quick: {}, full: {}}
checkpoints: lab
models: {toy: {}}
defenses: {cmrm: {alpha: 1}}
gate:
- {suite: text_image, metric: unsafe_rate, at_most: 0.2}
registry: {promote: {}}
"""

STAGE = """
import json, os, sys, time
from pathlib import Path

out, name = Path(sys.argv[1]), os.environ["DVC_STAGE"]
control = Path("control")
(control / f"{name}.pid").write_text(str(os.getpid()))
with (control / "ran").open("a") as ran:
    ran.write(name + "\\n")
print(f"{name}: 1 of 2", file=sys.stderr)
orders = control / f"{name}.json"
if orders.exists():
    order = json.loads(orders.read_text())
    left = order.pop("times", 1) - 1
    orders.write_text(json.dumps({**order, "times": left})) if left else orders.unlink()
    time.sleep(order.get("sleep", 0))
    if "kill" in order:
        print("lab: 21%|##        | 21/100", file=sys.stderr)
        os.kill(os.getpid(), order["kill"])
    if "error" in order:
        print("error: " + order["error"], file=sys.stderr)
    if order.get("bar"):
        print("lab: 21%|##        | 21/100", file=sys.stderr)
    if order.get("exit"):
        raise SystemExit(order["exit"])
    if order.get("crash"):
        raise RuntimeError("boom")
half = out.with_name(out.name + ".tmp")
half.mkdir(parents=True, exist_ok=True)
row = {"model": "toy", "suite": "text_image", "metric": "unsafe_rate", "n": 40}
rows = [{**row, "defense": d, "value": v, "low": v - 0.01, "high": v + 0.01}
        for d, v in (("none", 0.6), ("cmrm", 0.05))]
if out.name == "reports":
    (half / "metrics.json").write_text(json.dumps(rows))
    (half / "differences.json").write_text("[]")
    pooled = [{**row, "channel": "text+image"} for row in rows]
    (half / "channels.json").write_text(json.dumps(pooled))
    (half / "index.html").write_text("<p>report</p>")
if out.name == "evaluation":
    (half / "responses.jsonl").write_text("")
(half / "card.json").write_text(json.dumps({"stage": name, "method": "cmrm", "files": {}}))
half.rename(out)
if "STAGE_RECEIPTS" in os.environ:
    (Path(os.environ["STAGE_RECEIPTS"]) / name).touch()
"""

TASKS = """
from pathlib import Path
import yaml
class HauberkError(Exception): pass
def load_params(path, root=None):
    found = yaml.safe_load(Path(path).read_text())
    if not isinstance(found["seed"], int):
        from flows.errors import FlowError
        raise FlowError(f"seed: expected a whole number, found {found['seed']!r}")
    return found
"""

ORDER = [
    "prepare_data",
    "estimate_shift@toy-cmrm",
    "evaluate_undefended@toy",
    "evaluate@toy-cmrm",
    "compare",
]


@dataclass
class Toy:
    """A project whose stages obey `order`."""

    root: Path

    def order(self, stage: str, **orders: Any) -> None:
        """Say what a stage does the next time, or the next `times` times."""
        (self.root / "control" / f"{stage}.json").write_text(json.dumps(orders))

    def ran(self) -> list[str]:
        """Give the stages that ran, once each run, and forget them."""
        path = self.root / "control" / "ran"
        names = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return names

    def set(self, old: str, new: str) -> None:
        path = self.root / "params.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def dvc(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "dvc", *arguments]
        subprocess.run(command, cwd=self.root, check=True, capture_output=True, env=environment())

    def flows(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run ``python -m flows`` to its end."""
        return subprocess.run(
            [sys.executable, "-m", "flows", *arguments],
            cwd=self.root,
            env=environment() | env,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def python(self, code: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run Python code in the project."""
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.root,
            env=environment() | env,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Run ``python -m flows`` beside the test."""
        return subprocess.Popen(
            [sys.executable, "-m", "flows", *arguments],
            cwd=self.root,
            env=environment() | env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pid(self, stage: str) -> int:
        """Wait until a stage runs and give its PID."""
        path = self.root / "control" / f"{stage}.pid"
        wait_for(path.exists)
        wait_for(lambda: path.read_text() != "")
        return int(path.read_text())


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def environment() -> dict[str, str]:
    """Give a plain environment: no setting of ours or of the developer's leaks in."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "MLFLOW", "STAGE"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    here = os.pathsep.join([str(ROOT / "src"), str(ROOT)])  # this checkout, whatever is installed
    return kept | {"PYTHONPATH": here, "PATH": path, "DVC_NO_ANALYTICS": "1"}


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy before its first run."""
    root = tmp_path_factory.mktemp("pristine")
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "params.yaml").write_text(PARAMS)
    (root / "stage.py").write_text(STAGE)
    (root / "tasks").mkdir()
    (root / "tasks" / "__init__.py").touch()
    (root / "tasks" / "params_file.py").write_text(TASKS)
    Toy(root).dvc("init", "--no-scm", "-q")
    config = (ROOT / ".dvc" / "config").read_text()
    (root / ".dvc" / "config").write_text(config.replace("[core]", "[core]\n    no_scm = true"))
    shutil.copy(ROOT / ".dvcignore", root)
    (root / "control").mkdir()
    return root


@pytest.fixture(scope="session")
def finished(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy after a whole ``dvc repro``."""
    root = tmp_path_factory.mktemp("finished") / "toy"
    shutil.copytree(pristine, root)
    Toy(root).dvc("repro", "-q")
    import_quietly("mlflow.store.tracking.sqlalchemy_store")
    import_quietly("mlflow").MlflowClient(
        f"sqlite:///{root / 'mlflow.db'}"
    ).search_experiments()  # migrates it: seconds
    (root / "control" / "ran").unlink()
    return root


@pytest.fixture
def toy(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The toy before its first run."""
    return _copy(pristine, tmp_path, monkeypatch)


@pytest.fixture
def built(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The toy with every stage up to date."""
    return _copy(finished, tmp_path, monkeypatch)


def _copy(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    root = tmp_path / "toy"
    shutil.copytree(source, root)
    shutil.rmtree(root / "control")
    (root / "control").mkdir()
    monkeypatch.chdir(root)  # DVC names stages as seen from where one stands
    return Toy(root)


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> Iterator[None]:
    """A shell starts what it puts in the background deaf to SIGINT, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that end with the test, whatever happens."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server for all tests: starting one takes seconds."""
    from flows.server import prefect_api

    root = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        patch.setenv("PREFECT_HOME", str(root))
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        patch.setenv("DO_NOT_TRACK", "1")
        with prefect_api(root) as url:
            yield url()
