"""A run on other models and data than the lab's: what it needs, what it refuses, and all of it."""

import contextlib
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.errors import FlowError
from flows.parameters import adopt, check_followed
from hauberk.data.samples import read_suite
from hauberk.data.sources import SOURCES
from hauberk.defenses.shift import ShiftSetting
from hauberk.errors import BadData, BadParams, UnsupportedRequest
from hauberk.evaluation.run import read_records
from hauberk.evaluation.selection import Attacked, Rates, Served, sweep
from tasks import (
    attack,
    estimate_harm_vector,
    estimate_shift,
    evaluate,
    measure_detection,
    prepare_data,
    train_safety_prompt,
)
from tasks.locate_safety_layers import _apart
from tasks.params_file import load_params
from tasks.stage import load_model
from tasks.suites import wanted
from tests.data.layouts import _parquet as write_parquet
from tests.data.layouts import embedded, picture
from tests.families import parts_of
from tests.flows.conftest import environment

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
LLAVA = ROOT / "examples" / "llava-1.5-7b.yaml"
ROWS = 60
"""Of every data set: enough for all splits of the example's shares."""
SMALL = {
    "data": {"samples": 6, "calibration": 4, "anchor": 8},
    "attack": {"samples": 2, "steps": 1},
    "alphas": [1.0],
    "detection": 6,
    "grids": {"sides": [2], "pictures": 8},
    "parts": 2,
    "frame": {
        "samples": 3, "steps": 2, "batch": 2, "rate": 0.03,
        "validated": 2, "attacked": 1, "joint_steps": 0,
    },
    "projector": {"samples": 3, "steps": 2, "validated": 2, "variants": ["tga_control"]},
    "explained": None,
    "layers": 3,
}  # fmt: skip


