"""The text twin read off token ids, for tokenizers of every kind that LLaVAs are published with."""

import string

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from hauberk.analysis.twins import TwinStates, last_states
from hauberk.errors import UnsupportedRequest
from hauberk.lab.build import CHAT_TEMPLATE
from hauberk.requests import Request, blank_twin, encode, text_twin

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
        template = template.replace("{{ bos_token }}", "")
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


def check(tiny, processor, requests):
    """The shifts are those of the prompts that were rendered without or with blank pictures."""
    twins, expected, found = TwinStates(tiny.model, processor), [], []
    for request in requests:
        inputs = encode(processor, [request])
        found.append(twins.shifts(inputs["input_ids"], inputs["attention_mask"])[0])
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


def test_a_processor_without_one_size_is_refused(tiny):
    processor = processor_of(tiny, "Prepend")
    images = type(processor.image_processor)(do_center_crop=False, size={"longest_edge": 96})
    images.crop_size = None
    processor.image_processor = images
    with pytest.raises(UnsupportedRequest, match=r"size of its own.*96"):
        TwinStates(tiny.model, processor)
