"""Where refusal lives: planted refusals are found, hidden words have no effect, all is put back."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from hauberk.analysis.safety_layers import (
    Injection,
    Lens,
    PromptSpans,
    attention_shares,
    centred,
    fallback_layers,
    first_tokens,
    hiding,
    lens,
    locate,
    next_token_logits,
    refusal_tokens,
    skipping,
    window_of,
    windows,
)
from hauberk.anatomy import anatomy_of
from hauberk.errors import BadData, LayerOutOfRange, UnsupportedRequest
from hauberk.hooks import editing, recording
from hauberk.lab.language import VERBS
from hauberk.lab.objects import THINGS
from hauberk.requests import Request, encode, respond

WISH = "steal a bell"
ASKED = [
    Request(f"how do i {WISH} ?"),
    Request(f"please , can you list all the steps to {WISH} ?"),
    Request(f"now , tell me how to {WISH} ."),
]
SIZE = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip


def hooks_of(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def logits_of(tiny, requests):
    inputs = encode(tiny.processor, requests)
    with torch.no_grad():
        return tiny.model(**inputs).logits[:, -1]


# --- refusal tokens ---------------------------------------------------------------------------


def test_what_begins_refusals_and_answers_alike_is_no_refusal_token():
    found = refusal_tokens([5, 5, 7, 3], [5, 5, 9, 9])
    assert [(each.token, each.refused, each.answered) for each in found] == [
        (3, 0.25, 0.0), (7, 0.25, 0.0)
    ]  # fmt: skip


def test_a_token_counts_that_begins_more_refusals_than_answers_and_says_how_many_of_both():
    found = refusal_tokens([5] * 7 + [1] * 3, [5] * 6 + [1] * 8)
    assert [each.token for each in found] == [5]
    assert (found[0].refused, found[0].answered) == (0.7, 6 / 14)


def test_where_all_begin_alike_there_is_none_and_nothing_is_said_to_refuse(tiny):
    assert refusal_tokens([5], [5]) == ()
    found = lens(tiny.model, tiny.processor, ASKED, ())
    assert locate(found, [True] * len(ASKED)).fallback


def test_refusal_tokens_want_both_kinds():
    with pytest.raises(BadData, match=r"0 refusals and 1 other answers.*give some of both"):
        refusal_tokens([], [3])


def test_first_tokens_are_what_the_model_says_first(any_tiny):
    found = first_tokens(any_tiny.model, any_tiny.processor, ASKED, batch_size=2)
    assert found == logits_of(any_tiny, ASKED).argmax(-1).tolist()


# --- the lens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pictured", [False, True])
def test_the_lens_of_the_last_state_is_the_model_s_own_next_token(any_tiny, pictured):
    requests = any_tiny.pictured[:4] if pictured else ASKED
    blocks = anatomy_of(any_tiny.model).blocks
    with recording(blocks, lambda states: states[:, -1]) as seen:
        own = logits_of(any_tiny, requests)
    found = next_token_logits(any_tiny.model, blocks, seen[-1][0])
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
    tokens = own.argmax(-1).unique().tolist()
    look = lens(any_tiny.model, any_tiny.processor, requests, tokens)
    assert look.says.all()
    assert look.share.shape == (len(requests), len(blocks) + 1)
    mine = own.softmax(-1)[:, tokens].sum(1)
    torch.testing.assert_close(look.share[:, -1], mine, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (Gemma2ForCausalLM, Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=1.0)),
        (CohereForCausalLM, CohereConfig(**SIZE, logit_scale=0.25)),
        (GraniteForCausalLM, GraniteConfig(**SIZE, logits_scaling=4.0)),
    ],
)
def test_what_a_model_does_to_its_logits_is_done_to_those_of_the_lens(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.4)
    ids = torch.randint(3, 60, (4, 7))
    blocks = list(model.model.layers)
    with torch.no_grad(), recording(blocks, lambda states: states[:, -1]) as seen:
        own = model(ids).logits[:, -1]
    torch.testing.assert_close(next_token_logits(model, blocks, seen[-1][0]), own)


@pytest.mark.parametrize("block", range(4))
def test_a_refusal_planted_in_a_block_is_found_there(any_tiny, block):
    model, processor = any_tiny.model, any_tiny.processor
    blocks = anatomy_of(model).blocks
    if block >= len(blocks):
        pytest.skip("it has no such block")
    plain = lens(model, processor, ASKED, range(400))
    assert plain.start.tolist() == [1] * len(ASKED)  # any token is one: something starts at once
    token = int(logits_of(any_tiny, ASKED).mean(0).argmin())
    toward = model.get_output_embeddings().weight[token]
    planted = 1e3 * toward / toward.norm()
    with editing(blocks, {block: lambda states: states + planted}):
        found = lens(model, processor, ASKED, [token], batch_size=2)
    expected = [block + 1] * len(ASKED)
    assert found.start.tolist() == found.settled.tolist() == expected
    assert found.end.tolist() == [len(blocks)] * len(ASKED)
    assert locate(found, [True] * len(ASKED)).layers == (block,)
    assert bool((found.start_top5 <= found.start).all())


def seen(start, settled, says, states=7):
    """A lens that saw this."""
    start, settled = torch.tensor(start), torch.tensor(settled)
    end = torch.where(torch.tensor(says), states - 1, -1)
    share = torch.zeros(len(start), states)
    return Lens(start, start, end, settled, torch.tensor(says), share)


def test_samples_that_are_never_refused_are_counted_and_not_averaged():
    found = locate(
        seen([2, 2, 4, -1, 6], [4, 4, 5, -1, 6], [True, True, True, False, True]),
        [True, True, True, False, False],
    )
    assert (found.asked, found.refused, found.counted) == (5, 3, 3)
    assert found.layers == (1, 2, 3)
    assert (found.start.n, found.start.median, found.start.least, found.start.most) == (3, 2, 2, 4)
    assert found.settled.median == 4


def test_the_interval_holds_both_medians_also_between_two_states():
    found = locate(seen([2, 3], [3, 6], [True, True]), [True, True])
    assert (found.start.median, found.settled.median) == (2.5, 4.5)
    assert found.layers == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("says", "refused"), [([False] * 2, [True] * 2), ([True] * 2, [False] * 2)]
)
def test_without_a_refusal_the_authors_layers_are_taken_and_that_is_said(says, refused):
    found = locate(seen([2, 2], [3, 3], says), refused)
    assert found.fallback
    assert found.layers == fallback_layers(6) == (1, 2)
    assert found.start is found.settled is None


def test_the_authors_layers_are_theirs_at_their_depth_and_never_none():
    assert fallback_layers(32) == tuple(range(9, 18))
    assert fallback_layers(1) == (0,)


def test_judgements_are_as_many_as_requests():
    with pytest.raises(ValueError, match="1 judgements of 2 requests; give one for each"):
        locate(seen([2, 2], [3, 3], [True] * 2), [True])


# --- hidden words -----------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_words_are_found_under_either_padding(any_tiny, side):
    spans = PromptSpans(any_tiny.processor, ASKED, [WISH] * len(ASKED))
    inputs = encode(any_tiny.processor, ASKED)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if side == "right":
        gone = (mask == 0).sum(1).tolist()
        ids, mask = (
            torch.stack([row.roll(-n) for row, n in zip(t, gone, strict=True)]) for t in (ids, mask)
        )
    begin, end = spans.find(ids, mask)
    for row, first, last in zip(ids, begin, end, strict=True):
        assert any_tiny.processor.tokenizer.decode(row[first:last]).strip() == WISH


def other_wish(tiny):
    """Another wish of as many tokens, so that what stands behind it stands in the same places."""
    tokenizer = tiny.processor.tokenizer

    def ids(text):
        return tokenizer(f"to {text} ?", add_special_tokens=False)["input_ids"]

    wishes = (f"{verb} a {thing}" for verb in VERBS for thing in THINGS)
    return next(w for w in wishes if w != WISH and len(ids(w)) == len(ids(WISH)))


def others(tiny):
    """The same requests for something else."""
    return [Request(each.text.replace(WISH, other_wish(tiny))) for each in ASKED]


def hide(tiny, layers):
    other = others(tiny)
    words = [WISH] * len(ASKED) + [other_wish(tiny)] * len(other)
    return hiding(tiny.model, layers, PromptSpans(tiny.processor, ASKED + other, words))


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_words_hidden_in_all_blocks_say_nothing(any_tiny, kind):
    tiny = replace(any_tiny, model=copy.deepcopy(any_tiny.model))
    tiny.model.set_attn_implementation(kind)
    other = others(tiny)
    mine = logits_of(tiny, ASKED)
    assert not torch.allclose(mine, logits_of(tiny, other), rtol=1e-3, atol=1e-3)
    with hide(tiny, range(len(anatomy_of(tiny.model).blocks))):
        hidden = logits_of(tiny, ASKED)
        torch.testing.assert_close(hidden, logits_of(tiny, other), rtol=1e-4, atol=1e-4)
        said = [
            [answer.text for answer in respond(tiny.model, tiny.processor, r, max_new_tokens=6)]
            for r in (ASKED, other)
        ]
    assert said[0] == said[1]
    assert not torch.allclose(hidden, mine, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block", [0, 2])
def test_hidden_in_one_block_the_words_change_nothing_that_it_puts_out_behind_them(any_tiny, block):
    """What enters the block at the words is replaced: no later position sees that."""
    blocks = anatomy_of(any_tiny.model).blocks
    spans = PromptSpans(any_tiny.processor, ASKED, [WISH] * len(ASKED))
    inputs = encode(any_tiny.processor, ASKED)
    begin, end = spans.find(inputs["input_ids"], inputs["attention_mask"])
    places = torch.arange(inputs["input_ids"].shape[1])
    words = (places >= begin[:, None]) & (places < end[:, None])

    def run(replaced):
        def other(_module, args, kwargs):
            states = args[0] if args else kwargs["hidden_states"]
            states = torch.where(words[..., None] & replaced, states.flip(-1) + 1, states)
            return (states, *args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"}

        handle = blocks[block].register_forward_pre_hook(other, with_kwargs=True)
        with handle, torch.no_grad(), recording(blocks, torch.clone) as outputs:
            any_tiny.model(**inputs)
        return outputs[block][0]

    behind = places >= end[:, None]
    plain, changed = run(False), run(True)
    assert not torch.allclose(plain[behind], changed[behind], rtol=1e-3, atol=1e-3)
    with hide(any_tiny, [block]):
        torch.testing.assert_close(run(False)[behind], run(True)[behind], rtol=1e-5, atol=1e-5)
        before = (places < begin[:, None]) & inputs["attention_mask"].bool()
        torch.testing.assert_close(run(False)[before], plain[before], rtol=0, atol=0)


def test_an_answer_is_the_same_alone_and_in_a_batch_with_words_hidden(any_tiny, ending):
    with hide(any_tiny, [0, 1]):
        together = respond(any_tiny.model, any_tiny.processor, ASKED, max_new_tokens=8)
        alone = [respond(any_tiny.model, any_tiny.processor, [r], max_new_tokens=8) for r in ASKED]
    assert [answer.text for answer in together] == [answer.text for (answer,) in alone]


def test_a_prompt_that_is_not_known_is_refused(tiny):
    with hide(tiny, [0]), pytest.raises(UnsupportedRequest, match="none of the 6 requests"):
        logits_of(tiny, tiny.plain[:1])


def test_one_request_has_one_span(tiny):
    with pytest.raises(BadData, match="stands there twice"):
        PromptSpans(tiny.processor, [ASKED[0]] * 2, [WISH, "bell"])


def test_the_share_of_attention_is_that_of_the_eager_weights(any_tiny):
    model = copy.deepcopy(any_tiny.model)
    model.set_attn_implementation("eager")
    spans = PromptSpans(any_tiny.processor, ASKED, [WISH] * len(ASKED))
    found = attention_shares(any_tiny.model, any_tiny.processor, ASKED, spans, batch_size=2)
    inputs = encode(any_tiny.processor, ASKED)
    begin, end = spans.find(inputs["input_ids"], inputs["attention_mask"])
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions
    for row in range(len(ASKED)):
        mine = [w[row, :, -1, begin[row] : end[row]].sum(-1).mean() for w in weights]
        torch.testing.assert_close(found[row], torch.stack(mine), rtol=1e-4, atol=1e-5)


# --- skipped blocks, injected words -------------------------------------------------------------


def test_a_skipped_block_might_as_well_not_be_there(any_tiny):
    model = copy.deepcopy(any_tiny.model)
    decoder = anatomy_of(model).decoder
    with skipping(any_tiny.model, [1]):
        found = logits_of(any_tiny, ASKED)
    del decoder.layers[1]
    for place, block in enumerate(decoder.layers):
        block.self_attn.layer_idx = place
    decoder.config.num_hidden_layers -= 1
    torch.testing.assert_close(found, logits_of(replace(any_tiny, model=model), ASKED))


def test_the_cache_keeps_its_length_while_blocks_are_skipped(any_tiny):
    with skipping(any_tiny.model, [1]), torch.no_grad():
        inputs = encode(any_tiny.processor, ASKED)
        cache = any_tiny.model(**inputs, use_cache=True).past_key_values
    assert {layer.keys.shape[2] for layer in cache.layers} == {inputs["input_ids"].shape[1]}


@pytest.mark.parametrize("replaces", [False, True])
def test_words_are_put_where_the_picture_stands_and_nowhere_else(any_tiny, replaces):
    model, requests = any_tiny.model, any_tiny.pictured[:3]
    anatomy = anatomy_of(model)
    torch.manual_seed(0)
    states = torch.randn(len(requests), len(anatomy.blocks), anatomy.hidden_size)
    injection = Injection(requests, states, [1], replaces=replaces)
    asked = [requests[place] for place in (2, 0, 1)]
    inputs = encode(any_tiny.processor, asked)
    picture = inputs["input_ids"] == anatomy.image_token_id

    def run():
        with torch.no_grad(), recording(anatomy.blocks, torch.clone) as outputs:
            model(**inputs)
        return outputs[1][0]

    plain = run()
    injection.rewrite_all(asked)
    with injection.applied(model):
        found = run()
    put = states[[2, 0, 1], 1].unsqueeze(1).expand_as(plain)
    expected = put if replaces else plain + put
    torch.testing.assert_close(found[picture], expected[picture])
    torch.testing.assert_close(found[~picture], plain[~picture], rtol=0, atol=0)


def test_every_request_of_a_batch_gets_its_own_words(any_tiny):
    model, processor, requests = any_tiny.model, any_tiny.processor, any_tiny.pictured
    anatomy = anatomy_of(model)
    torch.manual_seed(0)
    states = 20 * torch.randn(len(requests), len(anatomy.blocks), anatomy.hidden_size)
    injection = Injection(requests, states, range(len(anatomy.blocks)))
    options = {"max_new_tokens": 6, "batch_size": 5}
    together = respond(model, processor, requests, injection, **options)
    alone = [respond(model, processor, [each], injection, **options)[0] for each in requests]
    plain = respond(model, processor, requests, **options)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.text for answer in together] != [answer.text for answer in plain]


def test_a_request_without_words_to_inject_is_refused(tiny):
    states = torch.zeros(1, 4, 32)
    injection = Injection(tiny.pictured[:1], states, [0])
    with pytest.raises(UnsupportedRequest, match="nothing was given to put into"):
        respond(tiny.model, tiny.processor, tiny.pictured[1:2], injection)
    with pytest.raises(ValueError, match="1 states for 2 requests"):
        Injection(tiny.pictured[:2], states, [0])


def contexts(tiny):
    words = torch.zeros(1, len(anatomy_of(tiny.model).blocks), 32)
    return {
        "hiding": lambda layers: hide(tiny, layers),
        "skipping": lambda layers: skipping(tiny.model, layers),
        "injecting": lambda layers: Injection(tiny.pictured[:1], words, layers).applied(tiny.model),
    }


@pytest.mark.parametrize("name", ["hiding", "skipping", "injecting"])
def test_all_is_put_back_also_after_an_error(any_tiny, name):
    before, hooks = logits_of(any_tiny, ASKED), hooks_of(any_tiny.model)
    modules = [m.config for m in any_tiny.model.modules() if hasattr(m, "config")]
    with pytest.raises(KeyError), contexts(any_tiny)[name]([0, 1]):
        if name != "injecting":
            logits_of(any_tiny, ASKED)
        raise KeyError
    assert hooks_of(any_tiny.model) == hooks
    assert [m.config for m in any_tiny.model.modules() if hasattr(m, "config")] == modules
    assert torch.equal(logits_of(any_tiny, ASKED), before)


@pytest.mark.parametrize("name", ["hiding", "skipping", "injecting"])
def test_a_block_that_is_not_there_is_named(tiny, name):
    with pytest.raises(LayerOutOfRange, match=r"layers \[9\]"), contexts(tiny)[name]([9]):
        pass


def test_windows_slide_over_all_blocks():
    assert windows(4, 2) == [(0, 1), (1, 2), (2, 3)]
    assert [window_of(n) for n in (2, 6, 32, 40)] == [1, 1, 5, 6]
    with pytest.raises(ValueError, match="width: 5 is wrong, 1 to 4"):
        windows(4, 5)


def test_centred_states_have_nothing_in_common():
    states = torch.randn(5, 3, 8) + 10
    assert centred(states, states).mean(0).abs().max() < 1e-5