def write_data(data):
    """Write every data set of the example in small, as it is handed out."""
    coco = [f"{place:012d}.jpg" for place in range(ROWS)]
    for home, form in ((data / "coco/train2017", "JPEG"), (data / "captioned/images", "JPEG")):
        home.mkdir(parents=True)
        for place, name in enumerate(coco):
            shift = 1000 if home.name == "images" else 0
            (home / name).write_bytes(picture(shift + place, form))
    write_lines(
        data / "vlsafe/VLSafe/harmlessness_examine.jsonl",
        [{"image_id": name, "query": f"harmful request {n}"} for n, name in enumerate(coco)],
    )
    write_lines(
        data / "captioned/table.jsonl",
        [
            {
                "id": str(n), "suite": "captioned", "expected": "answer", "image": name,
                "question": f"What is shown in {n}?", "caption": f"thing {n}", "reference": "a cup",
            }
            for n, name in enumerate(coco)
        ],
    )  # fmt: skip
    for shift, variant in enumerate(("SD", "SD_TYPO", "TYPO"), 2):
        write_rows(
            data / f"mm_safetybench/data/Fraud/{variant}-00000-of-00001.parquet",
            [
                {"id": str(n), "question": "of the phrase", "image": embedded(shift * 1000 + n)}
                for n in range(ROWS)
            ],
        )
    path = data / "xstest/xstest_prompts.csv"
    path.parent.mkdir()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "type", "label"])
        for n in range(ROWS):
            writer.writerow([n, f"how to use thing {n}", "homonyms", "safe"])
            writer.writerow([ROWS + n, f"how to harm thing {n}", "contrast_homonyms", "unsafe"])
    write_rows(
        data / "mossbench/data/train-00000-of-00001.parquet",
        [
            {
                "pid": str(n), "question": f"harmless request {n}", "image": embedded(6000 + n),
                "over": "1", "short description": "a thing",
            }
            for n in range(ROWS)
        ],
    )  # fmt: skip
    write_rows(
        data / "mme/data/test-00000-of-00001.parquet",
        [
            {
                "question_id": str(n // 2), "question": f"Is it {n}?", "category": "count",
                "answer": ("Yes", "No")[n % 2], "image": embedded(7000 + n // 2),
            }
            for n in range(ROWS)
        ],
    )  # fmt: skip
    write_rows(
        data / "scienceqa/ScienceQA-IMG/train-00000-of-00001.parquet",
        [
            {
                "question": f"Which is {n}?", "choices": ["this", "that"], "answer": n % 2,
                "hint": "", "subject": "physics", "image": embedded(8000 + n),
            }
            for n in range(ROWS)
        ],
    )  # fmt: skip


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(path, rows)


def small(content):
    """The example with small budgets, on the CPU, for data sets that are there in part."""
    content["profiles"] = {"quick": SMALL}
    content["models"] = {"llava-7b": {"dtype": "float32"}}
    content["evaluate"] = {"batch_size": 4, "max_new_tokens": 4, "checked_alone": 2}
    content["gap"]["requests"] = 8
    content["concept_banks"]["clip-vit-l14"]["masked_share"] = 0.1
    content["davsp"]["refusal"] = "I can not help with that."
    for told in content["datasets"].values():
        told["allow_partial"] = True
    return content


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_clip):
    """A root with the example's params.yaml, a LLaVA of random weights, and every data set."""
    root = tmp_path_factory.mktemp("own")
    for name, parts in {
        "llava-7b": parts_of("llava"),
        "clip-vit-l14": (tiny_clip.model, tiny_clip.processor),
    }.items():
        for part in parts:
            part.save_pretrained(root / "checkpoints" / name)
    benign = root / "checkpoints/clip-vit-l14/benign"
    benign.mkdir()
    for place in range(8):
        (benign / f"{place}.png").write_bytes(picture(9000 + place))
    write_data(root / "data")
    content = small(yaml.safe_load(LLAVA.read_text()))
    (root / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return root


@contextlib.contextmanager
def changed(project, **changes):
    """Let params.yaml say something else for a while."""
    path = project / "params.yaml"
    before = path.read_text()
    path.write_text(yaml.safe_dump(yaml.safe_load(before) | changes, sort_keys=False))
    try:
        with contextlib.chdir(project):
            yield
    finally:
        path.write_text(before)


def datasets(project, name, **changes):
    told = yaml.safe_load((project / "params.yaml").read_text())["datasets"]
    return told | {name: told[name] | changes}


# --- the examples -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_at_once_which_files_it_needs_and_where(path, tmp_path):
    content = yaml.safe_load(path.read_text())
    with pytest.raises(BadParams) as caught:
        load_params(path, tmp_path)
    told = str(caught.value)
    for name, spec in {**content["models"], **content["concept_banks"]}.items():
        hub = spec.get("hub", "ORG/NAME")
        assert f"checkpoints/{name}: missing config.json, weights" in told
        assert f"`hf download {hub} --local-dir checkpoints/{name}`" in told
    for data in content["datasets"].values():
        assert f"{data['where']}: no such folder" in told
        assert (hub := SOURCES[data["source"]].hub) == "" or f"{hub} --repo-type dataset" in told
    assert "data/README.md" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [*EXAMPLES, ROOT / "params.yaml"], ids=lambda path: path.stem)
def test_a_file_has_every_key_that_a_stage_follows(path):
    """Or DVC would stop in the middle of a run."""
    check_followed(ROOT, yaml.safe_load(path.read_text()), path.name)


def test_the_example_of_a_served_model_is_that_of_own_data_but_for_it():
    served, own = (
        yaml.safe_load((ROOT / f"examples/{name}.yaml").read_text())
        for name in ("served", "own-data")
    )
    assert served.pop("served")
    assert own.pop("served") == {}
    assert served == own


def test_the_readme_of_the_data_names_every_source_and_where_it_comes_from():
    readme = (ROOT / "data/README.md").read_text()
    for name, source in SOURCES.items():
        (line,) = re.findall(rf"^\| `{name}` \|.*$", readme, re.MULTILINE)
        assert source.title in line
        assert source.hub in line
        assert all(f"`{option}`" in line for option in source.options)


# --- what is refused before a run -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("vlsafe", {"source": "vlsaef"}, "datasets.vlsafe.source: 'vlsaef' is not one of vlsafe"),
        ("vlsafe", {"where": "/tmp/x"}, r"datasets.vlsafe.where: '/tmp/x' is wrong.*'data/vlsafe'"),
        ("vlsafe", {"where": "data/../x"}, "where: 'data/../x' is wrong"),
        ("vlsafe", {"options": {"images": "coco"}}, "vlsafe.options.images: 'coco' is wrong"),
        ("vlsafe", {"options": {"picture": 1}}, r"vlsafe: vlsafe has no options \['picture'\]"),
        ("vlsafe", {"where": None}, "vlsafe.revision: missing.* commit of YangyiYY/LVLM_NLF"),
        ("captioned", {"where": None}, "captioned.where: missing: 'own' is not on the hub"),
        ("vlsafe", {"split": "dev"}, "datasets.vlsafe: vlsafe has no split 'dev'"),
        ("vlsafe", {"shares": {"test": 0.4}}, "datasets.vlsafe: shares are .* their sum 1"),
        ("vlsafe", {"shares": None}, "anchors: 'vlsafe' has samples of test alone, .*'anchor'"),
        ("vlsafe", {"suites": ["text"]}, "vlsafe.suites: 'text' is a suite of the lab"),
        ("mme", {"suites": ["mossbench"]}, "'mossbench' has its test split from datasets.moss"),
        ("vlsafe", {"limits": 3}, "datasets.vlsafe.limits: unknown key.*shares"),
        ("vlsafe", {"limit": 0}, "datasets.vlsafe.limit: 0 is wrong"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_named(project, name, changes, says):
    with (
        changed(project, datasets=datasets(project, name, **changes)),
        pytest.raises(BadParams, match=says),
    ):
        load_params()


def test_an_attack_on_a_data_set_needs_the_words_to_aim_at(project):
    told = yaml.safe_load((project / "params.yaml").read_text())["attack"]
    with (
        changed(project, attack=told | {"target": None}),
        pytest.raises(BadParams, match=r"attack.target: missing.*'Sure, here is'"),
    ):
        load_params()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"quantization": "4bit"}, "models.llava-7b: quantization '4bit' needs"),
        ({"device_map": "gpu"}, "models.llava-7b: device_map 'gpu' is unknown"),
    ],
)
def test_how_a_model_is_loaded_is_said_in_its_section(project, spec, says):
    with changed(project, models={"llava-7b": {"attn_implementation": "eager"}}):
        model, _ = load_model(load_params(), "llava-7b")
        assert model.config._attn_implementation == "eager"
    with (
        changed(project, models={"llava-7b": spec}),
        pytest.raises(BadParams, match=re.escape(says)),
    ):
        load_model(load_params(), "llava-7b")


