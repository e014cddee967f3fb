"""The text twin read off token ids, for tokenizers of every kind that LLaVAs are published with."""

import string

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from hauberk.analysis.twins import TwinStates, last_states
from hauberk.anatomy import anatomy_of
from hauberk.errors import UnsupportedRequest
from hauberk.lab.build import FAMILIES
from hauberk.requests import Request, blank_twin, encode, text_twin

CHAT_TEMPLATE = FAMILIES["lab-llava"].chat.template
RED, BLUE = (Image.new("RGB", (96, 96), color) for color in ("red", "blue"))
REQUESTS = [
    Request("what is this ?", (RED,)),
    Request("what is this ?", (RED, BLUE)),
    Request("  two  spaces ", (BLUE,)),
    Request("\nnaïve 猫 \n", (RED,)),
    Request("", (BLUE,)),
]


def spaced(prepend):
    """Llama's pre-tokenizer and decoder: a space before every piece, or before the first."""

    def build(core):
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
        core.decoder = FROM_SPACED

    return build


def metaspaced(core):
    """The same with SentencePiece's own decoder, and words split."""
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    )


def prepended(core):
    """The tokenizer.json of LLaVA-1.5: one space more, whatever the piece begins with."""
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = FROM_SPACED


def byte_level(add_prefix_space):
    def build(core):
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        core.decoder = decoders.ByteLevel()

    return build


FROM_SPACED = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(content=" ", left=1),
    ]
)
KINDS = {
    "always": spaced("always"),
    "first": spaced("first"),
    "never": spaced("never"),
    "SentencePiece": metaspaced,
    "Prepend": prepended,
    "bytes": byte_level(False),
    "bytes after a space": byte_level(True),
}


