"""Publishing: once per lineage, nothing lost, nothing executable."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from registry.bundles import BANK, Subject
from registry.errors import NotBuilt, Unverified
from registry.publish import publish
from registry.store import Store, open_store

ROOT = Path(__file__).parents[2]


def test_a_version_holds_bundle_numbers_lineage_and_report(project, store: Store):
    made = publish(store, project.subject, project.live)
    version = store.version("cmrm.toy", "candidate")
    assert (made.created, made.version, str(version.version)) == (True, "1", "1")
    assert version.tags["lineage.key"] == made.key
    assert version.tags["git.commit"] == project.git("rev-parse", "HEAD")
    assert version.tags["git.dirty"] == "true"
    assert version.tags["dvc.in.lab/words.txt"] == "aa"
    assert version.tags["data.ids"].startswith("anchor:abab")
    run = store.client.get_run(version.run_id)
    assert run.info.experiment_id == store.experiment_id
    assert run.data.metrics["text_image/unsafe_rate"] == 0.05
    assert run.data.metrics["vs_none/benign_image/accuracy.low"] == pytest.approx(-0.06)
    assert run.data.params["defenses.cmrm.alpha"] == "1.0"
    assert run.inputs.dataset_inputs[0].dataset.name == "anchor"
    files = {f.path for f in store.client.list_artifacts(version.run_id, "evaluation")}
    assert {"evaluation/table.json", "evaluation/responses.jsonl"} <= files


def test_what_a_training_measured_at_its_steps_becomes_curves(project, store: Store):
    told = {
        "history": [{"step": 1, "course": 0, "loss": 2.0}, {"step": 2, "course": 0, "loss": 1.5}],
        "validated": [{"step": 0, "merit": 0.1}, {"step": 2, "merit": 0.4}],
    }
    (project.subject.bundle / "training.json").write_text(json.dumps(told))
    publish(store, project.subject, project.live)
    run_id = store.version("cmrm.toy", "candidate").run_id

    def curve(name):
        found = store.client.get_metric_history(run_id, f"training/{name}")
        return [(point.step, point.value) for point in sorted(found, key=lambda p: p.step)]

    assert curve("history/loss") == [(1, 2.0), (2, 1.5)]
    assert curve("validated/merit") == [(0, 0.1), (2, 0.4)]
    assert curve("history/course") == []


def test_the_model_is_data_without_code_or_pickle(project, store: Store, tmp_path: Path):
    import mlflow

    publish(store, project.subject, project.live)
    folder = Path(mlflow.artifacts.download_artifacts("models:/cmrm.toy@candidate"))
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {"data/bundle/card.json", "data/bundle/shift.safetensors", "MLmodel"} <= names
    assert not [n for n in names if n.endswith((".pkl", ".py", ".pickle"))]
    assert "loader_module: hauberk.bundle" in (folder / "MLmodel").read_text()


def test_the_same_lineage_is_published_once(project, store: Store):
    first = publish(store, project.subject, project.live)
    second = publish(store, project.subject, project.live)
    assert (second.created, second.version, second.key) == (False, first.version, first.key)
    assert len(store.client.search_runs([store.experiment_id])) == 1


def test_other_bytes_under_a_published_lineage_are_refused(project, store: Store):
    first = publish(store, project.subject, project.live)
    (project.subject.bundle / "shift.safetensors").write_bytes(b"edited")
    with pytest.raises(Unverified, match=rf"cmrm\.toy/{first.version} has the lineage of .*run"):
        publish(store, project.subject, project.live)
    assert store.aliases("cmrm.toy") == {"candidate": first.version}


def test_another_evaluation_is_another_version_and_the_candidate(project, store: Store):
    publish(store, project.subject, project.live)
    project.build(unsafe=0.02)
    assert publish(store, project.subject, project.live).version == "2"
    assert store.aliases("cmrm.toy") == {"candidate": "2"}
    project.build(unsafe=0.05)
    again = publish(store, project.subject, project.live)
    assert (again.created, store.aliases("cmrm.toy")) == (False, {"candidate": "1"})


KILLED = """
import os, signal, pickle, sys
from pathlib import Path
from mlflow import MlflowClient
from registry.publish import publish
from registry.store import open_store

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(MlflowClient, sys.argv[1], die)
subject, live = pickle.loads(Path("subject").read_bytes())
publish(open_store(Path.cwd()), subject, live)
"""


@pytest.mark.parametrize("call", ["log_batch", "log_artifacts", "create_model_version"])
def test_a_publication_that_was_killed_is_made_again_whole(project, store: Store, call):
    (project.root / "subject").write_bytes(pickle.dumps((project.subject, project.live)))
    command = [sys.executable, "-W", "ignore", "-c", KILLED, call]
    env = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "src"))), "PATH": os.defpath}
    done = subprocess.run(command, cwd=project.root, env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (killed,) = store.client.search_runs([store.experiment_id])
    assert killed.info.status == "RUNNING"
    made = publish(store, project.subject, project.live)
    assert (made.created, made.version) == (True, "1")
    assert store.client.get_run(killed.info.run_id).info.status == "KILLED"
    run = store.client.get_run(store.version("cmrm.toy", "1").run_id)
    assert run.info.status == "FINISHED"


def test_a_publication_that_fails_says_so(project, store: Store, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr(store.client, "create_model_version", refuse)
    with pytest.raises(OSError, match="no space left"):
        publish(store, project.subject, project.live)
    (run,) = store.client.search_runs([store.experiment_id])
    assert run.info.status == "FAILED"


def test_a_version_whose_logged_model_was_deleted_is_published_anew(project, store: Store):
    publish(store, project.subject, project.live)
    logged = store.version("cmrm.toy", "1").source.removeprefix("models:/")
    store.client.delete_logged_model(logged)
    assert publish(store, project.subject, project.live).version == "2"


def test_a_version_whose_artifacts_are_gone_is_published_anew(project, store: Store):
    import shutil

    publish(store, project.subject, project.live)
    shutil.rmtree(project.root / "mlartifacts")
    assert publish(store, project.subject, project.live).version == "2"


def test_missing_numbers_are_left_out_not_written_as_zero(project, store: Store):
    project.build(unsafe=None)
    made = publish(store, project.subject, project.live)
    run = store.client.get_run(store.version("cmrm.toy", made.version).run_id)
    assert "text_image/unsafe_rate" not in run.data.metrics


def test_an_unfinished_bundle_is_refused_and_nothing_is_written(project, store: Store):
    (project.subject.bundle / "card.json").unlink()
    with pytest.raises(NotBuilt, match=r"card\.json does not exist.*flows run"):
        publish(store, project.subject, project.live)
    assert store.names() == []


def test_the_default_store_is_the_one_mlflow_finds_by_itself(project, store: Store):
    publish(store, project.subject, project.live)
    code = "import mlflow; print(mlflow.artifacts.download_artifacts('models:/cmrm.toy@candidate'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project.root, capture_output=True, text=True, check=True
    )
    card = Path(done.stdout.strip().splitlines()[-1]) / "data" / "bundle" / "card.json"
    assert json.loads(card.read_text())["method"] == "cmrm"


def test_a_dead_server_is_one_sentence_after_two_seconds(tmp_path, monkeypatch):
    from registry.errors import Unreachable

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="nothing answers there"):
        open_store(tmp_path)


def test_a_concept_bank_is_published_with_its_own_numbers_and_compared_with_nothing(
    project, store: Store
):
    here = project.root / "artifacts" / "clip" / BANK
    (here / "bundle").mkdir(parents=True)
    (here / "evaluation").mkdir()
    (here / "bundle" / "concepts.safetensors").write_bytes(b"\x07")
    card = {"method": BANK, "binding": {"model": "clip"}, "parameters": {"templates": ["{}"]},
            "data": [], "measurements": {"masked": 0.01}}  # fmt: skip
    (here / "bundle" / "card.json").write_text(json.dumps(card))
    (here / "evaluation" / "card.json").write_text("{}")
    found = {"model": "clip", "defense": BANK, "suite": "image_clutter", "metric": "auroc",
             "value": 0.98, "n": 40, "low": 0.95, "high": 0.99}  # fmt: skip
    (here / "evaluation" / "metrics.json").write_text(json.dumps([found]))
    stage = "measure_detection@clip"
    project.lock[stage] = ({}, {}, {f"artifacts/clip/{BANK}/evaluation": "m1.dir"})
    project.build()
    reports = project.root / "reports"
    bank = Subject("clip", BANK, here / "bundle", here / "evaluation", (stage,), reports)
    made = publish(store, bank, [*project.live, stage])
    version = store.version(f"{BANK}.clip", "candidate")
    assert (made.created, str(version.version)) == (True, "1")
    assert version.tags["method"] == BANK
    metrics = store.client.get_run(version.run_id).data.metrics
    assert metrics["image_clutter/auroc.low"] == 0.95
    assert not any(name.startswith("vs_none") for name in metrics)
