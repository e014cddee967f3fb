"""A safety prefix that is kept attended to: what must hold for every model, on tiny real ones."""

import copy
from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from transformers import ByT5Tokenizer

from hauberk.anatomy import anatomy_of
from hauberk.attention import NAMES, attentions_of
from hauberk.defenses.prefix_attention import PrefixAttention, PrefixSetting, prefix_share
from hauberk.defenses.prefix_tokens import PrefixFinder, prefixed
from hauberk.defenses.shift import Shift, ShiftSetting
from hauberk.errors import LayerOutOfRange, UnsupportedRequest
from hauberk.hooks import recording
from hauberk.lab.build import FAMILIES
from hauberk.requests import Request, encode, respond

USER = PrefixSetting("as an ai assistant , ", gamma=1.5)
ANSWER = PrefixSetting("as an ai assistant", "answer", gamma=1.5)
PLACES = pytest.mark.parametrize("setting", [USER, ANSWER], ids=["user", "answer"])
SAID = " , it is a lamp ."


@pytest.fixture(scope="module")
def tiny(any_tiny):
    return any_tiny


@pytest.fixture(scope="module")
def mixed(tiny):
    """Of all lengths and sizes, with pictures and without, and one with a system's words."""
    told = replace(tiny.plain[2], system="be kind . as an ai assistant , be brief .")
    return [*tiny.pictured[:4], *tiny.plain[:2], *tiny.varied, told]


def of(tiny, setting, **changes):
    return PrefixAttention(replace(setting, **changes), tiny.processor)


def finder_of(tiny, setting):
    image = tiny.model.config.image_token_id
    return PrefixFinder(tiny.processor, image, setting.text, setting.placement)


def inputs_of(tiny, setting, requests):
    """Prompts with the prefix, and two tokens behind it if they end with it."""
    asked = [prefixed(request, setting.text, setting.placement) for request in requests]
    if setting.placement == "answer":
        asked = [replace(request, begun=request.begun + SAID) for request in asked]
    return encode(tiny.processor, asked)


def tokens_of(tiny, setting, requests):
    ids = inputs_of(tiny, setting, requests)["input_ids"]
    begin, end = finder_of(tiny, setting).spans(ids)
    return ids, begin, end


def texts(answers):
    return [(answer.text, answer.tokens) for answer in answers]


def ask(tiny, requests, defense=None, **options):
    model = options.pop("model", tiny.model)
    return texts(
        respond(model, tiny.processor, requests, defense, **{"max_new_tokens": 6} | options)
    )


# --- Which tokens are the prefix's --------------------------------------------------------------


@PLACES
def test_the_tokens_found_say_the_prefix_and_stand_where_it_was_put(tiny, mixed, setting):
    ids, begin, end = tokens_of(tiny, setting, mixed)
    image = tiny.model.config.image_token_id
    for request, row, first, last in zip(mixed, ids, begin, end, strict=True):
        assert tiny.processor.decode(row[first:last]).strip() == setting.text.strip()
        behind = tiny.processor.decode(row[last:]).strip()
        if setting.placement == "user":
            assert behind.startswith(request.text)
            assert not (row[first:] == image).any()
        else:
            assert behind == SAID.strip()
        if request.images and setting.placement == "user":
            glue = row[int((row == image).nonzero()[-1]) + 1 : first]
            assert len(glue) <= 2


@PLACES
def test_the_same_words_elsewhere_are_not_the_prefix(tiny, mixed, setting):
    words = setting.text.strip()
    twice = [
        replace(request, text=f"{words} {request.text} {words} it is .", system=f"{words} .")
        for request in mixed
    ]
    alone = [replace(request, system=f"{words} .") for request in mixed]
    ids, begin, end = tokens_of(tiny, setting, twice)
    plain, wanted, _ = tokens_of(tiny, setting, alone)
    padding = [(rows == tiny.processor.tokenizer.pad_token_id).sum(1) for rows in (ids, plain)]
    if setting.placement == "user":  # what is said behind it moves nothing
        assert torch.equal(begin - padding[0], wanted - padding[1])
    for row, first, last in zip(ids, begin, end, strict=True):
        found = tiny.processor.decode(row[first:last]).strip()
        behind = tiny.processor.decode(row[last:])
        assert found == words
        assert behind.count(words) == (2 if setting.placement == "user" else 0)


