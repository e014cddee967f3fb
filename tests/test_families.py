"""Every defense on every family: it does what it promises, or it is refused with the reason.

What is tried here for each line of the doctor's list is the same for all families.  The table in
docs/families.md is what the doctor says of them; ``python -m tests.families`` writes it.
"""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText

import hauberk
from hauberk.analysis.harmfulness import HarmAxis
from hauberk.analysis.twins import TwinStates, rendered_shifts
from hauberk.anatomy import anatomy_of, fold_site, layout_of
from hauberk.attention import attentions_of
from hauberk.bundle import binding_of
from hauberk.concepts import build_bank
from hauberk.defenses import GuardAlign, Projector, SafetyPrompt, Shift
from hauberk.defenses.alignment import AlignmentSetting
from hauberk.defenses.folding import export_folded, folded
from hauberk.defenses.patch_transport import PatchTransport, TransportSetting
from hauberk.defenses.prefix_attention import PrefixAttention, PrefixSetting, prefix_share
from hauberk.defenses.projector import FACTOR_A, FACTOR_B, Part
from hauberk.defenses.projector_step import Lesson, ProjectorLoss
from hauberk.defenses.safety_prompt import Geometry
from hauberk.defenses.safety_prompt_step import Case, FrameLoss, Goal
from hauberk.defenses.shift import ShiftSetting, estimate_shift, sample_shifts
from hauberk.doctor import CHECKS, verdicts_of
from hauberk.errors import HauberkError, UnknownFamily, UnsupportedRequest, WrongModel
from hauberk.pixels import as_fed, frozen
from hauberk.requests import (
    EncoderCache,
    Request,
    blank_twin,
    encode,
    encode_answered,
    prompt_of,
    respond,
    text_twin,
)
from tests.families import BLOCKS, FAMILIES, QUESTIONS, SIDE, pictures
from tests.families import table as table_of_families

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
"""Of float32 logits of some units, in batches of other shapes."""
PREFIX = PrefixSetting("As an AI assistant, ", gamma=3.0)


def answers(family, requests, defense=None, **options):
    options = {"max_new_tokens": 4} | options
    found = respond(family.model, family.processor, requests, defense, **options)
    return [(answer.text, answer.tokens) for answer in found]


@torch.no_grad()
def last_logits(model, processor, requests):
    """At the end of every prompt, one by one: (requests, vocabulary)."""
    return torch.stack([model(**encode(processor, [r])).logits[0, -1] for r in requests])


# --- Requests -------------------------------------------------------------------------------------


def test_an_answer_does_not_depend_on_its_batch(family):
    asked = [*family.plain, *family.pictured]
    random.Random(0).shuffle(asked)
    alone = [answers(family, [request])[0] for request in asked]
    for batch_size in (2, 64):
        assert answers(family, asked, batch_size=batch_size) == alone
    assert len(set(alone)) > 4  # or the test could not fail


def test_features_that_are_kept_change_no_answer(family):
    asked, cache = family.pictured + family.plain, EncoderCache(family.model, family.processor)
    for _ in range(2):
        assert answers(family, asked, cache=cache) == answers(family, asked)


def test_a_text_twin_is_the_prompt_of_a_request_that_never_had_a_picture(family):
    for request in family.pictured[:2]:
        twin = text_twin(request)
        assert prompt_of(family.processor, twin) == prompt_of(
            family.processor, Request(request.text)
        )
        inputs = encode(family.processor, [twin])
        assert "pixel_values" not in inputs
        assert not (inputs["input_ids"] == anatomy_of(family.model).image_token_id).any()


def test_a_blank_twin_has_the_tokens_of_its_request_and_another_picture(family):
    for request in family.pictured[:3]:
        shown, blank = (
            encode(family.processor, [each])
            for each in (request, blank_twin(request, family.processor))
        )
        assert torch.equal(shown["input_ids"], blank["input_ids"])
        assert shown["pixel_values"].shape == blank["pixel_values"].shape
        assert not torch.equal(shown["pixel_values"], blank["pixel_values"])


