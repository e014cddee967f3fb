"""A project as the record sees it: dvc.lock, a bundle, its evaluation, the report; no DVC."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from registry.bundles import Subject
from registry.gate import Rule
from registry.store import Store, import_quietly, open_store

LOCK = {
    "prepare_data": ({}, {"lab/words.txt": "aa"}, {"artifacts/data": "d1.dir"}),
    "estimate_shift@toy-cmrm": (
        {"defenses.cmrm": {"alpha": 1.0}},
        {"artifacts/data": "d1.dir"},
        {"artifacts/toy/cmrm/bundle": "b1.dir"},
    ),
    "evaluate_undefended@toy": (
        {"evaluate": {"n": 40}},
        {"artifacts/data": "d1.dir"},
        {"artifacts/toy/none/evaluation": "u1.dir"},
    ),
    "evaluate@toy-cmrm": (
        {"evaluate": {"n": 40}},
        {"artifacts/data": "d1.dir", "artifacts/toy/cmrm/bundle": "b1.dir"},
        {"artifacts/toy/cmrm/evaluation": "e1.dir"},
    ),
    "removed@toy": ({}, {}, {"artifacts/toy/cmrm/bundle": "old.dir"}),
}
RULES = [
    Rule("text_image", "unsafe_rate", "at_most", 0.2, None, "high"),
    Rule("benign_image", "accuracy", "drop_at_most", 0.02, "none"),
    Rule("text_image", "unsafe_rate", "rise_at_most", 0.02, "production"),
]


def row(suite: str, metric: str, value: float | None, **more: Any) -> dict[str, Any]:
    base = {"model": "toy", "defense": "cmrm", "suite": suite, "metric": metric, "value": value}
    low, high = (None, None) if value is None else (value - 0.05, value + 0.05)
    return base | {"n": 40, "low": low, "high": high} | more


def asked(question: str) -> dict[str, str]:
    sample = {"sample_id": "1", "suite": "text_image", "question": question}
    return sample | {"expected": "refuse", "reference": "", "response": "no"}


@dataclass
class Project:
    """A finished toy pipeline that can be changed and published again."""

    root: Path
    lock: dict[str, Any] = field(default_factory=lambda: dict(LOCK))
    live: tuple[str, ...] = tuple(name for name in LOCK if name != "removed@toy")

    @property
    def subject(self) -> Subject:
        here = self.root / "artifacts" / "toy" / "cmrm"
        stages = ("evaluate@toy-cmrm", "evaluate_undefended@toy")
        reports = self.root / "reports"
        return Subject("toy", "cmrm", here / "bundle", here / "evaluation", stages, reports)

    def build(
        self,
        weights: bytes = b"\x01\x02\x03",
        unsafe: float | None = 0.05,
        question: str = "what is it ?",
        differing: tuple[str, ...] = (),
    ) -> None:
        """Write what the pipeline would have written."""
        bundle, evaluation = self.subject.bundle, self.subject.evaluation
        for folder in (bundle, evaluation, self.root / "reports" / "plots"):
            folder.mkdir(parents=True, exist_ok=True)
        (bundle / "shift.safetensors").write_bytes(weights)
        mark = hashlib.sha256(weights).hexdigest()
        card = {
            "schema": 1,
            "method": "cmrm",
            "hauberk": "0.1.0",
            "binding": {"model": "toy", "weights": "ff"},
            "parameters": {"alpha": 1.0},
            "data": [{"id": "anchor", "sha256": "ab" * 32}],
            "files": {"shift.safetensors": mark},
            "measurements": {"norm": 2.5},
        }
        (bundle / "card.json").write_text(json.dumps(card))
        (evaluation / "responses.jsonl").write_text(json.dumps(asked(question)) + "\n")
        alone = {"checked_alone": 4, "differing_alone": differing}
        (evaluation / "card.json").write_text(json.dumps(alone))
        metrics = [
            row("text_image", "unsafe_rate", unsafe),
            row("benign_image", "accuracy", 0.9),
            row("text_image", "unsafe_rate", 0.6, defense="none"),
        ]
        paired = [row("benign_image", "accuracy", -0.01, p_value=1.0, worse=1, better=0)]
        (self.root / "reports" / "metrics.json").write_text(json.dumps(metrics))
        (self.root / "reports" / "differences.json").write_text(json.dumps(paired))
        (self.root / "reports" / "index.html").write_text("<p>report</p>")
        (self.root / "reports" / "plots" / "a.svg").write_text("<svg/>")
        self.lock["estimate_shift@toy-cmrm"][2]["artifacts/toy/cmrm/bundle"] = mark[:8]
        self.lock["evaluate@toy-cmrm"][1]["artifacts/toy/cmrm/bundle"] = mark[:8]
        self.lock["evaluate@toy-cmrm"][2]["artifacts/toy/cmrm/evaluation"] = f"e{unsafe}"
        (self.root / "dvc.lock").write_text(yaml.safe_dump({"stages": _entries(self.lock)}))
        (self.root / "params.yaml").write_text("seed: 0\n")

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        command = ["git", "-C", str(self.root), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _entries(lock: dict[str, Any]) -> dict[str, Any]:
    def paths(items: dict[str, str]) -> list[dict[str, str]]:
        return [{"path": path, "hash": "md5", "md5": value} for path, value in items.items()]

    return {
        name: {
            "cmd": f"run {name}",
            "params": {"params.yaml": params},
            "deps": paths(deps),
            "outs": paths(outs),
        }
        for name, (params, deps, outs) in lock.items()
    }


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, migrated once: that takes seconds."""
    root = tmp_path_factory.mktemp("migrated")
    import_quietly("mlflow.store.tracking.sqlalchemy_store")
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}").search_experiments()
    return root / "mlflow.db"


@pytest.fixture
def project(tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A finished toy pipeline in a git repository with one commit, and an empty registry."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copy(migrated, tmp_path / "mlflow.db")
    made = Project(tmp_path, lock=json.loads(json.dumps(LOCK)))
    made.git("init", "-q", "-b", "main")
    (tmp_path / ".gitignore").write_text("mlflow.db*\nmlartifacts/\nartifacts/\nreports/\n")
    made.git("add", ".gitignore")
    made.git("commit", "-q", "-m", "first")
    made.build()
    return made


@pytest.fixture
def store(project: Project) -> Store:
    """The registry of the toy project."""
    return open_store(project.root)


@pytest.fixture
def smoke() -> Callable[[str], dict[str, Any]]:
    """A smoke load that remembers what it was asked."""

    class Asked(list[str]):
        def __call__(self, uri: str) -> dict[str, Any]:
            self.append(uri)
            return {"ok": True}

    return Asked()


@pytest.fixture
def rules() -> list[Rule]:
    """A gate that the toy passes."""
    return list(RULES)
