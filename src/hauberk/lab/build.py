"""A lab model before training: tokenizer, processor, and a network of the real classes.

One row of :data:`FAMILIES` is one model.  All share the world; each has its own classes, layout of
pixels, conversation format and dialect.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from hauberk.lab.language import DIALECTS, Dialect
from hauberk.lab.scenes import SIDE

# CLIP's own normalisation, as in the processors of LLaVA and Qwen.
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True)
class Size:
    """How large a miniature is; the defaults give some 2 million parameters."""

    vision_width: int = 128
    vision_layers: int = 4
    patch: int = 12
    text_width: int = 128
    text_layers: int = 6
    heads: int = 4
    vocabulary: int = 1024

    @property
    def grid(self) -> int:
        """Patches along the side of a picture."""
        return SIDE // self.patch


@dataclass(frozen=True)
class Chat:
    """A conversation format, from which template and training text are made alike."""

    begin: str
    user: str
    """Before what the user says, pictures first."""
    image: str
    """Stands for a picture until the processor expands it."""
    assistant: str
    """Between what the user says and the answer."""
    gap: str
    """Between that and the first word of the answer."""
    end: str
    """Ends an answer: the last part of it is the token that generation stops at."""
    between: str = ""
    """Between an answer and the next turn."""

    @property
    def template(self) -> str:
        """The chat template in Jinja."""
        user, assistant, image, begin = map(
            repr, (self.user, self.assistant, self.image, self.begin)
        )
        said = repr(self.gap), repr(self.end + self.between)
        return (
            f"{{{{ {begin} }}}}{{% for message in messages %}}"
            "{% if message['role'] == 'assistant' %}"
            f"{{{{ {assistant} + {said[0]} + message['content'] + {said[1]} }}}}"
            "{% else %}"
            f"{{{{ {user} if message['role'] == 'user' else '' }}}}"
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for part in message['content'] if part['type'] == 'image' %}"
            f"{{{{ {image} }}}}{{% endfor %}}"
            "{% for part in message['content'] if part['type'] == 'text' %}"
            "{{ part['text'] }}{% endfor %}{% endif %}"
            "{{ ' ' if message['role'] == 'system' else '' }}{% endif %}{% endfor %}"
            f"{{% if add_generation_prompt %}}{{{{ {assistant} }}}}{{% endif %}}"
        )


@dataclass(frozen=True)
class Family:
    """One architecture of the lab, from real classes."""

    dialect: Dialect
    chat: Chat
    special: Mapping[str, str]
    """Tokens with a meaning: the attribute of the tokenizer, and the token."""
    tower: str
    """Dotted path of the vision tower below the model, as of the two below."""
    projector: str
    decoder: str
    merged: int
    """Patches that become one image token."""
    image: Callable[[int], str]
    """What the processor makes of one picture of so many image tokens."""
    processor: Callable[[PreTrainedTokenizerFast, Size, str], ProcessorMixin]
    network: Callable[[PreTrainedTokenizerFast, Size, dict[str, Any]], PreTrainedModel]
    pixels: Callable[[Tensor, Size], dict[str, Tensor]]
    """Normalised pictures (n, 3, SIDE, SIDE) as the network takes them."""
    patches: Callable[[Tensor, int, Size], Tensor]
    """What the projector is fed, for n pictures, as (n, patches, width) in reading order."""
    handed: Callable[[Tensor], Any] = lambda projected: (projected,)
    """What the projector makes, in the shape in which the network takes ready features."""
    flat: bool = False
    """Whether the patches of all pictures come in one row, told apart by a grid."""

    def part(self, model: nn.Module, name: str) -> nn.Module:
        """The tower, the projector or the decoder of a network."""
        found: nn.Module = attrgetter(getattr(self, name))(model)
        return found

    def image_tokens(self, size: Size) -> str:
        """One picture of the lab in the prompt, expanded."""
        return self.image(size.grid**2 // self.merged)


def tokenizer_of(family: Family, texts: list[str], size: Size) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on ``texts``: whole words for the world, bytes for anything else."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokens = list(dict.fromkeys(family.special.values()))
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size.vocabulary,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in tokens],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    standard = {
        k: v for k, v in family.special.items() if k in ("pad_token", "bos_token", "eos_token")
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **standard,
        extra_special_tokens={k: v for k, v in family.special.items() if k not in standard},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def processor_of(family: Family, tokenizer: PreTrainedTokenizerFast, size: Size) -> ProcessorMixin:
    """Pair the tokenizer with the family's own image processor."""
    return family.processor(tokenizer, size, family.chat.template)