def test_a_system_turn_and_a_begun_answer_stand_where_they_belong(family):
    request = replace(family.pictured[0], system="be kind .", begun="it is")
    prompt = prompt_of(family.processor, request)
    assert prompt.index("be kind .") < prompt.index(request.text) < prompt.rindex("it is")
    assert prompt.endswith("it is")


@torch.no_grad()
def test_the_loss_of_an_answer_does_not_depend_on_its_batch(family):
    asked, said = family.pictured[:2], ["it is red", "who said that ?"]
    inputs, labels = encode_answered(family.processor, asked, said, 4)
    logits = family.model(**inputs).logits[:, -labels.shape[1] - 1 : -1]
    for row, (request, answer) in enumerate(zip(asked, said, strict=True)):
        one, label = encode_answered(family.processor, [request], [answer], 4)
        alone = family.model(**one).logits[0, -label.shape[1] - 1 : -1]
        torch.testing.assert_close(logits[row, : label.shape[1]], alone, **CLOSE)


@torch.no_grad()
def test_teacher_forcing_predicts_what_decoding_predicts(family):
    """Also where an answer is another kind of token than its prompt, as to PaliGemma."""
    request = family.pictured[1]
    inputs = encode(family.processor, [request])
    drawn = family.model.generate(
        **inputs, max_new_tokens=3, do_sample=False, output_logits=True, eos_token_id=None,
        return_dict_in_generate=True,
    )  # fmt: skip
    length = inputs["input_ids"].shape[1]
    forced, _ = encode_answered(family.processor, [request], ["who said that ?"], 2)
    forced["input_ids"][:, length:] = drawn.sequences[:, length : length + 2]
    logits = family.model(**forced).logits[0, length - 1 :]
    torch.testing.assert_close(logits, torch.cat(drawn.logits), **CLOSE)


def test_rows_that_would_see_each_other_s_pictures_are_not_encoded_together(family):
    asked = [family.pictured[0], family.plain[0]]
    if layout_of(family.model) == "cross":
        with pytest.raises(UnsupportedRequest, match=r"requests of \[0, 1\] pictures"):
            encode(family.processor, asked)
        return
    with torch.no_grad():
        batch = family.model(**encode(family.processor, asked)).logits[:, -1]
    torch.testing.assert_close(batch, last_logits(family.model, family.processor, asked), **CLOSE)


@pytest.mark.parametrize("family", ["paligemma"], indirect=True)
def test_prompts_made_in_place_of_paligemma_s_processor_are_the_same_as_its(family):
    request = family.pictured[0]
    made = encode(family.processor, [request])
    real = family.processor(text="<image>" + request.text, images=request.images[0])
    for name in made:
        assert torch.equal(made[name], torch.as_tensor(np.stack(real[name])))


def test_a_processor_without_a_chat_template_is_named(family):
    bare = copy.copy(family.processor)
    bare.chat_template = None
    if family.name == "paligemma":
        assert prompt_of(bare, family.plain[0]).endswith("\n")
        return
    with pytest.raises(UnsupportedRequest, match=r"no chat template.*set processor\.chat_template"):
        prompt_of(bare, family.plain[0])


# --- What each line of the doctor's list promises -------------------------------------------------


def try_shift(family, tmp_path, level):
    shifts = sample_shifts(family.model, family.processor, family.pictured)
    setting = ShiftSetting(level=level, alpha=2.0)
    holds(family, Shift(estimate_shift(shifts), setting, family.processor), tmp_path, texts=False)


def constant_shift(family):
    vectors = torch.randn(BLOCKS, 32, generator=torch.Generator().manual_seed(0))
    return Shift(vectors, ShiftSetting(position="all", compose="incremental", alpha=0.7))