@PLACES
@pytest.mark.parametrize("before", ["space", "what stands before a prefix", "an answer's tag"])
def test_a_prompt_that_only_speaks_of_the_prefix_has_none(tiny, mixed, setting, before):
    words, chat = setting.text.strip(), FAMILIES[tiny.name].chat
    glue = {
        "space": " ",
        "what stands before a prefix": chat.image.rpartition(tiny.processor.image_token)[2],
        "an answer's tag": chat.assistant + chat.gap,
    }[before]
    requests = [
        replace(request, text=f"{request.text}{glue}{words} it is .", system=f"{words} .")
        for request in mixed
    ]
    begin, end = finder_of(tiny, setting).spans(encode(tiny.processor, requests)["input_ids"])
    assert begin.tolist() == end.tolist() == [0] * len(mixed)


@pytest.mark.parametrize(
    "text", ["As an AI assistant, ", "as an ai assistant", "é a 7 ! ", " so : "]
)
@pytest.mark.parametrize("placement", ["user", "answer"])
def test_a_token_at_an_edge_that_its_neighbour_changes_is_not_looked_for(tiny, text, placement):
    setting = PrefixSetting(text if placement == "user" else text.rstrip(), placement)
    queries = [Request(query) for query in ("how ?", "What ?", "7 of", '"it"', "\nit", "(é)")]
    shown = [replace(request, images=tiny.pictured[0].images) for request in queries]
    _, begin, end = tokens_of(tiny, setting, [*queries, *shown])
    assert (end > begin).all()


@PLACES
def test_an_answer_that_a_request_begins_itself_comes_behind_the_prefix(tiny, mixed, setting):
    begun = [replace(request, begun=" it is") for request in mixed]
    _, begin, end = tokens_of(tiny, setting, begun)
    assert (end > begin).all()
    assert of(tiny, setting).rewrite(begun[0]).begun == (
        " it is" if setting.placement == "user" else "as an ai assistant it is"
    )


@pytest.mark.parametrize("what", ["pictures behind it", "no text", "no answer"])
def test_a_template_that_does_not_put_the_prefix_there_is_refused(tiny, what, monkeypatch):
    turn = "{% for m in messages %}{{ m['role'] + ':' }}TEXT{% for part in m['content'] if "
    turn += "part['type'] == 'image' %}{{ IMAGE }}{% endfor %}{% endfor %}"
    said = "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
    template, setting, says = {
        "pictures behind it": (turn.replace("TEXT", said), USER, "put it behind the pictures"),
        "no text": (turn.replace("TEXT", ""), USER, "does not show it as it is"),
        "no answer": ("{{ messages[0]['content'][-1]['text'] }}", ANSWER, "behind the prompt"),
    }[what]
    shown = template.replace("IMAGE", repr(tiny.processor.image_token))
    monkeypatch.setattr(tiny.processor, "chat_template", shown)
    with pytest.raises(UnsupportedRequest, match=says):
        with of(tiny, setting).applied(tiny.model):
            pass


def test_a_template_without_a_systems_turn_is_no_obstacle(tiny, monkeypatch):
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = refuse + tiny.processor.chat_template
    monkeypatch.setattr(tiny.processor, "chat_template", template)
    _, begin, end = tokens_of(tiny, USER, [tiny.plain[0], tiny.pictured[0]])
    assert (end > begin).all()


def test_a_tokenizer_that_does_not_tell_where_its_tokens_stand_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(tiny.processor, "tokenizer", ByT5Tokenizer())
    with pytest.raises(UnsupportedRequest, match=r"ByT5Tokenizer does not tell .* load the fast"):
        with of(tiny, USER).applied(tiny.model):
            pass


# --- What the calibration changes, and what not ---------------------------------------------------


