"""Attention that looks harder at some columns: against the formula, and bit by bit elsewhere."""

import copy
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from transformers import AttentionInterface, MllamaTextModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from hauberk.anatomy import anatomy_of
from hauberk.attention import NAMES, Calibration, Focus, aim_at, attentions_of, calibrating
from hauberk.errors import UnsupportedRequest
from hauberk.requests import encode

ROWS, LENGTH, PAST = 4, 9, 3
BEGIN, END = torch.tensor([1, 0, 2, 4]), torch.tensor([3, 0, 5, 6])  # the second row has none
GAMMA = 0.7


def module_of(tiny, kind="sdpa"):
    """The attention of one block of a copy of the model."""
    model = copy.deepcopy(tiny.model)
    model.set_attn_implementation(kind)
    return attentions_of(anatomy_of(model))[1]


def tensors(module, past, unused=0):
    """Queries, keys and values as the module hands them on, keys with positions not used yet."""
    torch.manual_seed(0)
    heads, size = module.config.num_attention_heads, module.head_dim
    groups = heads // module.num_key_value_groups
    query = 3 * torch.randn(ROWS, heads, LENGTH, size)
    key, value = torch.randn(2, ROWS, groups, past + LENGTH + unused, size)
    return query, key, value


def open_to(past, keys, padded):
    """Which keys each query sees, (rows, 1, queries, keys) bool: the first of row 0 are padding."""
    queries = torch.arange(past, past + LENGTH)[:, None]
    seen = (torch.arange(keys) <= queries)[None, None].repeat(ROWS, 1, 1, 1)
    seen[0, :, :, :padded] = False
    return seen


def masks(kind, past, keys):
    """The masks that a decoder gives: none at all, or with padding before the span of row 0."""
    seen = open_to(past, keys, padded=1)
    lowest = torch.finfo(torch.float32).min
    hidden = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, lowest)
    if kind == "eager":
        return [(hidden, seen)]
    shown = [(seen, seen), (hidden, seen)]
    return shown if past else [*shown, (None, open_to(0, keys, padded=0))]


def expected(module, query, key, value, seen, past, mode="clamped"):
    """Softmax of Z + bias + mask as the formula says it, and weights that the stock has."""
    key, value = (part.repeat_interleave(module.num_key_value_groups, 1) for part in (key, value))
    products = query @ key.mT
    logits = module.scaling * products
    added = {
        "clamped": GAMMA * logits.relu(),
        "unclamped": GAMMA * logits,
        "literal": GAMMA * products.relu() * logits,
    }[mode]
    columns, queries = torch.arange(key.shape[2]), torch.arange(past, past + query.shape[2])
    span = (columns >= BEGIN[:, None]) & (columns < END[:, None])
    behind = (queries >= END[:, None]) & span.any(1, keepdim=True)
    added = added * (behind[:, None, :, None] & span[:, None, None, :])
    logits = logits.masked_fill(~seen, -torch.inf)
    plain, weights = logits.softmax(-1), (logits + added).softmax(-1)
    return plain, weights, (weights @ value).transpose(1, 2), span, behind, added


def attend(module, query, key, value, mask):
    function = AttentionInterface()[module.config._attn_implementation]
    return function(module, query, key, value, mask, scaling=module.scaling)


def stock(module, query, key, value, mask):
    """What transformers itself would call."""
    eager = import_module(type(module).__module__).eager_attention_forward
    function = {"sdpa": sdpa_attention_forward, "eager": eager}[module.config._attn_implementation]
    return function(module, query, key, value, mask, scaling=module.scaling)


def told(past, **changes):
    focus = Focus(aim_at(BEGIN, END, past=past, length=LENGTH))
    return Calibration(**{"focus": focus, "gamma": GAMMA} | changes)