def try_fold(family, tmp_path):
    shift = constant_shift(family)
    plain = last_logits(family.model, family.processor, family.pictured)
    before = snapshot(family.model)
    with pytest.raises(ZeroDivisionError), folded(shift, family.model):
        found = last_logits(family.model, family.processor, family.pictured)
        assert not torch.allclose(found, plain, atol=1e-2)
        raise ZeroDivisionError
    with shift.applied(family.model):
        hooked = last_logits(family.model, family.processor, family.pictured)
    torch.testing.assert_close(found, hooked, **CLOSE)
    assert_restored(family, before, plain)


def try_folded_export(family, tmp_path):
    shift = constant_shift(family)
    with shift.applied(family.model):
        hooked = last_logits(family.model, family.processor, family.pictured)
    before, config = snapshot(family.model), family.model.config.text_config
    folder = export_folded(shift, family.model, family.processor, tmp_path / "served")
    served = AutoModelForImageTextToText.from_pretrained(folder).eval()
    found = last_logits(served, family.processor, family.pictured)
    torch.testing.assert_close(found, hooked, **CLOSE)
    assert_unchanged(family.model, before)
    assert family.model.config.text_config is config


def try_frame(family, tmp_path):
    frame = torch.randint(256, (3, 2 * SIDE, 2 * SIDE), generator=torch.Generator().manual_seed(0))
    geometry = Geometry(2 * SIDE, 2 * SIDE, (10, 10, 10, 10))
    holds(family, SafetyPrompt(frame.byte(), geometry, "be kind . "), tmp_path, texts=False)


def try_frame_training(family, tmp_path):
    width, height = as_fed(family.processor, pictures(1)[0]).size
    axis = HarmAxis(2, torch.ones(32) / 32**0.5, 0.0)
    cases = [
        Case(Request(QUESTIONS[0], pictures(1)), True, "who said that ?"),
        Case(Request(QUESTIONS[4], pictures(1)), False, "it is red"),
    ]
    with frozen(family.model):
        loss = FrameLoss(
            family.model, family.processor, Geometry(height, width, (6, 6, 6, 6)),
            Goal(axis, 100.0, -100.0, clean_weight=0.5),
        )  # fmt: skip
        rows = loss.prepare(cases, 4)
        frame = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
        found = loss(frame, rows, [True, True])
        canvas = (loss.canvas(frame, rows) * 255).round().byte().permute(0, 2, 3, 1)
    framed = [
        replace(case.request, images=[Image.fromarray(pixels.numpy())])
        for case, pixels in zip(cases, canvas, strict=True)
    ]
    expected = [
        loss_of(family, request, case.answer) for request, case in zip(framed, cases, strict=True)
    ]
    assert found.answer == pytest.approx(sum(expected) / 2, abs=1e-3)
    assert found.gradient[:, :6].abs().sum() > 0
    assert not found.gradient[:, 6:-6, 6:-6].any()


def try_masks(family, tmp_path, clip):
    holds(family, GuardAlign(clip, None, bank_hash="ab" * 32), tmp_path, texts=False, clip=clip)


def try_calibration(family, tmp_path):
    prefix = PrefixAttention(PREFIX, family.processor)
    asked = [family.pictured[0]]
    more, before = (
        prefix_share(family.model, family.processor, asked, each)[0]
        for each in (prefix, prefix.with_gamma(0.0))
    )
    chosen = [layer for layer in PREFIX.chosen_layers(BLOCKS) if not before[layer].isnan()]
    assert chosen
    assert (more[chosen] > 1.2 * before[chosen]).all()
    holds(family, GuardAlign(None, prefix), tmp_path, texts=True)


