"""The lab models that ship: what their cards say they are, and the same alone as in a batch."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from hauberk.data.lab import ATTACKED, SUITES, build_suite
from hauberk.evaluation.lab_card import DEMANDS, SAMPLES, SEED, measure_card
from hauberk.evaluation.rebuild import KEPT, note
from hauberk.lab import build, stages
from hauberk.lab.train import COURSES
from hauberk.requests import respond

LAB = Path(__file__).resolve().parents[1] / "lab"
MODELS = tuple(name for name in build.FAMILIES if (LAB / name).is_dir())


@pytest.fixture(scope="module", params=MODELS)
def folder(request):
    return LAB / request.param


@pytest.fixture(scope="module")
def shipped(folder):
    return build.load(folder)


def test_all_weights_together_are_small():
    assert sum(file.stat().st_size for file in LAB.rglob("*.safetensors")) <= 16e6


def test_what_ships_can_be_trained_again_and_every_named_model_ships():
    named = yaml.safe_load((LAB.parent / "params.yaml").read_text())["models"]
    assert {*named} <= {path.name for path in LAB.iterdir() if path.is_dir()} <= set(COURSES)
    assert MODELS


def test_the_weights_are_of_the_present_sources_and_recipe(folder):
    kept = json.loads((folder / "recipe.json").read_text())
    assert kept["source"] == stages.VlmTrainer.source_hash()
    recipe = COURSES[folder.name].recipe
    for name in ("seed", "steps", "peak_rate", "replay", "questions", "pictures", "batch"):
        assert kept["recipe"][name] == getattr(recipe, name)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


def test_a_card_has_every_demand_with_n_and_interval(folder):
    kept = json.loads((folder / "measurements.json").read_text())
    assert set(kept) == {demand.name for demand in DEMANDS}
    text = (folder / "README.md").read_text()
    for demand in DEMANDS:
        found = kept[demand.name]
        assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
        assert 0 < found["n"] <= SAMPLES
        assert (found["missed_by"] > 0) == (not demand.low <= found["value"] <= demand.high)
        assert demand.what in text


def test_a_model_does_what_its_card_says_on_the_first_of_the_same_samples(folder, shipped):
    kept = json.loads((folder / "measurements.json").read_text())
    suites = ("text", "text_image", "benign_image")
    found = measure_card(*shipped, size=40, suites=suites)
    assert set(found) == {demand.name for demand in DEMANDS if demand.suite in suites}
    for name, estimate in found.items():
        assert estimate.low <= kept[name]["high"], name
        assert kept[name]["low"] <= estimate.high, name


def test_a_batch_of_every_suite_is_answered_as_each_request_alone(shipped):
    model, processor = shipped
    requests = [
        sample.request
        for suite in SUITES
        if suite not in ATTACKED
        for sample in build_suite(suite, "test", 2, SEED)
    ]
    together = respond(model, processor, requests, max_new_tokens=32)
    alone = [respond(model, processor, [one], max_new_tokens=32)[0] for one in requests]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert len({answer.text for answer in together}) > 10


@pytest.mark.parametrize("name", [*COURSES])
def test_what_a_card_says_of_a_rebuild_is_what_was_measured(name):
    kept, shipped = LAB / name / KEPT, json.loads((LAB / name / "measurements.json").read_text())
    text = (LAB / name / "README.md").read_text()
    assert note(LAB / name) in text
    if kept.is_file():
        content = json.loads(kept.read_text())
        assert {row["name"]: row["shipped"] for row in content["rows"]} == {
            key: one["value"] for key, one in shipped.items()
        }
        assert all(row["within"] for row in content["rows"])
