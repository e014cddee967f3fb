"""Lists that must agree with each other, kept equal by a test and not by discipline."""

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
MACHINE = re.compile(
    r"""/(?:home|root|work|Users|workspace)/\w      # somebody's folder
      | \.\./shared\b
      | --(?:extra-)?index-url | --find[-]links      # where packages come from is not ours to say
      | \bpypi\.org | pythonhosted\.org | download\.pytorch\.org | /opt/\w
    """,
    re.VERBOSE,
)


def tracked() -> list[Path]:
    """Every file of the project that git knows."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def stages() -> dict[str, dict]:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(tmp_path):
    source = tmp_path / "source"  # a build leaves folders behind; not in the checkout
    shutil.copytree(
        ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"hauberk"}
    shipped = {name for name in names if name.startswith("hauberk/") and name.endswith(".py")}
    written = {
        path.relative_to(source / "src").as_posix() for path in (source / "src").rglob("*.py")
    }
    assert shipped == written
    assert "hauberk/py.typed" in names


def test_every_public_name_exists_and_is_listed_once():
    library = importlib.import_module("hauberk")
    assert len(library.__all__) == len(set(library.__all__))
    assert [name for name in library.__all__ if not hasattr(library, name)] == []


def test_every_stage_module_is_a_dvc_stage():
    modules = {
        path.stem
        for path in (ROOT / "tasks").glob("*.py")
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    commands = [stage.get("do", stage)["cmd"] for stage in stages().values()]
    assert modules == {re.search(r"-m tasks\.(\w+)", command)[1] for command in commands}


@pytest.mark.parametrize("name", stages())
def test_a_stage_depends_on_the_hashes_of_its_own_code(name):
    """Or DVC would take a result of older code for the one of this code."""
    stage = stages()[name].get("do", stages()[name])
    module = re.search(r"-m tasks\.(\w+)", stage["cmd"])[1]
    hashed = {"constraints.txt", "src/hauberk", "tasks"}
    assert (hashed if module == "hash_code" else {f".code/{module}.json"}) <= set(stage["deps"])


def test_a_rewritten_card_of_a_model_makes_no_stage_run_again(tmp_path, monkeypatch):
    from dvc.repo import Repo

    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / ".dvcignore", tmp_path)
    repo = Repo.init(no_scm=True)
    cards = "README.md", "measurements.json", "recipe.json", "rebuild.json"
    for name, seen in {**dict.fromkeys(cards, False), "config.json": True}.items():
        path = tmp_path / "lab" / "another" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert repo.dvcignore.is_ignored_file(str(path)) is not seen
    repo.close()


def test_every_command_of_the_readme_exists():
    from typer.main import get_command

    from flows.__main__ import app

    known = set(get_command(app).commands)
    assert set(re.findall(r"python -m flows (\w+)", readme())) <= known
    targets = set(
        re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert set(re.findall(r"^ +make (\w+)", readme(), re.MULTILINE)) <= targets


def test_every_file_that_the_readme_links_to_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", readme())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_constraints_name_one_version_of_every_declared_package():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert lines == sorted(lines, key=str.lower)
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = [_normal(line.split("==")[0]) for line in lines]
    assert len(pinned) == len(set(pinned))
    assert _declared() <= set(pinned)


def test_no_file_names_a_machine_or_a_package_host():
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in MACHINE.finditer(text)]
    assert found == []


def _declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = project["dependency-groups"].values()
    lines = [*project["project"]["dependencies"], *(line for group in groups for line in group)]
    return {_normal(re.match(r"[\w.-]+", line)[0]) for line in lines if isinstance(line, str)}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_readme_names_every_suite():
    from hauberk.data.lab import ATTACKED, SUITES

    readme = (ROOT / "README.md").read_text()
    own = [name for name in (*SUITES, *ATTACKED) if not name.endswith("_twin")]
    assert [name for name in own if f"`{name}`" not in readme] == []
