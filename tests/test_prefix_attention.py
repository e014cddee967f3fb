"""A safety prefix that is kept attended to, on tiny models of every family."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import softmax

from hauberk.anatomy import anatomy_of
from hauberk.attention import biased
from hauberk.defenses.prefix_attention import PrefixAttention, PrefixSetting, prefix_tokens
from hauberk.errors import LayerOutOfRange, UnsupportedRequest
from hauberk.requests import encode, respond

STRONG = PrefixSetting(text="there is a lamp . ", gamma=2.0, layers=(1, 2))


def defense_of(tiny, setting=STRONG):
    return PrefixAttention(setting, tiny.processor)


def batch_of(tiny, setting=STRONG, requests=None):
    defense = defense_of(tiny, setting)
    asked = [defense.rewrite(r) for r in requests or tiny.pictured[:3] + tiny.plain[:2]]
    return encode(tiny.processor, asked)


@torch.no_grad()
def logits_of(model, batch, defense=None, **more):
    if defense is None:
        return model(**batch, **more).logits
    with defense.applied(model):
        return model(**batch, **more).logits


@torch.no_grad()
def test_a_raised_prefix_changes_answers_and_the_model_is_restored_to_the_bit(any_tiny):
    batch, decoder = batch_of(any_tiny), anatomy_of(any_tiny.model).decoder
    before, kind = logits_of(any_tiny.model, batch), decoder.config._attn_implementation
    raised = logits_of(any_tiny.model, batch, defense_of(any_tiny))
    assert (raised - before).abs().max() > 1e-3
    assert torch.equal(logits_of(any_tiny.model, batch), before)
    assert decoder.config._attn_implementation == kind


@torch.no_grad()
def test_gamma_0_and_a_bias_of_nothing_change_no_bit(any_tiny):
    batch = batch_of(any_tiny)
    before = logits_of(any_tiny.model, batch)
    still = defense_of(any_tiny, replace(STRONG, gamma=0.0))
    assert torch.equal(logits_of(any_tiny.model, batch, still), before)
    with biased(anatomy_of(any_tiny.model), {1: lambda query, key, scaling: None}):
        assert torch.equal(any_tiny.model(**batch).logits, before)


@torch.no_grad()
def test_a_batch_without_the_prefix_keeps_every_bit(any_tiny):
    batch = encode(any_tiny.processor, any_tiny.pictured[:3] + any_tiny.plain[:2])
    before = logits_of(any_tiny.model, batch)
    assert torch.equal(logits_of(any_tiny.model, batch, defense_of(any_tiny)), before)


@torch.no_grad()
def test_what_comes_before_the_end_of_the_prefix_is_not_changed(any_tiny):
    batch = batch_of(any_tiny, requests=any_tiny.pictured[:1])
    row, tokens = batch["input_ids"][0].tolist(), prefix_tokens(any_tiny.processor, STRONG.text)
    end = max(i for i in range(len(row)) if row[i : i + len(tokens)] == tokens) + len(tokens)
    before = logits_of(any_tiny.model, batch)
    after = logits_of(any_tiny.model, batch, defense_of(any_tiny))
    torch.testing.assert_close(after[:, :end], before[:, :end], atol=1e-5, rtol=0)
    assert (after[:, end] - before[:, end]).abs().max() > 1e-4


@torch.no_grad()
def test_eager_attention_does_the_same(any_tiny):
    eager = copy.deepcopy(any_tiny.model)
    eager.set_attn_implementation("eager")
    batch = batch_of(any_tiny)
    one = logits_of(any_tiny.model, batch, defense_of(any_tiny))
    other = logits_of(eager, batch, defense_of(any_tiny))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(one[real], other[real], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["clamped", "unclamped"])
def test_weights_grow_by_the_exponential_of_what_was_added(mode):
    torch.manual_seed(0)
    from hauberk.defenses.prefix_attention import _Session

    session = _Session(replace(STRONG, gamma=0.7, mode=mode), [7, 8], image_token=0)
    session._read_prompt(torch.tensor([[5, 7, 8, 1, 2], [0, 7, 8, 3, 4]]))
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)  # grouped heads
    bias = session.bias(query, key, 0.3)
    logits = 0.3 * query @ key.repeat_interleave(2, dim=1).transpose(2, 3)
    ratio = softmax(logits + bias, -1) / softmax(logits, -1)
    ratio = ratio / ratio[..., :1]  # column 0 is not of the prefix
    grown = (0.7 * (logits.relu() if mode == "clamped" else logits)).exp()
    torch.testing.assert_close(ratio[:, :, 3:, 1:3], grown[:, :, 3:, 1:3])
    assert torch.equal(bias[:, :, :3], torch.zeros_like(bias[:, :, :3]))
    assert torch.equal(bias[..., 3:], torch.zeros_like(bias[..., 3:]))


def test_the_printed_equation_is_quadratic():
    from hauberk.defenses.prefix_attention import _Session

    session = _Session(replace(STRONG, gamma=0.1, mode="literal"), [7], image_token=0)
    products = torch.tensor([4 * 128**0.5])
    assert session._raised(products, 128**-0.5).item() == pytest.approx(18.1, abs=0.01)


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
def test_decoding_with_a_cache_equals_computing_everything_anew(any_tiny, cache):
    batch = batch_of(any_tiny, requests=any_tiny.pictured[:3])
    fixed = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None,
             "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    with defense_of(any_tiny).applied(any_tiny.model):
        cached = any_tiny.model.generate(**batch, **fixed, cache_implementation=cache)
        anew = any_tiny.model.generate(**batch, **fixed, use_cache=False)
    plain = any_tiny.model.generate(**batch, **fixed)
    assert torch.equal(cached.sequences, anew.sequences)
    torch.testing.assert_close(
        torch.stack(cached.logits), torch.stack(anew.logits), atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-3)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(any_tiny):
    requests = [any_tiny.pictured[0], any_tiny.plain[0]]
    together = logits_of(
        any_tiny.model, batch_of(any_tiny, requests=requests), defense_of(any_tiny)
    )
    for index, request in enumerate(requests):
        batch = batch_of(any_tiny, requests=[request])
        alone = logits_of(any_tiny.model, batch, defense_of(any_tiny))
        torch.testing.assert_close(together[index, -1], alone[0, -1], atol=1e-4, rtol=1e-4)


def test_a_batch_is_answered_as_each_request_alone(any_tiny, ending):
    requests = any_tiny.pictured[:6] + any_tiny.plain + any_tiny.varied
    defense, limit = defense_of(any_tiny), {"max_new_tokens": 12}
    together = respond(any_tiny.model, any_tiny.processor, requests, defense, **limit)
    alone = [
        respond(any_tiny.model, any_tiny.processor, [one], defense, **limit)[0] for one in requests
    ]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    without = respond(any_tiny.model, any_tiny.processor, requests, **limit)
    assert [answer.text for answer in together] != [answer.text for answer in without]


@torch.no_grad()
def test_two_models_in_one_process_know_nothing_of_each_other(any_tiny):
    one, two = any_tiny.model, copy.deepcopy(any_tiny.model)
    batch, weak = batch_of(any_tiny), defense_of(any_tiny, replace(STRONG, gamma=0.5))
    expected = (
        logits_of(one, batch),
        logits_of(two, batch, weak),
        logits_of(one, batch, defense_of(any_tiny)),
    )
    with weak.applied(two):
        assert torch.equal(one(**batch).logits, expected[0])
        with defense_of(any_tiny).applied(one):
            assert torch.equal(two(**batch).logits, expected[1])
            assert torch.equal(one(**batch).logits, expected[2])
        assert torch.equal(two(**batch).logits, expected[1])
        assert torch.equal(one(**batch).logits, expected[0])


@torch.no_grad()
def test_the_vision_tower_attends_as_ever(any_tiny):
    anatomy, batch = anatomy_of(any_tiny.model), batch_of(any_tiny, requests=any_tiny.pictured[:2])
    seen = []
    hook = anatomy.projector.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with hook:
        logits_of(any_tiny.model, batch)
        kind = anatomy.vision_tower.config._attn_implementation
        with defense_of(any_tiny).applied(any_tiny.model):
            assert anatomy.vision_tower.config._attn_implementation == kind == "sdpa"
            any_tiny.model(**batch)
    assert torch.equal(*seen)


def test_the_model_is_restored_after_an_error(any_tiny):
    batch, decoder = batch_of(any_tiny), anatomy_of(any_tiny.model).decoder
    before = logits_of(any_tiny.model, batch)
    with pytest.raises(RuntimeError, match="amid"), defense_of(any_tiny).applied(any_tiny.model):
        raise RuntimeError("amid the block")
    assert decoder.config._attn_implementation == "sdpa"
    assert torch.equal(logits_of(any_tiny.model, batch), before)


def test_the_prefix_is_found_where_it_was_put_and_not_in_the_query(any_tiny):
    from hauberk.defenses.prefix_attention import _Session

    tokens = prefix_tokens(any_tiny.processor, STRONG.text)
    again = [replace(r, text=f"{STRONG.text}{r.text}") for r in any_tiny.pictured[:2]]
    ids = batch_of(any_tiny, requests=again)["input_ids"]
    session = _Session(STRONG, tokens, any_tiny.model.config.image_token_id)
    session._read_prompt(ids)
    for row, start in zip(ids.tolist(), session.starts.tolist(), strict=True):
        last = max(i for i, token in enumerate(row) if token == session.image_token)
        rest = tokens[-5:]  # behind a space the first word becomes other tokens
        hits = [i for i in range(len(row)) if row[i : i + len(rest)] == rest]
        assert len(hits) == 2
        assert last < start == min(hits) - len(tokens) + 5


def test_layers_default_to_those_of_vaf_and_wrong_ones_are_named(any_tiny):
    assert PrefixSetting().chosen_layers(32) == (9, 10, 11, 12, 13, 14)
    assert PrefixSetting().chosen_layers(40) == tuple(range(11, 19))
    assert PrefixSetting().chosen_layers(28) == tuple(range(8, 13))
    assert PrefixSetting().chosen_layers(1) == (0,)
    beyond = defense_of(any_tiny, replace(STRONG, layers=(0, 9)))
    with pytest.raises(LayerOutOfRange, match=r"\[9\]"), beyond.applied(any_tiny.model):
        pass


@pytest.mark.parametrize(
    "wrong", [{"text": " "}, {"gamma": -1.0}, {"mode": "soft"}, {"layers": (1, 1)}]
)
def test_a_wrong_setting_is_refused_and_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        PrefixSetting(**wrong)


@torch.no_grad()
def test_what_cannot_be_followed_is_refused(any_tiny):
    batch = batch_of(any_tiny, requests=any_tiny.plain[:2])
    with defense_of(any_tiny).applied(any_tiny.model):
        first = any_tiny.model(**batch, use_cache=True)
        with pytest.raises(UnsupportedRequest, match="one token at a time"):
            any_tiny.model(
                input_ids=batch["input_ids"][:, -3:], past_key_values=first.past_key_values
            )
        with pytest.raises(UnsupportedRequest, match="input_ids"):
            any_tiny.model(inputs_embeds=torch.zeros(1, 3, 32))
        with pytest.raises(UnsupportedRequest, match="already"):
            with defense_of(any_tiny).applied(any_tiny.model):
                pass


def test_another_kind_of_attention_is_refused(any_tiny):
    other = copy.deepcopy(any_tiny.model)
    anatomy_of(other).decoder.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedRequest, match="flash_attention_2"):
        with defense_of(any_tiny).applied(other):
            pass
