"""The doctor: right for every family, in seconds, without weights; and clear where it can do
nothing."""

import json
import subprocess
import sys
import time

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig
from typer.testing import CliRunner

from hauberk import bare
from hauberk.bare import bare_model
from hauberk.cli import app
from hauberk.doctor import CHECKS, examine
from hauberk.errors import BadModel
from tests.families import FAMILIES, parts_of

ALWAYS = {
    "cmrm per data set", "davsp applies", "guardalign masks", "guardalign calibrates",
    "tga projector", "tga low rank", "tga exports",
}  # fmt: skip
EVERYTHING = ALWAYS | {
    "cmrm per request", "cmrm folds", "cmrm exports", "davsp trains", "tga trains",
}  # fmt: skip
REFUSED = {
    # family: what cannot be done with it
    "cohere2_vision": {"cmrm per request", "cmrm exports", "davsp trains"},
    "deepseek_vl": {"cmrm per request"},
    "gemma3": {"cmrm per request", "cmrm folds", "cmrm exports"},
    "glm4v": {"cmrm folds", "cmrm exports"},
    "idefics3": {"cmrm per request", "davsp trains"},
    "internvl": set(),
    "llava": set(),
    "llava_next": {"cmrm per request"},
    "llava_onevision": {"cmrm per request"},
    "mistral3": {"cmrm per request"},
    "mllama": {"cmrm per request", "cmrm folds", "cmrm exports", "davsp trains", "tga trains"},
    "paligemma": {"cmrm per request", "cmrm exports"},
    "qwen2_5_vl": {"cmrm exports"},
    "qwen2_vl": {"cmrm exports"},
    "qwen3_vl": {"cmrm exports"},
    "smolvlm": {"cmrm per request", "davsp trains"},
    "vipllava": set(),
}
DECODERS = {
    "gemma3": ("Gemma3TextModel", 26),
    "internvl": ("Qwen2Model", 32),
    "llava": ("LlamaModel", 32),
    "mllama": ("MllamaTextModel", 40),
    "qwen2_vl": ("Qwen2VLTextModel", 80),
}
"""Of the default configs, for some."""


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The config of a whole model of every family, at its true size, and nothing beside it."""
    home = tmp_path_factory.mktemp("configs")
    for name in FAMILIES:
        AutoConfig.for_model(name).save_pretrained(home / name)
    return home


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def possible(report):
    said = report["verdicts"]
    return {f"{each['defense']} {each['action']}" for each in said if each["possible"]}


def write(folder, **config):
    folder.mkdir(exist_ok=True)
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return file


def test_every_family_of_true_size_is_told_right_in_one_run_and_in_time(configs):
    assert set(REFUSED) == set(FAMILIES)
    started = time.monotonic()
    files = [configs / name / "config.json" for name in sorted(FAMILIES)]
    found = run("--json", *files)
    assert time.monotonic() - started < 60
    assert found.exit_code == 0, found.output
    reports = json.loads(found.stdout)
    assert [report["family"] for report in reports] == sorted(FAMILIES)
    for report in reports:
        assert possible(report) == EVERYTHING - REFUSED[report["family"]]
        assert all(each["reason"] for each in report["verdicts"] if not each["possible"])
        places = {each["part"]: (each["place"], each["what"]) for each in report["findings"]}
        missing = {part for part, (place, _) in places.items() if not place}
        assert missing == ({"pixel layout"} if report["family"] == "cohere2_vision" else set())
        if report["family"] in DECODERS:
            decoder, blocks = DECODERS[report["family"]]
            assert (places["decoder"][1], int(places["blocks"][0])) == (decoder, blocks)


def test_no_weight_is_ever_made(configs):
    built = bare_model(str(configs / "llava"))
    assert all(weight.is_meta for weight in built.model.parameters())
    assert sum(weight.numel() for weight in built.model.parameters()) > 6e9


def test_the_doctor_of_a_config_says_what_it_says_of_the_model(family, tmp_path):
    from hauberk.doctor import verdicts_of

    model, processor = parts_of(family.name)
    model.config.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    said = verdicts_of(bare_model(str(tmp_path)).model, processor.image_processor)
    assert said == verdicts_of(model, processor.image_processor)
    report = examine(str(tmp_path))
    assert [verdict.possible for verdict in report.verdicts] == [each.possible for each in said]
    (images,) = [each for each in report.findings if each.part == "image processor"]
    assert images.what == "its own settings"


def test_settings_of_the_image_processor_count(tmp_path):
    """LLaVA's own processor may fill up to squares, and then a blank one is not told by tokens."""
    model, processor = parts_of("llava")
    model.config.save_pretrained(tmp_path)
    settings = processor.image_processor.to_dict()
    settings |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (verdict,) = [v for v in examine(str(tmp_path)).verdicts if v.action == "per request"]
    assert "LlavaImageProcessor of this 'llava' model fills pictures up" in verdict.reason


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is no config in JSON"),
        ("[1]", "holds a list"),
        ("null", "holds a NoneType"),
        ('{"image_processor_type": "NobodysImageProcessor"}', "no image processor can be made"),
        (
            '{"image_processor_type": "CLIPImageProcessor", "size": {"wide": 3}}',
            "no image processor can be made",
        ),
        ('{"image_processor_type": 3}', "no image processor can be made"),
        (
            '{"image_processor_type": "Odd", "auto_map": {"AutoImageProcessor": "odd.Odd"}}',
            "no image processor can be made",
        ),
    ],
)
def test_settings_of_an_image_processor_that_are_broken_are_named(
    tmp_path, monkeypatch, name, content, says
):
    """They are not passed over: what is said of the default might not hold for this model."""
    monkeypatch.setattr("builtins.input", pytest.fail)  # transformers may ask whether to run code
    parts_of("llava")[0].config.save_pretrained(tmp_path)
    if name == "processor_config.json" and content.startswith('{"'):
        content = f'{{"image_processor": {content}}}'
    (tmp_path / name).write_text(content)
    with pytest.raises(BadModel, match=f"{name}.*{says}"):
        examine(str(tmp_path))
    found = run(tmp_path)
    assert (found.exit_code, "Traceback" in found.output) == (1, False)


