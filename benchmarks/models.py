"""The models that are timed: the lab's, and a random one with as many image tokens as LLaVA-1.5."""

from dataclasses import replace
from pathlib import Path
from typing import Any

LAB = Path("lab")
NAMES = "lab-llava", "lab-qwen", "lab-intern"


def lab(name: str) -> tuple[Any, Any] | None:
    """Load a lab model that ships with the project, if it does."""
    from hauberk.lab.build import load

    return load(LAB / name) if (LAB / name).is_dir() else None


def lab_clip() -> tuple[Any, Any] | None:
    """Load the lab's CLIP, if it ships with the project."""
    from transformers import AutoModel, AutoProcessor

    home = LAB / "lab-clip"
    if not home.is_dir():
        return None
    return AutoModel.from_pretrained(home).eval(), AutoProcessor.from_pretrained(home)


def pictured(processor: Any, number: int) -> list[Any]:
    """Make requests whose pictures are as large as what the model of this processor sees."""
    from hauberk.data.lab import build_suite

    side = processor.image_processor.crop_size["height"]
    samples = build_suite("text_image", "test", number, seed=0)
    return [replace(s.request, images=(s.image.resize((side, side)),)) for s in samples if s.image]


def llava_shape(
    side: int = 336, patch: int = 14, blocks: int = 8, width: int = 256
) -> tuple[Any, Any]:
    """Make a LLaVA with 576 image tokens and random weights; the lab's tokenizer and template.

    Small enough for a CPU, so that the prefill is timed and not the machine's memory.
    """
    import torch
    from transformers import (
        AutoProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )
    from transformers.image_utils import SizeDict

    processor = AutoProcessor.from_pretrained(LAB / "lab-llava")
    processor.patch_size = patch
    processor.image_processor.size = SizeDict(shortest_edge=side)
    processor.image_processor.crop_size = SizeDict(height=side, width=side)
    tokenizer = processor.tokenizer
    size = {"hidden_size": width, "num_attention_heads": 4}
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        **size,
    )
    eyes = CLIPVisionConfig(
        image_size=side, patch_size=patch, num_hidden_layers=4, intermediate_size=2 * width, **size
    )
    image_token: Any = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        text_config=text,
        vision_config=eyes,
        image_token_index=image_token,
        image_seq_length=(side // patch) ** 2,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval(), processor