@PLACES
@torch.no_grad()
def test_gamma_zero_and_the_time_after_the_block_change_no_bit(tiny, mixed, setting):
    inputs = inputs_of(tiny, setting, mixed)
    plain = tiny.model(**inputs).logits
    with of(tiny, setting).with_gamma(0).applied(tiny.model):
        assert torch.equal(tiny.model(**inputs).logits, plain)
    with of(tiny, setting).applied(tiny.model):
        assert not torch.allclose(tiny.model(**inputs).logits[:, -1], plain[:, -1], atol=1e-3)
    assert torch.equal(tiny.model(**inputs).logits, plain)


@PLACES
@torch.no_grad()
def test_rows_without_the_prefix_and_positions_up_to_its_end_keep_every_bit(tiny, mixed, setting):
    asked = [prefixed(request, setting.text, setting.placement) for request in mixed]
    if setting.placement == "answer":
        asked = [replace(request, begun=request.begun + SAID) for request in asked]
    inputs = encode(tiny.processor, [*asked[::2], *mixed[1::2]])
    begin, end = finder_of(tiny, setting).spans(inputs["input_ids"])
    plain = tiny.model(**inputs).logits
    with of(tiny, setting).applied(tiny.model):
        found = tiny.model(**inputs).logits
    number = len(asked[::2])
    assert torch.equal(found[number:], plain[number:])
    assert (end[:number] > begin[:number]).all()
    for row, stop in enumerate(end[:number].tolist()):
        assert torch.equal(found[row, :stop], plain[row, :stop])
        assert (found[row, stop:] - plain[row, stop:]).abs().amax(1).min() > 1e-4


@torch.no_grad()
def test_between_passes_of_the_model_the_decoder_is_the_stock_one(tiny):
    inputs = inputs_of(tiny, USER, tiny.pictured[:2])
    states = tiny.model.get_input_embeddings()(inputs["input_ids"])
    decoder = tiny.model.get_decoder()
    plain = decoder(inputs_embeds=states).last_hidden_state
    with of(tiny, USER).applied(tiny.model):
        tiny.model(**inputs)
        assert torch.equal(decoder(inputs_embeds=states).last_hidden_state, plain)
        with pytest.raises(IndexError):
            tiny.model(**inputs | {"input_ids": inputs["input_ids"] + 10**6})
        assert torch.equal(decoder(inputs_embeds=states).last_hidden_state, plain)


@PLACES
@torch.no_grad()
def test_only_chosen_blocks_act_and_the_vision_tower_is_untouched(tiny, mixed, setting):
    anatomy, inputs = anatomy_of(tiny.model), inputs_of(tiny, setting, mixed)
    towers, names = [], []
    with ExitStack() as stack:
        look = anatomy.vision_tower.register_forward_hook(lambda *seen: towers.append(seen[2]))
        stack.enter_context(look)
        seen = stack.enter_context(recording(anatomy.blocks, torch.clone))
        tiny.model(**inputs)
        with of(tiny, setting, layers=(2,)).applied(tiny.model):
            tiny.model(**inputs)
            names = [m.config._attn_implementation for m in attentions_of(anatomy).values()]
            assert tiny.model.config.vision_config._attn_implementation == "sdpa"
            assert tiny.model.config.get_text_config()._attn_implementation == "sdpa"
    assert names == ["sdpa", "sdpa", NAMES["sdpa"], "sdpa"]
    plain, calibrated = (tower if torch.is_tensor(tower) else tower[0] for tower in towers)
    assert torch.equal(plain, calibrated)
    same = [torch.equal(*block) for block in seen]
    assert same == [True, True, False, False]


@PLACES
@pytest.mark.parametrize("mode", ["clamped", "unclamped"])
@torch.no_grad()
def test_sdpa_equals_eager(tiny, mixed, setting, mode):
    eager, inputs = copy.deepcopy(tiny.model), inputs_of(tiny, setting, mixed)
    eager.set_attn_implementation("eager")
    defense = of(tiny, setting, mode=mode)
    logits = {}
    for name, model in {"sdpa": tiny.model, "eager": eager}.items():
        with defense.applied(model):
            logits[name] = model(**inputs).logits[:, -1]
            kinds = {
                m.config._attn_implementation for m in attentions_of(anatomy_of(model)).values()
            }
            assert kinds == {name, NAMES[name]}
    torch.testing.assert_close(logits["sdpa"], logits["eager"], atol=5e-5, rtol=1e-4)


