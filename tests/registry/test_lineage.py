"""Lineage: the key, the snapshot, and whether a version still is what was recorded."""

import shutil
from pathlib import Path

import pytest

from registry import lineage
from registry.errors import NotBuilt, Unverified
from registry.provenance import trace, verify
from registry.publish import publish
from registry.store import open_store


def stages(project):
    return lineage.closure(lineage.read_lock(project.root), project.subject.stages, project.live)


def test_the_closure_is_walked_through_outputs_and_forgets_removed_stages(project):
    assert list(stages(project)) == sorted(project.live)
    assert lineage.inputs(stages(project)) == {"lab/words.txt": "aa"}
    assert lineage.parameters(stages(project)) == {"defenses.cmrm.alpha": 1.0, "evaluate.n": 40}


def test_a_file_inside_an_output_leads_to_the_stage_that_made_it():
    lock = {
        "make": {"outs": [{"path": "data", "md5": "1"}]},
        "use": {"deps": [{"path": "data/a.parquet", "md5": "2"}], "outs": []},
        "near": {"outs": [{"path": "data2", "md5": "3"}]},
    }
    assert list(lineage.closure(lock, ["use"])) == ["make", "use"]


def test_the_key_follows_bytes_and_parameters_only(project):
    before = lineage.lineage_key(stages(project))
    project.lock["evaluate@toy-cmrm"][0]["evaluate"]["n"] = 41
    project.build()
    assert lineage.lineage_key(stages(project)) != before
    project.lock["evaluate@toy-cmrm"][0]["evaluate"]["n"] = 40
    project.build()
    assert lineage.lineage_key(stages(project)) == before


def test_a_stage_that_was_never_built_is_named(project):
    with pytest.raises(NotBuilt, match=r"\['evaluate@other'\] are not in dvc\.lock"):
        lineage.closure(lineage.read_lock(project.root), ["evaluate@other"])
    (project.root / "dvc.lock").unlink()
    with pytest.raises(NotBuilt, match="flows run"):
        lineage.read_lock(project.root)


def test_a_snapshot_holds_the_working_tree_and_touches_neither_branch_nor_index(project):
    (project.root / "staged.txt").write_text("half")
    project.git("add", "staged.txt")
    status, head = project.git("status", "--porcelain"), project.git("rev-parse", "HEAD")
    kept = lineage.snapshot(project.root)
    assert (kept.commit, kept.dirty) == (head, "true")
    assert project.git("status", "--porcelain") == status
    assert project.git("rev-parse", "HEAD") == head
    held = project.git("ls-tree", "--name-only", kept.snapshot).splitlines()
    assert {"dvc.lock", "params.yaml", "staged.txt"} <= set(held)
    assert "mlflow.db" not in held
    assert lineage.snapshot(project.root) == kept


def test_a_clean_tree_is_its_own_snapshot(project):
    project.git("add", "-A")
    project.git("commit", "-q", "-m", "all")
    kept = lineage.snapshot(project.root)
    assert (kept.dirty, kept.snapshot) == ("false", kept.commit)


def test_without_git_or_commit_the_tag_says_so(project, tmp_path_factory):
    shutil.rmtree(project.root / ".git")
    assert lineage.snapshot(project.root).snapshot == "none: not a git repository"
    project.git("init", "-q")
    kept = lineage.snapshot(project.root)
    assert kept.commit == "none: no commit yet"
    assert len(kept.snapshot) == 40


def test_a_version_verifies_with_and_without_git(project, store):
    publish(store, project.subject, project.live)
    assert all(f.holds for f in verify(store, "cmrm.toy", "candidate"))
    shutil.rmtree(project.root / ".git")
    findings = verify(store, "cmrm.toy", "candidate")
    assert all(f.holds for f in findings)
    assert any("recorded dvc.lock" in f.what for f in findings)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("shift.safetensors", "bytes of the model"),
        ("MLmodel", "bytes of the model"),
        ("requirements.txt", "bytes of the model"),
        ("evaluation/metrics.json", "recorded metrics"),
        ("closure.json", "recorded closure"),
    ],
)
def test_verify_finds_what_was_changed(project, store, name, what):
    publish(store, project.subject, project.live)
    stored = next((project.root / "mlartifacts").rglob(name))
    data = bytearray(stored.read_bytes())
    at = data.find(b"40") if b"40" in data else 0
    data[at] ^= 1
    stored.write_bytes(bytes(data))
    failed = [f.what for f in verify(store, "cmrm.toy", "candidate") if not f.holds]
    assert failed == [what]


@pytest.mark.parametrize(
    ("name", "whats"),
    [
        ("bundle/card.json", ["bytes of the model"]),
        ("evaluation/metrics.json", ["recorded metrics"]),
        ("closure.json", ["recorded closure", "closure in recorded dvc.lock"]),
        ("dvc.lock", ["recorded dvc.lock", "closure in recorded dvc.lock"]),
    ],
)
def test_verify_says_what_cannot_be_read(project, store, name, whats):
    shutil.rmtree(project.root / ".git")
    publish(store, project.subject, project.live)
    stored = next((project.root / "mlartifacts").rglob(name))
    stored.write_bytes(stored.read_bytes()[:50] + b"\n{")
    failed = [f.what for f in verify(store, "cmrm.toy", "candidate") if not f.holds]
    assert [what.partition(" (")[0] for what in failed] == whats
    if name == "closure.json":
        with pytest.raises(Unverified, match="recorded lineage cannot be read"):
            trace(store, "cmrm.toy", "candidate")


def test_a_version_without_its_tags_does_not_verify(project, store):
    publish(store, project.subject, project.live)
    for tag in ("lineage.key", "dvc.stages", "model.sha256"):
        store.client.delete_model_version_tag("cmrm.toy", "1", tag)
    says = {f.what: f.says for f in verify(store, "cmrm.toy", "candidate") if not f.holds}
    assert "the registry says nothing, found" in says.pop("bytes of the model")
    assert all("has no tag" in text for text in says.values())
    assert len(says) == 2


@pytest.mark.parametrize("text", ["a: [", "- 1", "stages: 3", "stages: {evaluate@toy-cmrm: }"])
def test_a_lock_that_cannot_be_read_is_one_message(text):
    with pytest.raises(Unverified, match=r"dvc\.lock .*restore it from git"):
        lineage.parse_lock(text)


def test_the_tree_leads_from_version_to_data(project, store):
    publish(store, project.subject, project.live)
    seen = trace(store, "cmrm.toy", "candidate")
    assert (seen.version, seen.aliases) == ("1", ("candidate",))
    assert seen.upstream("evaluate@toy-cmrm") == ["estimate_shift@toy-cmrm", "prepare_data"]


def test_a_project_that_was_moved_publishes_into_its_new_place(project, store, tmp_path_factory):
    publish(store, project.subject, project.live)
    new: Path = tmp_path_factory.mktemp("moved") / "project"
    shutil.copytree(project.root, new)
    project.root = new
    publish(open_store(new), project.subject, project.live)
    assert len(list((new / "mlartifacts").rglob("shift.safetensors"))) >= 1
