"""CMRM: what must hold for every model, checked on tiny real ones of every family."""

import copy
from dataclasses import replace

import pytest
import torch

from hauberk.analysis.twins import TwinStates, last_states
from hauberk.anatomy import anatomy_of
from hauberk.blank import BLANK_KINDS
from hauberk.defenses import Undefended
from hauberk.defenses.shift import (
    Shift,
    ShiftSetting,
    composed,
    estimate_shift,
    sample_shifts,
)
from hauberk.errors import LayerOutOfRange, UnsupportedRequest
from hauberk.requests import blank_twin, encode, respond, text_twin

EVERY = [
    ShiftSetting(level=level, compose=compose, position=position, steps=steps)
    for level in ("dataset", "sample")
    for compose in ("naive", "incremental")
    for position in ("last", "all")
    for steps in ("all", "prefill")
    # Half of them, in which every three choices meet in every way.
    if ((level == "sample") + (compose == "naive") + (position, steps).count("all")) % 2 == 0
]


@pytest.fixture(scope="module")
def tiny(any_tiny):
    return any_tiny


@pytest.fixture(scope="module")
def shifts(tiny):
    return sample_shifts(tiny.model, tiny.processor, tiny.pictured)


def make(tiny, shifts, setting, **changes):
    return Shift(estimate_shift(shifts), replace(setting, **changes), tiny.processor)


@pytest.mark.parametrize("setting", EVERY, ids=str)
@torch.no_grad()
def test_alpha_zero_changes_no_bit(tiny, shifts, setting):
    inputs = encode(tiny.processor, tiny.pictured[:3] + tiny.plain[:2])
    plain = tiny.model(**inputs).logits
    with make(tiny, shifts, setting, alpha=0.0).applied(tiny.model):
        assert torch.equal(tiny.model(**inputs).logits, plain)


@pytest.mark.parametrize("setting", EVERY, ids=str)
@torch.no_grad()
def test_text_only_rows_keep_every_bit_and_pictured_rows_change(tiny, shifts, setting):
    inputs = encode(tiny.processor, tiny.pictured[:3] + tiny.plain[:2])
    plain = tiny.model(**inputs).logits
    with make(tiny, shifts, setting).applied(tiny.model):
        edited = tiny.model(**inputs).logits
    assert torch.equal(edited[3:], plain[3:])
    assert not torch.allclose(edited[:3, -1], plain[:3, -1], atol=1e-3)


@pytest.mark.parametrize("setting", EVERY, ids=str)
def test_a_batch_answers_like_single_requests(tiny, shifts, setting):
    defense = make(tiny, shifts, setting)
    requests = tiny.pictured[:3] + tiny.plain[:2] + tiny.varied
    together = respond(tiny.model, tiny.processor, requests, defense, max_new_tokens=6)
    alone = [
        respond(tiny.model, tiny.processor, [request], defense, max_new_tokens=6)[0]
        for request in requests
    ]
    assert [a.text for a in together] == [a.text for a in alone]
    assert len({a.text for a in together}) > 1  # or the test could not fail


@pytest.mark.parametrize("setting", EVERY, ids=str)
def test_decoding_without_a_cache_gives_the_same_answers(tiny, shifts, setting):
    inputs = encode(tiny.processor, tiny.pictured[:2] + tiny.plain[:1] + tiny.varied)
    image = tiny.model.config.image_token_id  # none is shown for one that is made up
    arguments = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [image]}
    with make(tiny, shifts, setting).applied(tiny.model):
        cached = tiny.model.generate(**inputs, **arguments)
        plain = tiny.model.generate(**inputs, **arguments, use_cache=False)
    assert torch.equal(cached, plain)


@torch.no_grad()
def test_twins_from_the_cached_prefix_equal_plain_prefills_of_the_rendered_twins(tiny, shifts):
    texts = last_states(tiny.model, tiny.processor, [text_twin(r) for r in tiny.pictured])
    blanks = last_states(
        tiny.model, tiny.processor, [blank_twin(r, tiny.processor) for r in tiny.pictured]
    )
    torch.testing.assert_close(shifts, texts - blanks, atol=2e-5, rtol=1e-4)