@PLACES
def test_modes_differ_and_what_the_equation_prints_is_selectable(tiny, setting):
    inputs, found = inputs_of(tiny, setting, tiny.pictured[:2]), {}
    for mode in ("clamped", "unclamped", "literal"):
        with torch.no_grad(), of(tiny, setting, mode=mode).applied(tiny.model):
            found[mode] = tiny.model(**inputs).logits[:, -1]
    assert all(logits.isfinite().all() for logits in found.values())
    assert not torch.allclose(found["clamped"], found["unclamped"], atol=1e-3)
    assert not torch.allclose(found["clamped"], found["literal"], atol=1e-3)


# --- Decoding -------------------------------------------------------------------------------------


@PLACES
@pytest.mark.parametrize("cache", [None, "static"])
@torch.no_grad()
def test_decoding_with_a_cache_equals_computing_everything_anew(tiny, mixed, setting, cache):
    defense = of(tiny, setting)
    inputs = encode(tiny.processor, [defense.rewrite(request) for request in mixed])
    image = tiny.model.config.image_token_id  # none is shown for one that is made up
    arguments = {
        "max_new_tokens": 5, "do_sample": False, "suppress_tokens": [image], "eos_token_id": None,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    plain = tiny.model.generate(**inputs, **arguments)
    with defense.applied(tiny.model):
        cached = tiny.model.generate(**inputs, **arguments, cache_implementation=cache)
        anew = tiny.model.generate(**inputs, **arguments, use_cache=False)
    assert torch.equal(cached.sequences, anew.sequences)
    whole = torch.stack(cached.logits)
    torch.testing.assert_close(whole, torch.stack(anew.logits), atol=1e-5, rtol=1e-5)
    before = torch.stack(plain.logits)
    behind = slice(1, None) if setting.placement == "answer" else slice(None)
    assert (whole - before)[behind].abs().amax((0, 2)).min() > 1e-3
    if setting.placement == "answer":  # the prompt ends with the prefix: nothing is behind it yet
        torch.testing.assert_close(whole[0], before[0], atol=1e-5, rtol=1e-5)
        assert cache or torch.equal(whole[0], before[0])


@PLACES
@torch.no_grad()
def test_a_padded_prompt_is_calibrated_as_alone(tiny, mixed, setting):
    with of(tiny, setting).applied(tiny.model):
        together = tiny.model(**inputs_of(tiny, setting, mixed)).logits[:, -1]
        for request, row in zip(mixed, together, strict=True):
            single = tiny.model(**inputs_of(tiny, setting, [request])).logits[0, -1]
            torch.testing.assert_close(row, single, atol=5e-5, rtol=1e-4)


@PLACES
def test_a_batch_answers_like_single_requests_while_rows_leave_it(tiny, ending, setting):
    defense = of(tiny, setting)
    requests = [*tiny.pictured, *tiny.plain, *tiny.varied]
    together = ask(tiny, requests, defense, max_new_tokens=12)
    alone = [ask(tiny, [request], defense, max_new_tokens=12)[0] for request in requests[::3]]
    assert together[::3] == alone
    assert len({number for _, number in together}) > 2
    assert together != ask(tiny, requests, defense.with_gamma(0), max_new_tokens=12)
    begun = [text.startswith("as an ai assistant") for text, _ in together]
    assert set(begun) == {setting.placement == "answer"}


@PLACES
def test_beams_keep_their_prefix(tiny, setting):
    defense, rows = of(tiny, setting), [*tiny.pictured[:2], tiny.plain[0]]
    arguments = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    asked = [defense.rewrite(row) for row in rows]
    with defense.applied(tiny.model):
        together = tiny.model.generate(**encode(tiny.processor, asked), **arguments)
        alone = [tiny.model.generate(**encode(tiny.processor, [row]), **arguments) for row in asked]
    for row, single in zip(together, alone, strict=True):
        assert torch.equal(row[-4:], single[0, -4:])


@PLACES
@torch.no_grad()
def test_calls_that_cannot_be_followed_are_refused(tiny, setting):
    defense = of(tiny, setting)
    inputs = encode(tiny.processor, [defense.rewrite(tiny.pictured[0])])
    foreign = tiny.model(**inputs, use_cache=True).past_key_values
    with defense.applied(tiny.model):
        with pytest.raises(UnsupportedRequest, match=r"1 tokens after \d+ cached.*chunked prefill"):
            tiny.model(input_ids=torch.tensor([[5]]), past_key_values=foreign)
        own = tiny.model(**inputs, use_cache=True).past_key_values
        with pytest.raises(UnsupportedRequest, match=r"2 tokens after \d+ cached"):
            tiny.model(input_ids=torch.tensor([[5, 6]]), past_key_values=own)
        with pytest.raises(UnsupportedRequest, match="reads the prompt from input_ids"):
            tiny.model(inputs_embeds=torch.zeros(1, 2, 32))
        with pytest.raises(UnsupportedRequest, match="chunked prefill"):
            tiny.model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=4)


