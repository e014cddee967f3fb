"""GuardAlign as a whole: both halves together, in bundles, in batches, and beside other armour."""

import copy
import hashlib
import io
import json
import math
import shutil
from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, features
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

import hauberk
import hauberk.requests
from hauberk.anatomy import anatomy_of
from hauberk.attention import attentions_of
from hauberk.bundle import CARD, _canonical, binding_of, read_card
from hauberk.concepts import build_bank
from hauberk.defenses import GuardAlign, Shift
from hauberk.defenses.patch_transport import AS_PRINTED, PatchTransport, TransportSetting
from hauberk.defenses.prefix_attention import PrefixAttention, PrefixSetting
from hauberk.defenses.shift import ShiftSetting
from hauberk.errors import BadRequest, MissingClip, TamperedBundle, UnsupportedRequest, WrongModel
from hauberk.files import file_hash
from hauberk.requests import Request, encode, respond
from hauberk.target import obstacle

USER = PrefixSetting("as an ai assistant , ", gamma=1.5)
ANSWER = PrefixSetting("as an ai assistant", "answer", gamma=1.5, layers=(1, 3), mode="unclamped")
BANK_HASH = "ab" * 32
TENSORS = "concepts.safetensors"


@pytest.fixture(scope="module")
def clip_folder(tiny_clip, tmp_path_factory):
    """The tiny CLIP as ``save_pretrained`` writes it."""
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    tiny_clip.model.save_pretrained(folder)
    tiny_clip.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder):
    """The tiny CLIP as it is loaded from there, so that it knows where it came from."""
    model = AutoModel.from_pretrained(clip_folder, dtype=torch.float32).eval()
    return SimpleNamespace(model=model, processor=AutoProcessor.from_pretrained(clip_folder))


