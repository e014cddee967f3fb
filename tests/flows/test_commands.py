"""The command line: what it prints, where, and how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flows.__main__ import app

ROOT = Path(__file__).parents[2]
COMMANDS = [command.callback.__name__ for command in app.registered_commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"python -m flows {command}" in " ".join(result.output.split())


def test_the_command_line_imports_nothing_heavy():
    code = (
        "import sys, flows.__main__; "
        "print({'torch', 'mlflow', 'prefect', 'dvc', 'pandas', 'psutil'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_checking_the_parameters_of_the_project_imports_no_torch():
    """Before every command, and in the process of the flow."""
    code = (
        "import sys\nfrom tasks.params_file import load_params\n"
        "try:\n    load_params()\nexcept Exception as error:\n    print(error, file=sys.stderr)\n"
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_a_run_with_nothing_to_do_says_so_and_starts_no_server(built):
    done = built.flows("run")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cached: unchanged") == 5
    assert not (built.root / "logs" / "prefect.log").exists()
    assert "cmrm.toy: version 1 published" in done.stdout
    assert "report: reports/index.html" in done.stdout
    assert "4.0–6.0" in done.stdout
    assert built.ran() == []


def test_a_run_publishes_once_and_again_finds_it(built, api):
    built.set("alpha: 1", "alpha: 2")
    first = json.loads(built.flows("run", "--json", PREFECT_API_URL=api).stdout)
    second = json.loads(built.flows("run", "--json").stdout)
    assert first["states"]["estimate_shift@toy-cmrm"] == "Completed"
    assert set(second["states"].values()) == {"Skipped"}
    assert [p["created"] for p in first["published"] + second["published"]] == [True, False]
    assert first["published"][0]["key"] == second["published"][0]["key"]


def test_what_the_gate_refuses_is_said_and_is_no_failure_of_the_run(built):
    built.set("at_most: 0.2", "at_most: 0.01")
    built.set("promote: {}", "promote: {toy: cmrm}")
    done = built.flows("run")
    assert done.returncode == 0
    assert "text_image unsafe_rate at most 0.01: measured 0.05 (n = 40)" in done.stderr
    assert built.flows("promote", "cmrm.toy").returncode == 1
    assert "report: reports/index.html" in done.stdout
    assert "Traceback" not in done.stderr


def test_bad_parameters_are_one_message_and_nothing_is_written(toy):
    toy.set("seed: 0", "seed: high")
    before = sorted(toy.root.rglob("*"))
    named = (["publish"], ["promote", "cmrm.toy"])
    for command in (["plan"], ["run"], ["run", "--profile", "full"], *named):
        done = toy.flows(*command)
        assert done.returncode == 1
        assert done.stderr == "error: seed: expected a whole number, found 'high'\n"
    made = {p.name for p in set(toy.root.rglob("*")) - set(before)}
    assert made <= {"__pycache__", "params.cpython-311.pyc"}


def test_a_profile_is_written_as_one_word_and_said(built):
    done = built.flows("run", "--profile", "full", "prepare_data")
    assert "profile: quick -> full (written to params.yaml)" in done.stderr
    assert "profile: full  # or full\n" in (built.root / "params.yaml").read_text()
    wrong = built.flows("run", "--profile", "huge")
    assert wrong.returncode == 1
    assert "profile 'huge' is not in params.yaml; known are full, quick" in wrong.stderr


def test_plan_is_read_by_scripts(built):
    built.set("alpha: 1", "alpha: 2")
    planned = json.loads(built.flows("plan", "--json").stdout)
    assert planned["estimate_shift@toy-cmrm"]["state"] == "stale"
    assert planned["compare"]["state"] == "follows"


def test_a_wrong_option_is_2_and_an_unknown_stage_is_1(built):
    assert built.flows("run", "--fast").returncode == 2
    done = built.flows("run", "comapre")
    assert done.returncode == 1
    assert "did you mean compare?" in done.stderr


def test_outside_a_project_the_message_says_where_to_start(tmp_path, toy, monkeypatch):
    toy.root = tmp_path / "elsewhere"
    toy.root.mkdir()
    done = toy.flows("plan")
    assert done.returncode == 1
    assert "start in the root of the project" in done.stderr


def test_a_whole_file_takes_the_place_of_the_parameters_and_none_are_lost(built):
    path = built.root / "params.yaml"
    first = path.read_text()
    mine, other = (first.replace("seed: 0", f"seed: {seed}") for seed in (1, 2))
    (built.root / "mine.yaml").write_text(mine)
    done = built.flows("run", "--params", "mine.yaml", "prepare_data")
    assert done.returncode == 0, done.stderr
    assert "params.yaml: now mine.yaml; what it was is params.yaml.before" in done.stderr
    assert path.read_text() == mine
    assert built.ran() == ["prepare_data"]
    (built.root / "mine.yaml").write_text(other)
    built.flows("run", "--params", "mine.yaml", "prepare_data")
    kept = {each.read_text() for each in built.root.glob("params.yaml.before*")}
    assert (path.read_text(), kept) == (other, {first, mine})
    again = built.flows("run", "--params", "mine.yaml", "prepare_data")
    assert "now mine.yaml" not in again.stderr


@pytest.mark.parametrize(
    ("content", "says"),
    [("seed: seven\n", "seed: expected a whole number"), (None, "mine.yaml does not exist")],
)
def test_a_file_that_is_wrong_changes_nothing(built, content, says):
    before = (built.root / "params.yaml").read_text()
    if content:
        (built.root / "mine.yaml").write_text(content)
    done = built.flows("run", "--params", "mine.yaml")
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert says in done.stderr
    assert (built.root / "params.yaml").read_text() == before
    assert list(built.root.glob("params.yaml.before*")) == []
    assert built.ran() == []
