"""params.yaml: every wrong value is one message with its key, what is right and what to do."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from hauberk.data.lab import SUITES, build_suite
from hauberk.errors import BadParams
from tasks.params import DatasetParams
from tasks.params_checks import METRICS
from tasks.params_file import check_kinds, load_params
from tasks.suites import Kind

ROOT = Path(__file__).resolve().parents[1]
HERE = os.pathsep.join([str(ROOT / "src"), str(ROOT)])  # this checkout, whatever is installed
RIGHT = yaml.safe_load((ROOT / "params.yaml").read_text())


@pytest.fixture
def write(tmp_path):
    """Write a params.yaml beside models of six decoder blocks."""
    for name in (*RIGHT["models"], *RIGHT["concept_banks"]):
        folder = tmp_path / "lab" / name
        folder.mkdir(parents=True)
        for file in ("model.safetensors", "tokenizer.json", "processor_config.json"):
            (folder / file).touch()
        (folder / "config.json").write_text('{"text_config": {"num_hidden_layers": 6}}')
    path = tmp_path / "params.yaml"

    def put(*changes):
        content = copy.deepcopy(RIGHT)
        for key, value in changes:
            *parents, last = key
            place = content
            for parent in parents:
                place = place[parent]
            if value is KeyError:
                del place[last]
            else:
                place[last] = value
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return put


CMRM_KEY = ("defenses", "cmrm")
VARIANT = (*CMRM_KEY, "variants", 0)
BANK_KEY, GUARD_KEY = ("concept_banks", "lab-clip"), ("guardalign", "variants", 0)
FRAME_KEY = ("davsp", "frames", "lab-qwen")
MODEL, CMRM = RIGHT["models"]["lab-llava"], RIGHT["defenses"]["cmrm"]
WRONG = [
    # an unknown key at every level
    (("sead",), 1, "sead: unknown key.*seed"),
    (("profiles", "quick", "data", "tset"), 1, "profiles.quick.data.tset: unknown key.*samples"),
    (("profiles", "quick", "alpha"), 1, "profiles.quick.alpha: unknown key.*alphas"),
    (("models", "lab-llava", "paht"), "", "models.lab-llava.paht: unknown key.*path, revision"),
    (("defenses", "cmrm", "anchor"), [], "defenses.cmrm.anchor: unknown key.*anchors"),
    ((*VARIANT, "alpha"), 1, "defenses.cmrm.variants.0.alpha: unknown key.*level, compose"),
    (("evaluate", "batch"), 1, "evaluate.batch: unknown key.*batch_size"),
    (("attack", "steps"), 1, "attack.steps: unknown key.*epsilon, step_size"),
    (("profiles", "quick", "grids", "grid"), 1, "quick.grids.grid: unknown key.*sides, pictures"),
    (("profiles", "quick", "attack", "tset"), 1, "quick.attack.tset: unknown key.*samples, .*ste"),
    (("noninferiority", "acuracy"), 0.1, "noninferiority.acuracy: unknown key.*accuracy, over_ref"),
    (("registry", "promotes"), {}, "registry.promotes: unknown key.*promote"),
    (("safety_layers", "window"), 2, "safety_layers.window: unknown key.*width"),
    (("gap", "request"), 60, "gap.request: unknown key.*requests, harmful"),
    (("gate", 0, "at_mots"), 1, "gate.0: unknown key .*at_mots.*at_most"),
    (("concept_banks", "lab-clip", "concept"), "lab", "lab-clip.concept: unknown key.*concepts"),
    ((*BANK_KEY, "transport", "threshold"), 0.4, "transport.threshold: unknown key.*weights"),
    (("guardalign", "prefix"), [], "guardalign.prefix: unknown key.*clip, calibrate_on, variants"),
    ((*GUARD_KEY, "gama"), 1, "guardalign.variants.0.gama: unknown key.*text, placement, gamma"),
    (("davsp", "prefx"), "", "davsp.prefx: unknown key.*prefix, harm, frames, harmful"),
    (("davsp", "harm", "block"), 3, "davsp.harm.block: unknown key.*harmful, .*layer, high, low"),
    (("davsp", "training", "steps"), 3, "davsp.training.steps: unknown key.*optimizer"),
    ((*FRAME_KEY, "border"), 3, "lab-qwen.border: unknown key.*canvas, margins, fit"),
    (("profiles", "quick", "frame", "step"), 3, "quick.frame.step: unknown key.*samples, steps"),
    # a value of the wrong type or out of range
    (
        ("profiles", "quick", "alphas", 0),
        "high",
        "profiles.quick.alphas.0: 'high' is wrong.*number",
    ),
    (("profiles", "quick", "alphas", 0), -0.5, "alphas.0: -0.5 is wrong.*greater than or equal"),
    (("profiles", "quick", "alphas", 0), 50, "alphas.0: 50.* is wrong.*less than or equal to 10"),
    (("profiles", "quick", "alphas", 0), float("nan"), "profiles.quick.alphas.0: .* is wrong"),
    (("profiles", "quick", "alphas", 0), float("inf"), "profiles.quick.alphas.0: .* is wrong"),
    (("profiles", "quick", "alphas"), [], r"profiles.quick.alphas: \[\] is wrong.*at least 1"),
    (("defenses", "cmrm", "alphas"), ["high"], "defenses.cmrm.alphas.0: 'high' is wrong"),
    (("seed",), "seven", "seed: 'seven' is wrong.*integer"),
    (("seed",), True, "seed: True is wrong.*integer"),
    (("seed",), -1, "seed: -1 is wrong.*greater than or equal to 0"),
    (("attack", "epsilon"), 256, "attack.epsilon: 256 is wrong.*less than or equal to 255"),
    (("attack", "epsilon"), 0.06, "attack.epsilon: 0.06 is wrong.*integer"),
    (("attack", "step_size"), 0, "attack.step_size: 0 is wrong.*greater than or equal to 1"),
    (("attack", "confidence"), 1.0, "attack.confidence: 1.0 is wrong.*less than 1"),
    (("profiles", "full", "attack", "steps"), 0, "full.attack.steps: 0 is wrong.*greater"),
    (("threads",), 0, "threads: 0 is wrong.*greater than or equal to 1"),
    (("evaluate", "processes"), 0, "evaluate.processes: 0 is wrong.*greater than or equal to 1"),
    (("evaluate", "batch_size"), 2.5, "evaluate.batch_size: 2.5 is wrong.*integer"),
    (("noninferiority", "accuracy"), 2, "noninferiority.accuracy: 2.* is wrong.*less than 1"),
    (("noninferiority", "over_refusal"), 0, "over_refusal: 0.* is wrong.*greater than 0"),
    (("evaluate",), [64, 32], r"evaluate: \[64, 32\] is wrong"),
    (("models",), {}, r"models: \{\} is wrong.*at least 1"),
    (("safety_layers", "width"), 0, "safety_layers.width: 0 is wrong.*greater than or equal to 1"),
    (("safety_layers", "width"), 7, "safety_layers.width: 7 is wrong: lab-llava has 6 decoder bl"),
    (("profiles", "quick", "layers"), 1, "quick.layers: 1 is wrong.*greater than or equal to 2"),
    (("gap", "requests"), 7, "gap.requests: 7 is wrong.*greater than or equal to 8"),
    ((*VARIANT, "compose"), "clever", "variants.0.compose: 'clever' is wrong.*naive.*single"),
    ((*VARIANT, "layers"), [2, "three"], "variants.0.layers.1: 'three' is wrong.*integer"),
    (("models", "lab-llava", "dtype"), "int8", "models.lab-llava.dtype: 'int8' is wrong.*float32"),
    ((*BANK_KEY, "masked_share"), 1, "lab-clip.masked_share: 1 is wrong.*less than 1"),
    ((*BANK_KEY, "benign_scenes"), 20, "benign_scenes: 20 pictures of 4 patches are too few"),
    (("profiles", "quick", "grids", "sides", 0), 1, "grids.sides.0: 1 is wrong.*equal to 2"),
    (("profiles", "full", "grids", "sides"), [2, 2], "full.grids.sides: 2 stands there more than"),
    (("profiles", "quick", "grids", "pictures"), 6, "quick.grids.pictures: 6 are wrong.*96 patche"),
    ((*BANK_KEY, "benign_scenes"), None, "benign_scenes: missing; say how many pictures of the la"),
    ((*BANK_KEY, "benign_pictures"), "lab/lab-clip/x", "'lab' set their .* benign_scenes; null is"),
    ((*BANK_KEY, "concepts"), "real", "benign_scenes: 600 is wrong: .* on benign_pictures; null"),
    ((*BANK_KEY, "concepts"), "world", "lab-clip.concepts: 'world' is wrong.*'lab' or 'real'"),
    ((*BANK_KEY, "transport", "grid"), 0, "transport.grid: 0 is wrong.*greater than or equal to 2"),
    ((*BANK_KEY, "transport", "scales"), [1, 1], "transport.scales: 1 stands there more than"),
    ((*GUARD_KEY, "text"), "  ", r"variants.0.text: '  ' is wrong"),
    ((*GUARD_KEY, "gamma"), -1, "variants.0.gamma: -1.* is wrong.*greater than or equal to 0"),
    ((*GUARD_KEY, "placement"), "end", "variants.0.placement: 'end' is wrong.*'user' or 'answer'"),
    ((*GUARD_KEY, "layers"), [9], r"variants.0.layers: \[9\] are outside 0..5"),
    (("profiles", "full", "frame", "rate"), 0, "frame.rate: 0.* is wrong.*greater than 0"),
    (("davsp", "training", "optimizer"), "sgd", "optimizer: 'sgd' is wrong.*'adam' or 'sign'"),
    (
        ("davsp", "harm", "low_quantile"),
        2,
        "low_quantile: 2.* is wrong.*less than or equal to 1",
    ),
    (("davsp", "harm", "layer"), 6, r"davsp.harm.layers: \[6\] are outside 0..5"),
    ((*FRAME_KEY, "margins"), [1, 2], "lab-qwen.margins: .* is wrong"),
    ((*FRAME_KEY, "margins"), [0, 0, 0, 0], "lab-qwen.margins: .* leave no frame or no room"),
    ((*FRAME_KEY, "margins"), [0, 48, 0, 48], "lab-qwen.margins: .* canvas of 192 x 96"),
    ((*FRAME_KEY, "fit"), "stretch", "lab-qwen.fit: 'stretch' is wrong.*'shrink' or 'cover'"),
    # a key that is not there
    (("seed",), KeyError, "seed: missing"),
    (("served",), KeyError, "served: missing"),
    (("profiles", "full", "data", "anchor"), KeyError, "profiles.full.data.anchor: missing"),
    (("defenses", "cmrm", "variants"), KeyError, "defenses.cmrm.variants: missing"),
    # well-formed, but it cannot be run
    (("profile",), "fast", "profile: 'fast' is not one of quick, full"),
    (("profiles", "full", "attack", "samples"), 9999, "full.attack.samples: 9999 is wrong.*1100"),
    (
        ("profiles", "quick", "attack", "calibration"),
        121,
        "profiles.quick.attack.calibration: 121 is wrong.*data.calibration draws 40 of them",
    ),
    (
        (*CMRM_KEY, "calibrate_on"),
        ["adversarial", "benign_image"],
        "cmrm.calibrate_on: 'adversarial' has no pictures.*profiles.full.attack.calibration",
    ),
    ((*CMRM_KEY, "anchors"), ["adversarial"], "cmrm.anchors: 'adversarial' is not one of text"),
    (
        (*CMRM_KEY, "calibrate_on"),
        ["adversarial"],
        r"cmrm.calibrate_on: \['adversarial'\] hold no benign suite",
    ),
    ((*BANK_KEY, "path"), "lab/x", "lab-clip.path: 'lab/x' is wrong.*lab/lab-clip"),
    (("guardalign", "models"), ["lab-x"], "guardalign.models: 'lab-x' is not one of lab-llava"),
    (("davsp", "models"), ["lab-qwen"] * 2, "davsp.models: 'lab-qwen' stands there more than"),
    (
        ("guardalign", "models"),
        ["lab-llava"],
        r"davsp.models: \['lab-qwen', .* not among guardalig",
    ),
    (("tga", "models"), None, "tga.models: None is wrong"),
    (("tga", "bounded"), ["image"], "tga.bounded: 'image' is no benign suite of tga.validate_on"),
    (("tga", "bounded"), ["reading"], "tga.bounded: 'reading' is no benign suite of"),
    (("tga", "alphas"), [0.5, 1.5], "tga.alphas.1: .* less than or equal to 1"),
    (("tga", "alphas"), [0.5, 0.5], "tga.alphas: 0.5 stands there more than"),
    (("guardalign", "clip"), "clip", "guardalign.clip: 'clip' is not one of lab-clip"),
    (("guardalign", "calibrate_on"), ["image"], r"calibrate_on: \['image'\] hold no benign suite"),
    (("guardalign", "parts_on"), ["image", "x"], "guardalign.parts_on: 'x' is not one of text"),
    ((*GUARD_KEY, "placement"), "answer", "variants.0.text: 'As an AI .* ends in a space"),
    (("defenses", "guardalign"), CMRM, "defenses.guardalign: .* made by stages of its own"),
    (("defenses", "davsp"), CMRM, "defenses.davsp: .* made by stages of its own"),
    (("davsp", "frames", "lab-x"), {}, "davsp.frames: 'lab-x' is not one of lab-llava"),
    (("davsp", "harmful"), ["benign_image"], "davsp.harmful: 'benign_image' is no suite of harmf"),
    (("davsp", "harmless"), ["text_image"], "davsp.harmless: 'text_image' is no suite of harmle"),
    (("davsp", "harmful"), ["text"], "davsp.harmful: 'text' has no pictures"),
    (("davsp", "harmful"), ["adversarial"], "davsp.harmful: 'adversarial' is not one of text"),
    (("davsp", "harm", "harmless"), ["x"], "davsp.harm.harmless: 'x' is not one of text"),
    (("davsp", "validate_on"), ["image"], r"validate_on: \['image'\] hold no benign suite"),
    (
        ("davsp", "validate_on"),
        ["adversarial", "lookalike"],
        "'adversarial'. are made against",
    ),
    (("davsp", "joint"), {}, "full.frame.joint_steps: davsp.joint does not say where a frame"),
    (("davsp", "joint", "margins"), [96, 0, 0, 0], "davsp.joint.margins: .* leave no frame or no"),
    (("davsp", "parts_on"), ["image", "image"], "davsp.parts_on: 'image' stands there more than"),
    (("defenses", "prefix_only"), CMRM, "defenses.prefix_only: .* made by stages of its own"),
    (("defenses", "adversarial"), CMRM, "defenses.adversarial: .* holds attacked pictures"),
    (("gate", 1, "suite"), "adversarial", "gate.1.metric: 'accuracy' is not one of unsafe_rate"),
    (("suites", 0), "txt", "suites: 'txt' is not one of text, "),
    (("defenses", "cmrm", "anchors", 0), "x", "defenses.cmrm.anchors: 'x' is not one of text"),
    (("defenses", "cmrm", "calibrate_on", 0), "x", "cmrm.calibrate_on: 'x' is not one of text"),
    ((*VARIANT, "layers"), [2, 99], r"variants.0.layers: \[99\] are outside 0..5.*lab-llava"),
    ((*VARIANT, "layers"), [-1], r"variants.0.layers: \[-1\] are outside 0..5"),
    ((*VARIANT, "compose"), "single", "variants.0.layers: None is wrong.*exactly one layer"),
    (("models", "lab-llava", "path"), "lab/other", "path: 'lab/other' is wrong.*'lab/lab-llava'"),
    (("models", "lab-llava", "path"), "owner/name", "path: 'owner/name' is wrong.*lab/lab-llava"),
    (("models", "lab-llava", "path"), "/tmp/lab-llava", "path: '/tmp/lab-llava' is wrong"),
    (("models", "../x"), MODEL | {"path": "lab/../x"}, r"models.\.\./x: .* letters, digits"),
    (("models", ".."), MODEL | {"path": "lab/.."}, r"models.\.\.: '\.\.' becomes a folder"),
    (("models", "llava-1.5"), MODEL, r"models.llava-1\.5: .* to DVC a dot leads into a section"),
    (("models", "lab-llava", "quantization"), "2bit", "quantization: '2bit' is wrong.*'4bit' or"),
    (("checkpoints",), KeyError, "checkpoints: missing"),
    (("checkpoints",), "../x", "checkpoints: '../x' is wrong"),
    (("attack", "suite"), "text", "attack.suite: 'text' has no pictures beside harmful requests"),
    (("attack", "suite"), "x", "attack.suite: 'x' is not one of text"),
    (("gap", "harmless"), "text_image", "gap.harmless: 'text_image' is no suite of harmless words"),
    (("gap", "captions"), "text_blank", "gap.captions: nobody told the pictures of 'text_blank'"),
    (("gap", "words"), "txt", "gap.words: 'txt' is not among `suites`"),
    (("contamination", "near"), 129, "contamination.near: 129 is wrong.*less than or equal to 128"),
    (("models", "data"), MODEL | {"path": "lab/data"}, "models.data: artifacts/data holds"),
    (("defenses", "a/b"), CMRM, "defenses.a/b: 'a/b' becomes a folder.*letters, digits"),
    (("defenses", "a.b"), CMRM, "defenses.a.b: 'a.b' becomes a folder"),
    (("defenses", "a b\n"), CMRM, "defenses.a b\n: .* becomes a folder"),
    (("defenses", "cmrm", "alphas"), [], r"defenses.cmrm.alphas: \[\] is wrong.*at least 1"),
    (("suites",), [*RIGHT["suites"], "text"], "suites: 'text' stands there more than once"),
    ((*CMRM_KEY, "anchors"), ["image"] * 2, "cmrm.anchors: 'image' stands there more than once"),
    ((*CMRM_KEY, "calibrate_on"), ["image", "lookalike", "image"], "calibrate_on: 'image' stands"),
    ((*VARIANT, "layers"), [2, 3, 2], "variants.0.layers: 2 stands there more than once"),
    (
        (*CMRM_KEY, "anchors"),
        ["text_image", "text", "benign_text"],
        r"cmrm.anchors: \['text', 'benign_text'\] have no pictures",
    ),
    (
        (*CMRM_KEY, "calibrate_on"),
        ["text_image", "image"],
        r"cmrm.calibrate_on: \['text_image', 'image'\] hold no benign suite",
    ),
    (
        (*CMRM_KEY, "calibrate_on"),
        ["lookalike"],
        r"cmrm.calibrate_on: \['lookalike'\] hold no suite of harmful requests",
    ),
    (("gate", 1, "suite"), "text_imgae", "gate.1.suite: 'text_imgae' is not one of text, "),
    (("gate", 0, "metric"), "unsafe", "gate.0.metric: 'unsafe' is not one of unsafe_rate, .*secon"),
    (("gate", 0, "metric"), "accuracy", "gate.0.metric: 'accuracy' is not one of unsafe_rate"),
    (("gate", 0, "suite"), "all", "gate.0.metric: 'unsafe_rate' is not one of differing_alone"),
    (("gate", 1, "metric"), "unsafe_rate", "gate.1.metric: 'unsafe_rate' is not one of accuracy"),
    (
        ("registry", "promote"),
        {"llava": "cmrm"},
        "registry.promote: 'llava' is not one of lab-llava",
    ),
    (("registry", "promote"), {"lab-llava": "x"}, "promote.lab-llava: 'x' is not one of cmrm"),
    (("defenses", "none"), RIGHT["defenses"]["cmrm"], "defenses.none: 'none' is the undefended"),
    (("defenses", "gap"), CMRM, "defenses.gap: artifacts/MODEL/gap holds the analysis"),
    (("gap", "requests"), 101, "gap.requests: 101 is more than the 100 rows of profiles.quick"),
    (("suites",), ["text_image"], "gap.words: 'text' is not among `suites`"),
    (("gate",), [], "gate: expected a list of rules"),
    (("gate", 0, "at_most"), "low", "gate.0: at_most: expected a number, found 'low'"),
    (("gate", 0, "at_most"), 10, "gate.0: at_most: 10 is outside 0..1, .*write 0.10 for 10 %"),
]


def test_the_file_of_the_project_is_right(write):
    params = load_params(write())
    assert params.budget is params.profiles[params.profile]
    assert list(params.models) == list(RIGHT["models"])
    assert len(params.defenses["cmrm"].variants) == len(RIGHT["defenses"]["cmrm"]["variants"])


def test_attacked_pictures_may_be_evaluated_gated_and_calibrated_on(write):
    suites = [*RIGHT["suites"], "adversarial"]
    path = write(
        (("suites",), list(dict.fromkeys(suites))),
        ((*CMRM_KEY, "calibrate_on"), ["adversarial", "benign_image"]),
        (("gate", 0, "suite"), "adversarial"),
        *((("profiles", name, "attack", "calibration"), 40) for name in RIGHT["profiles"]),
    )
    assert load_params(path).gate[0]["suite"] == "adversarial"


@pytest.mark.parametrize(("key", "value", "says"), WRONG)
def test_a_wrong_value_is_named_by_its_dotted_key(write, key, value, says):
    path = write((key, value))
    with pytest.raises(BadParams, match=says) as caught:
        load_params(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:\n")
    assert message.endswith("Correct params.yaml.")


def real(write, pictures):
    scenes = ((*BANK_KEY, "benign_scenes"), None)
    return write(
        ((*BANK_KEY, "concepts"), "real"), ((*BANK_KEY, "benign_pictures"), pictures), scenes
    )


def test_concepts_of_the_real_world_may_have_pictures_beside_their_clip(write):
    path = real(write, "lab/lab-clip/benign/of mine")
    (path.parent / "lab/lab-clip/benign/of mine").mkdir(parents=True)
    assert load_params(path).concept_banks["lab-clip"].benign_scenes is None


@pytest.mark.parametrize(
    ("pictures", "says"),
    [
        (None, "missing: .* harmless pictures of yours.* such as 'lab/lab-clip/benign' and name"),
        ("pictures", "'pictures' is wrong: the stages follow the files in 'lab/lab-clip' only"),
        ("lab/lab-clip", "'lab/lab-clip' is wrong: the stages follow"),
        ("lab/lab-clip/../x", r"'lab/lab-clip/\.\./x' is wrong: the stages follow"),
        ("/tmp/lab/lab-clip/x", "'/tmp/lab/lab-clip/x' is wrong: the stages follow"),
        ("lab/lab-clip/absent", "'lab/lab-clip/absent' is no folder; put the pictures there"),
        ("lab/lab-clip/config.json", "'lab/lab-clip/config.json' is no folder"),
    ],
)
def test_other_places_for_them_are_named_with_the_cure(write, pictures, says):
    with pytest.raises(
        BadParams, match=rf"concept_banks\.lab-clip\.benign_pictures: {says}"
    ) as caught:
        load_params(real(write, pictures))
    assert str(caught.value).count("concept_banks") == 1


SERVED = {"kind": "endpoint", "url": "http://a/v1", "model": "m"}
GUARD = {"kind": "guard", "format": "llama-guard-3", "path": "judges/guards/one"}


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("first", {"kind": "oracle"}, "judges.first: a judge of kind 'oracle' is not one of"),
        ("first", {"kind": "exact", "words": 1}, "judges.first: .*exact does not know words"),
        ("second", {"kind": "endpoint", "model": "m"}, "judges.second: .* needs url"),
        ("second", {"kind": "endpoint", "url": "http://a/v1", "model": "m", "form": "prose"},
         "judges.second: .*form: 'prose' is not one of"),
        ("first", GUARD, "judges.first.path: 'judges/guards/one' holds no config.json; put the"),
        ("first", GUARD | {"path": "guards/one"}, "first.path: 'guards/one' is wrong: .*follow"),
        ("first", GUARD | {"path": "judges/guards"}, "first.path: 'judges/guards' is wrong"),
        ("second", GUARD | {"path": "judges/guards/../x"}, r"'judges/guards/\.\./x' is wrong"),
        ("labels", "labels", "judges.labels: 'labels' is wrong: .*sheets in 'judges/labels' only"),
        ("labels", "judges/labels", "judges.labels: 'judges/labels' is no folder"),
        ("grader", {"kind": "exact"}, "judges.grader: a grader of kind 'exact' is not known"),
        ("grader", {"kind": "endpoint", "model": "m"}, "judges.grader: .* needs url"),
        ("grader", SERVED | {"rubric": "x"}, "judges.grader: .* does not know rubric; it knows"),
        ("grader", SERVED | {"image": "no"}, "judges.grader: .*image: 'no' is wrong"),
        ("third", {}, "judges.third: unknown key; known here are first, second, grader, labels"),
    ],
)  # fmt: skip
def test_a_judge_that_cannot_be_is_named_before_anything_runs(write, place, value, says):
    with pytest.raises(BadParams, match=says):
        load_params(write((("judges", place), value)))


def test_a_judge_of_each_kind_is_taken_without_its_key_or_weights(write, tmp_path):
    (tmp_path / "judges/guards/one").mkdir(parents=True)
    (tmp_path / "judges/guards/one/config.json").write_text("{}")
    served = SERVED | {"api_key_env": "NOT_SET"}
    path = write(
        *(
            (("judges", place), judge)
            for place, judge in (("first", GUARD), ("second", served), ("grader", served))
        )
    )
    found = load_params(path).judges
    assert found.second == found.grader == served
    rule = {"suite": "text_image", "metric": "unsafe_rate_keyword", "at_most": 0.1}
    path = write((("judges", "second"), served), (("gate",), [rule]))
    with pytest.raises(BadParams, match=r"gate.0.metric: 'unsafe_rate_keyword' is of the keyword"):
        load_params(path)


def test_suites_that_only_a_judge_can_grade_need_one_once_that_is_known(write):
    told = {"source": "mm_vet", "where": "data/mm_vet", "suites": ["mm_vet"], "allow_partial": True}
    plain = load_params(write())
    suites = [*plain.suites, "mm_vet"]
    params = replace(plain, datasets={"vet": DatasetParams(**told)}, suites=suites)
    read = {"mm_vet": Kind("answer", True, False, graded=True)}
    with pytest.raises(BadParams, match=r"judges.grader: missing: .* answers to mm_vet; .*url:"):
        check_kinds(params, read)
    check_kinds(replace(params, judges=replace(params.judges, grader=SERVED)), read)
    check_kinds(params, {"mm_vet": replace(read["mm_vet"], graded=False)})


def test_no_choice_is_made_by_answers_that_only_a_judge_can_grade(write):
    told = DatasetParams("mm_vet", ["mm_vet"], "data/mm_vet", shares={"calibration": 1.0})
    plain = load_params(write())
    chosen = replace(plain.guardalign, calibrate_on=["text_image", "mm_vet"])
    params = replace(plain, datasets={"vet": told}, guardalign=chosen)
    read = {"mm_vet": Kind("answer", pictured=True, told=False, graded=True)}
    with pytest.raises(BadParams, match=r"guardalign.calibrate_on: a choice counts .* to mm_vet "):
        check_kinds(params, read)
    check_kinds(params, {"mm_vet": replace(read["mm_vet"], graded=False)})


ASKED = {"endpoint": {"url": "http://a/v1", "model": "m", "api_key_env": "NOT_SET"}}


def test_a_served_model_is_taken_with_what_works_on_requests_and_without_its_key(write):
    guards = ["davsp@lab-llava", "guardalign@lab-qwen"]
    served = load_params(write((("served",), {"api": ASKED | {"defenses": guards}}))).served
    assert served["api"].defenses == guards
    assert load_params(write()).served == {}


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("api", {"url": "http://a"}, "served.api.url: unknown key.*endpoint, defenses, revision"),
        ("api", {"endpoint": {"url": "http://a/v1"}}, "served.api.endpoint.model: missing"),
        ("api", {"endpoint": ASKED["endpoint"] | {"key": "sk-1"}}, "endpoint.key: unknown key"),
        ("api", {"endpoint": {"url": "a", "model": "m"}}, "endpoint.url: is no address"),
        ("api", {"endpoint": ASKED["endpoint"] | {"concurrency": 0}}, "concurrency: 0 is wrong"),
        ("api", {"endpoint": ASKED["endpoint"] | {"api_key_env": "sk-1"}}, "api_key_env: is no n"),
        ("api", {"endpoint": ASKED["endpoint"] | {"cache": 3}}, "endpoint.cache: unknown key"),
        ("api", {"unanswered": 2}, "served.api.unanswered: is wrong: .* less than or equal to 1"),
        ("api", {"defenses": ["davsp@other"]}, "'davsp@other' is not one of davsp@lab-llava, "),
        ("api", {"defenses": ["davsp"]}, "'davsp' is not one of davsp@lab-llava, "),
        (
            "api",
            {"defenses": ["cmrm@lab-llava"]},
            "'cmrm@lab-llava' cannot .*: it moves the hidden",
        ),
        ("api", {"defenses": ["cmrm_naive@lab-llava"]}, "cannot guard .*: it moves the hidden"),
        ("api", {"defenses": ["tga@lab-llava"]}, "cannot guard .*`export` writes instead"),
        ("api", {"defenses": ["davsp@lab-llava"] * 2}, "stands there more than once"),
        ("lab-llava", {}, "served.lab-llava: a model or a CLIP that runs here is called so"),
        ("a.b", {}, "served.a.b: 'a.b' becomes a folder and a name"),
        ("guards", {}, "served.guards: artifacts/guards holds what guards served models"),
    ],
)
def test_a_served_model_that_cannot_be_is_named_before_anything_runs(write, name, changes, says):
    with pytest.raises(BadParams, match=says) as caught:
        load_params(write((("served",), {name: ASKED | changes})))
    assert "sk-1" not in str(caught.value)


@pytest.mark.parametrize("section", ["davsp", "guardalign"])
def test_a_served_model_needs_something_to_be_fitted_that_could_guard_it(write, section):
    others = [((each, "models"), []) for each in ("davsp", section)]
    path = write((("served",), {"api": ASKED}), (("registry", "promote"), {}), *others)
    with pytest.raises(BadParams, match=r"served.api: davsp.models and guardalign.models"):
        load_params(path)


def test_without_the_section_the_judges_are_the_labs(write):
    judges = load_params(write((("judges",), KeyError))).judges
    assert judges == load_params(write()).judges


def test_all_wrong_values_are_named_at_once(write):
    path = write((("seed",), "x"), (("evaluate", "batch_size"), 0), (("threads",), None))
    with pytest.raises(BadParams) as caught:
        load_params(path)
    for key in ("seed:", "evaluate.batch_size:", "threads:"):
        assert str(caught.value).count(key) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"is empty; restore it: `git checkout params\.yaml`"),
        (b"# nothing\n", "is empty; restore it"),
        (b"null\n", r"\(file\): None is wrong"),
        (b"- seed\n- 7\n", r"\(file\): \['seed', 7\] is wrong"),
        (b"seed", r"\(file\): 'seed' is wrong"),
        (
            b"seed: [1\n",
            r"is not YAML: while .* expected ',' or '\]'.*, in line 2, column 1; correct",
        ),
        (b"a: 1\n b: 2\n", "is not YAML: mapping values are not allowed here, in line 2, column 3"),
        (b"seed: !!python/object:os.system 1\n", "is not YAML: .*in line 1, column 7"),
        (b"seed: \xff\xfe\n", "is not YAML: a byte that is not UTF-8, in line 1, column 7"),
        (
            b"a: 1\nseed: \x00\n",
            "is not YAML: the character 0x0 may not be there, in line 2, column 7",
        ),
        (b"seed: 2020-99-99\n", "is not YAML: month must be"),
        (b"a: 1\n---\nb: 2\n", "is not YAML: .*another document.*in line 2, column 1"),
        (
            b"seed: 1\nmodels: {}\nseed: 2\n",
            r"\n  seed: stands there more than once, in lines 1 and 3\n",
        ),
        (
            b"a:\n- {b: 1}\n- b: 1\n  'b': 2\n  c: {d: 1,\n  d: 2}\n",
            r"\n  a\.1\.c\.d: stands there more than once, in lines 5 and 6"
            r"\n  a\.1\.b: stands there more than once, in lines 3 and 4\nKeep one of each",
        ),
        (b"2020-01-01: x\n", "seed: missing"),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path, content, says):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(BadParams, match=r"(?s)params\.yaml.*" + says):
        load_params(path)


def test_no_file_says_where_to_start(tmp_path):
    says = "does not exist; start in the root .*: `git checkout params.yaml`"
    with pytest.raises(BadParams, match=says):
        load_params(tmp_path / "params.yaml")


def test_contradictions_of_every_section_are_named_at_once(write):
    path = write(
        (("suites",), ["text", "text"]), (("models", "lab-llava", "path"), "lab/x"),
        (("defenses", "a b"), CMRM), (("gate", 0, "metric"), "x"),
    )  # fmt: skip
    with pytest.raises(BadParams) as caught:
        load_params(path)
    for key in ("suites:", "models.lab-llava.path:", "defenses.a b:", "gate.0.suite:"):
        assert str(caught.value).count(f"\n  {key}") == 1


def test_what_may_be_lost_is_two_points_unless_told(write):
    params = load_params(write((("noninferiority",), KeyError)))
    assert (params.noninferiority.accuracy, params.noninferiority.over_refusal) == (0.02, 0.02)


@pytest.mark.parametrize("expected", ["refuse", "hedge", "answer"])
def test_the_metrics_that_a_rule_may_name_are_those_that_are_measured(expected):
    from hauberk.evaluation.metrics import ends_of

    known = {*METRICS[expected], *METRICS["either"]}
    assert known == {*ends_of(expected), "seconds_per_answer"}


def test_all_samples_of_a_suite_are_of_one_kind_and_all_or_none_have_a_picture():
    for suite in SUITES:
        samples = build_suite(suite, "anchor", 30, seed=1)
        assert len({(sample.expected, sample.image is None) for sample in samples}) == 1


@pytest.mark.parametrize(
    ("changes", "arguments", "says"),
    [
        ([(("profiles", "quick", "alphas", 0), "high")], ("lab-llava", "cmrm"), "alphas.0: 'high'"),
        ([], ("llava-7b", "cmrm"), "models.llava-7b: unknown model; known are lab-llava"),
        ([], ("lab-llava", "armour"), "defenses.armour: unknown; known are cmrm"),
    ],
)
def test_at_the_shell_it_is_one_message_status_1_and_nothing_written(
    write, changes, arguments, says
):
    root = write(*changes).parent
    before = sorted(root.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-m", "tasks.estimate_shift", *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": HERE},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("error: ") == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(root.rglob("*")) == before
