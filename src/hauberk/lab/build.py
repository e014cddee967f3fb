"""A lab model before training: tokenizer, processor, and a network of the real classes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hauberk.lab.scenes import SIDE

# CLIP's own normalisation, so that the processor is the one of every LLaVA.
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

# LLaVA-1.5's conversation format: pictures first, then the text, then the assistant's turn.
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: '}.get(message['role'], '') }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}\
{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}\
{% endif %}{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


@dataclass(frozen=True)
class Size:
    """How large the miniature is; the defaults give 2.3 million parameters."""

    vision_width: int = 128
    vision_layers: int = 4
    patch: int = 12
    text_width: int = 128
    text_layers: int = 6
    heads: int = 4
    vocabulary: int = 768


def build_tokenizer(texts: list[str], size: Size) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on ``texts``: whole words for the world, bytes for anything else."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size.vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def build_llava_processor(tokenizer: PreTrainedTokenizerFast, size: Size) -> LlavaProcessor:
    """Pair the tokenizer with CLIP's image processor, as LLaVA does."""
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
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    )


def build_llava(
    tokenizer: PreTrainedTokenizerFast, size: Size, seed: int
) -> LlavaForConditionalGeneration:
    """Make the untrained network: CLIP vision tower, two-layer projector, Llama decoder."""
    torch.manual_seed(seed)
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.text_width,
        "intermediate_size": 3 * size.text_width,
        "num_hidden_layers": size.text_layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=4 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.heads,
        image_size=SIDE,
        patch_size=size.patch,
    )
    image_token: Any = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=vision,
        image_token_index=image_token,
        image_seq_length=(SIDE // size.patch) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    config.pad_token_id = tokenizer.pad_token_id
    model: LlavaForConditionalGeneration = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model


def load(folder: Path) -> tuple[Any, Any]:
    """Load a lab model exactly as any user of transformers would."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)