def processor_of(tiny, kind, template=CHAT_TEMPLATE, begins=True):
    """The tiny processor with another tokenizer; ``begins`` tells who writes the <s>."""
    special = ["<pad>", "<s>", "</s>", "<image>"]  # with the ids that the tiny model knows
    if kind.startswith("bytes"):
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = [("i", "s"), ("Ġ", "is"), ("Ġ", "Ġ")]
    else:
        letters = [f"<0x{byte:02X}>" for byte in range(256)]
        letters += ["▁", *string.ascii_letters, *":?."]
        merges = [("i", "s"), ("▁", "is"), ("▁", "▁"), (":", "▁")]
    tokens = [*special, *letters, *("".join(pair) for pair in merges)]
    assert len(tokens) <= tiny.model.config.text_config.vocab_size
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    KINDS[kind](core)
    if not begins:
        template = template.replace("{{ '<s>' }}", "")
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        name_or_path=f"tokenizer of {kind}",
    )
    return LlavaProcessor(
        image_processor=tiny.processor.image_processor,
        tokenizer=tokenizer,
        patch_size=tiny.processor.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def shifts_of(twins, inputs, **changes):
    known = ("input_ids", "attention_mask", "image_grid_thw")
    return twins.shifts(**{name: inputs[name] for name in known if name in inputs} | changes)


def check(tiny, processor, requests):
    """The shifts are those of the prompts that were rendered without or with blank pictures."""
    twins, expected, found = TwinStates(tiny.model, processor), [], []
    for request in requests:
        found.append(shifts_of(twins, encode(processor, [request]))[0])
        rendered = [text_twin(request), blank_twin(request, processor)]
        text, blank = (last_states(tiny.model, processor, [twin])[0] for twin in rendered)
        expected.append(text - blank)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_twins_are_the_prompts_rendered_without_and_with_blank_pictures(tiny, kind, begins):
    check(tiny, processor_of(tiny, kind, begins=begins), REQUESTS)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_whose_tokens_touch_are_told_apart(tiny, kind):
    template = CHAT_TEMPLATE.replace("<image>\\n", "<image>")
    assert template != CHAT_TEMPLATE
    check(tiny, processor_of(tiny, kind, template), REQUESTS[:2])


SPACE_AFTER = CHAT_TEMPLATE.replace("<image>\\n", "<image> ")


@pytest.mark.parametrize("kind", ["first", "never", "Prepend", "bytes"])
def test_a_space_after_the_picture_is_no_hindrance_where_the_ids_tell_it(tiny, kind):
    check(tiny, processor_of(tiny, kind, SPACE_AFTER), REQUESTS[:2])


@pytest.mark.parametrize("kind", ["always", "SentencePiece", "bytes after a space"])
def test_a_tokenizer_that_hides_the_space_after_the_picture_is_refused_by_name(tiny, kind):
    with pytest.raises(UnsupportedRequest, match=f"'tokenizer of {kind}'.*level: dataset"):
        TwinStates(tiny.model, processor_of(tiny, kind, SPACE_AFTER))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_no_text_gives_are_refused_with_the_name_of_the_tokenizer(tiny, kind):
    processor = processor_of(tiny, kind)
    ids = encode(processor, REQUESTS[:1])["input_ids"]
    letters = processor.tokenizer.convert_tokens_to_ids(["i", "s"])  # where "is" is a token
    ids = torch.cat([ids, torch.tensor([letters])], dim=1)
    with pytest.raises(UnsupportedRequest, match=f"'tokenizer of {kind}'.*level: dataset"):
        TwinStates(tiny.model, processor).shifts(ids, torch.ones_like(ids))


def test_numbered_pictures_can_be_followed_one_by_one_only(tiny):
    numbered = CHAT_TEMPLATE.replace("{{ '<image>", "Picture {{ loop.index }}: {{ '<image>")
    processor = processor_of(tiny, "Prepend", numbered)
    check(tiny, processor, REQUESTS[:1])
    with pytest.raises(UnsupportedRequest, match=r"numbers its pictures.*one picture only"):
        check(tiny, processor, REQUESTS[1:2])


def pictured(*sizes):
    """A request with pictures of some widths and heights."""
    return Request("what is this ?", [Image.new("RGB", size, "red") for size in sizes])


lengths = st.integers(20, 200)
batches = st.lists(
    st.lists(st.tuples(lengths, lengths), max_size=2).map(lambda sizes: pictured(*sizes)),
    min_size=2,
    max_size=4,
)


@settings(max_examples=8)
@given(requests=batches)
@example(requests=[pictured((200, 100)), pictured((100, 200))])  # of as many tokens
@torch.no_grad()
def test_a_batch_of_pictures_of_all_sizes_has_the_shifts_of_single_plain_twins(any_tiny, requests):
    """Whatever the grid or the number of tiles, and whichever side the rows are padded on."""
    model, processor = any_tiny.model, any_tiny.processor
    texts, blanks = (
        last_states(model, processor, twin, batch_size=1)
        for twin in (
            [text_twin(request) for request in requests],
            [blank_twin(request, processor) for request in requests],
        )
    )
    inputs, twins = encode(processor, requests), TwinStates(model, processor)
    found = shifts_of(twins, inputs)
    torch.testing.assert_close(found, texts - blanks, atol=2e-5, rtol=1e-4)
    pictured = torch.tensor([bool(request.images) for request in requests])
    assert torch.equal(found.flatten(1).any(1), pictured)
    ends = inputs["attention_mask"].sum(1).tolist()
    right = {
        name: torch.stack([row.roll(end) for row, end in zip(inputs[name], ends, strict=True)])
        for name in ("input_ids", "attention_mask")
    }
    assert torch.equal(shifts_of(twins, inputs, **right), found)


@torch.no_grad()
def test_pictures_of_one_size_are_read_once_whatever_they_show(any_tiny):
    twins = TwinStates(any_tiny.model, any_tiny.processor)
    looks = []
    with twins.anatomy.vision_tower.register_forward_hook(lambda *_: looks.append(1)):
        for size in [(96, 96), (200, 100), (96, 96), (200, 100)]:
            for color in ("red", "blue"):
                request = Request("what is this ?", [Image.new("RGB", size, color)])
                shifts_of(twins, encode(any_tiny.processor, [request]))
    assert len(looks) == (1 if twins.anatomy.layout == "fixed" else 2)


@torch.no_grad()
def test_shifts_that_are_remembered_are_those_that_were_computed(any_tiny):
    requests = [*any_tiny.pictured[:4], *any_tiny.plain[:1], *any_tiny.pictured[:1]]
    inputs = encode(any_tiny.processor, requests)
    twins = TwinStates(any_tiny.model, any_tiny.processor, remember=2**20)
    expected = shifts_of(TwinStates(any_tiny.model, any_tiny.processor), inputs)
    passes = []
    with twins.anatomy.blocks[0].register_forward_hook(lambda *_: passes.append(1)):
        assert torch.equal(shifts_of(twins, inputs), expected)
        assert passes
        passes.clear()
        assert torch.equal(shifts_of(twins, inputs), expected)
        assert not passes
        few = encode(any_tiny.processor, requests[2:4])
        assert torch.equal(shifts_of(twins, few), expected[2:4])
        assert not passes


@torch.no_grad()
def test_no_more_shifts_are_remembered_than_there_is_room_for(any_tiny):
    inputs, anatomy = encode(any_tiny.processor, any_tiny.pictured[:4]), anatomy_of(any_tiny.model)
    two = 2 * len(anatomy.blocks) * anatomy.hidden_size * 4  # bytes
    twins = TwinStates(any_tiny.model, any_tiny.processor, remember=two)
    rows = []
    with anatomy.blocks[0].register_forward_hook(lambda _, given, out: rows.append(len(out))):
        first = shifts_of(twins, inputs)
        fresh, rows[:] = sum(rows), []
        torch.testing.assert_close(shifts_of(twins, inputs), first, atol=2e-5, rtol=1e-4)
    assert fresh - sum(rows) >= 2 * 2  # a text twin and a blank one of each


def only(family):
    return pytest.mark.parametrize("any_tiny", [family], indirect=True)


@only("lab-qwen")
@torch.no_grad()
def test_grids_are_read_off_the_positions_where_nothing_else_tells_them(any_tiny):
    """As inside ``generate``, which takes the pictures in before the prompt."""
    inputs = encode(any_tiny.processor, [*any_tiny.plain[:1], pictured((250, 90), (90, 250))])
    assert len({tuple(grid) for grid in inputs["image_grid_thw"].tolist()}) == 2
    twins = TwinStates(any_tiny.model, any_tiny.processor)
    prompt = {name: value for name, value in inputs.items() if name != "pixel_values"}
    positions, _ = any_tiny.model.model.get_rope_index(**prompt)
    read = shifts_of(twins, inputs, image_grid_thw=None, position_ids=positions)
    assert torch.equal(read, shifts_of(twins, inputs))


@only("lab-qwen")
def test_grids_that_are_not_those_of_the_prompts_are_refused(any_tiny):
    inputs = encode(any_tiny.processor, [pictured((96, 96)), pictured((200, 100))])
    twins, grids = TwinStates(any_tiny.model, any_tiny.processor), inputs["image_grid_thw"]
    for wrong in (None, grids[:1], grids[[0, 1, 1]], grids.flip(0)):
        with pytest.raises(
            UnsupportedRequest, match=r"pictures of \[4, 8\] tokens.*image_grid_thw"
        ):
            shifts_of(twins, inputs, image_grid_thw=wrong)


@only("lab-qwen")
def test_a_picture_that_the_processor_would_not_make_is_refused(any_tiny):
    """Of 2 x 1 tokens, where its smallest picture has 4."""
    (inputs,) = [encode(any_tiny.processor, [pictured((96, 96))])]
    ids = inputs["input_ids"][0]
    image = any_tiny.model.config.image_token_id
    start = int((ids == image).nonzero()[0])
    short = torch.cat([ids[:start], ids[start + 2 :]]).unsqueeze(0)
    with pytest.raises(UnsupportedRequest, match=r"\(1, 2, 1\).*through the processor"):
        TwinStates(any_tiny.model, any_tiny.processor).shifts(
            short, torch.ones_like(short), image_grid_thw=torch.tensor([[1, 4, 2]])
        )


@only("lab-intern")
@pytest.mark.parametrize("blank", ["uniform", "gaussian"])
def test_noise_in_several_tiles_is_refused_and_in_one_it_is_followed(any_tiny, blank):
    twins = TwinStates(any_tiny.model, any_tiny.processor, blank)
    request = pictured((96, 96), (96, 96))
    texts, blanks = (
        last_states(any_tiny.model, any_tiny.processor, [twin])
        for twin in (text_twin(request), blank_twin(request, any_tiny.processor, blank))
    )
    found = shifts_of(twins, encode(any_tiny.processor, [request]))
    torch.testing.assert_close(found, texts - blanks, atol=2e-5, rtol=1e-4)
    with pytest.raises(UnsupportedRequest, match=r"noise cut into 3 tiles.*blank: white"):
        shifts_of(twins, encode(any_tiny.processor, [pictured((96, 96), (200, 100))]))


def test_a_prompt_that_ends_with_its_picture_is_refused(any_tiny):
    inputs = encode(any_tiny.processor, [pictured((96, 96))])
    end = int((inputs["input_ids"][0] == any_tiny.model.config.image_token_id).nonzero()[-1]) + 1
    cut = {name: inputs[name][:, :end] for name in ("input_ids", "attention_mask")}
    with pytest.raises(UnsupportedRequest, match=r"ends with its picture.*add_generation_prompt"):
        shifts_of(TwinStates(any_tiny.model, any_tiny.processor), inputs, **cut)


def test_a_processor_without_one_size_is_refused(tiny):
    processor = processor_of(tiny, "Prepend")
    images = type(processor.image_processor)(do_center_crop=False, size={"longest_edge": 96})
    images.crop_size = None
    processor.image_processor = images
    with pytest.raises(UnsupportedRequest, match=r"size of its own.*96"):
        TwinStates(tiny.model, processor)
