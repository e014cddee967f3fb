"""Bundles: complete or absent, every byte checked, bound to one model, data and never code."""

import base64
import copy
import hashlib
import inspect
import io
import json
import os
import re
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import ExifTags, Image
from tokenizers import Tokenizer, normalizers
from transformers import AutoModelForImageTextToText, AutoProcessor

import hauberk
from hauberk.bundle import (
    CARD,
    SCHEMA,
    Card,
    _canonical,
    _decoded,
    _load_pyfunc,
    binding_of,
    file_hash,
    fingerprint,
    read_card,
    replacing,
    write_bundle,
)
from hauberk.defenses import DEFENSES, Defense, Shift
from hauberk.defenses.shift import ShiftSetting, estimate_shift, sample_shifts
from hauberk.errors import BadBundle, TamperedBundle, WrongModel
from hauberk.lab import build
from hauberk.requests import respond


@pytest.fixture(scope="module")
def defense(tiny):
    vectors = estimate_shift(sample_shifts(tiny.model, tiny.processor, tiny.pictured))
    setting = ShiftSetting(compose="incremental", layers=(0, 2, 3), alpha=1.5)
    return Shift(vectors, setting, tiny.processor)


@pytest.fixture(scope="module")
def made(tiny, defense, lab_folder, tmp_path_factory):
    """A bundle of the model as it was loaded from disk."""
    model, processor = build.load(lab_folder)
    return defense.save(
        tmp_path_factory.mktemp("made") / "bundle",
        binding_of(model, processor),
        data=[{"id": "anchor/text_image", "sha256": "ab" * 32}],
        measurements={"calibration_unsafe_rate": 0.25},
        extra_files={"sweep.json": "{}\n"},
    )