def trained(family, part):
    made, generator = {}, torch.Generator().manual_seed(0)
    for name, weight in part.whole(family.model).items():
        made[name] = weight.detach() * 1.5 + 0.1
    for name, layer in part.adapted(family.model).items():
        factors = {FACTOR_A: (2, layer.in_features), FACTOR_B: (layer.out_features, 2)}
        for kind, shape in factors.items():
            made[f"{name}.weight{kind}"] = 0.3 * torch.randn(shape, generator=generator)
    return Projector(made, part)


def try_projector(family, tmp_path):
    holds(family, trained(family, Part()), tmp_path, texts=False)


def try_low_rank(family, tmp_path):
    holds(family, trained(family, Part("lora", rank=2, alpha=4)), tmp_path, texts=True)


def try_projector_training(family, tmp_path):
    large, small = pictures(2, ((2 * SIDE, 2 * SIDE), (SIDE, SIDE)))
    lessons = [
        Lesson(Request(QUESTIONS[0], [small]), "who said that ?", "a red thing"),
        Lesson(Request(QUESTIONS[4]), "it is red"),
        Lesson(Request(QUESTIONS[1], [large]), "name 7", "many of them"),
    ]
    weights = list(anatomy_of(family.model).projector.parameters())
    expected = [loss_of(family, lesson.request, lesson.answer) for lesson in lessons]
    for features in (0, 2**31):
        loss = ProjectorLoss(
            family.model, family.processor, AlignmentSetting(layers=(1, 2)), features=features
        )
        found = loss(loss.prepare(lessons, 4), 1.0)
        assert found.answers == pytest.approx(sum(expected) / 3, abs=1e-3)
        gradients = torch.autograd.grad(found.loss, weights, allow_unused=True)
        assert sum(part.abs().sum() for part in gradients if part is not None) > 0


def try_projector_export(family, tmp_path):
    projector = trained(family, Part())
    with projector.applied(family.model):
        inside = last_logits(family.model, family.processor, family.pictured)
    folder = projector.export(family.model, family.processor, tmp_path / "served")
    served = AutoModelForImageTextToText.from_pretrained(folder).eval()
    found = last_logits(served, family.processor, family.pictured)
    torch.testing.assert_close(found, inside, **CLOSE)


TRIES = {
    ("cmrm", "per data set"): lambda family, path, clip: try_shift(family, path, "dataset"),
    ("cmrm", "per request"): lambda family, path, clip: try_shift(family, path, "sample"),
    ("cmrm", "folds"): lambda family, path, clip: try_fold(family, path),
    ("cmrm", "exports"): lambda family, path, clip: try_folded_export(family, path),
    ("davsp", "applies"): lambda family, path, clip: try_frame(family, path),
    ("davsp", "trains"): lambda family, path, clip: try_frame_training(family, path),
    ("guardalign", "masks"): try_masks,
    ("guardalign", "calibrates"): lambda family, path, clip: try_calibration(family, path),
    ("tga", "projector"): lambda family, path, clip: try_projector(family, path),
    ("tga", "low rank"): lambda family, path, clip: try_low_rank(family, path),
    ("tga", "trains"): lambda family, path, clip: try_projector_training(family, path),
    ("tga", "exports"): lambda family, path, clip: try_projector_export(family, path),
}


def test_everything_that_the_doctor_says_is_tried():
    assert list(TRIES) == [(defense, action) for defense, action, _ in CHECKS]


@pytest.mark.parametrize("line", list(TRIES), ids="-".join)
def test_what_the_doctor_says_of_a_family_is_what_happens(family, line, tmp_path, clip):
    said = verdicts_of(family.model, family.processor.image_processor)
    (verdict,) = [each for each in said if (each.defense, each.action) == line]
    if verdict.possible:
        TRIES[line](family, tmp_path, clip)
        return
    plain = last_logits(family.model, family.processor, family.pictured[:1])
    before = snapshot(family.model)
    with pytest.raises(HauberkError) as caught:
        TRIES[line](family, tmp_path, clip)
    assert str(caught.value) == verdict.reason
    assert family.name in verdict.reason or isinstance(caught.value, UnknownFamily)
    assert not list(tmp_path.iterdir())  # nothing half done is left behind
    assert_unchanged(family.model, before)
    assert torch.equal(last_logits(family.model, family.processor, family.pictured[:1]), plain)


