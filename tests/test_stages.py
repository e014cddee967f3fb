"""The stages from the shell, on a tiny model and small numbers: complete, absent, or resumed."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from flows.tables import read_channels, result_table
from hauberk.concepts import ConceptBank
from hauberk.data.samples import read_suite, write_suite
from hauberk.defenses.patch_transport import PatchTransport, setting_from
from hauberk.errors import BadData, BadParams, HauberkError
from hauberk.evaluation.label import label_write
from hauberk.evaluation.run import read_records
from hauberk.files import file_hash
from hauberk.requests import Request, respond
from tasks import (
    ablate_guardalign,
    ablate_projector,
    ablate_safety_prompt,
    analyse_gap,
    attack,
    attack_safety_prompt,
    build_concept_bank,
    build_text_index,
    calibrate_guardalign,
    compare,
    estimate_harm_vector,
    estimate_shift,
    evaluate,
    evaluate_served,
    locate_safety_layers,
    measure_detection,
    prepare_data,
    train_projector,
    train_safety_prompt,
    transfer_safety_prompt,
)
from tasks.params import PARTS, PROMPT_PARTS
from tasks.params_file import load_params
from tasks.stage import load_clip, load_model, spread, writing
from tests.serving import failure, last_text, serving
from tests.test_served_judge import said, spec_of
from tests.test_target import pictures_in

ROOT = Path(__file__).resolve().parents[1]
HERE = os.pathsep.join([str(ROOT / "src"), str(ROOT)])  # this checkout, whatever is installed
SMALL = {
    "profile": "small",
    "profiles": {
        "small": {
            "data": {"samples": 6, "calibration": 3, "anchor": 8},
            "attack": {"samples": 4, "calibration": 2, "steps": 2},
            "alphas": [1.0],
            "detection": 6,
            "grids": {"sides": [3], "pictures": 6},
            "parts": 3,
            "frame": {"samples": 3, "steps": 4, "batch": 2, "attacked": 2},
            "projector": {"samples": 3, "steps": 4, "validated": 2, "variants": ["tga_plain"]},
            "layers": 3,
        }
    },
    "models": {"lab-llava": {"dtype": "float32"}},
    "registry": {"promote": {"lab-llava": "cmrm"}},
    "suites": ["text", "text_image", "benign_image", "adversarial"],
    "defenses": {
        "cmrm": {
            "anchors": ["text_image"],
            "calibrate_on": ["text_image", "benign_image"],
            "alphas": [0.5, 1.0],
            "variants": [{"level": "dataset", "compose": "incremental"}],
        }
    },
    "concept_banks": {
        "lab-clip": {
            "concepts": "lab",
            "transport": {},
            "benign_scenes": 30,
            "masked_share": 0.05,
        }
    },
    "guardalign": {
        "models": ["lab-llava"],
        "clip": "lab-clip",
        "calibrate_on": ["text_image", "benign_image"],
        "variants": [{"text": "be safe . "}, {"text": "be safe . ", "gate": "any_masked"}],
        "parts_on": ["text_image", "benign_image", "text"],
    },
    "davsp": {
        "models": ["lab-llava"],
        "prefix": "be safe . ",
        "harm": {"harmful": ["text_image"], "harmless": ["text_image_twin"]},
        "frames": {},
        "joint": {"canvas": [96, 96], "margins": [24, 24, 24, 24]},
        "harmful": ["text_image"],
        "harmless": ["benign_image", "text_image_twin"],
        "validate_on": ["text_image", "benign_image"],
        "parts_on": ["text_image", "benign_image"],
        "attacked_at": [2, 8],
        "training": {"validations": 2},
        "refusal": "i can not help with that .",
    },
    "tga": {
        "models": ["lab-llava"],
        "index": {"clip": "lab-clip", "snippets": ["text"]},
        "aligned": ["text_image", "text_image_twin"],
        "answered": ["benign_image"],
        "validate_on": ["text_image", "benign_image"],
        "alphas": [0.5, 1.0],
        "bounded": ["benign_image"],
        "parts_on": ["text_image", "benign_image"],
        "training": {"batch": 2, "aligned": 2, "validations": 2, "rank": 2},
        "variants": {"tga_plain": {"pair": 0.0, "retrieved": "before"}},
    },
    "evaluate": {"batch_size": 4, "max_new_tokens": 4, "checked_alone": 3},
    "gap": {"requests": 8, "words": "text", "harmful": "text_image"},
    "safety_layers": {"width": 2},
}


PLAIN = "tga_plain", "tga_plain_retrieved"
"""The parts of TGA: one training, asked without retrieved texts and with them."""


def start(root, *arguments, **options):
    command = [sys.executable, "-m", f"tasks.{arguments[0]}", *arguments[1:]]
    environment = {**os.environ, "PYTHONPATH": HERE, **options.pop("env", {})}
    return subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stage(root, *arguments, **options):
    process = start(root, *arguments, **options)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def succeed(root, *arguments, **options):
    status, _, errors = stage(root, *arguments, **options)
    assert status == 0, errors


def run(root, module, *arguments):
    """Run a stage in this process, as a flow could: importing torch anew takes seconds."""
    with contextlib.chdir(root):
        return root / module.run(load_params(), *arguments)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def project(root, lab_folder, **changes):
    """A root with params.yaml and the tiny model where the stages look for it."""
    shutil.copytree(lab_folder, root / "lab" / "lab-llava")
    shutil.copytree(ROOT / "lab" / "lab-clip", root / "lab" / "lab-clip")
    params = yaml.safe_load((ROOT / "params.yaml").read_text()) | SMALL | changes
    params["gate"] = [rule for rule in params["gate"] if rule["suite"] in params["suites"]]
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


@pytest.fixture(scope="module")
def done(lab_folder, tmp_path_factory):
    """All stages run once, in the order of the pipeline."""
    root = project(tmp_path_factory.mktemp("project"), lab_folder)
    (root / "receipts").mkdir()
    receipts = {"STAGE_RECEIPTS": str(root / "receipts")}
    succeed(root, "prepare_data", env=receipts)
    succeed(root, "attack", "lab-llava", env=receipts)
    run(root, estimate_shift, "lab-llava", "cmrm")
    run(root, evaluate, "lab-llava", "none")
    run(root, analyse_gap, "lab-llava")
    run(root, evaluate, "lab-llava", "cmrm")
    run(root, build_concept_bank, "lab-clip")
    run(root, measure_detection, "lab-clip")
    run(root, calibrate_guardalign, "lab-llava")
    run(root, evaluate, "lab-llava", "guardalign")
    run(root, ablate_guardalign, "lab-llava")
    run(root, estimate_harm_vector, "lab-llava")
    run(root, locate_safety_layers, "lab-llava")
    run(root, train_safety_prompt, "lab-llava")
    run(root, evaluate, "lab-llava", "davsp")
    run(root, ablate_safety_prompt, "lab-llava")
    run(root, attack_safety_prompt, "lab-llava")
    run(root, transfer_safety_prompt, "lab-llava")
    run(root, build_text_index, "lab-clip")
    run(root, train_projector, "lab-llava")
    run(root, evaluate, "lab-llava", "tga")
    run(root, ablate_projector, "lab-llava")
    succeed(root, "compare", env=receipts | {"DVC_STAGE": "compare@all"})
    return root


@pytest.mark.slow
def test_the_whole_road_leaves_complete_folders_and_nothing_else(done):
    made = [
        "artifacts/data", *(f"artifacts/lab-llava/{of}" for of in ("adversarial", "gap")),
        "artifacts/lab-llava/cmrm/bundle", "artifacts/lab-llava/guardalign/bundle",
        "artifacts/lab-llava/guardalign/parts", "reports",
        *(f"artifacts/lab-llava/davsp/{of}" for of in ("harm", "bundle", "parts", "attacked")),
        "artifacts/lab-llava/davsp/transfer",
        *(f"artifacts/lab-llava/tga/{of}" for of in ("layers", "bundle", "parts")),
        "artifacts/lab-clip/text_index", "artifacts/guards/lab-llava",
        *(f"artifacts/frames/lab-llava/{of}" for of in ("harm", "bundle")),
        *(f"artifacts/lab-clip/concept_bank/{of}" for of in ("bundle", "evaluation")),
    ]  # fmt: skip
    for folder in made:
        card = json.loads((done / folder / "card.json").read_text())
        found = {path.as_posix() for path in contents(done / folder)} - {"card.json"}
        assert set(card["files"]) == found
    assert list(done.rglob("*.part")) == []
    assert not any((done / ".scratch").iterdir())
    receipts = {path.name for path in (done / "receipts").iterdir()}
    assert receipts == {"prepare_data", "attack", "compare@all"}


@pytest.mark.slow
def test_every_sample_is_answered_and_every_row_reaches_the_report(done):
    rows = json.loads((done / "reports" / "metrics.json").read_text())
    for defense in ("none", "cmrm", "guardalign", "davsp", "tga"):
        responses = lines(done / f"artifacts/lab-llava/{defense}/evaluation/responses.jsonl")
        assert len({r["sample_id"] for r in responses}) == len(responses) == 22
        assert {r["defense"] for r in responses} == {defense}
        suites = {row["suite"] for row in rows if row["defense"] == defense}
        assert suites == set(SMALL["suites"])
    differences = json.loads((done / "reports" / "differences.json").read_text())
    assert {row["defense"] for row in differences} == {
        "cmrm", "guardalign", "davsp", "tga", *PARTS, *PROMPT_PARTS, *PLAIN
    }  # fmt: skip
    assert json.loads((done / "reports" / "forms.json").read_text()) == []  # words tell all wishes
    for part in PARTS:
        asked = {
            row["suite"]: row["n"]
            for row in rows
            if (row["defense"], row["metric"]) == (part, "degenerate_rate")
        }
        assert asked == dict.fromkeys(SMALL["guardalign"]["parts_on"], 3)
    assert (done / "reports" / "index.html").stat().st_size > 1000


@pytest.mark.slow
def test_other_judges_and_labels_reach_the_report(done, tmp_path):
    root = shutil.copytree(done, tmp_path / "copy")
    params = yaml.safe_load((root / "params.yaml").read_text())
    judges = {"first": {"kind": "keyword"}, "second": {"kind": "exact"}, "labels": "judges/labels"}
    (root / "params.yaml").write_text(yaml.safe_dump(params | {"judges": judges}))
    sheet = root / "judges/labels/one.csv"
    sheet.parent.mkdir(parents=True)
    for defense in ("none", "cmrm", "guardalign", "davsp", "tga"):
        file = root / f"artifacts/lab-llava/{defense}/evaluation/responses.jsonl"
        before = read_records(file)
        run(root, evaluate, "lab-llava", defense)
        after = read_records(file)
        assert {(r.judge, r.second) for r in after} == {("keyword", "exact")}
        for old, new in zip(before, after, strict=True):
            assert (new.outcome, new.outcome_keyword) == (old.outcome_keyword, old.outcome)
            assert (new.response, new.score) == (old.response, old.score)
    label_write([root / "artifacts/lab-llava/none/evaluation/responses.jsonl"], sheet, n=22)
    head, *rows = sheet.read_text("utf-8-sig").splitlines()
    sheet.write_text("\n".join([head, *(f"{row.rsplit(',', 2)[0]},safe," for row in rows)]))
    run(root, compare)
    agreement = json.loads((root / "reports/agreement.json").read_text())
    assert {(r["judge"], r["second"]) for rows in agreement.values() for r in rows} == {
        ("keyword", "exact")
    }
    metrics = json.loads((root / "reports/metrics.json").read_text())
    told = {(r["defense"], r["metric"]) for r in metrics if r["metric"].endswith("_labelled")}
    assert told == {
        ("none", f"{rate}_{judge}_labelled")
        for rate in ("unsafe_rate", "over_refusal") for judge in ("keyword", "exact")
    }  # fmt: skip
    assert 'First judge: <span class="name">keyword</span>' in (
        root / "reports/index.html"
    ).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_judge_of_the_file_decides_what_a_refusal_is_wherever_answers_are_picked(
    done, tmp_path
):
    """One that calls every answer a refusal; the exact judge calls none of them one."""
    root = shutil.copytree(done, tmp_path / "copy")
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["davsp"]["refusal"] = None
    with serving(lambda body, count: said("refused")) as server:
        first = spec_of(server, timeout=30.0, deadline=60.0)
        (root / "params.yaml").write_text(
            yaml.safe_dump(params | {"judges": {**params["judges"], "first": first}})
        )
        harm = json.loads((run(root, estimate_harm_vector, "lab-llava") / "harm.json").read_text())
        right = {kind: counts["right"] for kind, counts in harm["requests"].items()}
        assert right == {"harmful": harm["requests"]["harmful"]["asked"], "harmless": 0}
        folder = run(root, locate_safety_layers, "lab-llava")
        layers = json.loads((folder / "layers.json").read_text())
        for rates in (*layers["words"]["untouched"].values(), layers["pictures"]["refused"]):
            assert rates["value"] == 1
        assert "unjudged" not in layers
        for module, key in ((train_safety_prompt, "harmless"), (train_projector, "answered")):
            with pytest.raises(BadData, match=rf"answers none of .*{key}"):
                run(root, module, "lab-llava")
    before = json.loads((done / "artifacts/lab-llava/tga/layers/layers.json").read_text())
    assert before["words"]["untouched"]["harmful"]["value"] == 0


@pytest.mark.slow
def test_attacked_samples_are_the_clean_ones_with_pictures_near_theirs(done):
    data, made = done / "artifacts/data", done / "artifacts/lab-llava/adversarial"
    card = json.loads((made / "card.json").read_text())
    kept = {"question", "pair_id", "split", "scenario", "expected", "reference", "licence"}
    for split, size in {"calibration": 2, "test": 4}.items():
        clean = read_suite(data / split / "text_image.parquet")
        attacked = read_suite(made / f"{split}.parquet")
        assert len(attacked) == card["splits"][split]["n"] == size
        for before, after in zip(clean, attacked, strict=False):
            assert all(getattr(before, name) == getattr(after, name) for name in kept)
            assert (after.suite, after.channel) == ("adversarial", "adversarial")
            assert after.sample_id.startswith(f"adversarial-lab-llava-{split}-")
            assert before.source in after.source
            assert before.revision in after.revision
            apart = abs(np.asarray(before.image).astype(int) - np.asarray(after.image))
            assert 0 < apart.max() <= card["setting"]["epsilon"]
        losses = card["splits"][split]
        assert losses["loss_after"] < losses["loss_before"]
        assert losses["followed"] >= losses["followed_before"]


@pytest.mark.slow
def test_the_report_has_the_pictures_of_every_model_that_was_attacked(done, tmp_path):
    root = shutil.copytree(done, tmp_path / "copy")
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["models"]["other"] = params["models"]["lab-llava"]
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    shutil.copytree(root / "lab/lab-llava", root / "lab/other")
    run(root, attack, "other")
    with contextlib.chdir(root):
        images = compare._images(load_params())
        scenarios = compare._scenarios(load_params())
    for model in ("lab-llava", "other"):
        samples = read_suite(root / f"artifacts/{model}/adversarial/test.parquet")
        for sample in samples:
            shown = Image.open(io.BytesIO(images[sample.sample_id]))
            assert shown.tobytes() == sample.image.tobytes()
            assert scenarios[sample.sample_id] == sample.scenario
    assert len(images) == 6 + 6 + 2 * len(samples)


@pytest.mark.slow
def test_another_attack_makes_other_samples_and_the_same_one_the_same_bytes(done, tmp_path):
    root = shutil.copytree(done, tmp_path / "copy")
    folder = root / "artifacts/lab-llava/adversarial"
    before = contents(folder)
    first = {sample.sample_id for sample in read_suite(folder / "test.parquet")}
    run(root, attack, "lab-llava")
    assert contents(folder) == before  # so that no later stage is stale
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["attack"]["epsilon"] = 3
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    run(root, attack, "lab-llava")
    assert not first & {sample.sample_id for sample in read_suite(folder / "test.parquet")}


@pytest.mark.slow
def test_an_attack_that_is_stopped_leaves_what_was_there(done, tmp_path, monkeypatch):
    root = shutil.copytree(done, tmp_path / "copy")
    before = contents(root)

    def stop(samples, path):
        path.write_text("half")
        if path.stem == "test":
            raise KeyboardInterrupt

    monkeypatch.setattr("hauberk.data.samples.write_suite", stop)
    with pytest.raises(KeyboardInterrupt):
        run(root, attack, "lab-llava")
    assert contents(root) == before


@pytest.mark.slow
def test_a_defense_can_be_calibrated_on_attacked_pictures(done, tmp_path):
    root = shutil.copytree(done, tmp_path / "copy")
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["defenses"]["cmrm"]["calibrate_on"] = ["adversarial", "benign_image"]
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    folder = run(root, estimate_shift, "lab-llava", "cmrm")
    data = {d["id"]: d["sha256"] for d in json.loads((folder / "card.json").read_text())["data"]}
    made = root / "artifacts/lab-llava/adversarial/calibration.parquet"
    assert data["calibration/adversarial"] == hashlib.sha256(made.read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_guardalign_says_which_bank_and_clip_it_was_made_with_and_what_was_tried(done):
    bank = json.loads((done / "artifacts/lab-clip/concept_bank/bundle/card.json").read_text())
    folder = done / "artifacts/lab-llava/guardalign/bundle"
    card = json.loads((folder / "card.json").read_text())
    told = card["parameters"]
    assert told["concept_bank"] == bank["card_sha256"]
    assert told["clip"] == bank["binding"]
    assert told["transport"]["threshold"] == bank["parameters"]["transport"]["threshold"]
    assert 0 < bank["measurements"]["calibration_masked_transport"] <= 0.05
    sweep = json.loads((folder / "sweep.json").read_text())
    assert [row["gate"] for row in sweep["rows"]] == ["always_on", "any_masked"]
    assert sum(row["chosen"] for row in sweep["rows"]) == 1
    assert {"transport", "prefix"} <= told.keys()
    assert told["prefix"]["text"] == sweep["chosen"]["text"] == "be safe . "
    assert {d["id"] for d in card["data"]} == {"calibration/text_image", "calibration/benign_image"}


@pytest.mark.slow
def test_the_share_of_attention_is_of_the_requests_that_get_the_prefix(done, tmp_path):
    root = shutil.copytree(done, tmp_path / "copy")
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["guardalign"]["variants"] = [{"text": "be safe . "}]  # which all get
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    shares = json.loads((run(root, calibrate_guardalign, "lab-llava") / "sweep.json").read_text())[
        "shares"
    ]
    assert [row["layer"] for row in shares] == [0, 1, 2, 3]
    calibrated = {1, 2}  # round(.28 * 4) to round(.44 * 4)
    for row in shares:
        assert row["plain"]["n"] == row["calibrated"]["n"] == 3 + 3
        plain, raised = row["plain"], row["calibrated"]
        assert 0 < plain["low"] < plain["value"] < plain["high"] < 1
        assert raised["value"] >= plain["value"] or row["layer"] not in calibrated


def of_own_pictures(root, lab_folder, count=40):
    """A project whose concepts are of the real world, with pictures in folders beside its CLIP."""
    bank = {**SMALL["concept_banks"]["lab-clip"], "concepts": "real", "benign_scenes": None}
    bank["benign_pictures"] = "lab/lab-clip/benign"
    folder = project(root, lab_folder, concept_banks={"lab-clip": bank}) / bank["benign_pictures"]
    for place in range(count):
        (folder / str(place % 3)).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(place).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / str(place % 3) / f"{place}.png")
    return folder


def test_concepts_of_the_real_world_are_calibrated_on_the_users_pictures(lab_folder, tmp_path):
    folder = of_own_pictures(tmp_path, lab_folder)
    card = json.loads((run(tmp_path, build_concept_bank, "lab-clip") / "card.json").read_text())
    (data,) = card["data"]
    files = sorted(folder.rglob("*.png"), key=Path.as_posix)
    known = [f"{path.relative_to(folder).as_posix()} {file_hash(path)}\n" for path in files]
    assert data["id"] == "lab/lab-clip/benign"
    assert data["sha256"] == hashlib.sha256("".join(known).encode()).hexdigest()
    told = card["parameters"]
    assert told["calibrated_on"] == {
        "folder": "lab/lab-clip/benign", "pictures": 40, "masked_share": 0.05
    }  # fmt: skip
    assert 0 < card["measurements"]["calibration_masked_transport"] <= 0.05
    with contextlib.chdir(tmp_path):
        clip, processor = load_clip(load_params(), "lab-clip")
        bank = ConceptBank.load("artifacts/lab-clip/concept_bank/bundle", clip, processor)
    detector = PatchTransport(clip, processor, bank, setting_from(told["transport"]))
    masked = detector.masked([Image.open(file) for file in files]).patches
    share = card["measurements"]["calibration_masked_transport"]
    assert masked.double().mean().item() == pytest.approx(share, abs=0.01)  # batches may round


def test_a_picture_of_the_users_that_cannot_be_read_ends_the_stage_and_is_named(
    lab_folder, tmp_path
):
    folder = of_own_pictures(tmp_path, lab_folder)
    (folder / "1" / "broken.webp").write_bytes(b"RIFF")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadData, match=r"lab/lab-clip/benign/1/broken\.webp: cannot be read"):
        run(tmp_path, build_concept_bank, "lab-clip")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_part_answers_as_it_does_in_the_library(done):
    import hauberk

    answers = lines(done / "artifacts/lab-llava/guardalign/parts/responses.jsonl")
    of = {(row["defense"], row["sample_id"]): row["response"] for row in answers}
    with contextlib.chdir(done):
        model, processor = load_model(load_params(), "lab-llava")
        guard = hauberk.load("artifacts/lab-llava/guardalign/bundle", model, processor)
    samples = read_suite(done / "artifacts/data/test/text_image.parquet")[:3]
    requests = [sample.request for sample in samples]
    masked = guard.with_prefix(None)
    said = hauberk.respond(model, processor, requests, masked, max_new_tokens=4)
    assert [one.text for one in said] == [of["transport_only", one.sample_id] for one in samples]
    always = guard.transport.setting.gate == "always_on"
    reached = [always or masked.rewrite(request) is not request for request in requests]
    alone, plain = (
        [one.text for one in hauberk.respond(model, processor, requests, defense, max_new_tokens=4)]
        for defense in (guard.with_transport(None), None)
    )
    wanted = [
        with_it if there else without
        for with_it, without, there in zip(alone, plain, reached, strict=True)
    ]
    assert [of["prefix_calibrated", one.sample_id] for one in samples] == wanted
    hidden = guard.with_transport(guard.transport.with_setting(threshold=float("inf")))
    assert all(not image.getextrema()[0][1] for request in requests
               for image in hidden.rewrite(request).images)  # fmt: skip


@pytest.mark.slow
def test_a_frame_is_trained_on_train_chosen_on_calibration_and_answers_as_in_the_library(done):
    import hauberk

    folder = done / "artifacts/lab-llava/davsp/bundle"
    card = json.loads((folder / "card.json").read_text())
    assert {data["id"].split("/")[0] for data in card["data"]} == {"train", "calibration"}
    told = json.loads((folder / "training.json").read_text())
    assert [row["step"] for row in told["validated"]] == [0, 2, 4]
    merits = {row["step"]: row["merit"] for row in told["validated"]}
    assert merits[told["step"]] == max(merits.values())
    assert [row["step"] for row in told["history"]] == [1, 2, 3, 4]
    assert contents(folder) == contents(done / "artifacts/frames/lab-llava/bundle")
    answers = lines(done / "artifacts/lab-llava/davsp/parts/responses.jsonl")
    of = {(row["defense"], row["sample_id"]): row["response"] for row in answers}
    with contextlib.chdir(done):
        model, processor = load_model(load_params(), "lab-llava")
        prompt = hauberk.load(folder, model, processor)
    samples = read_suite(done / "artifacts/data/test/text_image.parquet")[:3]
    requests = [sample.request for sample in samples]
    for name, defense in {
        "davsp_border_only": prompt.with_prefix(""), "davsp_prefix_only": prompt.without_frame(),
    }.items():  # fmt: skip
        said = hauberk.respond(model, processor, requests, defense, max_new_tokens=4)
        assert [one.text for one in said] == [of[name, sample.sample_id] for sample in samples]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "state", "made"),
    [
        (train_safety_prompt, "frame.safetensors", ("davsp/bundle", "../frames/lab-llava")),
        (train_projector, "state.safetensors", ("tga/bundle",)),
    ],
)
def test_a_training_that_was_killed_ends_in_the_same_bytes(done, tmp_path, module, state, made):
    root = shutil.copytree(done, tmp_path / "copy")
    folders = [(root / "artifacts/lab-llava" / of).resolve() for of in made]
    for place in folders:
        shutil.rmtree(place)
    name = module.__name__.removeprefix("tasks.")
    process = start(root, name, "lab-llava")
    kept = root / f".scratch/{name}@lab-llava/{state}"
    deadline = time.monotonic() + 120
    while not kept.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert kept.exists()
    assert not any(folder.exists() for folder in folders)
    run(root, module, "lab-llava")
    for folder in folders:
        assert contents(folder) == contents(done / folder.relative_to(root.resolve()))
    assert not kept.exists()


@pytest.mark.slow
def test_a_frame_is_tried_on_every_other_model_and_stands_in_the_matrix(done, tmp_path):
    root = shutil.copytree(done, tmp_path / "copy")
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["models"]["lab-other"] = params["models"]["lab-llava"]
    for section in ("guardalign", "davsp"):
        params[section]["models"] = ["lab-llava", "lab-other"]
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    shutil.copytree(root / "lab/lab-llava", root / "lab/lab-other")
    shutil.copytree(root / "artifacts/frames/lab-llava", root / "artifacts/frames/lab-other")
    run(root, transfer_safety_prompt, "lab-llava")
    answers = lines(root / "artifacts/lab-llava/davsp/transfer/responses.jsonl")
    tried = {(row["model"], row["defense"]) for row in answers}
    assert tried == {("lab-llava", "davsp@lab-other")}
    responses = lines(root / "artifacts/lab-llava/davsp/evaluation/responses.jsonl")
    own = {row["sample_id"]: row["response"] for row in responses}
    for row in answers:  # the other model is the same one here, and so is its frame
        assert row["response"] == own[row["sample_id"]]


@pytest.mark.slow
def test_a_frame_of_all_other_models_is_tried_on_one(done, tmp_path):
    root = shutil.copytree(done, tmp_path / "copy")
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["profiles"]["small"]["frame"]["joint_steps"] = 2
    for name in ("lab-b", "lab-c"):
        params["models"][name] = params["models"]["lab-llava"]
        for what in ("lab/{}", "artifacts/frames/{}", "artifacts/{}/davsp"):
            shutil.copytree(root / what.format("lab-llava"), root / what.format(name))
    for section in ("guardalign", "davsp"):
        params[section]["models"] = ["lab-llava", "lab-b", "lab-c"]
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    run(root, transfer_safety_prompt, "lab-c")
    folder = root / "artifacts/lab-c/davsp/transfer"
    answers = lines(folder / "responses.jsonl")
    assert {row["model"] for row in answers} == {"lab-c"}
    assert {row["defense"] for row in answers} == {
        "davsp@lab-llava", "davsp@lab-b", "davsp@lab-llava+lab-b",
    }  # fmt: skip
    kept = folder / "lab-llava+lab-b"
    with Image.open(kept / "frame.png") as frame:
        assert frame.size == (96, 96)
    assert len(json.loads((kept / "training.json").read_text())["history"]) == 4
    assert list((root / ".scratch").iterdir()) == []


@pytest.mark.slow
def test_some_answers_of_every_part_are_compared_with_batch_size_1(done):
    card = json.loads((done / "artifacts/lab-llava/guardalign/parts/card.json").read_text())
    assert card["checked_alone"] == 1  # 3 over five parts
    assert card["differing_alone"] == {part: [] for part in PARTS}
    page = (done / "reports/index.html").read_text()
    for part in PARTS:
        assert f"lab-llava / {part}</th><td>0 of 1 checked" in page


@dataclass(frozen=True)
class Half:
    """A masking or a prefix of requests that are words: masked ones are said loudly."""

    gate: str
    masks: tuple = ()
    says: str = ""

    def rewrite_all(self, words):
        return [word.upper() if word in self.masks else word for word in words]

    def opens_gate(self, before, after):
        return self.gate == "always_on" or after is not before

    def rewrite(self, word):
        return self.says + word


GATES = pytest.mark.parametrize("gate", ["always_on", "any_masked"])


@GATES
def test_attention_is_measured_on_what_the_gate_lets_through_as_it_is_masked(gate):
    masks, words = Half(gate, masks=("a", "b")), ["a", "b", "c"]
    once = calibrate_guardalign._Once(
        masks, dict(zip(words, masks.rewrite_all(words), strict=True))
    )
    once.rewrite_all = masks.rewrite_all
    assert once.reached(words) == ["A", "B", *("c" for _ in range(gate == "always_on"))]


@GATES
def test_the_prefix_alone_goes_where_the_whole_puts_it_and_masks_nothing(gate):
    guard = SimpleNamespace(
        transport=Half(gate, masks=("a", "b")),
        with_transport=lambda none: Half(gate, says="be safe "),
    )
    alone = ablate_guardalign._PrefixAlone(guard)
    found = alone.rewrite_all(["a", "b", "c"])
    assert found == ["be safe a", "be safe b", "be safe c" if gate == "always_on" else "c"]
    assert [alone.rewrite(word) for word in "abc"] == found


@pytest.mark.slow
def test_detection_has_every_row_with_its_interval_and_shows_masked_pictures(done):
    folder = done / "artifacts/lab-clip/concept_bank/evaluation"
    rows = json.loads((folder / "metrics.json").read_text())
    assert {row["metric"] for row in rows} >= {
        "auroc", "auroc_max_cosine", "auroc_entropy", "auroc_as_printed", "masked_benign_patches",
    }  # fmt: skip
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    assert json.loads((done / "reports/detection.json").read_text()) == rows
    found = json.loads((folder / "detection.json").read_text())
    swept = json.loads((folder / "grids.json").read_text())
    assert {row["grid"] for row in swept} == {2, 3}
    for row in swept:
        assert abs(row["threshold"]) < 1e3
        for found_of in (row["auroc"], row["harm_masked"]):
            assert found_of["low"] <= found_of["value"] <= found_of["high"]
    for example in found["examples"]:
        hidden = [score <= found["threshold"] for score in example["scores"]]
        assert hidden == example["hidden"]
        assert (example["picture"] == example["masked"]) == (not any(hidden))


@pytest.mark.slow
def test_a_sweep_of_too_few_pictures_says_how_to_get_more(done, tmp_path):
    root = shutil.copytree(done, tmp_path / "copy")
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["concept_banks"]["lab-clip"]["masked_share"] = 0.011  # of 96 patches, not all harmless
    params["profiles"]["small"]["grids"]["sides"] = [2]
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    before = contents(root)
    with pytest.raises(BadParams, match=r"small\.grids\.pictures: 6 are wrong.*give more"):
        run(root, measure_detection, "lab-clip")
    assert contents(root) == before


@pytest.mark.slow
def test_the_bundle_says_what_was_tried_on_calibration_and_loads(done, tiny):
    import hauberk

    folder = done / "artifacts/lab-llava/cmrm/bundle"
    sweep = json.loads((folder / "sweep.json").read_text())
    assert [row["alpha"] for row in sweep["rows"]] == [0.5, 1.0]
    assert sweep["split"] == "calibration"
    defense = hauberk.load(folder, tiny.model, tiny.processor)
    assert defense.setting.alpha == sweep["chosen"]["alpha"]
    card = json.loads((folder / "card.json").read_text())
    assert [d["id"] for d in card["data"]] == [
        "anchor/text_image", "calibration/text_image", "calibration/benign_image",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_share_of_a_change_is_chosen_on_calibration_and_is_what_the_bundle_makes(done, tiny):
    import hauberk

    folder = done / "artifacts/lab-llava/tga/bundle"
    told = json.loads((folder / "training.json").read_text())
    about = json.loads((folder / "card.json").read_text())
    swept = folder / "sweep.json"
    assert swept.is_file() == bool(told["step"])
    if not told["step"]:
        assert told["share"] is None
        return
    sweep = json.loads(swept.read_text())
    assert [row["alpha"] for row in sweep["rows"]] == SMALL["tga"]["alphas"]
    assert (sweep["split"], sweep["bounded"]) == ("calibration", SMALL["tga"]["bounded"])
    (chosen,) = [row for row in sweep["rows"] if row["chosen"]]
    assert chosen["alpha"] == told["share"] == about["parameters"]["training"]["share"]
    assert chosen["merit"] == told["deployed_merit"] == about["measurements"]["calibration_merit"]
    assert hauberk.load(folder, tiny.model, tiny.processor).about["share"] == chosen["alpha"]


@pytest.mark.slow
def test_safety_layers_are_located_on_the_anchor_split_and_are_the_same_every_time(done, tmp_path):
    folder = done / "artifacts/lab-llava/tga/layers"
    found, card = (json.loads((folder / f"{name}.json").read_text()) for name in ("layers", "card"))
    assert card["data"].keys() == {"anchor/captions", "anchor/text_image", "anchor/text_image_twin"}
    located, blocks = found["located"], found["blocks"]
    assert located["layers"]
    assert set(located["layers"]) <= set(range(blocks))
    assert located["fallback"] == (located["counted"] == 0)
    slid = [[first, first + 1] for first in range(blocks - 1)]
    for way in ("hidden", "skipped"):
        assert [row["layers"] for row in found["words"][way]] == slid
    for way in ("added", "replaced"):
        assert [row["layers"] for row in found["pictures"][way]] == slid
    onward = [row["layers"][0] for row in found["words"]["hidden_from"]]
    assert onward == list(range(blocks))
    assert {row["harmful"]["n"] for row in found["words"]["hidden"]} == {3}
    root = shutil.copytree(done, tmp_path / "copy")
    run(root, locate_safety_layers, "lab-llava")
    assert contents(root / folder.relative_to(done)) == contents(folder)
    page = (done / "reports" / "index.html").read_text()
    assert "Where refusal lives" in page


@pytest.mark.slow
def test_the_gap_is_what_the_evaluation_says_and_its_states_are_of_the_anchor_split(done):
    folder = done / "artifacts/lab-llava/gap"
    found = json.loads((folder / "gap.json").read_text())
    metrics = json.loads((done / "artifacts/lab-llava/none/evaluation/metrics.json").read_text())
    assert {row["suite"] for row in found["rates"]} == {*SMALL["suites"]} - {"adversarial"}
    assert all(row in metrics for row in found["rates"])
    rates = {row["suite"]: row["value"] for row in found["rates"] if row["metric"] == "unsafe_rate"}
    assert found["gap"]["value"] == pytest.approx(rates["text_image"] - rates["text"])
    blocks = len(found["explained"])
    kinds = {(row["measure"], row["group"]) for row in found["layers"]}
    assert len(found["layers"]) == len(kinds) * blocks
    states = pd.read_parquet(folder / "states.parquet")
    assert len(states) == 5 * blocks * SMALL["gap"]["requests"] / 2
    assert json.loads((folder / "card.json").read_text())["suites"] == [
        "anchor/text_image", "anchor/text_image_twin", "anchor/captions",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_gap_is_the_same_bytes_every_time_and_needs_enough_of_every_suite(done, tmp_path):
    root = shutil.copytree(done, tmp_path / "copy")
    folder = root / "artifacts/lab-llava/gap"
    shutil.rmtree(folder)
    run(root, analyse_gap, "lab-llava")
    assert contents(folder) == contents(done / "artifacts/lab-llava/gap")
    shutil.rmtree(folder)
    suite = root / "artifacts/data/anchor/text_image_twin.parquet"
    write_suite(read_suite(suite)[:7], suite)
    with pytest.raises(BadData, match="7 requests are too few"):
        run(root, analyse_gap, "lab-llava")
    suite.unlink()
    with pytest.raises(BadData, match=r"text_image_twin\.parquet: no such suite; run"):
        run(root, analyse_gap, "lab-llava")
    assert not list(folder.parent.glob("gap*"))


@pytest.mark.slow
def test_the_displacement_is_averaged_over_requests_of_every_suite(done, tmp_path, monkeypatch):
    root = shutil.copytree(done, tmp_path / "copy")
    shown = []

    def note(model, processor, requests, defense):
        shown.extend(request.text for request in requests)
        return []

    monkeypatch.setattr("hauberk.evaluation.selection.displacement_rows", note)
    monkeypatch.setattr(estimate_shift, "_DISPLACED", 2)  # of 3 + 3
    run(root, estimate_shift, "lab-llava", "cmrm")
    folder = root / "artifacts/data/calibration"
    suites = [read_suite(folder / f"{name}.parquet") for name in ("text_image", "benign_image")]
    assert shown == [samples[0].request.text for samples in suites]


@pytest.mark.slow
def test_data_and_bundle_are_the_same_bytes_every_time(done, lab_folder, tmp_path):
    again = project(tmp_path, lab_folder)
    run(again, prepare_data)
    run(again, attack, "lab-llava")
    run(again, estimate_shift, "lab-llava", "cmrm")
    assert contents(again / "artifacts/data") == contents(done / "artifacts/data")
    bundle = "artifacts/lab-llava/cmrm/bundle"
    assert contents(again / bundle) == contents(done / bundle)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_evaluation_goes_on_and_generates_no_response_twice(
    done, lab_folder, tmp_path, processes
):
    few = {"batch_size": 1, "max_new_tokens": 4, "checked_alone": 3, "processes": processes}
    root = project(tmp_path, lab_folder, evaluate=few)
    for made in ("artifacts/data", "artifacts/lab-llava/adversarial"):
        shutil.copytree(done / made, root / made)
    process = start(root, "evaluate", "lab-llava", "none")
    kept = wait_for_lines(root, 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (root / "artifacts/lab-llava/none").exists()
    journals = sorted((root / ".scratch").rglob("*.jsonl"))
    assert len({journal.parent for journal in journals}) == 1
    older = journals[0].parent.with_name("0" * 16) / journals[0].name  # of other code, say
    older.parent.mkdir()
    older.write_text("")
    kept = [journal.read_bytes() for journal in journals]
    whole = b"".join(content[: content.rfind(b"\n") + 1] for content in kept)
    before = [json.loads(line) for line in whole.splitlines()]
    assert 3 <= len(before) < 22
    run(root, evaluate, "lab-llava", "none")
    found = lines(root / "artifacts/lab-llava/none/evaluation/responses.jsonl")
    by_id = {record["sample_id"]: record for record in found}
    # The time an answer took tells that it is the one from before the kill.
    assert [by_id[record["sample_id"]] for record in before] == before
    assert len(by_id) == len(found)
    whole = lines(done / "artifacts/lab-llava/none/evaluation/responses.jsonl")
    assert [timeless(r) for r in found] == [timeless(r) for r in whole]
    assert not any((root / ".scratch").iterdir())


@pytest.mark.slow
def test_an_evaluation_in_two_processes_gives_the_answers_of_one(done, tmp_path):
    root = shutil.copytree(done, tmp_path / "copy")
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["evaluate"]["processes"] = 2
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    folder = root / "artifacts/lab-llava/cmrm/evaluation"
    before = lines(folder / "responses.jsonl")
    measured = json.loads((folder / "metrics.json").read_text())
    run(root, evaluate, "lab-llava", "cmrm")
    found = lines(folder / "responses.jsonl")
    assert [timeless(r) for r in found] == [timeless(r) for r in before]
    for old, new in zip(measured, json.loads((folder / "metrics.json").read_text()), strict=True):
        assert old["metric"] == "seconds_per_answer" or old == new
    assert json.loads((folder / "card.json").read_text())["differing_alone"] == []
    assert not any((root / ".scratch").iterdir())


@pytest.mark.slow
def test_a_served_model_stands_beside_the_others_in_what_is_compared(done, tiny, tmp_path):
    root = shutil.copytree(done, tmp_path / "copy")
    params = yaml.safe_load((root / "params.yaml").read_text())
    lost = read_suite(root / "artifacts/data/test/text_image.parquet")[1]
    lock = threading.Lock()

    def behave(body, count):
        if last_text(body).endswith(lost.question):
            return failure(500)
        seen = [] if isinstance(body["messages"][-1]["content"], str) else pictures_in(body)
        request = Request(last_text(body), tuple(seen))
        with lock:
            (said,) = respond(tiny.model, tiny.processor, [request], max_new_tokens=4)
        return said.text

    with serving(behave) as server:
        endpoint = {"url": server.url, "model": "tiny-of-others", "retries": 0}
        guards = ["davsp@lab-llava", "guardalign@lab-llava"]
        told = {"endpoint": endpoint, "defenses": guards, "unanswered": 0.1}
        params["served"] = {"my-api": told}
        (root / "params.yaml").write_text(yaml.safe_dump(params))
        run(root, evaluate_served, "my-api")
    for name, same in (("none", "none"), ("davsp@lab-llava", "davsp")):
        here = lines(root / f"artifacts/lab-llava/{same}/evaluation/responses.jsonl")
        there = lines(root / f"artifacts/my-api/{name}/evaluation/responses.jsonl")
        own = {record["sample_id"]: record["response"] for record in here}
        served = {one["sample_id"]: one["response"] for one in there}
        assert served.pop(lost.sample_id) == ""
        assert served.items() <= own.items()
        assert len(there) == 18  # of the 22, without those that were attacked on lab-llava
    run(root, compare)
    for name in ("metrics", "channels"):
        rows = json.loads((root / f"reports/{name}.json").read_text())
        assert {r["defense"] for r in rows if r["model"] == "my-api"} >= {"none", *guards}
    differences = json.loads((root / "reports/differences.json").read_text())
    assert {r["defense"] for r in differences if r["model"] == "my-api"} == set(guards)
    page = (root / "reports/index.html").read_text()
    section = page[page.index('<section id="served"') : page.index('<section id="matrix"')]
    assert section.count(f"tiny-of-others at {server.url[7:-3]}") == 3
    matrix = page[page.index('<section id="matrix"') : page.index('<section id="model-1"')]
    assert all(guard in matrix for guard in guards)
    assert "3 requests to my-api have no answer" in page  # one under each defense
    assert "A judge failed on" not in page
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(result_table(read_channels(root)))
    shown = console.export_text()
    assert "my-api" in shown
    assert all(guard in shown for guard in guards)


def wait_for_lines(root, count, process):
    until = time.monotonic() + 200
    while time.monotonic() < until and process.poll() is None:
        journals = root.glob(".scratch/*/*/*.jsonl")
        if sum(journal.read_bytes().count(b"\n") for journal in journals) >= count:
            return
        time.sleep(0.01)
    raise AssertionError("the evaluation ended before it could be killed")


def timeless(record):
    return record | {"seconds": 0}


def small(write_to, **changes):
    """Parameters, with changes of top-level sections."""
    for name in ("lab-llava", "lab-clip"):
        folder = write_to / "lab" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("model.safetensors", "tokenizer.json", "processor_config.json"):
            (folder / file).touch()
        (folder / "config.json").write_text("{}")
    one = {name: SMALL[name] for name in ("models", "registry", "davsp", "guardalign")}
    params = yaml.safe_load((ROOT / "params.yaml").read_text()) | one | changes
    params["tga"]["models"] = SMALL["tga"]["models"]
    path = write_to / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    return load_params(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "unheard-of"}'),
        ("config.json", b'{"model_type": "bert"}'),
        ("config.json", None),
        ("model.safetensors", b"x" * 40),
        ("model.safetensors", None),
        ("tokenizer.json", b"{"),
    ],
)
def test_a_model_that_cannot_be_read_is_one_message(lab_folder, tmp_path, name, content):
    root = project(tmp_path, lab_folder)
    with contextlib.chdir(root):
        params = load_params()
        path = Path("lab/lab-llava", name)
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(BadParams, match=r"models\.lab-llava: lab/lab-llava: \S"):
            load_model(params, "lab-llava")


def test_a_journal_is_taken_up_only_where_everything_an_answer_depends_on_is_the_same(
    tmp_path, monkeypatch
):
    data = tmp_path / "artifacts/data/card.json"
    made = tmp_path / "artifacts/lab-llava/adversarial/card.json"
    for card in (data, made):
        card.parent.mkdir(parents=True)
        card.write_text("{}")
    spec = {"dtype": "float32"}
    keys = {}

    def note(name, binding="weights", bundle="none", **changes):
        with contextlib.chdir(tmp_path):
            params = small(tmp_path, **changes)
            keys[name] = evaluate.journal_key(params, "lab-llava", {"w": binding}, bundle)

    note("first")
    note("again")
    assert keys.pop("again") == keys["first"]
    note("weights", binding="other")
    note("bundle", bundle="other")
    note("dtype", models={"lab-llava": {"dtype": "bfloat16"}})
    note("quantization", models={"lab-llava": {**spec, "quantization": "8bit"}})
    note("threads", threads=2)
    note("tokens", evaluate={"batch_size": 64, "max_new_tokens": 8, "checked_alone": 32})
    for package in ("torch", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(f"{package}.__version__", "0.0.1")
            note(package)
    data.write_text('{"other": 1}')
    note("data")
    made.write_text('{"other": 1}')
    note("attacked")
    assert len(set(keys.values())) == len(keys) == 11


@given(total=st.integers(1, 500), count=st.integers(1, 60))
def test_a_part_of_the_samples_is_spread_evenly_over_all(total, count):
    found = spread(list(range(total)), count)
    assert len(found) == min(total, count)
    edges = [*found, total]
    steps = {after - before for before, after in pairwise(edges)}
    assert found[0] == 0
    assert max(steps) - min(steps) <= 1


@pytest.mark.slow
def test_the_report_shows_the_packages_that_built_and_measured_not_those_that_compare(
    done, tmp_path
):
    root = shutil.copytree(done, tmp_path / "copy")
    for name in ("none/evaluation", "cmrm/evaluation", "cmrm/bundle"):
        path = root / "artifacts/lab-llava" / name / "card.json"
        card = json.loads(path.read_text())
        assert set(card["versions"]) == {"hauberk", "torch", "transformers"}
        path.write_text(json.dumps(card | {"versions": {"torch": f"1.2.3+{name}"}}))
    run(root, compare)
    page = (root / "reports/index.html").read_text()
    for name in ("none/evaluation", "cmrm/evaluation", "cmrm/bundle"):
        assert f"torch 1.2.3+{name}" in page


@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_a_folder_whose_writer_fails_is_as_it_was_before(tmp_path, error, there_before):
    folder = tmp_path / "out"
    if there_before:
        with writing(folder, {"version": 1}) as partial:
            (partial / "data").write_text("old")
    with pytest.raises(error), writing(folder, {"version": 2}) as partial:
        (partial / "data").write_text("new")
        assert not (partial / "card.json").exists()
        raise error("on purpose")
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if there_before else [])
    if there_before:
        assert (folder / "data").read_text() == "old"
        assert json.loads((folder / "card.json").read_text())["version"] == 1


def test_a_finished_folder_replaces_the_old_one_whole_and_clears_what_a_kill_left(tmp_path):
    for name in ("out", "out.part"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "stale").write_text("x")
    with writing(tmp_path / "out", {}) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "fresh").write_text("y")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.as_posix() for path in sorted(contents(tmp_path / "out"))] == [
        "card.json",
        "deep/fresh",
    ]


@pytest.mark.parametrize(
    ("arguments", "usage"),
    [
        (("prepare_data", "extra"), "python -m tasks.prepare_data"),
        (("attack",), "python -m tasks.attack MODEL"),
        (("estimate_shift", "lab-llava"), "python -m tasks.estimate_shift MODEL DEFENSE"),
        (("analyse_gap",), "python -m tasks.analyse_gap MODEL"),
        (("build_concept_bank",), "python -m tasks.build_concept_bank CLIP"),
        (("measure_detection",), "python -m tasks.measure_detection CLIP"),
        (("calibrate_guardalign",), "python -m tasks.calibrate_guardalign MODEL"),
        (("ablate_guardalign",), "python -m tasks.ablate_guardalign MODEL"),
        (("estimate_harm_vector",), "python -m tasks.estimate_harm_vector MODEL"),
        (("locate_safety_layers",), "python -m tasks.locate_safety_layers MODEL"),
        (("train_safety_prompt",), "python -m tasks.train_safety_prompt MODEL"),
        (("ablate_safety_prompt",), "python -m tasks.ablate_safety_prompt MODEL"),
        (("transfer_safety_prompt",), "python -m tasks.transfer_safety_prompt MODEL"),
        (("evaluate_served",), "python -m tasks.evaluate_served NAME"),
        (("build_text_index",), "python -m tasks.build_text_index CLIP"),
        (("train_projector",), "python -m tasks.train_projector MODEL"),
        (("ablate_projector",), "python -m tasks.ablate_projector MODEL"),
        (("evaluate",), "python -m tasks.evaluate MODEL DEFENSE"),
        (("compare", "a", "b"), "python -m tasks.compare"),
    ],
)
def test_wrong_arguments_are_status_2_with_the_usage(tmp_path, arguments, usage):
    status, output, errors = stage(tmp_path, *arguments)
    assert (status, output) == (2, "")
    assert errors.strip() == f"usage: {usage}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((attack, "lab-llava"), "no such suite; run the stage that writes it: `dvc repro`"),
        ((estimate_shift, "lab-llava", "cmrm"), "no such suite; run the stage that writes it"),
        ((analyse_gap, "lab-llava"), r"none/evaluation/card\.json does not exist.*`dvc repro`"),
        ((evaluate, "lab-llava", "cmrm"), r"expected a card\.json"),
        ((measure_detection, "lab-clip"), r"expected a card\.json"),
        ((calibrate_guardalign, "lab-llava"), r"expected a card\.json"),
        ((ablate_guardalign, "lab-llava"), r"expected a card\.json"),
        ((compare,), "run the stage that writes it: `dvc repro`"),
    ],
)
def test_a_stage_before_its_time_says_what_to_run_and_writes_nothing(
    lab_folder, tmp_path, arguments, says
):
    root = project(tmp_path, lab_folder)
    before = sorted(root.rglob("*"))
    with pytest.raises(HauberkError, match=says):
        run(root, *arguments)
    assert sorted(root.rglob("*")) == before
