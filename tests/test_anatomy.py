"""Finding the parts of a model: never the wrong one, never a guess."""

import pytest
import torch
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hauberk import anatomy
from hauberk.anatomy import FAMILIES, Family, anatomy_of
from hauberk.errors import HauberkError, LayerOutOfRange, UnknownFamily
from hauberk.requests import encode

CLIP = {"clip_vision_model": "fixed"}


def test_the_blocks_are_the_decoder_s_and_not_those_of_the_vision_tower(any_tiny):
    found = anatomy_of(any_tiny.model)
    assert len(found.blocks) == any_tiny.model.config.text_config.num_hidden_layers == 4
    inside = {id(module) for module in found.vision_tower.modules()}
    assert not inside & {id(block) for block in found.blocks}


@torch.no_grad()
def test_the_decoder_runs_its_blocks_in_order_on_states_of_the_hidden_size(any_tiny):
    found = anatomy_of(any_tiny.model)
    ran = []
    hooks = [
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, block in enumerate(found.blocks)
    ]
    found.decoder(inputs_embeds=torch.zeros(1, 3, found.hidden_size))
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1, 2, 3]


@torch.no_grad()
def test_what_the_projector_makes_of_the_tower_s_states_is_what_the_decoder_is_given(any_tiny):
    found = anatomy_of(any_tiny.model)
    inputs = encode(any_tiny.processor, any_tiny.pictured[:1])
    pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}

    def features():
        made = any_tiny.model.get_image_features(**pixels).pooler_output
        return torch.cat(list(made)).reshape(-1, found.hidden_size)

    plain = features()
    assert len(plain) == (inputs["input_ids"] == found.image_token_id).sum()
    with found.projector.register_forward_hook(lambda _module, _inputs, made: made + 3):
        torch.testing.assert_close(features(), plain + 3)
    first = next(module for module in found.vision_tower.modules() if hasattr(module, "weight"))
    with first.register_forward_hook(lambda _module, _inputs, made: 0 * made):
        assert not torch.allclose(features(), plain, atol=1e-2)


def test_the_layout_of_the_pixels_is_that_of_the_family(any_tiny):
    layouts = {"llava": "fixed", "qwen2_5_vl": "flat", "internvl": "tiles"}
    found = anatomy_of(any_tiny.model)
    assert found.layout == layouts[found.family]


def test_the_image_token_is_the_one_that_the_processor_writes(any_tiny):
    token = any_tiny.processor.tokenizer.convert_tokens_to_ids(any_tiny.processor.image_token)
    assert anatomy_of(any_tiny.model).image_token_id == token


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


def test_a_model_without_a_row_in_the_table_is_refused_by_name():
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(UnknownFamily, match=r"'llama' \(LlamaForCausalLM\).*'llava'.*FAMILIES"):
        anatomy_of(LlamaForCausalLM(config))


def llava(eyes):
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    text = LlamaConfig(vocab_size=8, num_hidden_layers=1, **size)
    vision = AutoConfig.for_model(eyes, num_hidden_layers=1, image_size=8, patch_size=4, **size)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=7)
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("eyes", ["clip_vision_model", "siglip_vision_model"])
def test_towers_that_see_one_square_have_the_fixed_layout(eyes):
    assert anatomy_of(llava(eyes)).layout == "fixed"


def test_a_vision_tower_whose_layout_is_not_known_is_refused_by_name():
    """Pixtral's pictures are of any size, so that one blank does not stand for all."""
    with pytest.raises(UnknownFamily, match=r"'pixtral' is not known in 'llava'.*clip_vision.*row"):
        anatomy_of(llava("pixtral"))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            Family("model.eyes", "model.multi_modal_projector", CLIP),
            "vision tower.*`model.eyes`",
        ),
        (Family("model.vision_tower", "model.bridge", CLIP), "projector.*`model.bridge`"),
    ],
)
def test_a_part_that_is_not_where_its_row_says_is_named(tiny, monkeypatch, row, says):
    monkeypatch.setitem(FAMILIES, "llava", row)
    with pytest.raises(UnknownFamily, match=says):
        anatomy_of(tiny.model)


def test_every_family_of_the_table_is_a_model_type_of_transformers():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert set(anatomy.FAMILIES) <= set(CONFIG_MAPPING_NAMES)