def test_settings_of_a_processor_that_tell_nothing_of_pictures_leave_the_default(tmp_path):
    parts_of("llava")[0].config.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
    (images,) = [f for f in examine(str(tmp_path)).findings if f.part == "image processor"]
    assert images.what == "the default of 'llava', as no settings came with the config"


def test_tables_are_printed_and_name_reasons(configs):
    found = run(configs / "mllama")
    assert found.exit_code == 0
    for word in ("MllamaTextModel", "model.vision_model", "128256", "cross", "calibrates"):
        assert word in found.stdout
    assert "no" in found.stdout.split()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "hauberk_new"}, "knows no model_type 'hauberk_new'.*install a newer"),
        (
            {"model_type": "hauberk_new", "auto_map": {"AutoModel": "modeling.New"}},
            "needs code that comes with the checkpoint, which is not run",
        ),
        ({"model_type": "llama"}, "'llama' reads text alone.*vision-language model"),
        ({"model_type": "clip"}, "'clip' is no model.*vision-language model"),
        ({"hidden_size": 8}, "names no model_type"),
        (
            {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]},
            "LlavaLlamaForCausalLM, which transformers does not have.*converted checkpoint",
        ),
        (
            {"model_type": "llava", "text_config": {"hidden_size": "wide"}},
            "no 'llava' can be built",
        ),
        ({"model_type": "llava", "architectures": "Llava"}, "architectures .* are 'Llava'.*a list"),
        ({"model_type": "llava", "architectures": [1]}, r"architectures .* are \[1\].*a list"),
        ({"model_type": "llava", "architectures": {"a": 1}}, "architectures .* a list of names"),
        ({"model_type": "llava", "vision_config": 7}, "no 'llava' can be built"),
        (
            {"model_type": "qwen2_vl", "text_config": {"num_attention_heads": 0}},
            "no 'qwen2_vl' can be built",
        ),
    ],
)
def test_a_config_of_no_model_that_can_be_served_is_refused_with_the_cure(tmp_path, config, says):
    with pytest.raises(BadModel, match=says):
        examine(str(write(tmp_path, **config)))
    found = run(tmp_path)
    assert found.exit_code == 1
    assert "Traceback" not in found.output


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"{", "no config in JSON"), (b"[]", "holds a list"), (b"\xff\xfe{}", "no config in JSON")],
)
def test_a_file_that_is_no_config_is_named(tmp_path, content, says):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(BadModel, match=says):
        examine(str(file))


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "nowhere", "a/b/c", "x/y.json"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(source, monkeypatch):
    monkeypatch.setattr(bare.PreTrainedConfig, "get_config_dict", pytest.fail)
    with pytest.raises(BadModel, match=r"no such file or folder; give .*OWNER/MODEL"):
        examine(source)


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(BadModel, match=r"no config\.json in this folder"):
        examine(str(tmp_path))