@pytest.mark.parametrize("mode", ["clamped", "unclamped", "literal"])
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(("past", "unused"), [(0, 0), (0, 4), (PAST, 0), (PAST, 2)])
def test_calibrated_attention_is_the_softmax_of_what_the_formula_adds(
    any_tiny, mode, kind, past, unused
):
    module = module_of(any_tiny, kind)
    query, key, value = tensors(module, past, unused)
    for mask, seen in masks(kind, past, past + LENGTH + unused):
        parts = expected(module, query, key, value, seen, past, mode)
        with calibrating({module: told(past, mode=mode)}):
            output, weights = attend(module, query, key, value, mask)
        real = seen.any(-1)[:, 0]  # a row of padding sees nothing
        torch.testing.assert_close(output[real], parts[2][real], atol=1e-5, rtol=1e-5)
        if kind == "eager":
            weights = weights.transpose(1, 2)[real]
            wanted = parts[1].transpose(1, 2)[real]
            torch.testing.assert_close(weights, wanted, atol=1e-5, rtol=1e-4)


def test_a_weight_grows_by_the_exponential_of_gamma_times_its_positive_logit(any_tiny):
    module = module_of(any_tiny, "eager")
    query, key, value = tensors(module, 0)
    ((mask, seen),) = masks("eager", 0, LENGTH)
    *_, span, _, added = expected(module, query, key, value, seen, 0)
    _, before = stock(module, query, key, value, mask)
    with calibrating({module: told(0)}):
        _, after = attend(module, query, key, value, mask)
    last = (after / before)[1:, :, -1]  # sees all columns; row 0 has one of padding
    grown = last / last[:, :, -1:]  # columns outside the span keep their proportions
    added, span = added[1:, :, -1], span[1:, None].expand_as(last)
    torch.testing.assert_close(grown, added.exp(), rtol=1e-4, atol=0)
    assert (added[span] > 0.5).any()
    assert (added[span] == 0).any()


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("past", [0, PAST])
def test_rows_without_a_span_and_queries_before_its_end_keep_every_bit(any_tiny, kind, past):
    module = module_of(any_tiny, kind)
    query, key, value = tensors(module, past)
    for mask, seen in masks(kind, past, past + LENGTH):
        behind = expected(module, query, key, value, seen, past)[4]
        plain = stock(module, query, key, value, mask)[0]
        with calibrating({module: told(past)}):
            output = attend(module, query, key, value, mask)[0]
        assert torch.equal(output[~behind], plain[~behind])
        changed = (output[behind] - plain[behind]).abs().amax((1, 2))
        assert (changed > 1e-4).all()


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("changes", [{"gamma": 0.0}, {"focus": Focus()}], ids=["gamma", "focus"])
def test_with_nothing_to_do_it_is_the_stock_function_to_the_bit(any_tiny, kind, changes):
    module = module_of(any_tiny, kind)
    query, key, value = tensors(module, 0)
    for mask, _ in masks(kind, 0, LENGTH):
        plain = stock(module, query, key, value, mask)[0]
        with calibrating({module: told(0, **changes)}):
            assert torch.equal(attend(module, query, key, value, mask)[0], plain)


def test_the_share_watched_is_the_sum_of_the_weights_on_the_span(any_tiny):
    module, seen = module_of(any_tiny, "eager"), []
    query, key, value = tensors(module, 0)
    ((mask, open_keys),) = masks("eager", 0, LENGTH)
    plain, weights, _, span, behind, _ = expected(module, query, key, value, open_keys, 0)
    for gamma in (0.0, GAMMA):
        with calibrating({module: told(0, gamma=gamma, watch=seen.append)}):
            attend(module, query, key, value, mask)
    for found, wanted in zip(seen, (plain, weights), strict=True):
        on_span = (wanted * span[:, None, None, :]).sum(-1).mean(1)[behind]
        known = behind[END > BEGIN, -found.shape[1] :]  # of rows and queries that are computed
        assert torch.equal(~found.isnan(), known)
        torch.testing.assert_close(found[known], on_span, atol=1e-5, rtol=1e-5)
    assert (seen[1] > seen[0])[~seen[0].isnan()].all()


def test_gradients_pass_through_what_is_added(any_tiny):
    module = module_of(any_tiny)
    query, key, value = tensors(module, 0)
    query.requires_grad_()
    with calibrating({module: told(0)}):
        (gradient,) = torch.autograd.grad(attend(module, query, key, value, None)[0].sum(), query)
    (plain,) = torch.autograd.grad(stock(module, query, key, value, None)[0].sum(), query)
    assert gradient.isfinite().all()
    assert torch.equal(gradient[1], plain[1])
    assert not torch.allclose(gradient[0], plain[0])


