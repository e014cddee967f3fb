"""Concept banks: encoded once, bound to their CLIP, and every byte checked."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from hauberk.bundle import Card, binding_of, write_bundle
from hauberk.concepts import ConceptBank, build_bank
from hauberk.data.concepts import REAL, lab_concepts
from hauberk.errors import BadBundle, TamperedBundle, WrongModel
from hauberk.lab.clip import Recipe, network_of
from hauberk.lab.objects import THINGS

NAMES = {"categories": ("a bomb", "a knife red"), "reference": ("a ball", "nothing", "a cup"),
         "templates": ("a picture of {} .", "{}", "{} in the picture")}  # fmt: skip


@pytest.fixture(scope="module")
def bank(tiny_clip):
    return build_bank(tiny_clip.model, tiny_clip.processor, **NAMES)


@pytest.fixture
def saved(bank, tiny_clip, tmp_path):
    return bank.save(tmp_path / "bank", binding_of(tiny_clip.model, tiny_clip.processor))


@torch.no_grad()
@pytest.mark.parametrize("family", ["tiny_clip", "tiny_siglip"])
def test_features_are_those_of_each_text_alone_in_any_batch(family, request):
    clip = request.getfixturevalue(family)
    together, one_by_one = (
        build_bank(clip.model, clip.processor, **NAMES, batch_size=size) for size in (256, 1)
    )
    torch.testing.assert_close(together.all_features, one_by_one.all_features)
    assert together.variants[1] == ("a picture of a knife red .", "a knife red",
                                    "a knife red in the picture")  # fmt: skip
    padding = "max_length" if family == "tiny_siglip" else False
    for texts, rows in zip(
        together.variants + together.reference_variants, together.all_features, strict=True
    ):
        for text, row in zip(texts, rows, strict=True):
            tokens = clip.processor(
                text=[text], padding=padding, max_length=48, return_tensors="pt"
            )
            found = clip.model.get_text_features(**tokens).pooler_output[0]
            torch.testing.assert_close(row, normalize(found, dim=0), atol=1e-5, rtol=1e-4)
    assert together.logit_scale == pytest.approx(clip.model.logit_scale.exp().item())
    assert (together.all_features[0, 0] - together.all_features[2, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["tiny_clip", "tiny_siglip"])
def test_a_bank_comes_back_from_disk_as_it_was(family, request, tmp_path):
    clip = request.getfixturevalue(family)
    bank = build_bank(clip.model, clip.processor, **NAMES)
    alone = replace(bank, reference=(), reference_features=None)
    binding = binding_of(clip.model, clip.processor)
    for index, made in enumerate((bank, alone)):
        folder = made.save(tmp_path / str(index), binding)
        again = ConceptBank.load(folder, clip.model, clip.processor)
        assert (again.variants, again.reference_variants) == (
            made.variants, made.reference_variants,
        )  # fmt: skip
        assert torch.equal(again.all_features, made.all_features)
        assert again.logit_scale == made.logit_scale
    assert alone.reference_variants == ()


def test_a_changed_byte_of_a_bank_is_refused(saved, tiny_clip):
    path = saved / "concepts.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(TamperedBundle, match=r"concepts\.safetensors"):
        ConceptBank.load(saved, tiny_clip.model, tiny_clip.processor)


def test_a_bank_with_a_right_hash_and_wrong_content_is_refused(bank, saved, tiny_clip, tmp_path):
    tensors = load_file(saved / "concepts.safetensors")
    parameters = json.loads((saved / "card.json").read_text())["parameters"]
    binding = binding_of(tiny_clip.model, tiny_clip.processor)
    longer, missing = tensors["features"] * 2, dict(list(tensors.items())[:1])
    told = parameters | {"templates": ["{}"]}
    broken = tensors | {"features": tensors["features"] * math.nan}
    for index, (kept, names) in enumerate((
        (tensors | {"features": longer}, parameters), (missing, parameters), (tensors, told),
        (broken, parameters), (tensors | {"features": tensors["features"].half()}, parameters),
        (tensors, {}),
    )):  # fmt: skip
        folder = write_bundle(
            tmp_path / str(index), Card("concept_bank", binding, names, []),
            lambda home, kept=kept: save_file(kept, home / "concepts.safetensors"),
        )  # fmt: skip
        with pytest.raises(TamperedBundle, match="no concept bank"):
            ConceptBank.load(folder, tiny_clip.model, tiny_clip.processor)
    empty = write_bundle(tmp_path / "x", Card("cmrm", binding, {}, []), lambda _: None)
    with pytest.raises(BadBundle, match="'cmrm'"):
        ConceptBank.load(empty, tiny_clip.model, tiny_clip.processor)


def test_a_bank_of_another_clip_tokenizer_or_processor_is_refused(saved, tiny_clip, tiny_siglip):
    clip, processor = tiny_clip.model, tiny_clip.processor
    with pytest.raises(WrongModel, match="architecture: expected CLIPModel"):
        ConceptBank.load(saved, tiny_siglip.model, tiny_siglip.processor)
    recipe = Recipe(side=24, vision_width=16, vision_layers=2, patch=12, text_width=16,
                    text_layers=1, heads=2, projection=16, seed=9)  # fmt: skip
    other = network_of(processor.tokenizer, recipe)
    with pytest.raises(WrongModel, match="weights") as refused:
        ConceptBank.load(saved, other, processor)
    assert "processor" not in str(refused.value)
    mean = processor.image_processor.image_mean
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    try:
        with pytest.raises(WrongModel, match="processor"):
            ConceptBank.load(saved, clip, processor)
    finally:
        processor.image_processor.image_mean = mean


def test_names_that_make_no_bank_are_refused_with_what_would_be_right(tiny_clip):
    for changes, message in (
        ({"categories": ()}, "0 categories"),
        ({"templates": ()}, "0 templates"),
        ({"templates": ("a picture",)}, "have not one gap"),
        ({"reference": ("a bomb",)}, r"'a bomb'\] stand there more than once"),
        ({"categories": ("a bomb " * 40,)}, "the model reads 48"),
    ):
        with pytest.raises(ValueError, match=message):
            build_bank(tiny_clip.model, tiny_clip.processor, **NAMES | changes)


def test_the_labs_concepts_are_its_world_and_no_toxic_one_is_harmless():
    lab = lab_concepts()
    for name, thing in THINGS.items():
        for noun in (f"a {name}", f"the words {name}"):
            assert (noun in lab.categories) == thing.toxic
            assert (noun in lab.reference) == (not thing.toxic)
    for concepts in (lab, REAL):
        assert not set(concepts.categories) & set(concepts.reference)
        assert len(concepts.templates) == 5
        assert all(template.count("{}") == 1 for template in concepts.templates)
    assert len(REAL.categories) == 20
    assert not any("/" in name for name in REAL.categories + REAL.reference)