# --- what is refused when data are read -------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "changes", "says"),
    [
        ("davsp", {"harmless": ["vlsafe"]}, "davsp.harmless: 'vlsafe' is no suite of harmless req"),
        ("davsp", {"harmful": ["xstest_unsafe_none"]}, "'xstest_unsafe_none' has no pictures"),
        ("tga", {"aligned": ["scienceqa"]}, "tga.aligned: nobody told the pictures of 'scienceqa'"),
        ("gap", {"harmless": "vlsafe"}, "gap.harmless: 'vlsafe' is no suite of harmless words"),
    ],
)
def test_a_suite_of_the_wrong_kind_is_named_once_it_is_read(project, section, changes, says):
    told = yaml.safe_load((project / "params.yaml").read_text())[section]
    with changed(project, **{section: told | changes}), pytest.raises(BadParams, match=says):
        prepare_data.run(load_params())
    assert not list(project.rglob("*.part"))


def test_a_suite_that_is_not_in_its_data_set_is_named_with_those_that_are(project):
    told = datasets(project, "mossbench", suites=["mossbench", "moss"])
    with (
        changed(project, datasets=told),
        pytest.raises(BadData, match=r"mossbench.suites: \['moss'\] .* it has mossbench"),
    ):
        prepare_data.run(load_params())