def test_settings_that_share_their_twins_answer_as_alone_and_run_them_once(tiny, shifts):
    kept = TwinStates(tiny.model, tiny.processor, "mean", remember=2**24)
    block, requests = anatomy_of(tiny.model).blocks[0], tiny.pictured

    def ask(setting, twins):
        defense, passes = Shift(shifts.mean(0), setting, tiny.processor, twins), []
        with block.register_forward_hook(lambda *_: passes.append(1)):
            answers = respond(tiny.model, tiny.processor, requests, defense, max_new_tokens=4)
        return [answer.text for answer in answers], len(passes)

    first = ShiftSetting(level="sample", compose="incremental", blank="mean", alpha=0.5)
    second = replace(first, compose="naive", alpha=2.0)
    assert ask(first, kept) == ask(first, None)
    (expected, alone), (found, shared) = ask(second, None), ask(second, kept)
    assert found == expected
    assert shared < alone


def test_twins_of_another_blank_or_processor_are_refused(tiny, shifts):
    twins = TwinStates(tiny.model, tiny.processor, "mean")
    setting = ShiftSetting(level="sample", blank="mean")
    for changed, processor, says in (
        (replace(setting, blank="white"), tiny.processor, "'white' of the setting is 'mean'"),
        (setting, copy.copy(tiny.processor), "another processor"),
    ):
        with pytest.raises(ValueError, match=says):
            Shift(shifts.mean(0), changed, processor, twins)


@pytest.mark.parametrize("blank", BLANK_KINDS)
@torch.no_grad()
def test_every_kind_of_blank_has_a_shift_of_its_own(tiny, shifts, blank):
    request = tiny.pictured[:1]
    found = sample_shifts(tiny.model, tiny.processor, request, blank=blank)
    blanks = [blank_twin(request[0], tiny.processor, blank)]
    texts = last_states(tiny.model, tiny.processor, [text_twin(request[0])])
    expected = texts - last_states(tiny.model, tiny.processor, blanks)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert (blank == "white") == torch.allclose(found[0], shifts[0], atol=1e-3)


def longer_by(number, inputs):
    """The same inputs with so many positions of zeros after every prompt."""
    every = {"input_ids", "attention_mask", "mm_token_type_ids"} & set(inputs)
    pad = torch.nn.functional.pad
    return {**inputs, **{name: pad(inputs[name], (0, number)) for name in every}}


@torch.no_grad()
def test_right_padding_edits_the_last_real_position(tiny, shifts):
    defense = make(tiny, shifts, ShiftSetting(compose="incremental"))
    inputs = encode(tiny.processor, tiny.pictured[:1])
    padded = longer_by(5, inputs)
    with defense.applied(tiny.model):
        alone = tiny.model(**inputs).logits[:, -1]
        inside = tiny.model(**padded).logits[:, -6]
    torch.testing.assert_close(inside, alone, atol=1e-4, rtol=1e-4)


def test_increments_sum_to_the_shift_at_every_depth(shifts):
    vectors = estimate_shift(shifts)
    added = composed(vectors, ShiftSetting(compose="incremental", alpha=0.5))
    for layer in range(len(vectors)):
        total = sum(added[below] for below in range(layer + 1))
        torch.testing.assert_close(total, 0.5 * vectors[layer])


def test_increments_over_some_layers_skip_the_others(shifts):
    vectors = estimate_shift(shifts)
    added = composed(vectors, ShiftSetting(compose="incremental", layers=(1, 3)))
    assert list(added) == [1, 3]
    torch.testing.assert_close(added[1] + added[3], vectors[3])


@pytest.mark.parametrize("compose", ["naive", "incremental"])
def test_a_layer_that_is_named_twice_is_refused(compose):
    with pytest.raises(ValueError, match=r"layers: \[2\] stand there more than once"):
        ShiftSetting(compose=compose, layers=(2, 0, 2))


