"""The defense of trained weights: applied and put back, installed, saved, and exported."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from hauberk.anatomy import FAMILIES, anatomy_of
from hauberk.bundle import CARD, binding_of, fingerprint
from hauberk.defenses import Projector, load
from hauberk.defenses.projector import FACTOR_A, FACTOR_B, Part, Retrieved
from hauberk.errors import LayerOutOfRange, TamperedBundle, UnsupportedRequest, WrongModel
from hauberk.requests import encode, respond

PARTS = (Part("projector"), Part("lora", last=1, rank=2, alpha=4), Part("decoder"))


def changed(model, part, seed=0):
    """A projector whose every tensor is another than the model's."""
    torch.manual_seed(seed)
    tensors = {n: w + 0.1 * torch.randn_like(w) for n, w in part.whole(model).items()}
    for name, layer in part.adapted(model).items():
        tensors[f"{name}.weight{FACTOR_A}"] = 0.3 * torch.randn(part.rank, layer.in_features)
        tensors[f"{name}.weight{FACTOR_B}"] = 0.3 * torch.randn(layer.out_features, part.rank)
    return Projector(tensors, part, {"layers": [1]})


@pytest.fixture(params=PARTS, ids=lambda part: part.mode)
def part(request):
    return request.param


@torch.no_grad()
def logits(tiny):
    return tiny.model(**encode(tiny.processor, tiny.pictured[:3])).logits