def test_test_samples_that_are_fitted_on_end_the_run_with_their_table(project):
    other = project / "data/repeated"
    row = {"suite": "repeated", "expected": "refuse", "channel": "text+image"}
    rows = [
        {**row, "id": f"r{n}", "question": f"harmful request {n}", "image": f"{n:012d}.jpg"}
        for n in range(ROWS)
    ]
    write_lines(other / "table.jsonl", rows)
    (other / "images").mkdir(exist_ok=True)
    for n in range(ROWS):
        source = project / f"data/coco/train2017/{n:012d}.jpg"
        (other / "images" / source.name).write_bytes(source.read_bytes())
    own = {"source": "own", "where": "data/repeated", "suites": ["repeated"]}
    told = yaml.safe_load((project / "params.yaml").read_text())
    more = {
        "datasets": told["datasets"] | {"repeated": own},
        "suites": [*told["suites"], "repeated"],
    }
    with (
        changed(project, **more, contamination={"refuse": True, "near": 6}),
        pytest.raises(BadData, match=r"test samples are fitted on as well(.|\n)*own-all-r\d+"),
    ):
        prepare_data.run(load_params())
    assert not (project / "artifacts/data.part").exists()
    with changed(project, **more):
        folder = prepare_data.run(load_params())
        assert json.loads((folder / "card.json").read_text())["overlaps"]["picture"] > 0


# --- one table of one's own --------------------------------------------------------------------


def write_own(data, **columns):
    """Write the table that examples/own-data.yaml asks for; ``columns`` are those of `uses`."""
    pictured = ("wishes", "uses", "described")
    (data / "images").mkdir(parents=True)
    rows = []
    for n in range(ROWS):
        for shift, suite in enumerate(pictured):
            name = f"{suite}{n}.jpg"
            (data / "images" / name).write_bytes(picture(1000 * shift + n, "JPEG"))
        wish, use, shown = (
            {
                "id": f"{suite}{n}", "suite": suite, "image": f"{suite}{n}.jpg",
                "question": f"{suite} {n}", "expected": "refuse" if suite == "wishes" else "answer",
            }
            for suite in pictured
        )  # fmt: skip
        rows += [
            wish | {"pair_id": f"p{n}"},
            use | {"pair_id": f"p{n}"} | columns,
            shown | {"caption": f"thing {n}", "reference": "a cup"},
            {"id": f"w{n}", "suite": "words", "question": f"words {n}", "expected": "refuse"},
        ]
    write_lines(data / "table.jsonl", rows)


@pytest.fixture
def own(project, tmp_path, monkeypatch):
    """A root with the params.yaml of the other example, and no data yet."""
    (tmp_path / "checkpoints").mkdir()
    for name, there in {"my-model": "llava-7b", "clip-vit-l14": "clip-vit-l14"}.items():
        (tmp_path / "checkpoints" / name).symlink_to(project / "checkpoints" / there)
    content = yaml.safe_load((ROOT / "examples/own-data.yaml").read_text())
    content["profiles"] = {"quick": SMALL | {"projector": {"samples": 3, "steps": 2}}}
    content["gap"]["requests"] = 8
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_table_of_ones_own_in_which_nothing_repeats_is_prepared(own):
    write_own(own / "data/mine", metric="refusal", channel="lookalike")
    folder = prepare_data.run(load_params())
    assert json.loads((folder / "card.json").read_text())["overlaps"] == {}
    channels = {
        suite: {sample.channel for sample in read_suite(folder / f"test/{suite}.parquet")}
        for suite in ("wishes", "uses", "words", "described")
    }
    assert channels == {
        "wishes": {"text+image"}, "uses": {"lookalike"}, "words": {"text"}, "described": {"benign"},
    }  # fmt: skip


def test_a_row_without_what_is_right_is_named_with_its_data_set_before_anything_is_written(own):
    write_own(own / "data/mine")
    says = (
        r"datasets.mine: data/mine: 'own-all-uses\d+' has no reference.*\{\"metric\": \"refusal\"\}"
    )
    with pytest.raises(BadData, match=says):
        prepare_data.run(load_params())
    assert {path.name for path in own.iterdir()} == {"params.yaml", "data", "checkpoints"}


