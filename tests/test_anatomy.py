"""Finding the parts of a model: never the wrong one, never a guess."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hauberk import anatomy
from hauberk.anatomy import FAMILIES, anatomy_of, fold_site, path_of
from hauberk.errors import HauberkError, LayerOutOfRange, UnknownFamily
from hauberk.requests import encode
from tests.families import BLOCKS

LLAMA = LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
)
EXPECTED = {
    # family: layout, vision tower, connectors, blocks that take a folded constant
    "cohere2_vision": (None, "vision_tower", ["multi_modal_projector"], "linear"),
    "deepseek_vl": ("fixed", "vision_model", ["aligner"], "linear"),
    "gemma3": ("fixed", "vision_tower", ["multi_modal_projector"], "none"),
    "glm4v": ("flat", "visual", ["visual.merger"], "none"),
    "idefics3": ("split", "vision_model", ["connector"], "linear"),
    "internvl": ("tiles", "vision_tower", ["multi_modal_projector"], "linear"),
    "llava": ("fixed", "vision_tower", ["multi_modal_projector"], "linear"),
    "llava_next": ("anyres", "vision_tower", ["multi_modal_projector"], "linear"),
    "llava_onevision": ("anyres", "vision_tower", ["multi_modal_projector"], "linear"),
    "mistral3": ("sized", "vision_tower", ["multi_modal_projector"], "linear"),
    "mllama": ("cross", "vision_model", ["multi_modal_projector"], "linear gated"),
    "paligemma": ("fixed", "vision_tower", ["multi_modal_projector"], "linear"),
    "qwen2_5_vl": ("flat", "visual", ["visual.merger"], "linear"),
    "qwen2_vl": ("flat", "visual", ["visual.merger"], "linear"),
    "qwen3_vl": ("flat", "visual", ["visual.merger", "visual.deepstack_merger_list"], "linear"),
    "smolvlm": ("split", "vision_model", ["connector"], "linear"),
    "vipllava": ("fixed", "vision_tower", ["multi_modal_projector"], "linear"),
}


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def test_every_part_is_found_where_it_is(family):
    found = anatomy_of(family.model)
    layout, tower, connectors, folds = EXPECTED[family.name]
    assert found.layout == layout
    assert path_of(family.model, found.vision_tower) == f"model.{tower}"
    assert list(found.connectors) == [f"model.{path}" for path in connectors]
    assert found.projector is found.connectors[f"model.{connectors[0]}"]
    assert " ".join(dict.fromkeys(fold_site(block).kind for block in found.blocks)) == folds
    assert found.mutual == (family.name in ("gemma3", "paligemma"))


def test_a_model_without_weights_has_the_anatomy_of_one_with(family):
    bare = on_meta(family.model.config)
    assert next(bare.parameters()).is_meta
    with_weights, without = anatomy_of(family.model), anatomy_of(bare)
    for name in ("family", "hidden_size", "image_token_id", "layout", "mutual"):
        assert getattr(with_weights, name) == getattr(without, name)
    assert list(with_weights.connectors) == list(without.connectors)
    assert len(with_weights.blocks) == len(without.blocks)


def test_the_blocks_are_the_decoder_s_and_not_those_of_the_vision_tower(family):
    found = anatomy_of(family.model)
    assert len(found.blocks) == family.model.config.text_config.num_hidden_layers == BLOCKS
    inside = {id(module) for module in found.vision_tower.modules()}
    assert not inside & {id(block) for block in found.blocks}


@torch.no_grad()
def test_the_decoder_runs_its_blocks_in_order_on_states_of_the_hidden_size(family):
    found = anatomy_of(family.model)
    ran = []
    hooks = [
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, block in enumerate(found.blocks)
    ]
    found.decoder(inputs_embeds=torch.zeros(1, 3, found.hidden_size))
    for hook in hooks:
        hook.remove()
    across = {i for i, block in enumerate(found.blocks) if fold_site(block).kind == "gated"}
    assert ran == [layer for layer in range(BLOCKS) if layer not in across]


@torch.no_grad()
def test_what_tower_and_projector_make_reaches_the_answer(family):
    """So that neither is a part that some path goes around, as at Gemma's random weights."""
    found = anatomy_of(family.model)
    inputs = encode(family.processor, family.pictured[:1])
    plain = family.model(**inputs).logits[:, -1]
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)  # which are run, not only read
    first = next(module for module in found.vision_tower.modules() if isinstance(module, kinds))
    for part in (first, *found.connectors.values()):
        holders = part if isinstance(part, torch.nn.ModuleList) else [part]
        for holder in holders:
            with holder.register_forward_hook(lambda _module, _inputs, made: made * 0.5 + 1):
                assert not torch.allclose(family.model(**inputs).logits[:, -1], plain, atol=1e-4)


def test_image_tokens_stand_where_a_picture_is_and_nowhere_else(family):
    token = anatomy_of(family.model).image_token_id
    for request in (*family.pictured[:3], *family.plain[:2]):
        ids = encode(family.processor, [request])["input_ids"]
        number = int((ids == token).sum())
        assert number > 0 if request.images else number == 0
        if family.name == "mllama":
            assert number == len(request.images)