@pytest.mark.parametrize("kind", NAMES)
@torch.no_grad()
def test_a_decoder_that_is_given_one_of_our_names_is_the_stock_one(any_tiny, kind):
    """With the mask of its padding, which a name that is registered by half would lose."""
    model = copy.deepcopy(any_tiny.model)
    inputs = encode(any_tiny.processor, any_tiny.pictured[:3] + any_tiny.plain[:2])
    model.set_attn_implementation(kind)
    plain = model(**inputs).logits
    model.set_attn_implementation({"text_config": NAMES[kind]})
    assert model.config.vision_config._attn_implementation == kind
    assert torch.equal(model(**inputs).logits, plain)


def test_a_causal_attention_is_found_in_every_block_that_has_one(any_tiny):
    anatomy = anatomy_of(any_tiny.model)
    found = attentions_of(anatomy)
    assert list(found) == [0, 1, 2, 3]
    assert not {id(m) for m in anatomy.vision_tower.modules()} & {id(m) for m in found.values()}
    config = MllamaTextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, cross_attention_layers=[1], pad_token_id=0,
    )  # fmt: skip
    crossed = replace(anatomy, blocks=tuple(MllamaTextModel(config).layers))
    assert list(attentions_of(crossed)) == [0, 2]


@pytest.mark.parametrize("error", [None, "body"])
def test_a_module_gets_back_the_config_that_it_shares(any_tiny, error):
    first, second = attentions_of(anatomy_of(any_tiny.model))[1], module_of(any_tiny)
    second.config = first.config
    shared, before = first.config, first.config.to_dict()
    with pytest.raises(RuntimeError, match="on purpose"):
        with calibrating({first: told(0)}):
            assert first.config._attn_implementation == NAMES["sdpa"]
            assert second.config is shared
            assert shared._attn_implementation == "sdpa"
            with calibrating({second: told(0)}):
                raise RuntimeError("on purpose")
    assert first.config is second.config is shared
    assert (shared.to_dict(), shared._attn_implementation) == (before, "sdpa")


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_an_implementation_whose_logits_are_hidden_is_refused(any_tiny, name):
    whole, module = module_of(any_tiny), module_of(any_tiny)
    module.config._attn_implementation = name
    with pytest.raises(UnsupportedRequest, match=rf"attends by '{name}'.*'sdpa'"):
        with calibrating({whole: told(0), module: told(0)}):
            pass
    with calibrating({whole: told(0)}):  # which was entered and left
        assert whole.config._attn_implementation == NAMES["sdpa"]


def test_a_module_is_calibrated_once_at_a_time(any_tiny):
    module = module_of(any_tiny)
    with calibrating({module: told(0)}):
        with pytest.raises(UnsupportedRequest, match="calibrated already"):
            with calibrating({module: told(0)}):
                pass
        assert module.config._attn_implementation == NAMES["sdpa"]


def test_keys_that_a_cache_has_dropped_and_passes_of_others_are_refused(any_tiny):
    module = module_of(any_tiny)
    query, key, value = tensors(module, PAST)
    with calibrating({module: told(PAST)}):
        with pytest.raises(UnsupportedRequest, match=r"keys of 11 positions, where 12 were seen"):
            attend(module, query, key[:, :, 1:], value[:, :, 1:], None)
        with pytest.raises(UnsupportedRequest, match=r"2 rows of 9 queries in a pass of \(4, 9\)"):
            attend(module, query[:2], key[:2], value[:2], None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"begin": END}, "none"), ({"past": 0, "length": 3}, "none"), ({}, "some")],
    ids=["no span", "all before", "both"],
)
def test_a_pass_with_nothing_behind_a_span_has_no_aim(changes, says):
    arguments = {"begin": BEGIN, "end": END, "past": 0, "length": LENGTH} | changes
    aim = aim_at(arguments.pop("begin"), arguments.pop("end"), **arguments)
    assert (aim is None) == (says == "none")
    if aim is not None:
        assert aim.rows.tolist() == [0, 2, 3]
        assert aim.first == 3
        assert not aim.whole
    step = aim_at(BEGIN[[0, 2]], END[[0, 2]], past=20, length=1)
    assert step is not None
    assert step.whole