@pytest.fixture(scope="module")
def bank(clip):
    return build_bank(
        clip.model, clip.processor,
        categories=("a bomb", "a knife", "a gun"),
        reference=("a ball", "a cup"),
        templates=("a picture of {} .", "{}"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def mixed(any_tiny):
    """No picture, one, and two of different sizes."""
    return mixed_of(any_tiny)


def mixed_of(tiny):
    told = replace(tiny.varied[1], system="be kind .", begun=" it is")
    return [tiny.plain[0], *tiny.pictured[:4], *tiny.varied, tiny.plain[1], told]


@pytest.fixture(scope="module")
def detect(clip, bank):
    """Make a detector; without a threshold it masks about half of the patches of ``requests``."""

    def make(requests=None, setting=None, **changes):
        setting = replace(setting or TransportSetting(), **changes)
        detector = PatchTransport(clip.model, clip.processor, bank, setting)
        if requests is None:
            return detector
        images = [image for request in requests for image in request.images]
        return detector.with_setting(threshold=midway(detector.scores(images)))

    return make


def midway(scores):
    """A threshold that no rounding tips: in the widest gap between the scores in the middle."""
    values = scores.flatten().double().sort().values
    middle = values[len(values) // 3 : 2 * len(values) // 3 + 1].tolist()
    below, above = max(pairwise(middle), key=lambda pair: pair[1] - pair[0])
    assert above - below > 1e-3
    return (below + above) / 2


def armour(tiny, transport, prefix=USER, **about):
    return GuardAlign(
        transport, prefix and PrefixAttention(prefix, tiny.processor), bank_hash=BANK_HASH, **about
    )


def ask(tiny, requests, defense=None, **options):
    model = options.pop("model", tiny.model)
    options = {"max_new_tokens": 6} | options
    answers = respond(model, tiny.processor, requests, defense, **options)
    return [(answer.text, answer.tokens) for answer in answers]


def shown(request):
    """Everything of a request, pictures by their pixels."""
    pictures = [(image.mode, image.size, image.tobytes()) for image in request.images]
    return request.text, request.system, request.begun, pictures


@torch.no_grad()
def logits(tiny, requests, model=None):
    return (model or tiny.model)(**encode(tiny.processor, requests)).logits


def noise(*size, seed=0):
    pixels = np.random.default_rng(seed).integers(1, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# --- What it does to requests ---------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [None, USER, ANSWER], ids=["none", "user", "answer"])
@pytest.mark.parametrize("gate", ["always_on", "any_masked"])
def test_many_requests_are_rewritten_as_one_by_one_and_each_half_does_its_own(
    tiny, detect, prefix, gate
):
    mixed = mixed_of(tiny)
    transport = detect(mixed, grid=3, scales=(1, 2), gate=gate)
    transport.batch_size = 5  # which cuts through pictures and requests
    guard, before = armour(tiny, transport, prefix), [shown(request) for request in mixed]
    together = guard.rewrite_all(mixed)
    assert [shown(request) for request in mixed] == before
    assert [shown(request) for request in together] == [shown(guard.rewrite(r)) for r in mixed]
    for old, new, masked in zip(mixed, together, transport.rewrite_all(mixed), strict=True):
        changed = shown(masked) != shown(old)
        assert shown(new)[3] == shown(masked)[3]
        text, begun = old.text, old.begun
        if prefix and (changed or gate == "always_on"):
            where = prefix.placement == "answer"
            text, begun = (text, prefix.text + begun) if where else (prefix.text + text, begun)
        assert (new.text, new.begun, new.system) == (text, begun, old.system)
    assert masked is not mixed[-1]
    assert masked.system  # which is kept while pictures are replaced


@given(data=st.data())
@settings(max_examples=15)
def test_what_else_is_rewritten_with_a_request_does_not_change_it(tiny, detect, data):
    pool = mixed_of(tiny)
    transport = detect(pool, gate=data.draw(st.sampled_from(["always_on", "any_masked"])))
    guard = armour(tiny, transport)
    chosen = data.draw(st.lists(st.sampled_from(pool), max_size=6))
    found = guard.rewrite_all(chosen)
    assert [shown(request) for request in found] == [shown(guard.rewrite(r)) for r in chosen]


def test_without_masking_and_prefix_every_request_stays_the_object_that_it_was(tiny, detect):
    mixed, off = mixed_of(tiny), armour(tiny, detect(threshold=-math.inf), None)
    for request, same in zip(mixed, off.rewrite_all(mixed), strict=True):
        assert same is request
        assert off.rewrite(request) is request
    assert ask(tiny, mixed, off) == ask(tiny, mixed)
    plain = logits(tiny, mixed)
    with off.applied(tiny.model):
        assert torch.equal(logits(tiny, mixed), plain)


def test_what_the_gate_leaves_alone_is_untouched_and_answered_bit_by_bit_as_undefended(
    any_tiny, mixed, detect
):
    guard = armour(any_tiny, detect(mixed, gate="any_masked"))
    rewritten = guard.rewrite_all(mixed)
    alone = [index for index, new in enumerate(rewritten) if new is mixed[index]]
    assert [shown(new) == shown(old) for old, new in zip(mixed, rewritten, strict=True)] == [
        index in alone for index in range(len(mixed))
    ]
    assert {bool(mixed[index].images) for index in alone} == {True, False}
    touched = [index for index in range(len(mixed)) if index not in alone]
    plain = logits(any_tiny, rewritten)
    with guard.applied(any_tiny.model):
        found = logits(any_tiny, rewritten)
    assert torch.equal(found[alone], plain[alone])
    for index in touched:
        assert not torch.equal(found[index], plain[index])
    undefended, defended = ask(any_tiny, mixed), ask(any_tiny, mixed, guard)
    assert [defended[index] for index in alone] == [undefended[index] for index in alone]
    assert [defended[index] for index in touched] != [undefended[index] for index in touched]


def test_with_nothing_to_do_it_is_refused_and_halves_can_be_changed(tiny, detect):
    with pytest.raises(ValueError, match="neither transport nor prefix"):
        GuardAlign(None, None)
    both = armour(tiny, detect(threshold=math.inf))
    masks, speaks = both.with_prefix(None), both.with_transport(None)
    request = tiny.pictured[0]
    assert masks.rewrite(request).text == request.text
    assert not np.asarray(masks.rewrite(request).images[0]).any()
    assert speaks.rewrite(request).images == request.images
    assert speaks.rewrite(request).text == USER.text + request.text
    assert shown(masks.with_prefix(both.prefix).rewrite(request)) == shown(both.rewrite(request))
    for half, change in ((masks, masks.with_transport), (speaks, speaks.with_prefix)):
        assert half.bank_hash == BANK_HASH
        with pytest.raises(ValueError, match="neither transport nor prefix"):
            change(None)


# --- Answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [USER, ANSWER], ids=["user", "answer"])
def test_a_batch_answers_like_single_requests(any_tiny, mixed, ending, detect, prefix):
    guard = armour(any_tiny, detect(mixed, gate="any_masked"), prefix)
    together = ask(any_tiny, mixed, guard, max_new_tokens=10)
    assert together == ask(any_tiny, mixed, guard, max_new_tokens=10, batch_size=1)
    assert together[::-1] == ask(any_tiny, mixed[::-1], guard, max_new_tokens=10, batch_size=4)
    assert together != ask(any_tiny, mixed, guard.with_prefix(None), max_new_tokens=10)
    assert together != ask(any_tiny, mixed, guard.with_transport(None), max_new_tokens=10)
    assert together != ask(any_tiny, mixed, max_new_tokens=10)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_seconds_of_an_answer_hold_its_share_of_the_detection(
    tiny, detect, batch_size, monkeypatch
):
    """By a clock that stands still but for the detection."""
    clock, transport = [0.0], detect(threshold=math.inf)
    real = transport.rewrite_all

    def slow(requests):
        clock[0] += 10 * len(requests)
        return real(requests)

    frozen = SimpleNamespace(perf_counter=lambda: clock[0])
    monkeypatch.setattr(hauberk.requests, "time", frozen)
    monkeypatch.setattr(transport, "rewrite_all", slow)
    mixed = mixed_of(tiny)
    for guard in (armour(tiny, transport), armour(tiny, transport, None)):
        found = respond(tiny.model, tiny.processor, mixed, guard, max_new_tokens=2,
                        batch_size=batch_size)  # fmt: skip
        assert [answer.seconds for answer in found] == [10.0] * len(mixed)
    assert clock[0] == 20 * len(mixed)


def cut(form, **options):
    """A picture that is opened lazily, and whose file ends in its middle."""
    content = io.BytesIO()
    noise(96, 96).save(content, form, **options)
    return Image.open(io.BytesIO(content.getvalue()[: len(content.getvalue()) // 2]))


def closed(folder):
    """A picture whose file was closed before it was read, as a ``with`` block does it."""
    noise(96, 96).save(folder / "picture.png")
    with Image.open(folder / "picture.png") as image:
        return image


BROKEN = {
    "a JPEG cut off": lambda _: cut("JPEG"),
    "a PNG cut off": lambda _: cut("PNG"),
    "a JPEG 2000 cut off": lambda _: cut("JPEG2000"),
    "a closed file": closed,
    "floats": lambda _: Image.fromarray(np.zeros((96, 96), dtype=np.float32)),
    "no pixels": lambda _: Image.new("RGB", (0, 5)),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize(("batch_size", "threshold"), [(3, math.inf), (64, 1e9)])
def test_a_picture_that_cannot_be_read_is_named_by_its_request_and_nothing_is_half_done(
    tiny, detect, kind, batch_size, threshold, tmp_path
):
    if kind == "a JPEG 2000 cut off" and not features.check("jpg_2000"):
        pytest.skip("this Pillow reads no JPEG 2000")
    requests = mixed_of(tiny)
    place = 1  # in the list; it is asked last, as it has two pictures and the longest text
    whole = requests[3].images[0]
    requests[place] = Request(f"{tiny.pictured[0].text} " * 4, (whole, BROKEN[kind](tmp_path)))
    guard, done = armour(tiny, detect(threshold=threshold)), []
    plain = logits(tiny, mixed_of(tiny))
    with pytest.raises(BadRequest, match=rf"^request {place}: picture 1: "):
        ask(tiny, requests, guard, batch_size=batch_size, on_batch=lambda *new: done.extend(new[0]))
    assert place not in done
    assert len(requests) == 9
    assert len(done) == (6 if batch_size == 3 else 0)
    assert stock(tiny.model)
    assert torch.equal(logits(tiny, mixed_of(tiny)), plain)
    others = [request for index, request in enumerate(requests) if index != place]
    assert len(ask(tiny, others, guard)) == len(others)


# --- The model ------------------------------------------------------------------------------------


def stock(model):
    """Whether nothing is left of any armour."""
    attentions = attentions_of(anatomy_of(model)).values()
    kinds = {module.config._attn_implementation for module in attentions}
    hooks = [
        getattr(hook, "func", hook).__module__  # transformers leaves some of its own
        for module in (model, *anatomy_of(model).blocks)
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return kinds == {"sdpa"} and not any(home.startswith("hauberk") for home in hooks)


@pytest.mark.parametrize("end", ["none", "in the block", "in a pass", "in between of batches"])
def test_after_the_block_the_model_answers_as_before_also_after_an_error(
    any_tiny, mixed, detect, end
):
    guard, plain = armour(any_tiny, detect(mixed)), logits(any_tiny, mixed)
    undefended = ask(any_tiny, mixed)
    inside = []

    def fail(*_):
        inside.append(not stock(any_tiny.model))
        raise RuntimeError("on purpose")

    def run():
        if end == "in between of batches":
            ask(any_tiny, mixed, guard, on_batch=fail, batch_size=2)
        with guard.applied(any_tiny.model):
            inside.append(not stock(any_tiny.model))
            ask(any_tiny, guard.rewrite_all(mixed))
            if end == "in a pass":
                any_tiny.model(input_ids=torch.full((1, 4), 10**6))
            if end == "in the block":
                fail()

    if end == "none":
        run()
    else:
        with pytest.raises((RuntimeError, IndexError)):
            run()
    assert inside
    assert all(inside)
    assert stock(any_tiny.model)
    assert torch.equal(logits(any_tiny, mixed), plain)
    assert ask(any_tiny, mixed) == undefended


def test_two_models_in_one_process_do_not_influence_each_other(any_tiny, mixed, detect):
    """Nor do their defenses, which look at pictures with the same CLIP."""
    other = copy.deepcopy(any_tiny.model)
    with torch.no_grad():
        for weight in other.get_decoder().parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    weak = armour(any_tiny, detect(mixed, gate="any_masked"), replace(USER, gamma=0.5))
    strong = armour(any_tiny, detect(threshold=math.inf), replace(ANSWER, gamma=4.0))
    mine, its = ask(any_tiny, mixed, weak), ask(any_tiny, mixed, strong, model=other)
    plain = [ask(any_tiny, mixed, model=model) for model in (any_tiny.model, other)]
    assert len({str(answers) for answers in (mine, its, *plain)}) == 4
    first, second = weak.applied(any_tiny.model), strong.applied(other)
    first.__enter__()
    asked = weak.rewrite_all(mixed)
    assert ask(any_tiny, mixed, model=other) == plain[1]
    assert ask(any_tiny, mixed, strong, model=other) == its
    second.__enter__()
    for _ in range(2):
        assert ask(any_tiny, asked) == mine
        assert ask(any_tiny, strong.rewrite_all(mixed), model=other) == its
    first.__exit__(None, None, None)
    assert ask(any_tiny, mixed) == plain[0]
    assert ask(any_tiny, strong.rewrite_all(mixed), model=other) == its
    second.__exit__(None, None, None)
    assert [ask(any_tiny, mixed, model=model) for model in (any_tiny.model, other)] == plain


def test_one_defense_serves_two_models_at_once(tiny, detect):
    mixed, other = mixed_of(tiny), copy.deepcopy(tiny.model)
    guard = armour(tiny, detect(mixed))
    alone = ask(tiny, mixed, guard)
    with guard.applied(other):
        assert ask(tiny, mixed, guard) == alone
        assert ask(tiny, guard.rewrite_all(mixed), model=other) == alone
    assert alone != ask(tiny, mixed)


def test_it_works_together_with_cmrm_in_both_orders(any_tiny, mixed, detect):
    model, guard = any_tiny.model, armour(any_tiny, detect(mixed))
    torch.manual_seed(0)
    shift = Shift(0.5 * torch.randn(4, 32), ShiftSetting(compose="incremental"))
    asked = guard.rewrite_all(mixed)
    orders = {}
    for order in ((), (shift,), (guard,), (shift, guard), (guard, shift)):
        with ExitStack() as stack:
            for defense in order:
                stack.enter_context(defense.applied(model))
            orders[order] = ask(any_tiny, asked), logits(any_tiny, asked)
        assert stock(model)
    (both, whole), (turned, same) = orders[shift, guard], orders[guard, shift]
    assert both == turned
    assert torch.equal(whole, same)
    pictured = [index for index, request in enumerate(mixed) if request.images]
    for (_, one), (_, two) in combinations([*orders.values()][:4], 2):
        assert not torch.allclose(one[pictured, -1], two[pictured, -1], atol=1e-3)
    with shift.applied(model):
        assert ask(any_tiny, mixed, guard) == both
    with guard.applied(model):
        assert ask(any_tiny, asked, shift) == both
    assert ask(any_tiny, asked) == orders[()][0]


def test_cmrm_of_single_samples_works_around_it_and_inside_where_it_only_masks(tiny, detect):
    mixed = mixed_of(tiny)
    guard = armour(tiny, detect(mixed))
    shift = Shift(torch.zeros(4, 32), ShiftSetting(level="sample"), tiny.processor)
    with shift.applied(tiny.model):
        both = ask(tiny, mixed, guard)
    assert both != ask(tiny, mixed, guard)
    with pytest.raises(UnsupportedRequest, match="apply that one outside"):
        with guard.applied(tiny.model):
            ask(tiny, guard.rewrite_all(mixed), shift)
    assert stock(tiny.model)
    masks = guard.with_prefix(None)
    with shift.applied(tiny.model):
        outside = ask(tiny, mixed, masks)
    with masks.applied(tiny.model):
        assert ask(tiny, masks.rewrite_all(mixed), shift) == outside


def test_a_second_guardalign_on_a_model_is_refused_and_the_first_goes_on(tiny, detect):
    mixed = mixed_of(tiny)
    guard = armour(tiny, detect(mixed))
    once = ask(tiny, mixed, guard)
    with guard.applied(tiny.model):
        with pytest.raises(UnsupportedRequest, match="calibrated already"):
            ask(tiny, mixed, guard)
        assert ask(tiny, guard.rewrite_all(mixed)) == once


# --- Bundles --------------------------------------------------------------------------------------


HALF = [  # with thresholds that mask about half
    (TransportSetting(), USER),
    (
        TransportSetting(grid=3, scales=(1, 2), fill="mean", max_share=0.5, gate="any_masked"),
        ANSWER,
    ),
    (TransportSetting(scales=(), column_penalty=math.inf, precision="float64"), None),
    (replace(AS_PRINTED, grid=3), replace(USER, layers=(2,))),
]
ENDS = [(TransportSetting(threshold=end), USER) for end in (-math.inf, math.inf)]


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """Write a bundle for the tiny model; without a name into a folder of its own."""

    def save(guard, folder=None):
        folder = folder or tmp_path_factory.mktemp("guardalign") / "bundle"
        data = [{"id": "calibration/benign", "sha256": "cd" * 32}]
        return guard.save(folder, binding_of(tiny.model, tiny.processor), data=data)

    return save


@pytest.fixture(scope="module")
def made(tiny, detect, saved):
    return saved(armour(tiny, detect(mixed_of(tiny))))


@pytest.fixture
def bundle(made, tmp_path):
    """A copy to do damage to."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def load(tiny, folder, **options):
    return hauberk.load(folder, tiny.model, tiny.processor, **options)


def sign(folder, **changes):
    """Write a card whose own hash is right: what an attacker can do as well."""
    content = json.loads((folder / CARD).read_text()) | changes
    del content["card_sha256"]
    content["card_sha256"] = hashlib.sha256(_canonical(content)).hexdigest()
    (folder / CARD).write_bytes(_canonical(content))


def parameters_of(folder):
    return json.loads((folder / CARD).read_text())["parameters"]


def refused_constant(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize(("setting", "prefix"), HALF + ENDS)
def test_a_bundle_gives_back_settings_bank_pictures_and_answers(
    tiny, detect, saved, setting, prefix
):
    mixed = mixed_of(tiny)
    guard = armour(tiny, detect(mixed if (setting, prefix) in HALF else None, setting), prefix)
    folder = saved(guard)
    json.loads((folder / CARD).read_bytes(), parse_constant=refused_constant)
    loaded = load(tiny, folder)
    assert loaded.transport.setting == guard.transport.setting
    assert repr(loaded.transport.setting) == repr(guard.transport.setting)  # types as well
    assert (loaded.prefix and loaded.prefix.setting) == prefix
    assert loaded.bank_hash == BANK_HASH
    old, new = guard.transport.bank, loaded.transport.bank
    assert old.parameters == new.parameters
    assert old.variants == new.variants
    assert old.reference_variants == new.reference_variants
    assert torch.equal(old.all_features, new.all_features)
    before, after = ([shown(r) for r in one.rewrite_all(mixed)] for one in (guard, loaded))
    assert before == after
    assert ask(tiny, mixed, guard) == ask(tiny, mixed, loaded)
    if (setting, prefix) in HALF:
        assert ask(tiny, mixed, loaded) != ask(tiny, mixed)
    again = loaded.save(folder.parent / "again", read_card(folder)[1].binding,
                        data=read_card(folder)[1].data)  # fmt: skip
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_the_card_tells_concepts_thresholds_and_the_clip(tiny, clip, bank, detect, saved):
    for threshold, told in ((0.25, 0.25), (math.inf, "inf"), (-math.inf, "-inf")):
        folder = saved(armour(tiny, detect(threshold=threshold, column_penalty=math.inf)))
        card = read_card(folder)[1]
        assert card.method == "guardalign"
        assert set(card.files) == {TENSORS}
        assert card.parameters["transport"]["threshold"] == told
        assert card.parameters["transport"]["column_penalty"] == "inf"
        assert card.parameters["concepts"] == bank.parameters
        assert card.parameters["concept_bank"] == BANK_HASH
        found = binding_of(clip.model, clip.processor)
        assert card.parameters["clip"] == vars(found)
        assert found.model == clip.model.config.name_or_path


TRANSPORTS = st.builds(
    TransportSetting,
    weights=st.sampled_from(["as_printed", "low_entropy", "uniform"]),
    problem=st.sampled_from(["per_category", "joint"]),
    score=st.sampled_from(["raw", "per_mass_mean", "per_mass_min", "log_odds"]),
    column_penalty=st.floats(0, allow_nan=False),
    epsilon=st.floats(0, exclude_min=True, allow_nan=False),
    iterations=st.integers(1, 1000),
    precision=st.sampled_from(["float32", "float64"]),
    grid=st.integers(1, 8),
    scales=st.lists(st.integers(1, 8), max_size=3).map(tuple),
    threshold=st.floats(allow_nan=False),
    fill=st.sampled_from(["black", "mean"]),
    max_share=st.floats(0, 1),
    gate=st.sampled_from(["always_on", "any_masked"]),
)
PREFIXES = st.builds(
    PrefixSetting,
    text=st.text(min_size=1).filter(str.strip),
    gamma=st.floats(0, allow_nan=False, allow_infinity=False),
    layers=st.none() | st.sets(st.integers(0, 3), min_size=1).map(tuple),
    mode=st.sampled_from(["clamped", "unclamped", "literal"]),
)


@given(setting=TRANSPORTS)
@settings(max_examples=12)
def test_any_setting_of_the_transport_comes_back(tiny, detect, saved, setting):
    folder = saved(armour(tiny, detect(None, setting), None))
    json.loads((folder / CARD).read_bytes(), parse_constant=refused_constant)
    loaded = load(tiny, folder)
    assert loaded.prefix is None
    assert repr(loaded.transport.setting) == repr(setting)


@given(setting=PREFIXES)
@example(setting=PrefixSetting("inf"))  # what infinity is written as
@settings(max_examples=15)
def test_any_prefix_comes_back(tiny, saved, setting):
    loaded = load(tiny, saved(armour(tiny, None, setting)))
    assert loaded.transport is None
    assert loaded.prefix.setting == setting


def test_a_bundle_read_without_a_model_changes_requests_as_one_loaded_for_it(tiny, made, tmp_path):
    mixed = mixed_of(tiny)
    alone, loaded = hauberk.read(made), load(tiny, made)
    before, after = ([shown(r) for r in one.rewrite_all(mixed)] for one in (alone, loaded))
    assert before == after != [shown(request) for request in mixed]
    assert obstacle(alone.with_prefix(alone.prefix.with_gamma(0))) == ""
    assert "calibrates attention" in obstacle(alone)
    with pytest.raises(UnsupportedRequest, match="read without a model"), alone.applied(tiny.model):
        pass
    with pytest.raises(MissingClip):
        hauberk.read(made, clip=tmp_path / "nowhere")


def test_a_bundle_of_the_prefix_alone_needs_no_clip(tiny, saved, tmp_path):
    folder = saved(armour(tiny, None))
    assert [path.name for path in folder.iterdir()] == [CARD]
    assert set(parameters_of(folder)) == {"transport", "prefix"}
    mixed = mixed_of(tiny)
    answers = [
        ask(tiny, mixed, guard)
        for guard in (
            armour(tiny, None), load(tiny, folder), load(tiny, folder, clip=tmp_path / "nowhere")
        )
    ]  # fmt: skip
    assert answers[0] == answers[1] == answers[2] != ask(tiny, mixed)


@pytest.mark.parametrize(
    ("revision", "fetched"),
    [(None, False), ("main", False), ("0123456789abcdef" * 2 + "01234567", True)],
)
def test_a_clip_is_fetched_only_where_a_commit_pins_it(
    tiny, bundle, monkeypatch, revision, fetched
):
    card = parameters_of(bundle)
    told = {"model": "somebody/clip", "revision": revision}
    sign(bundle, parameters=card | {"clip": card["clip"] | told})
    asked = []

    def from_pretrained(source, **options):
        asked.append((source, options["revision"], options["local_files_only"]))
        raise OSError("not here")

    monkeypatch.setattr(AutoModel, "from_pretrained", from_pretrained)
    with pytest.raises(MissingClip, match="somebody/clip"):
        load(tiny, bundle)
    assert asked == [("somebody/clip", revision, not fetched)]


def test_the_clip_may_lie_elsewhere_and_where_it_is_gone_its_place_and_the_cure_are_named(
    tiny, clip_folder, bundle, detect, tmp_path
):
    first, second = (tmp_path / name for name in ("first", "second"))
    shutil.copytree(clip_folder, first)
    card = parameters_of(bundle)
    sign(bundle, parameters=card | {"clip": card["clip"] | {"model": str(first)}})
    mixed = mixed_of(tiny)
    wanted = [shown(request) for request in load(tiny, bundle).rewrite_all(mixed)]
    first.rename(second)
    with pytest.raises(MissingClip) as caught:
        load(tiny, bundle)
    assert f"{str(first)!r}" in str(caught.value)
    assert "hauberk.load(folder, model, processor, clip=...)" in str(caught.value)
    for place in (second, str(second)):
        guard = load(tiny, bundle, clip=place)
        assert [shown(request) for request in guard.rewrite_all(mixed)] == wanted
    with pytest.raises(MissingClip, match="no clip here"):  # it is not looked for anywhere else
        load(tiny, bundle, clip=tmp_path / "no clip here")


def test_a_clip_that_is_damaged_or_no_clip_is_named_whatever_is_wrong_with_it(
    tiny, clip_folder, made, tmp_path
):
    folder = tmp_path / "clip"
    for name in sorted(path.name for path in clip_folder.iterdir()):
        raw = (clip_folder / name).read_bytes()
        for content in (None, b"", raw[: len(raw) // 2], b'{"a": 1}'):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(clip_folder, folder)
            (folder / name).unlink()
            if content is not None:
                (folder / name).write_bytes(content)
            with pytest.raises((MissingClip, WrongModel), match=str(folder)):
                load(tiny, made, clip=folder)
    folder.with_name("empty").mkdir()
    for place in (folder.with_name("empty"), *clip_folder.iterdir()):
        with pytest.raises(MissingClip, match=str(place)):
            load(tiny, made, clip=place)


@pytest.mark.parametrize("which", ["weights", "siglip", "processor", "a model of another kind"])
def test_another_clip_is_refused(tiny, clip, tiny_siglip, lab_folder, made, tmp_path, which):
    model, processor = copy.deepcopy(clip.model), copy.deepcopy(clip.processor)
    if which == "weights":
        with torch.no_grad():
            model.visual_projection.weight += 0.5
    if which == "siglip":
        model, processor = tiny_siglip.model, tiny_siglip.processor
    if which == "processor":
        processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    folder = lab_folder
    if which != "a model of another kind":
        model.save_pretrained(folder := tmp_path / "other")
        processor.save_pretrained(folder)
    with pytest.raises(WrongModel) as caught:
        load(tiny, made, clip=folder)
    assert str(folder) in str(caught.value)
    line = "processor: expected " if which == "processor" else "weights: expected "
    assert line in str(caught.value)


def test_a_clip_in_half_precision_on_disk_is_looked_with_in_the_precision_of_its_threshold(
    tiny, clip, made, tmp_path
):
    rounded = copy.deepcopy(clip.model).bfloat16()
    rounded.save_pretrained(tmp_path)
    clip.processor.save_pretrained(tmp_path)
    guard = load(tiny, made, clip=tmp_path)
    assert guard.transport.clip.dtype == torch.float32
    assert not guard.transport.clip.training


def test_a_bundle_for_another_model_is_refused_on_loading_and_on_applying(tiny, bundle):
    guard, same, changed = load(tiny, bundle), *(copy.deepcopy(tiny.model) for _ in "ab")
    with torch.no_grad():
        next(changed.parameters())[0] += 1
    with pytest.raises(WrongModel, match=r"(?s)this guardalign bundle.*weights: expected"):
        hauberk.load(bundle, changed, tiny.processor)
    for armoured in (guard, guard.with_prefix(None), guard.with_transport(None)):
        with pytest.raises(WrongModel, match="weights: expected"), armoured.applied(changed):
            pytest.fail("applied to a model that it was not made for")
        with pytest.raises(WrongModel, match="weights: expected"):
            ask(tiny, tiny.pictured[:1], armoured, model=changed)
        with armoured.applied(same):
            pass  # the same weights in another object
    processor = copy.deepcopy(tiny.processor)
    processor.chat_template += " "
    with pytest.raises(WrongModel, match="chat_template: expected"):
        hauberk.load(bundle, tiny.model, processor)


@given(data=st.data())
@settings(max_examples=20)
def test_a_flipped_bit_of_the_concepts_is_found(tiny, made, tmp_path_factory, data):
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("flipped") / "bundle"))
    raw = bytearray((folder / TENSORS).read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / TENSORS).write_bytes(raw)
    with pytest.raises(TamperedBundle, match=r"concepts\.safetensors: sha256 expected"):
        load(tiny, folder)


CONCEPTS = {
    "missing": None,
    "no tensors": lambda _: b"not tensors at all",
    "other names": lambda t: {"shift": t["features"]},
    "half precision": lambda t: {name: rows.half() for name, rows in t.items()},
    "fewer rows": lambda t: {name: rows[1:] for name, rows in t.items()},
    "no reference": lambda t: {"features": t["features"]},
    "longer rows": lambda t: {name: 2 * rows for name, rows in t.items()},
    "not numbers": lambda t: {name: rows * math.nan for name, rows in t.items()},
    "of another width": lambda t: {
        name: torch.nn.functional.normalize(rows[..., :8], dim=-1) for name, rows in t.items()
    },
}


@pytest.mark.parametrize("kind", CONCEPTS)
def test_concepts_that_are_none_are_named_also_where_the_card_is_right(tiny, bundle, kind):
    path, change = bundle / TENSORS, CONCEPTS[kind]
    files = json.loads((bundle / CARD).read_text())["files"]
    if change is None:
        path.unlink()
        del files[path.name]
    else:
        found = change(load_file(path))
        if isinstance(found, bytes):
            path.write_bytes(found)
        else:
            save_file({name: rows.contiguous() for name, rows in found.items()}, path)
        files[path.name] = file_hash(path)
    sign(bundle, files=files)
    with pytest.raises(TamperedBundle, match=str(bundle)):
        load(tiny, bundle)


def within(part, **changes):
    return lambda told: told | {part: told[part] | changes}


def without(*names):
    return lambda told: {name: value for name, value in told.items() if name not in names}


BROKEN_CARDS = {
    "no parameters": lambda told: {},
    "a list of parameters": lambda told: [told],
    "no transport": without("transport"),
    "no prefix": without("prefix"),
    "no clip": without("clip"),
    "no concepts": without("concepts"),
    "neither": lambda told: told | {"transport": None, "prefix": None},
    "two empty ones": lambda told: told | {"transport": {}, "prefix": {}},
    "a text as transport": lambda told: told | {"transport": "all"},
    "a list as transport": lambda told: told | {"transport": [1, 2]},
    "a number as prefix": lambda told: told | {"prefix": 7},
    "a text as clip": lambda told: told | {"clip": "somewhere"},
    "null as concepts": lambda told: told | {"concepts": None},
    "a clip of unknown weights": lambda told: (
        told | {"clip": {name: value for name, value in told["clip"].items() if name != "weights"}}
    ),
    "one more concept": lambda told: (
        told
        | {"concepts": told["concepts"] | {"categories": [*told["concepts"]["categories"], "a x"]}}
    ),
    "a concept twice": lambda told: (
        told | {"concepts": told["concepts"] | {"categories": ["a bomb"] * 3}}
    ),
    "a temperature that is no number": lambda told: (
        told | {"concepts": told["concepts"] | {"logit_scale": "nan"}}
    ),
    "an unknown field": within("transport", strength=3),
    "a grid of nothing": within("transport", grid=0),
    "a grid in words": within("transport", grid="two"),
    "a grid with half a patch": within("transport", grid=2.5),
    "a scale of nothing": within("transport", scales=[1, 0]),
    "a scale in words": within("transport", scales="12"),
    "no threshold": within("transport", threshold=None),
    "a threshold that is no number": within("transport", threshold="nan"),
    "a share of two": within("transport", max_share=2.0),
    "no epsilon": within("transport", epsilon=0.0),
    "unknown weights": within("transport", weights="heavy"),
    "an unknown problem": within("transport", problem="none"),
    "an unknown score": within("transport", score="high"),
    "an unknown solver": within("transport", solver="ours"),
    "an unknown precision": within("transport", precision="float8"),
    "an unknown fill": within("transport", fill="pink"),
    "an unknown gate": within("transport", gate="shut"),
    "a prefix without words": within("prefix", text=" "),
    "a prefix that is a number": within("prefix", text=7),
    "a prefix nowhere": within("prefix", placement="system"),
    "a negative gamma": within("prefix", gamma=-1.0),
    "an infinite gamma": within("prefix", gamma="inf"),
    "an unknown mode": within("prefix", mode="all"),
    "no layers": within("prefix", layers=[]),
    "a layer twice": within("prefix", layers=[1, 1]),
    "layers in words": within("prefix", layers=["one"]),
}


@pytest.mark.parametrize("kind", BROKEN_CARDS)
def test_a_card_of_broken_settings_is_named_also_where_its_hash_is_right(tiny, bundle, kind):
    sign(bundle, parameters=BROKEN_CARDS[kind](parameters_of(bundle)))
    with pytest.raises(TamperedBundle, match=rf"{bundle}.*build it again"):
        load(tiny, bundle)


def test_a_score_that_needs_harmless_concepts_is_refused_for_a_bank_without(
    tiny, clip, saved, tmp_path
):
    alone = build_bank(clip.model, clip.processor, categories=("a bomb",), templates=("{}",))
    setting = TransportSetting(score="per_mass_min")
    guard = armour(tiny, PatchTransport(clip.model, clip.processor, alone, setting))
    folder = saved(guard, tmp_path / "bundle")
    assert load(tiny, folder).transport.bank.reference == ()
    sign(folder, parameters=within("transport", score="log_odds")(parameters_of(folder)))
    with pytest.raises(TamperedBundle, match="reference"):
        load(tiny, folder)