# --- One model and others -------------------------------------------------------------------------


def hooks_and_names(model):
    modules = attentions_of(anatomy_of(model)).values()
    names = [module.config._attn_implementation for module in modules]
    return len(model._forward_hooks), len(model._forward_pre_hooks), names


@pytest.mark.parametrize("error", ["body", "forward"])
@torch.no_grad()
def test_the_model_is_restored_also_after_an_error(tiny, error):
    inputs, before = inputs_of(tiny, USER, tiny.pictured[:2]), hooks_and_names(tiny.model)
    plain = tiny.model(**inputs).logits
    with pytest.raises((RuntimeError, IndexError)):
        with of(tiny, USER).applied(tiny.model):
            assert hooks_and_names(tiny.model) != before
            if error == "forward":
                tiny.model(input_ids=torch.full_like(inputs["input_ids"], 10**6))
            raise RuntimeError("on purpose")
    assert hooks_and_names(tiny.model) == before
    assert torch.equal(tiny.model(**inputs).logits, plain)


def test_two_models_in_one_process_do_not_influence_each_other(tiny):
    """Nested, interleaved, and with one config between them."""
    other = copy.deepcopy(tiny.model)
    for mine, its in zip(tiny.model.modules(), other.modules(), strict=True):
        if hasattr(its, "config"):
            its.config = mine.config
    weak, strong = of(tiny, USER, gamma=0.5), of(tiny, USER, gamma=4.0)
    requests = [weak.rewrite(request) for request in (*tiny.pictured[:4], *tiny.plain[:2])]
    wanted = {}
    for defense in (weak, strong):
        with defense.applied(tiny.model):
            wanted[defense] = ask(tiny, requests)
    plain = ask(tiny, requests)
    assert plain != wanted[weak] != wanted[strong]

    first, second = weak.applied(tiny.model), strong.applied(other)
    with first:
        assert ask(tiny, requests, model=other) == plain
        with second:
            for _ in range(2):
                assert ask(tiny, requests) == wanted[weak]
                assert ask(tiny, requests, model=other) == wanted[strong]
        assert ask(tiny, requests) == wanted[weak]
    first, second = weak.applied(tiny.model), strong.applied(other)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ask(tiny, requests) == plain
    assert ask(tiny, requests, model=other) == wanted[strong]
    second.__exit__(None, None, None)
    assert ask(tiny, requests, model=other) == plain


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_a_second_calibration_of_a_model_is_refused_and_the_first_goes_on(tiny, gamma):
    defense = of(tiny, USER)
    once = ask(tiny, tiny.pictured[:3], defense)
    with defense.applied(tiny.model):
        with pytest.raises(UnsupportedRequest, match="calibrated already"):
            ask(tiny, tiny.pictured[:3], defense.with_gamma(gamma))
        asked = [defense.rewrite(request) for request in tiny.pictured[:3]]
        assert ask(tiny, asked) == once