def network_of(
    family: Family, tokenizer: PreTrainedTokenizerFast, size: Size, seed: int
) -> PreTrainedModel:
    """Make the untrained network."""
    torch.manual_seed(seed)
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in
           ("bos_token", "eos_token", "pad_token")}  # fmt: skip
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.text_width,
        "intermediate_size": 3 * size.text_width,
        "num_hidden_layers": size.text_layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        **ids,
    }
    model: PreTrainedModel = family.network(tokenizer, size, text).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    for name, value in ids.items():
        setattr(model.generation_config, name, value)
    return model


def load(folder: Path) -> tuple[Any, Any]:
    """Load a lab model exactly as any user of transformers would."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)


# --- LLaVA: CLIP, a two-layer projector, Llama; pictures as squares ---------------------------


def _llava_processor(
    tokenizer: PreTrainedTokenizerFast, size: Size, template: str
) -> ProcessorMixin:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=size.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
        image_token="<image>",
    )


def _llava(tokenizer: PreTrainedTokenizerFast, size: Size, text: dict[str, Any]) -> PreTrainedModel:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=4 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.heads,
        image_size=SIDE,
        patch_size=size.patch,
    )
    config = LlavaConfig(
        text_config=LlamaConfig(**text, num_key_value_heads=size.heads),
        vision_config=vision,
        image_token_index=_id(tokenizer, "<image>"),
        image_seq_length=size.grid**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


# --- Qwen2.5-VL: flat patches with a grid, windows, three-axis positions ----------------------


def _qwen_processor(
    tokenizer: PreTrainedTokenizerFast, size: Size, template: str
) -> ProcessorMixin:
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    images = Qwen2VLImageProcessorPil(
        patch_size=size.patch,
        merge_size=2,
        size={"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2},
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    videos = Qwen2VLVideoProcessor(patch_size=size.patch, merge_size=2)
    return Qwen2_5_VLProcessor(
        image_processor=images, tokenizer=tokenizer, video_processor=videos, chat_template=template
    )


def _qwen(tokenizer: PreTrainedTokenizerFast, size: Size, text: dict[str, Any]) -> PreTrainedModel:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rotated = size.text_width // size.heads // 2
    time = rotated // 4  # a quarter for time, the rest for height and width, as Qwen shares it
    height = (rotated - time) // 2
    text |= {
        "num_key_value_heads": size.heads // 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [time, height, rotated - time - height],
        },
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_width,
            "intermediate_size": 2 * size.vision_width,
            "num_heads": size.heads,
            "patch_size": size.patch,
            "spatial_merge_size": 2,
            "window_size": SIDE,  # one window a lab picture, several in a larger one
            "fullatt_block_indexes": [size.vision_layers // 2 - 1, size.vision_layers - 1],
            "out_hidden_size": size.text_width,
        },
        image_token_id=_id(tokenizer, "<|image_pad|>"),
        video_token_id=_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=_id(tokenizer, "<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _flat(pixels: Tensor, size: Size) -> dict[str, Tensor]:
    """Cut pictures into patches, four neighbours after one another, each frame said twice."""
    n, half = len(pixels), size.grid // 2
    cut = pixels.view(n, 3, half, 2, size.patch, half, 2, size.patch)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    flat = cut.expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return {
        "pixel_values": flat.reshape(n * size.grid**2, -1),
        "image_grid_thw": torch.tensor([[1, size.grid, size.grid]]).repeat(n, 1),
    }


def _of_four(states: Tensor, n: int, size: Size) -> Tensor:
    """Put patches that come four by four (any leading shape) into reading order."""
    half = size.grid // 2
    cut = states.reshape(n, half, half, 2, 2, size.vision_width)
    return cut.permute(0, 1, 3, 2, 4, 5).reshape(n, size.grid**2, size.vision_width)


# --- InternVL: tiles, pixel shuffle, Qwen2 ----------------------------------------------------


def _intern_processor(
    tokenizer: PreTrainedTokenizerFast, size: Size, template: str
) -> ProcessorMixin:
    from transformers import InternVLProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        GotOcr2ImageProcessorPil,
    )
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    square = {"height": SIDE, "width": SIDE}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(
            size=square, crop_to_patches=True, max_patches=4,
            image_mean=CLIP_MEAN, image_std=CLIP_STD,
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=square),
        image_seq_length=size.grid**2 // 4,
        chat_template=template,
    )  # fmt: skip


def _intern(
    tokenizer: PreTrainedTokenizerFast, size: Size, text: dict[str, Any]
) -> PreTrainedModel:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        text_config={"model_type": "qwen2", **text, "num_key_value_heads": size.heads // 2},
        vision_config={
            "hidden_size": size.vision_width,
            "intermediate_size": 4 * size.vision_width,
            "num_hidden_layers": size.vision_layers,
            "num_attention_heads": size.heads,
            "image_size": [SIDE, SIDE],
            "patch_size": [size.patch, size.patch],
        },
        image_token_id=_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=size.grid**2 // 4,
        tie_word_embeddings=True,
    )
    return InternVLForConditionalGeneration(config)


def _shuffled(states: Tensor, n: int, size: Size) -> Tensor:
    """Undo InternVL's pixel shuffle: (n, patches / 4, 4 width), columns before rows."""
    half = size.grid // 2
    cut = states.reshape(n, half, half, 2, 2, size.vision_width)
    return cut.permute(0, 1, 3, 2, 4, 5).reshape(n, size.grid**2, size.vision_width)