def weights(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_weights_are_replaced_and_put_back_bit_by_bit(any_tiny, part):
    before, plain = weights(any_tiny.model), logits(any_tiny)
    projector = changed(any_tiny.model, part)
    with projector.applied(any_tiny.model):
        assert not torch.allclose(logits(any_tiny), plain)
        assert not same(weights(any_tiny.model), before)
    assert same(weights(any_tiny.model), before)
    assert torch.equal(logits(any_tiny), plain)


def test_they_are_put_back_after_an_error(tiny, part):
    before = weights(tiny.model)
    with pytest.raises(RuntimeError, match="stop"):
        with changed(tiny.model, part).applied(tiny.model):
            raise RuntimeError("stop")
    assert same(weights(tiny.model), before)


def test_what_is_trained_is_what_connects_tower_and_decoder(any_tiny):
    names = Part("projector").whole(any_tiny.model)
    (path,) = anatomy_of(any_tiny.model).connectors
    assert names
    assert all(name.startswith(path + ".") for name in names)


def test_the_mergers_of_a_deepstack_are_trained_too(tiny, monkeypatch):
    family = replace(FAMILIES["llava"], deepstack="model.vision_tower.encoder.layers.1.mlp")
    monkeypatch.setitem(FAMILIES, "llava", family)
    names = Part("projector").whole(tiny.model)
    for path in anatomy_of(tiny.model).connectors:
        assert any(name.startswith(path) for name in names)
    found = list(anatomy_of(tiny.model).connectors)
    assert found == ["model.multi_modal_projector", family.deepstack]


def test_neither_tower_nor_words_are_ever_trained(any_tiny, part):
    model = any_tiny.model
    anatomy = anatomy_of(model)
    mine = {id(w) for module in anatomy.connectors.values() for w in module.parameters()}
    tower = {id(w) for w in anatomy.vision_tower.parameters()} - mine
    words = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    linear = {id(layer.weight) for layer in part.adapted(model).values()}
    trained = {id(weight) for weight in part.whole(model).values()} | linear
    assert not trained & (tower | words)


def test_low_rank_changes_end_at_the_last_block(tiny):
    names = PARTS[1].adapted(tiny.model)
    blocks = {name.partition("layers.")[2].partition(".")[0] for name in names}
    assert blocks == {"0", "1"}
    with pytest.raises(LayerOutOfRange, match=r"\[9\]"):
        Part("lora", last=9).adapted(tiny.model)


def test_the_decoder_is_changed_up_to_its_norm(tiny):
    names = Part("decoder").whole(tiny.model)
    assert any(".layers.3." in name for name in names)
    assert any(name.endswith("language_model.norm.weight") for name in names)


def test_one_replacement_at_a_time(tiny, part):
    projector = changed(tiny.model, part)
    with projector.applied(tiny.model):
        with pytest.raises(UnsupportedRequest, match="already"):
            with projector.applied(tiny.model):
                pass
        assert not torch.equal(logits(tiny), torch.zeros(()))
    with projector.applied(tiny.model):
        pass


def test_installed_weights_stay_and_are_not_added_twice(lab_folder, tiny, part):
    model = AutoModelForImageTextToText.from_pretrained(lab_folder).eval()
    projector = changed(model, part)
    wanted = projector.weights(model)
    projector.install(model)
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    for again in (projector.install, lambda model: projector.applied(model).__enter__()):
        with pytest.raises(UnsupportedRequest, match="load the model again"):
            again(model)


def test_a_bundle_gives_back_the_defense(any_tiny, part, tmp_path):
    projector = changed(any_tiny.model, part)
    folder = projector.save(
        tmp_path / "b", binding_of(any_tiny.model, any_tiny.processor), data=[{"id": "x"}]
    )
    again = load(folder, any_tiny.model, any_tiny.processor)
    assert again.part == part
    assert again.about == {"layers": [1]}
    assert same(again.tensors, projector.tensors)
    with projector.applied(any_tiny.model):
        wanted = logits(any_tiny)
    with again.applied(any_tiny.model):
        assert torch.equal(logits(any_tiny), wanted)


def test_a_card_says_what_is_trained(any_tiny, part, tmp_path):
    folder = changed(any_tiny.model, part).save(
        tmp_path / "b", binding_of(any_tiny.model, any_tiny.processor), data=[]
    )
    parameters = json.loads((folder / CARD).read_text())["parameters"]
    assert parameters["part"]["mode"] == part.mode
    (path,) = anatomy_of(any_tiny.model).connectors
    assert any(name.startswith(path) for name in parameters["trained"])
    assert parameters["retrieved"] is None


def test_a_bundle_holds_changed_tensors_alone(tiny, tmp_path):
    folder = changed(tiny.model, PARTS[0]).save(
        tmp_path / "b", binding_of(tiny.model, tiny.processor), data=[]
    )
    assert set(load_file(folder / "projector.safetensors")) == set(PARTS[0].whole(tiny.model))


@pytest.mark.parametrize("what", ["byte", "missing", "another"])
def test_a_changed_bundle_is_not_read(tiny, tmp_path, what):
    projector = changed(tiny.model, PARTS[1])
    tensors = dict(projector.tensors)
    if what == "missing":
        tensors.popitem()
    if what == "another":
        tensors["lm_head.weight"] = torch.zeros(2, 2)
    folder = Projector(tensors, projector.part).save(
        tmp_path / "b", binding_of(tiny.model, tiny.processor), data=[]
    )
    if what == "byte":
        file = folder / "projector.safetensors"
        save_file({name: t + 1 for name, t in load_file(file).items()}, file)
    with pytest.raises(TamperedBundle, match=r"projector\.safetensors"):
        load(folder, tiny.model, tiny.processor)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_mixed_weights_lie_between_the_models_own_and_the_trained_ones(any_tiny, part, alpha):
    projector = changed(any_tiny.model, part)
    own = weights(any_tiny.model)
    mixed = projector.mixed(any_tiny.model, alpha)
    assert same(weights(any_tiny.model), own)
    assert mixed.about == {"layers": [1], "share": alpha}
    far, near = projector.weights(any_tiny.model), mixed.weights(any_tiny.model)
    assert far.keys() == near.keys()
    for name, value in near.items():
        between = torch.lerp(own[name].double(), far[name].double(), alpha)
        torch.testing.assert_close(value.double(), between, atol=1e-6, rtol=1e-5)
    if alpha in (0, 1):  # to the last bit
        assert same(near, far if alpha else {name: own[name] for name in near})


def test_mixing_twice_is_mixing_by_the_product(tiny):
    projector = changed(tiny.model, PARTS[1])
    twice, once = projector.mixed(tiny.model, 0.5).mixed(tiny.model, 0.5), 0.25
    torch.testing.assert_close(twice.weights(tiny.model), projector.mixed(tiny.model, once).weights(
        tiny.model))  # fmt: skip
    assert twice.about["share"] == once


def test_a_mixed_bundle_is_a_bundle_like_any_other(tiny, part, tmp_path):
    mixed = changed(tiny.model, part).mixed(tiny.model, 0.5)
    folder = mixed.save(tmp_path / "b", binding_of(tiny.model, tiny.processor), data=[])
    assert json.loads((folder / CARD).read_text())["parameters"]["training"]["share"] == 0.5
    loaded = load(folder, tiny.model, tiny.processor)
    assert same(loaded.weights(tiny.model), mixed.weights(tiny.model))


def test_what_is_mixed_of_a_loaded_bundle_stays_bound_and_retrieves(tiny, lab_folder, tmp_path):
    folder = changed(tiny.model, PARTS[0]).with_retrieved(Retrieved("after"), None).save(
        tmp_path / "b", binding_of(tiny.model, tiny.processor), data=[]
    )  # fmt: skip
    mixed = load(folder, tiny.model, tiny.processor).mixed(tiny.model, 0.5)
    assert mixed.retrieved == Retrieved("after")
    other = AutoModelForImageTextToText.from_pretrained(lab_folder).eval()
    other.model.language_model.norm.weight.data.add_(1)
    for use in (mixed.applied(other).__enter__, lambda: mixed.mixed(other, 0.5)):
        with pytest.raises(WrongModel, match="weights"):
            use()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_mixed_in_the_wider_of_both_precisions(lab_folder, dtype):
    model = AutoModelForImageTextToText.from_pretrained(lab_folder, dtype=dtype).eval()
    own = weights(model)
    for tensors, kept in ((torch.float32, model), (dtype, model.float())):
        given = {n: t.to(tensors) for n, t in changed(model, PARTS[0]).tensors.items()}
        untouched = Projector(given, PARTS[0]).mixed(kept, 0.0).weights(kept)
        assert same(untouched, {name: own[name].to(kept.dtype) for name in untouched})


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(tiny, alpha):
    with pytest.raises(ValueError, match="from 0 to 1 is right"):
        changed(tiny.model, PARTS[0]).mixed(tiny.model, alpha)


def test_nothing_is_mixed_inside_of_a_block(tiny):
    projector = changed(tiny.model, PARTS[0])
    with projector.applied(tiny.model), pytest.raises(UnsupportedRequest, match="already"):
        projector.mixed(tiny.model, 0.5)


def test_weights_of_another_shape_are_refused(tiny):
    name = next(iter(PARTS[0].whole(tiny.model)))
    with pytest.raises(WrongModel, match=r"\(3, 3\)"):
        with Projector({name: torch.zeros(3, 3)}, PARTS[0]).applied(tiny.model):
            pass


def test_a_loaded_bundle_is_bound_to_its_model(tiny, lab_folder, tmp_path):
    folder = changed(tiny.model, PARTS[0]).save(
        tmp_path / "b", binding_of(tiny.model, tiny.processor), data=[]
    )
    projector = load(folder, tiny.model, tiny.processor)
    other = AutoModelForImageTextToText.from_pretrained(lab_folder).eval()
    other.model.language_model.norm.weight.data.add_(1)
    with pytest.raises(WrongModel, match="weights"):
        with projector.applied(other):
            pass


def test_an_exported_checkpoint_answers_as_the_model_with_the_bundle(any_tiny, part, tmp_path):
    model = any_tiny.model
    any_tiny.processor.save_pretrained(tmp_path / "processor")
    processor = AutoProcessor.from_pretrained(tmp_path / "processor")
    before = fingerprint(model)
    projector = changed(model, part)
    folder = projector.export(model, processor, tmp_path / "plain")
    assert fingerprint(model) == before
    stock = AutoModelForImageTextToText.from_pretrained(folder).eval()
    stock_processor = AutoProcessor.from_pretrained(folder)
    requests = any_tiny.pictured + any_tiny.plain
    with projector.applied(model), torch.no_grad():
        wanted = model(**encode(processor, any_tiny.pictured[:3])).logits
        state = weights(model)
    with torch.no_grad():
        found = stock(**encode(stock_processor, any_tiny.pictured[:3])).logits
    assert same(weights(stock), state)
    assert torch.equal(found, wanted)
    said = [answer.text for answer in respond(model, processor, requests, projector)]
    assert [answer.text for answer in respond(stock, stock_processor, requests)] == said


def test_weights_keep_the_precision_of_the_model(lab_folder):
    model = AutoModelForImageTextToText.from_pretrained(lab_folder, dtype=torch.bfloat16).eval()
    projector = changed(model, PARTS[1])
    assert {value.dtype for value in projector.weights(model).values()} == {torch.bfloat16}
    with projector.applied(model):
        assert model.dtype == torch.bfloat16


class Parrot:
    """Says one text of every picture."""

    def texts(self, images):
        return ["a lamp ." for _ in images]


def test_retrieved_text_is_off_unless_it_is_asked_for(tiny):
    projector = changed(tiny.model, PARTS[0])
    assert projector.rewrite(tiny.pictured[0]) is tiny.pictured[0]
    told = projector.with_retrieved(Retrieved("after", "{}"), Parrot())
    asked = [tiny.pictured[0], tiny.plain[0]]
    first, second = told.rewrite_all(asked)
    assert first.text == f"a lamp . {tiny.pictured[0].text}"
    assert second is tiny.plain[0]


def test_a_bundle_that_wants_a_retrieved_text_says_so(tiny, tmp_path):
    projector = changed(tiny.model, PARTS[0]).with_retrieved(Retrieved("before", "{}"), Parrot())
    folder = projector.save(tmp_path / "b", binding_of(tiny.model, tiny.processor), data=[])
    again = load(folder, tiny.model, tiny.processor)
    with pytest.raises(UnsupportedRequest, match="with_retrieved"):
        again.rewrite(tiny.pictured[0])
    assert again.with_retrieved(None, None).rewrite(tiny.pictured[0]) is tiny.pictured[0]
    system = again.with_retrieved(again.retrieved, Parrot()).rewrite(tiny.pictured[0]).system
    assert system == "a lamp ."


@pytest.mark.parametrize("wrong", [{"mode": "all"}, {"rank": 0}, {"alpha": 0}])
def test_a_wrong_part_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(Part(), **wrong)