def test_a_defense_that_runs_the_decoder_itself_acts_outside_and_is_refused_inside(tiny):
    torch.manual_seed(0)
    shift = Shift(torch.randn(4, 32), ShiftSetting(level="sample"), tiny.processor)
    prefix = of(tiny, USER)
    inputs = inputs_of(tiny, USER, tiny.pictured[:3])
    found = []
    for defenses in ([], [shift], [prefix], [shift, prefix]):
        with ExitStack() as stack, torch.no_grad():
            for defense in defenses:
                stack.enter_context(defense.applied(tiny.model))
            found.append(tiny.model(**inputs).logits[:, -1])
    for one, other in combinations(found, 2):
        assert not torch.allclose(one, other, atol=1e-3)
    with pytest.raises(UnsupportedRequest, match="apply that one outside"):
        with prefix.applied(tiny.model), shift.applied(tiny.model):
            tiny.model(**inputs)


def test_layers_that_a_model_does_not_have_are_refused(tiny):
    with pytest.raises(LayerOutOfRange, match=r"\[99\].*0\.\.3"):
        with of(tiny, USER, layers=(1, 99)).applied(tiny.model):
            pass


# --- The share of attention -----------------------------------------------------------------------


@PLACES
def test_the_share_is_what_eager_attention_shows_and_rises_where_it_is_calibrated(tiny, setting):
    eager, requests = copy.deepcopy(tiny.model), tiny.pictured[:3] + tiny.plain[:2]
    eager.set_attn_implementation("eager")
    defense, answers = of(tiny, setting), [SAID] * len(requests)
    still = prefix_share(
        tiny.model, tiny.processor, requests, defense.with_gamma(0), answers=answers
    )
    raised = prefix_share(
        tiny.model, tiny.processor, requests, defense, answers=answers, batch_size=2
    )
    assert still.shape == raised.shape == (5, 4)
    torch.testing.assert_close(raised[:, 0], still[:, 0], atol=1e-6, rtol=0)
    assert (raised[:, 1:3].mean(0) > still[:, 1:3].mean(0) + 0.01).all()
    for gamma, share in ((0.0, still), (setting.gamma, raised)):
        by_row = []
        for request in requests:
            asked = defense.rewrite(request)
            inputs = encode(tiny.processor, [replace(asked, begun=asked.begun + SAID)])
            begin, end = (int(x) for x in finder_of(tiny, setting).spans(inputs["input_ids"]))
            with torch.no_grad(), defense.with_gamma(gamma).applied(eager):
                weights = eager(**inputs, output_attentions=True).attentions
            on_prefix = torch.stack(weights)[:, 0, :, end:, begin:end].sum(-1).mean((1, 2))
            by_row.append(on_prefix)
        torch.testing.assert_close(share, torch.stack(by_row), atol=1e-5, rtol=1e-4)


def test_a_prefix_that_nothing_follows_has_no_share(tiny):
    with pytest.raises(ValueError, match=r"no position comes behind the prefix in 3 .*`answers`"):
        prefix_share(tiny.model, tiny.processor, tiny.pictured[:3], of(tiny, ANSWER))
    shown = prefix_share(tiny.model, tiny.processor, tiny.pictured[:3], of(tiny, USER))
    assert ((shown > 0) & (shown < 1)).all()
    assert hooks_and_names(tiny.model) == (0, 0, ["sdpa"] * 4)


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "layers"),
    [(1, [0]), (2, [1]), (4, [1, 2]), (6, [2, 3]), (28, range(8, 13)), (32, range(9, 15)),
     (40, range(11, 19))],
)  # fmt: skip
def test_the_middle_layers_are_those_of_vaf_scaled_to_the_depth(blocks, layers):
    assert PrefixSetting().chosen_layers(blocks) == tuple(layers)
    assert PrefixSetting(layers=(3, 1)).chosen_layers(blocks) == (1, 3)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"placement": "system"}, "placement: 'system' is not one of user, answer"),
        ({"mode": "all"}, "mode: 'all' is not one of clamped, unclamped, literal"),
        ({"gamma": -0.1}, "gamma: -0.1 is wrong, 0 or more is right"),
        ({"gamma": float("nan")}, "gamma: nan is wrong"),
        ({"text": " "}, "text: ' ' has no words"),
        ({"placement": "answer"}, "ends in a space.*'As an AI assistant,' is right"),
        ({"layers": ()}, r"layers: \(\) is wrong, one or more"),
        ({"layers": (2, 2)}, r"layers: \(2, 2\) is wrong"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        PrefixSetting(**wrong)
