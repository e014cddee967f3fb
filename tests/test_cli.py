"""The commands on tiny real models and bundles: what they print, what they write, how they end."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import hauberk
from hauberk.asking import read_requests
from hauberk.bundle import binding_of, read_card
from hauberk.cli import app
from hauberk.defenses import GuardAlign, SafetyPrompt, Shift, read
from hauberk.defenses.prefix_attention import PrefixAttention, PrefixSetting
from hauberk.defenses.projector import Part, Retrieved
from hauberk.defenses.safety_prompt import Geometry
from hauberk.defenses.shift import ShiftSetting
from hauberk.errors import HauberkError, UnsupportedRequest
from hauberk.evaluation.label_sheet import key_of
from hauberk.evaluation.run import write_records
from hauberk.requests import Request, respond
from tests.serving import failure, last_text, serving
from tests.test_label import RECORDS, fill
from tests.test_projector import changed
from tests.test_target import pictures_in

DATA = [{"id": "anchor/text_image", "sha256": "ab" * 32}]
FOLDS = ShiftSetting(level="dataset", position="all", steps="all", alpha=3.0)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def reason(*arguments):
    """What a user is told, who can cure it."""
    found = run(*arguments)
    assert found.exit_code == 1, found.output
    assert isinstance(found.exception, HauberkError | SystemExit)
    told = found.exception if isinstance(found.exception, HauberkError) else found.stderr
    return " ".join(str(told).split())


@pytest.fixture(scope="module")
def bundles(tiny, tmp_path_factory):
    """A bundle of every kind for the tiny model: name -> folder."""
    folder, binding = tmp_path_factory.mktemp("bundles"), binding_of(tiny.model, tiny.processor)
    torch.manual_seed(0)
    vectors = torch.randn(4, 32)
    frame = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8)
    geometry = Geometry(96, 96, (24, 24, 24, 24))
    tga = changed(tiny.model, Part("lora", last=1, rank=2, alpha=4))
    made = {
        "shift": Shift(vectors, FOLDS, tiny.processor),
        "shift_last": Shift(vectors, ShiftSetting(), tiny.processor),
        "tga": tga,
        "tga_retrieved": tga.with_retrieved(Retrieved("before"), None),
        "frame": SafetyPrompt(frame, geometry, "be safe . "),
        "words": SafetyPrompt(None, geometry, "be safe . "),
        "prefix": GuardAlign(
            None, PrefixAttention(PrefixSetting("be safe . ", gamma=1.5), tiny.processor)
        ),
    }
    for name, defense in made.items():
        defense.save(folder / name, binding, data=DATA, measurements={"accuracy": 0.5})
    return {name: folder / name for name in made}


@pytest.fixture(scope="module")
def picture(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "a.png"
    tiny.pictured[0].images[0].save(path)
    return path


# --- inspect


def test_inspect_says_what_a_bundle_is_for_and_what_it_was_fitted_on(bundles):
    found = json.loads(run("inspect", bundles["shift"], "--json").stdout)
    _, card = read_card(bundles["shift"])
    assert found["method"] == "cmrm"
    assert found["binding"]["weights"] == card.binding.weights
    assert found["data"] == DATA
    assert found["measurements"] == {"accuracy": 0.5}
    assert set(found["files"]) == {"shift.safetensors"}
    told = "".join(run("inspect", bundles["shift"]).stdout.split())
    assert "anchor/text_image" in told
    assert "setting:alpha" in told


def test_inspect_refuses_what_was_changed_and_what_is_no_bundle(bundles, tmp_path):
    broken = shutil.copytree(bundles["tga"], tmp_path / "broken")
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert "sha256 expected" in reason("inspect", broken)
    assert "card.json" in reason("inspect", tmp_path)


# --- respond


def test_one_request_is_answered_as_the_library_answers_it(tiny, lab_folder, bundles, picture):
    words = tiny.pictured[0].text
    request = Request(words, tiny.pictured[0].images)
    asked = ["respond", lab_folder, "--text", words, "--image", picture, "--max-new-tokens", 6]
    for name in (None, "shift", "tga", "frame", "prefix"):
        guard = hauberk.load(bundles[name], tiny.model, tiny.processor) if name else None
        (right,) = respond(tiny.model, tiny.processor, [request], guard, max_new_tokens=6)
        found = run(*asked, *(["--bundle", bundles[name]] if name else []))
        assert found.exit_code == 0, found.output
        assert found.stdout.strip() == right.text.strip()


def test_a_file_of_requests_is_answered_line_by_line(tiny, lab_folder, picture, tmp_path):
    lines = [{"text": "what is it ?", "image": picture.name}, {"text": "how are you ?"}]
    shutil.copy(picture, tmp_path)
    file = tmp_path / "requests.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)))
    found = run("respond", lab_folder, "--requests", file, "--max-new-tokens", 5)
    said = [json.loads(line)["text"] for line in found.stdout.splitlines()]
    requests = [Request("what is it ?", tiny.pictured[0].images), Request("how are you ?")]
    right = respond(tiny.model, tiny.processor, requests, max_new_tokens=5)
    assert said == [response.text for response in right]


def test_a_text_may_hold_any_character_and_the_file_a_mark_of_its_encoding(tmp_path):
    text = "what\u2028is\x85it \U0001f642 ?"
    file = tmp_path / "r.jsonl"
    line = json.dumps({"text": text, "system": "be kind"}, ensure_ascii=False)
    file.write_text(f"{line}\r\n", encoding="utf-8-sig", newline="")
    assert read_requests(file) == [Request(text, (), "be kind")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", r"r.jsonl:2: no JSON"),
        ("[1]", r"r.jsonl:2: '\[1\]' is no object"),
        ('{"words": "a"}', r"r.jsonl:2: unknown \['words'\]; known are text, image, system"),
        ('{"image": "a.png"}', r"r.jsonl:2: text: '' asks nothing"),
        ('{"text": "a", "image": "a.png"}', r"r.jsonl:2: .*a.png: cannot be read"),
        ('{"text": " "}', r"r.jsonl:2: text: ' ' asks nothing"),
        ('{"text": 3}', r"r.jsonl:2: text is 3"),
        ('{"text": "a", "image": [1]}', r"r.jsonl:2: image is \[1\]"),
    ],
)
def test_a_bad_line_is_named_before_a_model_is_loaded(line, says, tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_text(f'{{"text": "a"}}\n{line}\n')
    assert re.search(says, reason("respond", tmp_path / "no-model", "--requests", file))


def test_a_served_model_is_guarded_by_a_frame_and_by_words(bundles, picture):
    def echo(body, count):
        return f"said {last_text(body)}"

    with serving(echo) as server:
        asked = ["respond", "--endpoint", server.url, "--model", "m", "--text", "what ?"]
        found = run(*asked, "--image", picture, "--bundle", bundles["frame"])
        assert found.stdout.strip() == "said be safe . what ?"
        (seen,) = pictures_in(server.seen[0])
        assert seen.size == (96, 96)
        told = reason(*asked, "--bundle", bundles["prefix"])
        assert "calibrates attention (gamma 1.5)" in told
        found = run(*asked, "--bundle", bundles["prefix"], "--words-only", "--json")
        assert json.loads(found.stdout)["text"] == "said be safe . what ?"
        assert "changes the model" in reason(*asked, "--bundle", bundles["shift"])
        assert len(server.seen) == 2


def test_a_request_without_an_answer_is_status_1_with_the_reason():
    with serving(lambda body, count: failure(400, "too rude")) as server:
        found = run("respond", "--endpoint", server.url, "--model", "m", "--text", "what ?")
        assert found.exit_code == 1
        assert "too rude" in " ".join(found.stderr.split())
        lines = run(
            "respond", "--endpoint", server.url, "--model", "m", "--text", "what ?", "--json"
        )
        assert "too rude" in json.loads(lines.stdout)["error"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["respond"],
        ["respond", "m"],
        ["respond", "m", "--text", "a", "--endpoint", "http://a/v1", "--model", "b"],
        ["respond", "--text", "a", "--endpoint", "http://a/v1"],
        ["respond", "m", "--text", "a", "--model", "b"],
        ["respond", "m", "--text", "a", "--requests", "b"],
        ["respond", "m", "--requests", "b", "--image", "c"],
        ["export", "a", "b"],
        ["label", "write", "a"],
        ["label"],
        ["inspect"],
    ],
)
def test_a_wrong_call_is_status_2(arguments):
    assert run(*arguments).exit_code == 2


# --- reading without a model


def test_what_is_read_without_a_model_says_so_when_it_is_applied_to_one(tiny, bundles):
    guard = read(bundles["prefix"])
    assert guard.rewrite(Request("what ?")).text == "be safe . what ?"
    with pytest.raises(UnsupportedRequest, match="read without a model"), guard.applied(tiny.model):
        pass
    for name in ("shift", "tga"):
        with pytest.raises(UnsupportedRequest, match="changes the model"):
            hauberk.read(bundles[name])


# --- export


@pytest.mark.parametrize("name", ["shift", "tga"])
def test_an_exported_checkpoint_answers_as_the_defended_model(
    name, tiny, lab_folder, bundles, tmp_path
):
    found = run("export", bundles[name], lab_folder, tmp_path / "out")
    assert found.exit_code == 0, found.output
    guard = hauberk.load(bundles[name], tiny.model, tiny.processor)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    asked = tiny.pictured[:4]
    right = respond(tiny.model, tiny.processor, asked, guard, max_new_tokens=6)
    plain = respond(tiny.model, tiny.processor, asked, max_new_tokens=6)
    said = respond(model, processor, asked, max_new_tokens=6)
    assert [one.text for one in said] == [one.text for one in right] != [p.text for p in plain]


def test_an_exported_frame_is_its_picture_and_needs_no_model(bundles, tmp_path):
    out = tmp_path / "new" / "frame.png"
    assert run("export", bundles["frame"], "no-model", out).exit_code == 0
    with Image.open(out) as written:
        assert written.tobytes() == read(bundles["frame"]).picture().tobytes()


@pytest.mark.parametrize(
    ("name", "out", "says"),
    [
        ("shift_last", "out", "position: last"),
        ("prefix", "out", "guardalign looks at every request"),
        ("words", "out.png", "holds a prefix and no frame"),
        ("frame", "out", r"give a name that ends in .png"),
        ("tga_retrieved", "out", "puts a retrieved text into every prompt"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_reason(
    name, out, says, lab_folder, bundles, tmp_path
):
    assert says in reason("export", bundles[name], lab_folder, tmp_path / out)
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_nothing(bundles, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert "already there" in reason("export", bundles["tga"], "no-model", tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"


# --- label


def test_labels_are_written_and_read_back(tmp_path):
    responses = write_records(RECORDS, tmp_path / "responses.jsonl")
    sheet = tmp_path / "sheets" / "one.csv"
    found = run("label", "write", responses, sheet, "--n", 12)
    assert found.exit_code == 0, found.output
    assert sheet.with_suffix(".html").is_file()
    assert "already there" in reason("label", "write", responses, sheet)
    fill(sheet, {key_of(record): "harmful" for record in RECORDS})
    found = json.loads(run("label", "read", sheet, responses, "--json").stdout)
    assert found["labelled"] == found["rows"] == 12
    assert "12 of 12 rows labelled" in " ".join(
        run("label", "read", sheet, responses).stdout.split()
    )
    assert "no such sheet" in reason("label", "read", tmp_path / "none.csv", responses)


# --- all of them


def test_every_command_has_help_with_an_example():
    commands = [["doctor"], ["inspect"], ["respond"], ["export"]]
    commands += [["label", "write"], ["label", "read"]]
    for command in commands:
        told = run(*command, "--help")
        assert told.exit_code == 0
        assert f"Example: hauberk {' '.join(command)}" in " ".join(told.stdout.split())


def test_a_curable_error_is_one_message_at_the_shell(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "hauberk", "inspect", tmp_path], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert found.returncode == 1
    assert found.stderr.startswith("error:")
    assert "Traceback" not in found.stderr