def test_a_single_layer_carries_the_whole_shift(tiny, shifts):
    added = composed(estimate_shift(shifts), ShiftSetting(compose="single", layers=(2,)))
    assert list(added) == [2]
    with pytest.raises(ValueError, match="exactly one layer"):
        make(tiny, shifts, ShiftSetting(compose="single"))


@torch.no_grad()
def test_the_shift_moves_towards_text(tiny):
    """Subtracting would move away: the sign of Eq. 6 that the reviewers found inconsistent."""
    text = last_states(tiny.model, tiny.processor, [text_twin(r) for r in tiny.pictured])
    blank = [blank_twin(r, tiny.processor) for r in tiny.pictured]
    before = last_states(tiny.model, tiny.processor, blank)
    for layer in range(before.shape[1]):
        setting = ShiftSetting(level="sample", compose="single", layers=(layer,))
        with Shift(torch.zeros(before.shape[1:]), setting, tiny.processor).applied(tiny.model):
            after = last_states(tiny.model, tiny.processor, blank)
        assert (before - text)[:, layer].norm(dim=-1).min() > 0.5
        torch.testing.assert_close(after[:, layer], text[:, layer], atol=1e-4, rtol=1e-4)


def test_the_shift_of_a_prompt_without_an_image_is_zero(tiny):
    inputs = encode(tiny.processor, tiny.plain)
    found = TwinStates(tiny.model, tiny.processor).shifts(
        inputs["input_ids"], inputs["attention_mask"]
    )
    assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("estimator", ["mean", "rank1"])
def test_estimators_return_the_common_shift_with_its_sign_and_length(estimator):
    generator = torch.Generator().manual_seed(3)
    shift = torch.randn(5, 16, generator=generator)
    found = estimate_shift(shift + 0.05 * torch.randn(400, 5, 16, generator=generator), estimator)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, shift, atol=0.02, rtol=0.02)


def test_half_precision_states_are_averaged_in_float32():
    shifts = torch.full((3000, 1, 1), 1.0, dtype=torch.bfloat16)
    shifts[::2] += 0.0078125
    assert estimate_shift(shifts).item() == pytest.approx(1.00390625, abs=1e-6)


def test_anchors_without_an_image_are_refused_and_do_not_shrink_the_shift(tiny):
    mixed = [*tiny.pictured[:3], *tiny.plain[:2]]
    with pytest.raises(UnsupportedRequest, match=r"2 of 5 requests have no image.*picture"):
        sample_shifts(tiny.model, tiny.processor, mixed)


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match="n > 0"):
        estimate_shift(torch.empty(0, 3, 4))


def test_the_same_requests_give_the_same_vectors(tiny, shifts):
    again = sample_shifts(tiny.model, tiny.processor, tiny.pictured)
    assert torch.equal(estimate_shift(again), estimate_shift(shifts))


def test_the_model_is_restored_also_after_an_error(tiny, shifts):
    def hooks():
        modules = [tiny.model, *anatomy_of(tiny.model).blocks]
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]

    before = hooks()
    with pytest.raises(RuntimeError, match="on purpose"):
        with make(tiny, shifts, ShiftSetting(level="sample")).applied(tiny.model):
            assert hooks() != before
            raise RuntimeError("on purpose")
    assert hooks() == before


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_shift_inside_the_block_of_a_shift_is_refused_and_the_first_goes_on(tiny, shifts, alpha):
    defense = make(tiny, shifts, ShiftSetting(compose="incremental"))
    other = make(tiny, shifts, ShiftSetting(), alpha=alpha)
    requests, arguments = tiny.pictured[:3], {"max_new_tokens": 4}
    once = respond(tiny.model, tiny.processor, requests, defense, **arguments)
    with defense.applied(tiny.model):
        for second in (defense, other):
            with pytest.raises(UnsupportedRequest, match=r"applied to this model already.*without"):
                respond(tiny.model, tiny.processor, requests, second, **arguments)
        inside = respond(tiny.model, tiny.processor, requests, **arguments)
    assert [answer.text for answer in inside] == [answer.text for answer in once]
    again = respond(tiny.model, tiny.processor, requests, defense, **arguments)
    assert [answer.text for answer in again] == [answer.text for answer in once]