@pytest.mark.parametrize(
    ("model_type", "tower", "projector"),
    [
        ("aria", "model.vision_tower", "model.multi_modal_projector"),
        ("ernie4_5_vl_moe", "model.vision_tower", "model.resampler_model"),
        ("got_ocr2", "model.vision_tower", "model.multi_modal_projector"),
        ("hyperclovax_vision_v2", "model.vision_model", "model.projector"),
        ("kimi_k25", "model.vision_tower", "model.mm_projector"),
        ("lfm2_vl", "model.vision_tower", "model.multi_modal_projector"),
        ("lighton_ocr", "model.vision_encoder", "model.vision_projection"),
        ("llama4", "vision_model", "multi_modal_projector"),
        ("molmo2", "model.vision_tower", "model.multi_modal_projector"),
        ("ovis2", "model.vision_tower", "model.visual_embeddings_table"),
        ("qwen3_5", "model.visual", "model.visual.merger"),
    ],
)
def test_families_that_were_never_run_are_found_as_well(model_type, tower, projector):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    model = on_meta(AutoConfig.for_model(model_type))
    found = anatomy_of(model)
    assert path_of(model, found.vision_tower) == tower
    assert next(iter(found.connectors)) == projector
    assert len(found.blocks) == model.config.get_text_config().num_hidden_layers
    assert found.layout in (None, "flat")


def test_a_switch_that_puts_the_norm_behind_the_mlp_is_seen():
    config = AutoConfig.for_model("molmo2")
    kinds = []
    for config.text_config.norm_after in (False, True):
        site = fold_site(anatomy_of(on_meta(config)).blocks[0])
        kinds.append((site.kind, site.reason))
    assert kinds[0] == ("linear", "")
    assert kinds[1][0] == "none"
    assert "post_attention_layernorm" in kinds[1][1]


def test_experts_take_no_bias_and_are_named():
    site = fold_site(anatomy_of(on_meta(AutoConfig.for_model("aria"))).blocks[0])
    assert site.kind == "none"
    assert "shared_experts.down_proj" in site.reason


@pytest.mark.parametrize("layers", [(), (0,), (3,), (0, 1, 2, 3)])
def test_every_block_of_the_model_may_be_named(tiny, layers):
    anatomy_of(tiny.model).check_layers(layers)


@pytest.mark.parametrize("layers", [(4,), (-1,), (0, 7, 99)])
def test_a_layer_out_of_range_names_itself_the_range_and_the_cure(tiny, layers):
    outside = [layer for layer in layers if not 0 <= layer <= 3]
    with pytest.raises(LayerOutOfRange) as caught:
        anatomy_of(tiny.model).check_layers(layers)
    message = str(caught.value)
    assert str(outside) in message
    assert "0..3" in message
    assert "params.yaml" in message
    assert isinstance(caught.value, HauberkError)


def test_a_model_that_reads_text_alone_is_refused_by_name():
    says = r"'llama' \(LlamaForCausalLM\) has no vision tower .*get_encoder.*Family\(vision_tower="
    with pytest.raises(UnknownFamily, match=says):
        anatomy_of(LlamaForCausalLM(LLAMA))


def test_an_encoder_of_prompts_is_refused():
    with pytest.raises(UnknownFamily, match=r"florence2.*encoder of their own"):
        anatomy_of(on_meta(AutoConfig.for_model("florence2")))


def test_a_config_that_names_no_image_token_is_refused_with_both_names():
    model = on_meta(
        AutoConfig.for_model("minicpmv4_6")
    )  # whose config says it in checkpoints alone
    with pytest.raises(UnknownFamily, match="`image_token_id` nor as `image_token_index`"):
        anatomy_of(model)


def test_a_projector_that_is_missing_or_there_twice_is_no_guess():
    model = llava("clip_vision_model")
    model.model.aligner = torch.nn.Linear(8, 8)
    says = r"has 2 that may be .*multi_modal_projector.*aligner.*'llava': Family\(projector="
    with pytest.raises(UnknownFamily, match=says):
        anatomy_of(model)
    del model.model.aligner, model.model.multi_modal_projector
    with pytest.raises(UnknownFamily, match=r"no projector; looked for .*'model.connector'"):
        anatomy_of(model)


def llava(eyes):
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    text = LlamaConfig(vocab_size=8, num_hidden_layers=1, **size)
    vision = AutoConfig.for_model(eyes, num_hidden_layers=1, image_size=8, patch_size=4, **size)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=7)
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("eyes", ["clip_vision_model", "siglip_vision_model"])
def test_towers_that_see_one_square_have_the_fixed_layout(eyes):
    assert anatomy_of(llava(eyes)).layout == "fixed"


@pytest.mark.parametrize(("eyes", "layout"), [("pixtral", "sized"), ("dinov2", None)])
def test_the_layout_follows_from_the_tower_or_is_not_known(eyes, layout):
    """Pixtral's pictures are of any size, so that one blank does not stand for all."""
    assert anatomy_of(llava(eyes)).layout == layout


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"vision_tower": "model.eyes"}, "vision tower.*`model.eyes`"),
        ({"projector": "model.bridge"}, "projector.*`model.bridge`"),
        ({"deepstack": "model.stack"}, "deepstack.*`model.stack`"),
    ],
)
def test_a_part_that_is_not_where_its_row_says_is_named(tiny, monkeypatch, row, says):
    monkeypatch.setitem(FAMILIES, "llava", replace(FAMILIES["llava"], **row))
    with pytest.raises(UnknownFamily, match=says):
        anatomy_of(tiny.model)


def test_every_family_of_the_table_is_a_model_type_of_transformers():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert set(anatomy.FAMILIES) <= set(CONFIG_MAPPING_NAMES)