@pytest.fixture
def bundle(made, tmp_path):
    """A copy to do damage to."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def sign(folder, **changes):
    """Write a card whose own hash is right: what an attacker can do as well."""
    content = json.loads((folder / CARD).read_text()) | changes
    del content["card_sha256"]
    content["card_sha256"] = hashlib.sha256(_canonical(content)).hexdigest()
    (folder / CARD).write_bytes(_canonical(content))


def test_a_bundle_gives_back_bit_equal_vectors_the_setting_and_the_same_answers(
    tiny, defense, made
):
    loaded = hauberk.load(made, tiny.model, tiny.processor)
    assert torch.equal(loaded.vectors, defense.vectors)
    assert loaded.vectors.dtype == torch.float32
    assert loaded.setting == defense.setting
    requests = tiny.pictured[:4] + tiny.plain[:2]
    answers = [
        [a.text for a in respond(tiny.model, tiny.processor, requests, d, max_new_tokens=5)]
        for d in (defense, loaded, None)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_a_defense_that_needs_no_clip_makes_nothing_of_one_and_knows_of_none(tiny, made, tmp_path):
    loaded = hauberk.load(made, tiny.model, tiny.processor, clip=tmp_path / "nowhere")
    assert torch.equal(loaded.vectors, hauberk.load(made, tiny.model, tiny.processor).vectors)
    knows = {
        name: "clip" in inspect.signature(defense.load).parameters
        for name, defense in {**DEFENSES, "protocol": Defense}.items()
    }
    assert [name for name, known in knows.items() if known] == ["guardalign"]


def test_the_card_tells_what_the_bundle_is(made):
    home, card = read_card(made)
    assert (home, card.method, card.schema) == (made, "cmrm", SCHEMA)
    assert card.hauberk == hauberk.__version__
    assert card.parameters["alpha"] == 1.5
    assert card.data == [{"id": "anchor/text_image", "sha256": "ab" * 32}]
    assert card.measurements == {"calibration_unsafe_rate": 0.25}
    assert card.files == {
        name: file_hash(made / name) for name in ("shift.safetensors", "sweep.json")
    }


def test_the_card_tells_the_packages_and_one_from_before_they_were_told_is_read(bundle):
    versions = read_card(bundle)[1].versions
    assert versions == {
        "hauberk": hauberk.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    content = json.loads((bundle / CARD).read_text())
    del content["versions"]
    (bundle / CARD).write_text(json.dumps(content))
    sign(bundle)
    assert read_card(bundle)[1].versions == {}


@pytest.mark.parametrize("expected", ["no such file", "None", None])
def test_a_missing_file_is_missed_whatever_the_card_expects_of_it(bundle, expected):
    files = json.loads((bundle / CARD).read_text())["files"]
    (bundle / "shift.safetensors").unlink()
    sign(bundle, files=files | {"shift.safetensors": expected})
    with pytest.raises(TamperedBundle, match=r"shift\.safetensors.*found no such file"):
        read_card(bundle)


@pytest.mark.parametrize("content", [None, b"", b"not tensors at all"])
def test_a_bundle_without_readable_vectors_is_named_also_where_its_card_is_right(
    tiny, bundle, content
):
    files = json.loads((bundle / CARD).read_text())["files"]
    path = bundle / "shift.safetensors"
    if content is None:
        path.unlink()
        del files[path.name]
    else:
        path.write_bytes(content)
        files[path.name] = file_hash(path)
    sign(bundle, files=files)
    with pytest.raises(TamperedBundle, match=r"shift\.safetensors: expected shift vectors"):
        hauberk.load(bundle, tiny.model, tiny.processor)


def test_the_same_defense_is_saved_as_the_same_bytes(tiny, defense, made, tmp_path):
    binding = read_card(made)[1].binding
    folders = [defense.save(tmp_path / name, binding, data=[]) for name in ("one", "two")]
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("name", [CARD, "shift.safetensors", "sweep.json"])
def test_a_flipped_bit_at_any_position_of_any_file_is_found(bundle, name):
    raw = (bundle / name).read_bytes()
    missed = []
    for position in range(len(raw)):
        flipped = bytearray(raw)
        flipped[position] ^= 1 << position % 8
        (bundle / name).write_bytes(flipped)
        try:
            read_card(bundle)
        except TamperedBundle as error:
            if all(word in str(error) for word in (name, "expected", "found")):
                continue
        missed.append(position)
    assert missed == []
    (bundle / name).write_bytes(raw)
    read_card(bundle)


@given(data=st.data())
def test_a_card_cut_off_anywhere_or_with_bytes_put_in_is_found(made, tmp_path_factory, data):
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("cut") / "bundle"))
    raw = (made / CARD).read_bytes()
    at = data.draw(st.integers(0, len(raw) - 1))
    added = data.draw(st.binary(max_size=3))
    assume(raw[at:] != added)
    (folder / CARD).write_bytes(raw[:at] + added)
    with pytest.raises(TamperedBundle):
        read_card(folder)
    (folder / CARD).write_bytes(raw[:at] + b" " + added + raw[at:])
    with pytest.raises(TamperedBundle):
        read_card(folder)


@pytest.mark.parametrize("content", [b"[1]", b"null", b"3", b'"card"', b"{}", b"", b"\xff\xfe"])
def test_a_card_that_is_no_card_is_found(bundle, content):
    (bundle / CARD).write_bytes(content)
    with pytest.raises(
        TamperedBundle, match="expected a card in JSON with its own hash, found other bytes"
    ):
        read_card(bundle)


def test_loading_names_both_hashes_of_a_changed_file(tiny, bundle):
    expected = file_hash(bundle / "shift.safetensors")
    raw = bytearray((bundle / "shift.safetensors").read_bytes())
    raw[-1] ^= 1
    (bundle / "shift.safetensors").write_bytes(raw)
    found = file_hash(bundle / "shift.safetensors")
    with pytest.raises(TamperedBundle, match=f"expected {expected}, found {found}"):
        hauberk.load(bundle, tiny.model, tiny.processor)


def test_a_missing_file_is_found(tiny, bundle):
    (bundle / "shift.safetensors").unlink()
    with pytest.raises(TamperedBundle, match=r"shift\.safetensors.*found no such file"):
        hauberk.load(bundle, tiny.model, tiny.processor)


@pytest.mark.parametrize("name", ["extra.py", ".hidden", "folder/inside.txt"])
def test_an_added_file_is_found(tiny, bundle, name):
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("print('hello')")
    with pytest.raises(TamperedBundle, match=f"found also .*{name.split('/')[0]}"):
        hauberk.load(bundle, tiny.model, tiny.processor)


def test_a_link_in_place_of_a_file_is_refused_even_with_the_right_content(tiny, bundle):
    (bundle / "shift.safetensors").rename(bundle.parent / "outside")
    (bundle / "shift.safetensors").symlink_to(bundle.parent / "outside")
    with pytest.raises(TamperedBundle, match="leaves the folder"):
        hauberk.load(bundle, tiny.model, tiny.processor)


@pytest.mark.parametrize(
    "name", ["../outside", "a/../../outside", "/outside", "sub/file", "..", "."]
)
def test_a_card_whose_hash_is_right_still_cannot_leave_its_folder(tiny, bundle, name):
    (bundle.parent / "outside").write_text("secret")
    files = json.loads((bundle / CARD).read_text())["files"]
    sign(bundle, files=files | {name: file_hash(bundle.parent / "outside")})
    with pytest.raises(TamperedBundle):
        hauberk.load(bundle, tiny.model, tiny.processor)


def test_a_card_of_a_newer_schema_is_told_from_a_broken_one(tiny, bundle):
    sign(bundle, schema=SCHEMA + 1, hauberk="9.0.0")
    with pytest.raises(BadBundle, match=rf"schema {SCHEMA + 1}.*up to {SCHEMA}.*hauberk 9\.0\.0"):
        hauberk.load(bundle, tiny.model, tiny.processor)


@pytest.mark.parametrize("lacking", ["files", "schema", "binding", "method", "parameters", "data"])
def test_a_signed_card_without_a_part_is_no_bundle(bundle, lacking):
    content = json.loads((bundle / CARD).read_text())
    del content[lacking]
    (bundle / CARD).write_bytes(_canonical(content))
    sign(bundle)
    with pytest.raises(BadBundle, match=lacking):
        read_card(bundle)


def test_a_method_of_a_newer_hauberk_is_named_with_the_known_ones(tiny, bundle):
    sign(bundle, method="plate")
    with pytest.raises(BadBundle, match=r"'plate' is not one of \['cmrm', .*'tga'\]"):
        hauberk.load(bundle, tiny.model, tiny.processor)


def test_a_concept_bank_is_no_defense_and_says_how_it_is_read(tiny, bundle):
    sign(bundle, method="concept_bank")
    with pytest.raises(BadBundle, match=r"is a concept bank.*ConceptBank\.load"):
        hauberk.load(bundle, tiny.model, tiny.processor)


def test_every_layer_calls_a_concept_bank_alike():
    from hauberk import concepts
    from registry import bundles
    from tasks import stage

    assert concepts.METHOD == bundles.BANK == stage.BANK


def test_a_folder_without_a_card_is_no_bundle(tiny, tmp_path):
    with pytest.raises(BadBundle, match="found 0"):
        hauberk.load(tmp_path, tiny.model, tiny.processor)
    with pytest.raises(BadBundle, match="found 0"):
        hauberk.load(str(tmp_path / "nowhere"), tiny.model, tiny.processor)


def test_vectors_of_another_shape_are_refused_although_hash_and_binding_are_right(
    tiny, made, tmp_path
):
    binding = read_card(made)[1].binding
    folder = Shift(torch.zeros(3, 32), ShiftSetting()).save(tmp_path / "b", binding, data=[])
    with pytest.raises(WrongModel, match=r"\(4, 32\).*\(3, 32\)"):
        hauberk.load(folder, tiny.model, tiny.processor)


def refused(folder, model, processor, *keys):
    """Load, which must fail for ``keys`` alone; the message must name both values of each."""
    card, found = read_card(folder)[1], binding_of(model, processor)
    with pytest.raises(WrongModel) as caught:
        hauberk.load(folder, model, processor)
    message = str(caught.value)
    for key in keys:
        line = f"{key}: expected {getattr(card.binding, key)}, found {getattr(found, key)}"
        assert line in message
        assert getattr(card.binding, key) != getattr(found, key)
    assert message.count("expected ") == len(keys)


def test_a_model_with_other_weights_is_refused(tiny, made, lab_folder):
    model, processor = build.load(lab_folder)
    with torch.no_grad():
        model.lm_head.weight += 0.5
    refused(made, model, processor, "weights")


def test_a_model_of_another_depth_is_refused(tiny, made):
    size = build.Size(
        vision_width=32, vision_layers=5, patch=24, text_width=32, text_layers=3, vocabulary=400
    )
    family = build.FAMILIES[tiny.name]
    other = build.network_of(family, tiny.processor.tokenizer, size, seed=0)
    refused(made, other, tiny.processor, "config", "weights")


def test_another_chat_template_is_refused(tiny, made, lab_folder):
    model, processor = build.load(lab_folder)
    processor.chat_template = processor.chat_template.replace("USER: ", "HUMAN: ")
    refused(made, model, processor, "chat_template")


def crop(processor):
    processor.image_processor.crop_size = {"height": 48, "width": 48}


def normalise(processor):
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]


def patches(processor):
    processor.patch_size = 12


def words(processor):
    processor.tokenizer.add_tokens(["zzz"])


def lower(processor):
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def forget(processor):
    core = processor.tokenizer.backend_tokenizer
    state = json.loads(core.to_str())
    del state["model"]["merges"][-20:]
    processor.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


@pytest.mark.parametrize("change", [crop, normalise, patches, words, lower, forget])
def test_another_processor_is_refused(made, lab_folder, change):
    model, processor = build.load(lab_folder)
    change(processor)
    refused(made, model, processor, "processor")


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("", "vision_feature_layer", -2),
        ("text_config", "rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ("vision_config", "layer_norm_eps", 0.1),
    ],
)
def test_another_config_is_refused(made, lab_folder, part, name, value):
    model, processor = build.load(lab_folder)
    setattr(getattr(model.config, part) if part else model.config, name, value)
    refused(made, model, processor, "config")


def test_a_tokenizer_that_was_used_is_still_the_same(made, lab_folder):
    model, processor = build.load(lab_folder)
    processor.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert processor.tokenizer.backend_tokenizer.truncation
    assert replace(binding_of(model, processor), model="") == replace(
        read_card(made)[1].binding, model=""
    )


def test_a_tokenizer_without_a_backend_is_known_by_its_vocabulary(lab_folder):
    model, processor = build.load(lab_folder)

    class Slow:
        chat_template = None

        def __init__(self, words):
            self.words = words

        def get_vocab(self):
            return {word: index for index, word in enumerate(self.words)}

    found = []
    for words in ("abc", "abc", "abd"):
        processor.tokenizer = Slow(words)
        found.append(binding_of(model, processor).processor)
    assert found[0] == found[1] != found[2]


def test_another_architecture_is_refused(tiny, bundle):
    card = read_card(bundle)[1]
    sign(bundle, binding=vars(card.binding) | {"architecture": "OtherForConditionalGeneration"})
    refused(bundle, tiny.model, tiny.processor, "architecture")


def test_another_version_of_transformers_is_named_where_something_differs(bundle, lab_folder):
    model, processor = build.load(lab_folder)
    model.config.image_seq_length += 1
    with pytest.raises(WrongModel, match=r"found \w+\nLoad the model"):
        hauberk.load(bundle, model, processor)
    sign(bundle, versions={"transformers": "5.0.1"})
    hint = rf"with transformers 5\.0\.1, this is {re.escape(transformers.__version__)}, which may"
    with pytest.raises(WrongModel, match=hint):
        hauberk.load(bundle, model, processor)


def test_every_difference_is_named_at_once(tiny, made, lab_folder):
    model, processor = build.load(lab_folder)
    with torch.no_grad():
        model.lm_head.weight += 0.5
    crop(processor)
    processor.chat_template += " "
    with pytest.raises(WrongModel) as caught:
        hauberk.load(made, model, processor)
    for key in ("weights", "chat_template", "processor"):
        assert f"{key}: expected " in str(caught.value)


def test_the_binding_is_the_same_in_every_precision_that_can_hold_the_weights(any_tiny, tmp_path):
    copy.deepcopy(any_tiny.model).bfloat16().save_pretrained(tmp_path / "m")
    loaded = [
        AutoModelForImageTextToText.from_pretrained(
            tmp_path / "m", dtype=dtype, attn_implementation=attention
        )
        for dtype, attention in ((torch.float32, "sdpa"), (torch.bfloat16, "eager"))
    ]
    assert [str(model.dtype) for model in loaded] == ["torch.float32", "torch.bfloat16"]
    first, second = (binding_of(model, any_tiny.processor) for model in loaded)
    assert first == second


def test_the_fingerprint_sees_names_shapes_and_values():
    def linear(**changes):
        torch.manual_seed(0)
        layer = torch.nn.Linear(6, 4)
        for name, value in changes.items():
            setattr(layer, name, torch.nn.Parameter(value))
        return fingerprint(layer)

    torch.manual_seed(0)
    weight = torch.nn.Linear(6, 4).weight.detach()
    moved = weight.clone()
    moved[3, 5] += 0.25
    prints = {
        linear(),
        linear(weight=moved),
        linear(weight=weight.reshape(4, 6).T.contiguous()),
        linear(other=torch.zeros(1)),
        fingerprint(torch.nn.Sequential(torch.nn.Linear(6, 4))),
    }
    assert len(prints) == 5
    assert linear() == linear()


@given(st.data())
def test_the_fingerprint_sees_every_single_weight(data):
    torch.manual_seed(0)
    layer = torch.nn.Linear(80, 60)
    before = fingerprint(layer)
    at = data.draw(st.integers(0, layer.weight.numel() - 1))
    with torch.no_grad():
        layer.weight.view(-1)[at] += 0.25
    assert fingerprint(layer) != before


def test_a_loaded_defense_is_not_applied_to_another_model(tiny, bundle):
    defense = hauberk.load(bundle, tiny.model, tiny.processor)
    other = copy.deepcopy(tiny.model)
    with defense.applied(other):
        pass  # the same weights in another object
    changed = copy.deepcopy(tiny.model)
    with torch.no_grad():
        next(changed.parameters())[0] += 1
    for armour in (defense, defense.with_alpha(0.5)):
        with pytest.raises(WrongModel, match="weights: expected"), armour.applied(changed):
            pytest.fail("applied to a model that it was not made for")


def test_the_binding_of_a_model_just_made_survives_round_trips_through_folders(any_tiny, tmp_path):
    model, processor = any_tiny.model, any_tiny.processor
    first = binding_of(model, processor)
    for name in ("saved", "copied", "copied again"):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / name)
        processor = AutoProcessor.from_pretrained(tmp_path / name)
        found = binding_of(model, processor)
        assert replace(found, model="") == replace(first, model="")
        assert found.model == str(tmp_path / name)


@pytest.mark.parametrize("there_before", [False, True])
def test_a_bundle_whose_saving_fails_is_as_it_was_before(made, tmp_path, there_before):
    folder = tmp_path / "bundle"
    card = read_card(made)[1]
    if there_before:
        write_bundle(folder, card, lambda home: (home / "data.txt").write_text("old") and None)

    def write(home):
        (home / "data.txt").write_text("new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_bundle(folder, card, write)
    assert [path.name for path in tmp_path.iterdir()] == (["bundle"] if there_before else [])
    if there_before:
        read_card(folder)
        assert (folder / "data.txt").read_text() == "old"


def test_what_a_killed_save_left_is_cleared_by_the_next(made, tmp_path):
    (tmp_path / "bundle.part").mkdir()
    (tmp_path / "bundle.part" / "half").write_text("x")
    write_bundle(tmp_path / "bundle", read_card(made)[1], lambda home: None)
    assert read_card(tmp_path / "bundle")[1].files == {}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def written(folder, version):
    """Write a folder of three files that say which version they are of."""
    with replacing(folder) as partial:
        for name in "abc":
            (partial / name).write_text(version)


@pytest.mark.parametrize("dead", [True, False])
def test_whenever_a_write_is_interrupted_the_old_or_the_new_is_there_and_never_half(
    tmp_path, monkeypatch, dead
):
    """A killed process does nothing more; an interrupted one cleans up."""
    seen, calls = set(), [0]
    for last in count(1):
        folder = tmp_path / str(last) / "out"
        written(folder, "old")
        with monkeypatch.context() as patched:
            calls[0] = 0

            def limited(real, last=last):
                def call(*arguments, **options):
                    calls[0] += 1
                    if calls[0] == last or (dead and calls[0] > last):
                        raise KeyboardInterrupt
                    return real(*arguments, **options)

                return call

            for name in ("mkdir", "rename", "unlink", "rmdir"):
                patched.setattr(os, name, limited(getattr(os, name)))
            try:
                written(folder, "new")
            except KeyboardInterrupt:
                pass
            else:
                break
        whole = [["new"] * 3], [["old"] * 3]
        found = [
            sorted(path.read_text() for path in home.iterdir())
            for home in ((folder,) if folder.exists() else sorted(folder.parent.iterdir()))
        ]
        assert found in (*whole, [["old"] * 3, ["new"] * 3])
        assert folder.exists() or dead
        seen.add(str(found))
        written(folder, "next")
        assert [path.name for path in folder.parent.iterdir()] == ["out"]
        assert {path.read_text() for path in folder.iterdir()} == {"next"}
    assert last == 8  # a folder made, two renames, four removals, and one that is not reached
    assert len(seen) == 2 + dead


def test_the_hash_of_a_card_covers_its_floats_exactly(made, tmp_path):
    card = replace(read_card(made)[1], measurements={"a": 0.1 + 0.2, "b": 1e-300})
    folder = write_bundle(tmp_path / "bundle", card, lambda home: None)
    assert read_card(folder)[1].measurements == {"a": 0.1 + 0.2, "b": 1e-300}
    assert isinstance(read_card(folder)[1], Card)


@pytest.fixture(scope="module")
def registered(made, tmp_path_factory):
    """The bundle as MLflow keeps it, written by MLflow itself: a model URI and its store."""
    import mlflow

    root = tmp_path_factory.mktemp("mlflow")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
    experiment = mlflow.create_experiment("bundles", artifact_location=(root / "a").as_uri())
    with mlflow.start_run(experiment_id=experiment):
        info = mlflow.pyfunc.log_model(
            name="cmrm", loader_module="hauberk.bundle", data_path=str(made), pip_requirements=[]
        )
    yield info.model_uri
    mlflow.set_tracking_uri(before)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_model_of_the_registry_loads_as_a_bundle(tiny, defense, registered):
    import mlflow

    folder = mlflow.artifacts.download_artifacts(registered)
    assert Path(folder, "MLmodel").is_file()
    loaded = hauberk.load(folder, tiny.model, tiny.processor)
    assert torch.equal(loaded.vectors, defense.vectors)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_model_of_the_registry_answers_prompts_and_pictures_without_pickle(
    tiny, defense, registered, monkeypatch
):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    asked = tiny.pictured[:2] + tiny.plain[:1]
    frame = pd.DataFrame(
        {"prompt": [r.text for r in asked], "image": [encoded(*r.images) for r in asked]}
    )
    answers = mlflow.pyfunc.load_model(registered).predict(frame)
    expected = respond(tiny.model, tiny.processor, asked, defense)
    assert answers == [answer.text for answer in expected]
    undefended = respond(tiny.model, tiny.processor, asked)
    assert answers != [answer.text for answer in undefended]


def encoded(image=None):
    if image is None:
        return None
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def served(made):
    return _load_pyfunc(str(made))


def test_rows_without_a_picture_may_leave_it_out_in_any_way(tiny, served):
    prompt = tiny.plain[0].text
    expected = [respond(tiny.model, tiny.processor, tiny.plain[:1], max_new_tokens=4)[0].text]
    limit = {"max_new_tokens": 4}
    for frame in (
        pd.DataFrame({"prompt": [prompt]}),
        pd.DataFrame({"prompt": [prompt], "image": [None]}),
        pd.DataFrame({"prompt": [prompt], "image": [float("nan")]}),
        pd.DataFrame({"prompt": [prompt], "image": [""]}),
    ):
        assert served.predict(frame, limit) == expected


def test_the_base_model_may_lie_elsewhere_but_must_be_the_same(tiny, made, lab_folder, tmp_path):
    moved = shutil.copytree(lab_folder, tmp_path / "moved")
    frame = pd.DataFrame({"prompt": [tiny.plain[0].text]})
    limit = {"max_new_tokens": 3, "model_path": str(moved)}
    assert len(_load_pyfunc(str(made)).predict(frame, limit)) == 1
    build.network_of(
        build.FAMILIES[tiny.name],
        tiny.processor.tokenizer,
        build.Size(vision_width=32, vision_layers=5, patch=24, text_width=32, text_layers=4),
        seed=1,
    ).save_pretrained(moved)
    with pytest.raises(WrongModel, match="weights: expected"):
        _load_pyfunc(str(made)).predict(frame, limit)


def test_another_path_of_the_base_model_is_asked_for_anew(tiny, made, lab_folder, tmp_path):
    served = _load_pyfunc(str(made))
    frame = pd.DataFrame({"prompt": [tiny.plain[0].text]})
    moved = shutil.copytree(lab_folder, tmp_path / "moved")
    for path in (lab_folder, moved):
        served.predict(frame, {"max_new_tokens": 2, "model_path": str(path)})
        assert served._loaded[0].name_or_path == str(path)
    first = served._loaded[0]
    served.predict(frame, {"max_new_tokens": 2, "model_path": str(moved)})
    assert served._loaded[0] is first
    with pytest.raises(OSError, match="nowhere"):
        served.predict(frame, {"model_path": str(tmp_path / "nowhere")})


def test_a_picture_is_read_from_text_or_bytes_and_turned_as_its_exif_says(tiny, served):
    image = tiny.pictured[0].images[0].resize((96, 190))
    lying = image.transpose(Image.Transpose.ROTATE_90)
    tag = Image.Exif()
    tag[ExifTags.Base.Orientation] = 6  # to be turned clockwise by 90 degrees
    buffer = io.BytesIO()
    lying.save(buffer, "PNG", exif=tag)
    text = base64.b64encode(buffer.getvalue())
    for either in (text, text.decode()):
        (shown,) = _decoded(0, either)
        assert shown.size == image.size
        assert shown.tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("frame", "params", "says"),
    [
        ({"prompt": ["hello ?"]}, {"temperature": 1}, r"unknown params \['temperature'\]"),
        ({"question": ["hello ?"]}, {}, r"column 'prompt'.*found \['question'\]"),
        ({"prompt": ["hello ?"], "image": ["%%%"]}, {}, "row 0.*base64"),
        ({"prompt": ["a", "b"], "image": [None, "aGVsbG8="]}, {}, "row 1.*picture"),
        ({"prompt": ["a", "b"], "image": ["", b"\x89PNG\r\n"]}, {}, "row 1.*base64"),
        ({"prompt": ["a"], "image": [Image.new("RGB", (8, 8))]}, {}, "row 0.*type Image"),
        ({"prompt": ["a"], "image": [0.5]}, {}, "row 0.*type float"),
        ({"prompt": ["a", None]}, {}, "row 1: prompt is (None|nan); give a text"),
        ({"prompt": [7]}, {}, "row 0: prompt is 7; give a text"),
    ],
)
def test_input_that_cannot_be_answered_is_named(served, frame, params, says):
    with pytest.raises(ValueError, match=says):
        served.predict(pd.DataFrame(frame), params)


def test_a_changed_bundle_is_not_served(bundle):
    (bundle / "sweep.json").write_text("[]\n")
    with pytest.raises(TamperedBundle):
        _load_pyfunc(str(bundle))


def test_a_picture_that_was_cut_off_is_named_by_its_row(served):
    whole = encoded(Image.new("RGB", (96, 96), "red"))
    cut = base64.b64encode(base64.b64decode(whole)[:-30]).decode()
    with pytest.raises(ValueError, match=r"row 0.*picture.*truncated"):
        served.predict(pd.DataFrame({"prompt": ["what is this ?"], "image": [cut]}))