def test_a_defense_of_another_method_may_act_inside_the_block(tiny, shifts):
    defense = make(tiny, shifts, ShiftSetting())
    with defense.applied(tiny.model), Undefended().applied(tiny.model):
        assert len(tiny.model._forward_pre_hooks) == 1


def test_a_block_that_could_not_be_entered_leaves_the_model_free(tiny, shifts):
    with pytest.raises(LayerOutOfRange):
        with make(tiny, shifts, ShiftSetting(layers=(99,))).applied(tiny.model):
            pass
    with make(tiny, shifts, ShiftSetting()).applied(tiny.model):
        pass


def test_layer_out_of_range_names_the_range_and_the_cure(tiny, shifts):
    defense = make(tiny, shifts, ShiftSetting(layers=(2, 99)))
    with pytest.raises(LayerOutOfRange, match=r"\[99\].*0\.\.3.*params\.yaml"):
        with defense.applied(tiny.model):
            pass


@torch.no_grad()
def test_calls_that_cannot_be_followed_are_refused(tiny, shifts):
    defense = make(tiny, shifts, ShiftSetting())
    inputs = encode(tiny.processor, tiny.pictured[:1])
    with defense.applied(tiny.model):
        cache = tiny.model(**inputs, use_cache=True).past_key_values
        two = torch.tensor([[5, 6]])
        with pytest.raises(UnsupportedRequest, match=r"2 tokens after \d+ cached"):
            tiny.model(input_ids=two, past_key_values=cache)
        with pytest.raises(UnsupportedRequest, match="input_ids"):
            tiny.model(inputs_embeds=torch.zeros(1, 2, 32))


@pytest.mark.parametrize("any_tiny", ["lab-qwen"], indirect=True)
@pytest.mark.parametrize("level", ["dataset", "sample"])
def test_a_video_is_refused(tiny, shifts, level):
    ids = torch.tensor([[5, tiny.model.config.video_token_id, 6]])
    with make(tiny, shifts, ShiftSetting(level=level)).applied(tiny.model):
        with pytest.raises(UnsupportedRequest, match=r"holds a video; give single frames"):
            tiny.model(input_ids=ids)


@pytest.mark.parametrize("level", ["dataset", "sample"])
def test_a_static_cache_is_refused_where_it_hides_the_padding(tiny, shifts, level):
    defense = make(tiny, shifts, ShiftSetting(level=level))
    arguments = {"max_new_tokens": 3, "do_sample": False}
    rows = sorted(
        tiny.pictured, key=lambda request: encode(tiny.processor, [request])["input_ids"].shape[1]
    )
    padded, whole = encode(tiny.processor, [rows[0], rows[-1]]), encode(tiny.processor, rows[:1])
    with defense.applied(tiny.model):
        with pytest.raises(UnsupportedRequest, match=r"mask of \(2, 1, .*use the dynamic cache"):
            tiny.model.generate(**padded, **arguments, cache_implementation="static")
        static = tiny.model.generate(**whole, **arguments, cache_implementation="static")
        dynamic = tiny.model.generate(**whole, **arguments)
    assert torch.equal(static, dynamic)


@pytest.mark.parametrize("level", ["dataset", "sample"])
def test_a_backward_pass_may_follow_an_answer_in_the_same_block(tiny, shifts, level):
    """Such as that of an attack's gradient, or of a loss under the defense."""
    defense = make(tiny, shifts, ShiftSetting(level=level, compose="incremental"))
    request = tiny.pictured[:1]
    inputs = encode(tiny.processor, request)
    with defense.applied(tiny.model):
        respond(tiny.model, tiny.processor, request, max_new_tokens=1)
        pixels = inputs["pixel_values"].clone().requires_grad_()
        logits = tiny.model(**inputs | {"pixel_values": pixels}).logits
        (gradient,) = torch.autograd.grad(logits[0, -1].logsumexp(0), pixels)
    assert gradient.isfinite().all()
    assert gradient.norm() > 0


def prefilled(tiny, *requests):
    """The cache of a prompt and the token that a model would choose next, (rows, 1)."""
    found = tiny.model(**encode(tiny.processor, requests), use_cache=True)
    return found.past_key_values, found.logits[:, -1:].argmax(-1)


