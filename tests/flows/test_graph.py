"""The graph that dvc.yaml of the project means, as DVC resolves it."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.graph import Graph
from flows.parameters import check_followed
from flows.record import subjects

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(pristine, tmp_path, monkeypatch) -> Path:
    """The project's own dvc.yaml with one more model and one more defense in params.yaml."""
    shutil.copytree(pristine / ".dvc", tmp_path / ".dvc")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section in ("models", "defenses"):
        params[section]["another"] = next(iter(params[section].values()))
    params["guardalign"]["models"] = ["another"]
    params["davsp"]["models"] = ["lab-qwen"]
    params["tga"]["models"] = []
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_report_waits_for_every_model_and_every_defense(project):
    graph = Graph(project)
    params = yaml.safe_load((project / "params.yaml").read_text())
    pairs = [f"{m}-{d}" for m in params["models"] for d in params["defenses"]]
    of_model = {
        "models": ("attack", "evaluate_undefended", "analyse_gap", "locate_safety_layers"),
        "guardalign": ("calibrate_guardalign", "evaluate_guardalign", "ablate_guardalign"),
        "davsp": (
            "estimate_harm_vector", "train_safety_prompt", "evaluate_safety_prompt",
            "ablate_safety_prompt", "attack_safety_prompt", "transfer_safety_prompt",
        ),
        "tga": ("train_projector", "evaluate_projector", "ablate_projector"),
    }  # fmt: skip
    needed = {
        "hash_code",
        "prepare_data",
        *(
            f"{stage}@{model}"
            for section, stages in of_model.items()
            for stage in stages
            for model in (params[section] if section == "models" else params[section]["models"])
        ),
        *(f"{stage}@{pair}" for stage in ("estimate_shift", "evaluate") for pair in pairs),
        "build_concept_bank@lab-clip",
        "measure_detection@lab-clip",
        "build_text_index@lab-clip",
    }
    assert "calibrate_guardalign@another" in needed
    assert set(graph.stages["compare"].upstream) == needed
    graph.close()


def test_every_parameter_is_followed_by_a_stage():
    """One that none follows could be changed, and nothing would be made anew.

    The folder of the checkpoints is followed by what lies in it.
    """
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    keys = {key for stage in stages for key in stage.get("params", [])}
    wild = (re.sub(r"\\\$\\{[^}]*\\}", "[^.]+", re.escape(key)) for key in keys)  # ${item.model}
    followed = re.compile(f"({'|'.join(wild)})(\\..*)?")
    told = _leaves(yaml.safe_load((ROOT / "params.yaml").read_text()))
    assert {key for key in told if not followed.fullmatch(key)} == {"checkpoints"}


def _leaves(content: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    if not (isinstance(content, dict) and content):
        yield ".".join(path)
        return
    for key, value in content.items():
        yield from _leaves(value, (*path, key))


def test_a_served_model_is_a_stage_behind_what_guards_it_and_of_none_there_is_no_stage(project):
    graph = Graph(project)
    assert not any(name.startswith("evaluate_served") for name in graph.stages)
    graph.close()
    path = project / "params.yaml"
    content = yaml.safe_load(path.read_text())
    endpoint = {"url": "http://localhost:8000/v1", "model": "m"}
    served = {name: {"endpoint": endpoint, "defenses": ["davsp@lab-qwen"]} for name in ("a", "b")}
    path.write_text(yaml.safe_dump(content | {"served": served}))
    check_followed(ROOT, content | {"served": served}, "params.yaml")
    graph = Graph(project)
    for name in served:
        stage = graph.stages[f"evaluate_served@{name}"]
        assert stage.outs == (f"artifacts/{name}",)
        fits = {"train_safety_prompt@lab-qwen", "calibrate_guardalign@another"}
        assert fits <= {*stage.upstream}
        assert stage.name in graph.stages["compare"].upstream
    assert {subject.model for subject in subjects(graph)}.isdisjoint(served)  # nothing is published
    graph.close()