def test_the_table_in_the_docs_is_what_the_doctor_says(pytestconfig):
    written = (pytestconfig.rootpath / "docs" / "families.md").read_text("utf-8")
    assert written == table_of_families(), "run: python -m tests.families > docs/families.md"


# --- What all of it must do -----------------------------------------------------------------------


def holds(family, defense, tmp_path, *, texts, clip=None):
    """Change answers, the same in batches and alone; restore every bit; be bound when on disk.

    ``texts`` says whether requests without a picture are changed as well.
    """
    asked = [*family.pictured[:3], *family.plain[:2]]
    plain = last_logits(family.model, family.processor, asked)
    before = snapshot(family.model)
    armoured = [defense.rewrite(request) for request in asked]
    with pytest.raises(ZeroDivisionError), defense.applied(family.model):
        inside = last_logits(family.model, family.processor, armoured)
        raise ZeroDivisionError
    changed = [not torch.allclose(*pair, **CLOSE) for pair in zip(inside, plain, strict=True)]
    assert changed == [True] * 3 + [texts] * 2
    if not texts:
        assert torch.equal(inside[3:], plain[3:])
    assert_restored(family, before, plain, asked)
    assert answers(family, asked, defense) == [answers(family, [r], defense)[0] for r in asked]
    assert_restored(family, before, plain, asked)

    folder = defense.save(tmp_path / "bundle", binding_of(family.model, family.processor), data=[])
    if clip is not None:
        clip = clip.folder
    loaded = hauberk.load(folder, family.model, family.processor, clip=clip)
    again = [loaded.rewrite(request) for request in asked]
    with loaded.applied(family.model):
        assert torch.equal(last_logits(family.model, family.processor, again), inside)
    other = copy.deepcopy(family.model)
    next(anatomy_of(other).blocks[0].parameters()).data += 1
    with pytest.raises(WrongModel, match="weights: expected"), loaded.applied(other):
        pass


@torch.no_grad()
def loss_of(family, request, answer):
    inputs, labels = encode_answered(family.processor, [request], [answer], 4)
    logits = family.model(**inputs).logits[0, -labels.shape[1] - 1 : -1]
    return cross_entropy(logits, labels[0]).item()