@pytest.mark.parametrize("return_dict", [True, False])
@torch.no_grad()
def test_token_by_token_a_prompt_is_continued_as_generate_does(tiny, shifts, return_dict):
    defense = make(tiny, shifts, ShiftSetting(compose="incremental"))
    first, second = tiny.pictured[:2]  # of one length: what is called by hand has no mask
    inputs = encode(tiny.processor, [first, replace(second, text=first.text)])
    with defense.applied(tiny.model):
        whole = tiny.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        found = tiny.model(**inputs, use_cache=True, return_dict=return_dict)
        logits, cache = found[:2]
        tokens = [logits[:, -1:].argmax(-1)]
        for _ in range(4):
            found = tiny.model(input_ids=tokens[-1], past_key_values=cache)
            tokens.append(found.logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(tokens, 1), whole[:, -5:])


@torch.no_grad()
def test_a_cache_that_does_not_hold_the_prompt_of_this_block_is_refused(tiny, shifts):
    """Its rows, its twins and its length would be those of another prompt."""
    defense = make(tiny, shifts, ShiftSetting())
    longest = max(tiny.pictured, key=lambda request: len(request.text))
    outside, token = prefilled(tiny, tiny.pictured[0])

    def refused(cache, token):
        length = cache.get_seq_length()
        with pytest.raises(UnsupportedRequest, match=rf"after {length} cached ones.*without a"):
            tiny.model(input_ids=token, past_key_values=cache)
        assert cache.get_seq_length() == length

    with defense.applied(tiny.model):
        refused(outside, token)  # no prompt was read yet
        own, token = prefilled(tiny, tiny.pictured[0])
        refused(outside, token)  # as long as the own one
        refused(copy.deepcopy(own), token)
        refused(own, token.expand(2, 1))
        refused(own, token.expand(1, 3))  # a second turn, or assisted decoding
        longer, _ = prefilled(tiny, longest)
        refused(own, token)  # another prompt was read since
        longer.crop(-1)
        refused(longer, token)
    with defense.applied(tiny.model):
        refused(own, token)  # the block it was made in is closed


@torch.no_grad()
def test_a_whole_prompt_after_steps_with_a_cache_is_edited_at_its_own_end(tiny, shifts):
    """Its first positions are those of the prompt before it, but it is no step of that one."""
    defense = make(tiny, shifts, ShiftSetting(compose="incremental"))
    inputs = encode(tiny.processor, tiny.pictured[:1])
    with defense.applied(tiny.model):
        longer = tiny.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        mask = torch.ones_like(longer)
        whole = longer_by(4, inputs) | {"input_ids": longer, "attention_mask": mask}
        after = tiny.model(**whole).logits
    with defense.applied(tiny.model):
        fresh = tiny.model(**whole).logits
    assert torch.equal(after, fresh)


@torch.no_grad()
def test_output_hidden_states_shows_the_edit(tiny, shifts):
    inputs = encode(tiny.processor, tiny.pictured[:1])
    show = {**inputs, "output_hidden_states": True}
    before = tiny.model(**show).hidden_states[2]
    defense = make(tiny, shifts, ShiftSetting(compose="single", layers=(1,)))
    with defense.applied(tiny.model):
        after = tiny.model(**show).hidden_states[2]
    torch.testing.assert_close(after[0, -1] - before[0, -1], estimate_shift(shifts)[1])
    assert torch.equal(after[:, :-1], before[:, :-1])


def test_beams_keep_their_own_shift(tiny, shifts):
    defense = make(tiny, shifts, ShiftSetting(level="sample", compose="incremental"))
    rows = tiny.pictured[:3]
    arguments = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    with defense.applied(tiny.model):
        together = tiny.model.generate(**encode(tiny.processor, rows), **arguments)
        alone = [tiny.model.generate(**encode(tiny.processor, [row]), **arguments) for row in rows]
    for row, single in zip(together, alone, strict=True):
        assert torch.equal(row[-4:], single[0, -4:])