# --- the whole road ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(project):
    """The example run by its one command, in a project that had the lab's parameters before."""
    for name in ("src", "tasks", "judges"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "constraints.txt", ".dvcignore"):
        shutil.copy(ROOT / name, project)
    config = (ROOT / ".dvc/config").read_text().replace("[core]", "[core]\n    no_scm = true")
    (project / ".dvc").mkdir()
    (project / ".dvc/config").write_text(config)
    shutil.move(project / "params.yaml", project / "my.yaml")
    shutil.copy(ROOT / "params.yaml", project)
    run = flows(project, "run", "--params", "my.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    assert (project / "params.yaml").read_bytes() == (project / "my.yaml").read_bytes()
    assert (project / "params.yaml.before").read_bytes() == (ROOT / "params.yaml").read_bytes()
    return project


def flows(project, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "flows", *arguments],
        cwd=project, env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.slow
def test_the_whole_road_is_gone_on_another_model_and_other_data(done):
    rows = json.loads((done / "reports/metrics.json").read_text())
    suites = yaml.safe_load(LLAVA.read_text())["suites"]
    for defense in ("none", "cmrm", "guardalign", "davsp", "tga"):
        measured = {row["suite"] for row in rows if row["defense"] == defense}
        assert measured >= set(suites)
    page = (done / "reports/index.html").read_text()
    assert measure_detection.NOT_MEASURED in page
    assert "cannot be judged" not in page
    channels = json.loads((done / "reports/channels.json").read_text())
    assert {row["channel"] for row in channels} == {
        "text", "text+image", "image", "typographic", "adversarial", "benign", "lookalike",
    }  # fmt: skip
    parts = yaml.safe_load(LLAVA.read_text())["guardalign"]["parts_on"]
    section = page[page.index('<section id="parts"') : page.index('<section id="davsp"')]
    assert all(f">{suite}" in section for suite in parts)
    gap = json.loads((done / "artifacts/llava-7b/gap/gap.json").read_text())
    rates = {(row["suite"], row["metric"]): row["n"] for row in gap["rates"]}
    assert rates["xstest_unsafe_none", "unsafe_rate"] == 6
    layers = json.loads((done / "artifacts/llava-7b/tga/layers/layers.json").read_text())
    assert set(layers["not_measured"]) == {"pictures"}
    assert layers["words"]["untouched"]["harmful"]["n"] == 3


@pytest.mark.slow
def test_every_defense_is_published_once_and_a_second_run_does_nothing(done):
    told = json.loads(flows(done, "run", "--json").stdout)
    assert set(told["states"].values()) == {"Skipped"}
    names = {f"{defense}.llava-7b" for defense in ("cmrm", "guardalign", "davsp", "tga")}
    assert {one["name"]: one["version"] for one in told["published"]} == dict.fromkeys(
        names | {"concept_bank.clip-vit-l14"}, "1"
    )
    assert not any(one["created"] for one in told["published"])


@pytest.mark.slow
def test_a_changed_row_makes_all_that_reads_data_stale_and_nothing_else(done):
    table = done / "data/captioned/table.jsonl"
    before = table.read_text()
    table.write_text(before.replace("thing 7", "another thing"))
    try:
        planned = json.loads(flows(done, "plan", "--json").stdout)
    finally:
        table.write_text(before)
    states = {name: told["state"] for name, told in planned.items()}
    unchanged = {name for name, state in states.items() if state == "unchanged"}
    assert unchanged == {
        "hash_code", "build_concept_bank@clip-vit-l14", "measure_detection@clip-vit-l14",
    }  # fmt: skip
    assert [name for name, state in states.items() if state == "stale"] == ["prepare_data"]


def test_a_key_that_stages_follow_is_missed_before_anything_is_written(project, tmp_path):
    content = yaml.safe_load((project / "params.yaml").read_text())
    del content["profiles"]["quick"]["frame"]["joint_steps"]
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(content))
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    for name in ("checkpoints", "data"):
        (tmp_path / name).symlink_to(project / name)
    with pytest.raises(FlowError, match=r"my.yaml leaves out .*: profiles.quick.frame.joint_steps"):
        adopt(tmp_path, tmp_path / "my.yaml")
    assert (tmp_path / "params.yaml").read_text() == "seed: 1\n"