def snapshot(model):
    """Weights and hooks, of which transformers leaves some of its own on a model that has run."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return {name: value.clone() for name, value in model.state_dict().items()}, hooks


def assert_unchanged(model, before):
    weights, hooks = snapshot(model)
    assert weights.keys() == before[0].keys()
    assert all(torch.equal(weights[name], before[0][name]) for name in weights)
    assert hooks == before[1]


def assert_restored(family, before, plain, asked=None):
    assert_unchanged(family.model, before)
    found = last_logits(family.model, family.processor, asked or family.pictured)
    assert torch.equal(found, plain)


@pytest.fixture(scope="module")
def clip(tiny_clip, tmp_path_factory):
    """A detector that masks half of every picture, which knows where its CLIP lies."""
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    tiny_clip.model.save_pretrained(folder)
    tiny_clip.processor.save_pretrained(folder)
    bank = build_bank(
        tiny_clip.model, tiny_clip.processor, categories=("a bomb", "a knife"),
        reference=("a ball",), templates=("a picture of {} .",),
    )  # fmt: skip
    setting = TransportSetting(threshold=float("inf"), max_share=0.5)
    detector = PatchTransport(tiny_clip.model, tiny_clip.processor, bank, setting)
    detector.folder = folder
    return detector


# --- Traps ----------------------------------------------------------------------------------------


def test_shifts_read_off_tokens_are_those_of_whole_twins(family):
    said = verdicts_of(family.model, family.processor.image_processor)
    if not next(verdict.possible for verdict in said if verdict.action == "per request"):
        with pytest.raises(UnsupportedRequest, match="use level: dataset"):
            TwinStates(family.model, family.processor)
        return
    found = sample_shifts(family.model, family.processor, family.pictured)
    torch.testing.assert_close(
        found, rendered_shifts(family.model, family.processor, family.pictured), **CLOSE
    )


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_calibrated_attention_keeps_the_mask_of_the_family(family, kind):
    """Both kinds are given their masks in other ways, some of which are not causal."""
    model = copy.deepcopy(family.model)
    model.set_attn_implementation({"text_config": kind})
    modules = attentions_of(anatomy_of(model)).values()
    assert {module.config._attn_implementation for module in modules} == {kind}
    prefix = PrefixAttention(PREFIX, family.processor)
    asked = [prefix.rewrite(request) for request in (*family.pictured[:2], family.plain[0])]
    with prefix.applied(family.model):
        expected = last_logits(family.model, family.processor, asked)
    with prefix.applied(model):
        torch.testing.assert_close(
            last_logits(model, family.processor, asked), expected, atol=1e-3, rtol=1e-3
        )


@torch.no_grad()
def test_a_picture_changes_the_answer(family):
    """Or every contract above would hold of a model that does not look."""
    shown = family.pictured[0]
    blank = blank_twin(shown, family.processor)
    found = last_logits(family.model, family.processor, [shown, blank])
    assert not torch.allclose(*found, atol=1e-2)


def test_blocks_of_cross_attention_take_the_state_before_them_where_there_is_no_picture():
    from hauberk.analysis.twins import last_states
    from tests.families import parts_of

    model, processor = parts_of("mllama")
    states = last_states(model, processor, [Request(QUESTIONS[5])])[0]
    across = [fold_site(block).kind == "gated" for block in anatomy_of(model).blocks]
    assert across == [False, True, False, True]
    assert torch.equal(states[1], states[0])
    assert not torch.equal(states[2], states[1])


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_a_bias_that_does_not_do_what_the_hook_does_is_not_written(family, tmp_path, monkeypatch):
    """A block that scales what it adds, under a name that nobody told."""
    sites = [replace(fold_site(block), scale=2.0) for block in anatomy_of(family.model).blocks]
    monkeypatch.setattr("hauberk.defenses.folding.fold_site", lambda _: sites[0])
    with pytest.raises(UnsupportedRequest, match=r"'llava'.*do not move the states as hooks do"):
        export_folded(constant_shift(family), family.model, family.processor, tmp_path / "served")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["llava_next"], indirect=True)
def test_a_decoder_with_a_window_is_not_written_as_one_without(family, tmp_path, monkeypatch):
    monkeypatch.setattr(family.model.config.text_config, "sliding_window", 16)
    with pytest.raises(UnsupportedRequest, match="window of 16 positions"):
        export_folded(constant_shift(family), family.model, family.processor, tmp_path / "served")


@pytest.mark.parametrize("family", ["llava"], indirect=True)
@pytest.mark.parametrize("wrong", [{"level": "sample"}, {"position": "last"}, {"steps": "prefill"}])
def test_a_shift_that_is_no_constant_is_not_folded(family, wrong):
    (name,) = wrong
    setting = replace(ShiftSetting(position="all"), **wrong)
    shift = Shift(torch.ones(BLOCKS, 32), setting, family.processor)
    with pytest.raises(UnsupportedRequest, match=f"{name}: {wrong[name]}.*is not the same"):
        with folded(shift, family.model):
            pass


def test_every_known_family_is_tried():
    from hauberk.anatomy import FAMILIES as KNOWN

    never_run = {"ernie4_5_vl_moe", "hyperclovax_vision_v2", "ovis2"}
    assert set(KNOWN) - never_run <= set(FAMILIES)