def test_no_connection_is_one_message(monkeypatch):
    def unreachable(source, revision):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore")

    monkeypatch.setattr(bare.PreTrainedConfig, "get_config_dict", unreachable)
    found = run("owner/model")
    assert found.exit_code == 1
    told = " ".join(found.stderr.split())
    assert "cannot be read from the hub (We couldn't connect" in told
    assert "check the name and the connection" in told


def test_one_bad_model_does_not_hide_the_others(configs, tmp_path):
    found = run("--json", configs / "llava", tmp_path / "gone", configs / "gemma3")
    assert found.exit_code == 1
    first, second, third = json.loads(found.stdout)
    assert (first["family"], third["family"]) == ("llava", "gemma3")
    assert "no such file" in second["error"]


def test_of_a_model_with_a_part_missing_the_others_are_told_and_what_to_add(tmp_path):
    file = write(tmp_path, **AutoConfig.for_model("granite_docling").to_dict())
    report = examine(str(file))
    found = {each.part: each for each in report.findings}
    assert found["decoder"].place
    assert found["vision tower"].place
    assert not found["projector"].place
    says = "looked for ['model.multi_modal_projector'", "add a row 'granite_docling': Family(proj"
    assert all(words in found["projector"].what for words in says)
    assert not report.complete
    possible = {f"{each.defense} {each.action}" for each in report.verdicts if each.possible}
    assert possible == {"davsp applies", "guardalign masks"} | possible & {"davsp trains"}
    assert run(file).exit_code == 1


@pytest.mark.slow
def test_the_doctor_of_every_model_type_ends_with_a_report_or_a_reason(tmp_path):
    """Of all that transformers has for pictures and text: no traceback, no guess."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES,
    )

    files = [write(tmp_path / name, model_type=name) for name in NAMES if name in CONFIG_MAPPING]
    found = run("--json", *files)
    reports = json.loads(found.stdout)
    assert len(reports) == len(files) > 50
    assert sum(report.get("complete", False) for report in reports) > 40
    for report in reports:
        if "error" not in report:
            assert all(each["place"] or each["what"] for each in report["findings"])
            assert len(report["verdicts"]) == len(CHECKS)


def test_a_wrong_call_is_status_2():
    assert run().exit_code == 2
    assert run("--nonsense").exit_code == 2


def test_help_shows_an_example_and_starts_without_torch():
    heavy = "{'torch', 'transformers'} & set(sys.modules)"
    code = f"import sys, hauberk.cli; assert not ({heavy}), {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)
    started = time.monotonic()
    found = subprocess.run(
        [sys.executable, "-m", "hauberk", "doctor", "--help"], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert time.monotonic() - started < 5  # half a second on a quiet machine
    assert "hauberk doctor llava-hf/" in found.stdout


def test_checks_have_names_of_their_own():
    names = [(defense, action) for defense, action, _ in CHECKS]
    assert len(set(names)) == len(names)
    assert ALWAYS < {f"{defense} {action}" for defense, action in names} == EVERYTHING


def test_looking_for_parts_takes_no_memory(configs):
    before = torch.get_default_device()
    bare_model(str(configs / "llava"))
    assert torch.get_default_device() == before