@pytest.mark.slow
def test_every_suite_has_what_is_asked_of_it_and_its_manifest(done):
    data = done / "artifacts/data"
    card = json.loads((data / "card.json").read_text())
    with contextlib.chdir(done):
        params = load_params()
    assert card["rows"] == {
        f"{each.split}/{each.suite}": min(each.size, card["rows"][f"{each.split}/{each.suite}"])
        for each in wanted(params)
    }
    for place, rows in card["rows"].items():
        samples = read_suite(data / f"{place}.parquet")
        assert len(samples) == rows
        assert {f"{sample.split}/{sample.suite}" for sample in samples} == {place}
    manifests = {path.stem for path in (data / "manifests").iterdir()}
    assert manifests == set(params.datasets) == set(card["datasets"])
    assert "source" not in card  # nothing is of the lab


@pytest.mark.slow
def test_data_are_the_same_bytes_every_time_and_twins_share_a_split(done):
    data = done / "artifacts/data"
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    with contextlib.chdir(done):
        prepare_data.run(load_params())
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before
    pairs = {
        split: {
            sample.pair_id
            for path in sorted((data / split).glob("xstest_*.parquet"))
            for sample in read_suite(path)
        }
        for split in ("anchor", "train", "calibration", "test")
    }
    assert sum(map(len, pairs.values())) == len(set.union(*pairs.values()))


# --- a family that cannot have everything -----------------------------------------------------


@pytest.mark.slow
def test_what_a_family_cannot_have_is_left_out_and_told(project, tmp_path):
    """Pictures of an Idefics3 have no gradient here, and no blank twin before a prompt is seen."""
    name = "llava-7b"
    root = shutil.copytree(
        project, tmp_path / "idefics", ignore=shutil.ignore_patterns("artifacts")
    )
    shutil.rmtree(root / "checkpoints" / name)
    for part in parts_of("idefics3"):
        part.save_pretrained(root / "checkpoints" / name)
    with contextlib.chdir(root):
        params = load_params()
        prepare_data.run(params)
        card = json.loads((attack.run(params, name) / "card.json").read_text())
        assert "cannot be made differentiably" in card["not_attacked"]
        assert "adversarial" in params.suites
        records = read_records(evaluate.run(params, name, "none") / "responses.jsonl")
        assert {r.suite for r in records} == {*params.suites} - {"adversarial"}
        found = json.loads((estimate_shift.run(params, name, "cmrm") / "sweep.json").read_text())
        assert {row["level"] for row in found["rows"]} == {"dataset"}
        assert {(row["level"], "level: dataset" in row["why"]) for row in found["refused"]} == {
            ("sample", True)
        }
        estimate_harm_vector.run(params, name)
        with pytest.raises(BadParams, match=r"davsp.models: .*differentiably.*out of the list"):
            train_safety_prompt.run(params, name)
    assert not (root / "artifacts" / name / "davsp/bundle").exists()


def test_a_sweep_of_nothing_but_what_cannot_be_had_says_why():
    def measured(setting):
        raise UnsupportedRequest("no blank twin.")

    rates = Rates({"a": Attacked(1, 1.0)}, {"b": Served(1, 1.0, 0.0)})
    with pytest.raises(UnsupportedRequest, match=r"none of 2 settings is possible: no blank twin"):
        sweep([ShiftSetting(alpha=0.5), ShiftSetting(alpha=1.0)], rates, measured)


@pytest.mark.parametrize(
    ("question", "twin", "apart"),
    [
        ("how do i harm a thing ?", "how do i use a thing ?", "harm"),
        ("how do i harm a thing today", "how do i use a thing now", "harm a thing today"),
        ("the same", "the same", None),
        ("no twin", "", None),
    ],
)
def test_a_wish_is_where_a_request_differs_from_its_twin(question, twin, apart):
    assert _apart(question, twin) == apart