def _id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    found: Any = tokenizer.convert_tokens_to_ids(token)
    return int(found)


_LLAVA_CHAT = Chat(
    begin="<s>", user="USER: ", image="<image>\n", assistant=" ASSISTANT:", gap=" ", end="</s>"
)
_CHAT_ML = {"begin": "", "user": "<|im_start|>user\n", "gap": "",
            "assistant": "<|im_end|>\n<|im_start|>assistant\n", "end": "<|im_end|>",
            "between": "\n"}  # fmt: skip
_ML_TOKENS = {
    "pad_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
}  # fmt: skip

FAMILIES = {
    "lab-llava": Family(
        dialect=DIALECTS["plain"],
        chat=_LLAVA_CHAT,
        special={
            "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>",
        },
        tower="model.vision_tower",
        projector="model.multi_modal_projector",
        decoder="model.language_model",
        merged=1,
        image=lambda tokens: "<image>" * tokens + "\n",
        processor=_llava_processor,
        network=_llava,
        pixels=lambda pixels, size: {"pixel_values": pixels},
        patches=lambda states, n, size: states,
    ),
    "lab-qwen": Family(
        dialect=DIALECTS["brief"],
        chat=Chat(image="<|vision_start|><|image_pad|><|vision_end|>", **_CHAT_ML),
        special={
            **_ML_TOKENS, "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
        },
        tower="model.visual",
        projector="model.visual.merger",
        decoder="model.language_model",
        merged=4,
        image=lambda tokens: f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>",
        processor=_qwen_processor,
        network=_qwen,
        pixels=_flat,
        patches=_of_four,
        flat=True,
    ),
    "lab-intern": Family(
        dialect=DIALECTS["polite"],
        chat=Chat(image="<IMG_CONTEXT>\n", **_CHAT_ML),
        special={
            **_ML_TOKENS, "start_image_token": "<img>", "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
        },
        tower="model.vision_tower",
        projector="model.multi_modal_projector",
        decoder="model.language_model",
        merged=4,
        image=lambda tokens: f"<img>{'<IMG_CONTEXT>' * tokens}</img>\n",
        processor=_intern_processor,
        network=_intern,
        pixels=lambda pixels, size: {"pixel_values": pixels},
        patches=_shuffled,
        handed=lambda projected: projected,
    ),
}  # fmt: skip
