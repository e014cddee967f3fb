"""The hashes of code: what makes a stage stale, and what does not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.hash_code import code_hash

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "def f(x):\n    return x + 1\n"


@pytest.mark.parametrize(
    "same",
    [
        '"""Says what it is for."""\n\n' + SOURCE,
        "# a remark\n" + SOURCE,
        'def f(x):\n    """Add one."""\n    return (\n        x\n        + 1  # one\n    )\n',
    ],
)
def test_what_only_a_reader_sees_changes_no_hash(same):
    assert code_hash(same) == code_hash(SOURCE)


@pytest.mark.parametrize(
    "other",
    [
        SOURCE.replace("+ 1", "+ 2"),
        SOURCE.replace("def f(x)", "def f(x=0)"),
        SOURCE + 'TEXT = "a string that is used"\n',
        "import math\n" + SOURCE,
    ],
)
def test_what_the_code_does_changes_its_hash(other):
    assert code_hash(other) != code_hash(SOURCE)


def test_a_block_of_nothing_but_text_is_read():
    assert code_hash('class A:\n    """Empty."""\n') == code_hash('class A:\n    "Nothing."\n')


@pytest.fixture
def project(tmp_path):
    """A copy of the code, where the hashes are taken of."""
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("tasks", "registry", "src"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for file in ("constraints.txt", "params.yaml"):
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / "lab").symlink_to(ROOT / "lab")
    return tmp_path


def run(project):
    return subprocess.run(
        [sys.executable, "-m", "tasks.hash_code"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project / "src")},
        capture_output=True,
        text=True,
    )


def hashes(project):
    done = run(project)
    assert done.returncode == 0, done.stderr
    return {path.stem: json.loads(path.read_text()) for path in (project / ".code").iterdir()}


def changed(before, after):
    return {name for name in before if before[name] != after[name]}


def test_a_changed_module_concerns_the_stages_that_import_it_and_no_other(project):
    before = hashes(project)
    assert set(before) == {
        path.stem
        for path in (ROOT / "tasks").glob("*.py")
        if '__name__ == "__main__"' in path.read_text() and path.stem != "hash_code"
    }
    attack = project / "src" / "hauberk" / "attacks" / "pgd.py"
    attack.write_text(attack.read_text() + "\nLATER = 1\n")
    assert changed(before, hashes(project)) == {"attack", "attack_safety_prompt"}
    (project / "constraints.txt").write_text("torch==0\n")
    assert changed(before, hashes(project)) == set(before)


def test_a_module_that_python_cannot_read_is_named_and_nothing_is_lost(project):
    hashes(project)
    kept = sorted(path.read_bytes() for path in (project / ".code").iterdir())
    broken = project / "src" / "hauberk" / "attacks" / "pgd.py"
    broken.write_text("def broken(:\n")
    done = run(project)
    assert done.returncode == 1
    assert "pgd.py, line 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.read_bytes() for path in (project / ".code").iterdir()) == kept
