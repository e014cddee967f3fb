"""A tiny real model of every family: true classes, random weights, its own processor, no download.

One row of :data:`FAMILIES` is one model type.  Its chat template has the shape that published
checkpoints of the family have, with what makes them differ: where the picture stands, what is
written beside it, whether the beginning of text is.  Adding a family is adding a row.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

BLOCKS = 4
"""Of every decoder; every vision tower has another number."""
SIDE = 24
"""Of the square that a tower of fixed size sees, in pixels; of a tile as well."""

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": BLOCKS, "max_position_embeddings": 2048,
}  # fmt: skip
EYES = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_hidden_layers": 3, "image_size": SIDE, "patch_size": 6,
}  # fmt: skip
CLIP = {"model_type": "clip_vision_model", **EYES}
SIGLIP = {"model_type": "siglip_vision_model", **EYES, "vision_use_head": False}
QWEN_EYES = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 6,
    "spatial_merge_size": 2, "out_hidden_size": 32,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]

QUESTIONS = (
    "what is this ?", "how many things are there ?", "tell me about harmful request 3 .",
    "is it red ?", "describe the picture .", "who said that ?", "why ?", "name 7 of them .",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """One row of the table."""

    special: Mapping[str, str]
    """Tokens with a meaning: the attribute of the tokenizer, and the token."""
    template: str | None
    """None where published checkpoints bring none."""
    config: Callable[[Callable[[str], int]], dict[str, Any]]
    """Given the id of a token, what the config says beside the vocabulary."""
    processor: Callable[[PreTrainedTokenizerFast], Any]


def _turns(
    image: str, user: str, assistant: str, end: str, *, begin: str = "", bare: str = "",
    system: str = "{}",
) -> str:  # fmt: skip
    """A chat template in Jinja; ``bare`` is written in a user's turn that shows no picture."""
    before, after = system.split("{}")
    return (
        f"{{{{ {begin!r} }}}}{{% for m in messages %}}"
        "{% set parts = [{'type': 'text', 'text': m['content']}] if m['content'] is string "
        "else m['content'] %}"
        "{% set shown = parts | selectattr('type', 'equalto', 'image') | list %}"
        f"{{{{ {user!r} if m['role'] == 'user' else {assistant!r} if m['role'] == 'assistant' "
        f"else {before!r} }}}}"
        f"{{{{ {bare!r} if m['role'] == 'user' and not shown else '' }}}}"
        f"{{% for part in parts %}}{{{{ {image!r} if part['type'] == 'image' else part['text'] }}}}"
        "{% endfor %}"
        f"{{{{ {end!r} if m['role'] == 'assistant' else {after!r} if m['role'] == 'system' "
        "else '' }}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {assistant!r} }}}}{{% endif %}}"
    )


def _chat_ml(image: str) -> str:
    return _turns(
        image, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n",
        system="<|im_start|>system\n{}<|im_end|>\n",
    )  # fmt: skip


_SENTENCES = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
_ML = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "im_start_token": "<|im_start|>"}
_GEMMA = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
_QWEN = {
    **_ML, "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
}  # fmt: skip
_IDEFICS = {
    "pad_token": "<pad>", "bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>",
    "fake_image_token": "<fake_token_around_image>", "image_token": "<image>",
    "global_image_token": "<global-img>",
    **{f"row_{r}_col_{c}": f"<row_{r}_col_{c}>" for r in (1, 2, 3) for c in (1, 2, 3)},
}  # fmt: skip
_IDEFICS_CHAT = _turns(
    "<image>", "User:", "<end_of_utterance>\nAssistant:", "<end_of_utterance>\n",
    begin="<|im_start|>", bare=" ", system="System: {}<end_of_utterance>\n",
)  # fmt: skip


# --- configs ------------------------------------------------------------------------------------


def _llava(id_of: Callable[[str], int]) -> dict[str, Any]:
    return {
        "text_config": {"model_type": "llama", **TEXT}, "vision_config": CLIP,
        "image_token_index": id_of("<image>"), "image_seq_length": 16, "vision_feature_layer": -2,
    }  # fmt: skip


def _vipllava(id_of: Callable[[str], int]) -> dict[str, Any]:
    config = _llava(id_of)
    del config["vision_feature_layer"]
    return config | {"vision_feature_layers": [-1, -2]}


def _llava_next(id_of: Callable[[str], int]) -> dict[str, Any]:
    return _llava(id_of) | {
        "text_config": {"model_type": "mistral", **TEXT}, "image_grid_pinpoints": PINPOINTS,
    }  # fmt: skip


def _onevision(id_of: Callable[[str], int]) -> dict[str, Any]:
    return {
        "text_config": {"model_type": "qwen2", **TEXT}, "vision_config": SIGLIP,
        "image_token_index": id_of("<image>"), "video_token_index": id_of("<video>"),
        "image_grid_pinpoints": PINPOINTS,
    }  # fmt: skip


def _qwen(eyes: Mapping[str, Any], **text: Any) -> Callable[[Callable[[str], int]], dict[str, Any]]:
    def config(id_of: Callable[[str], int]) -> dict[str, Any]:
        return {
            "text_config": {**TEXT, "rope_parameters": MROPE, **text},
            "vision_config": {**QWEN_EYES, **eyes},
            "image_token_id": id_of("<|image_pad|>"), "video_token_id": id_of("<|video_pad|>"),
            "vision_start_token_id": id_of("<|vision_start|>"),
            "vision_end_token_id": id_of("<|vision_end|>"),
        }  # fmt: skip

    return config


def _internvl(id_of: Callable[[str], int]) -> dict[str, Any]:
    eyes = EYES | {"image_size": [SIDE, SIDE], "patch_size": [6, 6]}
    return {
        "text_config": {"model_type": "qwen2", **TEXT}, "vision_config": eyes,
        "image_token_id": id_of("<IMG_CONTEXT>"), "image_seq_length": 4,
    }  # fmt: skip


def _idefics3(id_of: Callable[[str], int]) -> dict[str, Any]:
    return {
        "text_config": {"model_type": "llama", **TEXT}, "vision_config": dict(EYES),
        "scale_factor": 2, "image_token_id": id_of("<image>"),
    }  # fmt: skip


def _gemma3(id_of: Callable[[str], int]) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention"] * (BLOCKS // 2)
    return {
        "text_config": {**TEXT, "head_dim": 8, "sliding_window": 512, "layer_types": kinds,
                        "query_pre_attn_scalar": 8},
        "vision_config": SIGLIP, "mm_tokens_per_image": 4,
        "image_token_index": id_of("<image_soft_token>"),
        "boi_token_index": id_of("<start_of_image>"), "eoi_token_index": id_of("<end_of_image>"),
    }  # fmt: skip


def _paligemma(id_of: Callable[[str], int]) -> dict[str, Any]:
    return {
        "text_config": {"model_type": "gemma", **TEXT, "head_dim": 8},
        "vision_config": SIGLIP | {"projection_dim": 32},
        "projection_dim": 32, "hidden_size": 32, "image_token_index": id_of("<image>"),
    }  # fmt: skip


def _mllama(id_of: Callable[[str], int]) -> dict[str, Any]:
    eyes = {
        "hidden_size": 32, "intermediate_size": 64, "attention_heads": 4, "num_hidden_layers": 3,
        "num_global_layers": 2, "vision_output_dim": 64, "intermediate_layers_indices": [1],
        "image_size": SIDE, "patch_size": 6, "max_num_tiles": 4,
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    }  # fmt: skip
    text = {
        **TEXT, "cross_attention_layers": [1, 3],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }  # fmt: skip
    return {
        "text_config": text, "vision_config": eyes, "image_token_index": id_of("<|image|>"),
    }  # fmt: skip


def _deepseek(id_of: Callable[[str], int]) -> dict[str, Any]:
    return {
        "text_config": {"model_type": "llama", **TEXT}, "vision_config": SIGLIP,
        "image_token_id": id_of("<image_placeholder>"),
    }  # fmt: skip


def _mistral3(id_of: Callable[[str], int]) -> dict[str, Any]:
    return {
        "text_config": {"model_type": "mistral", **TEXT, "head_dim": 8},
        "vision_config": {"model_type": "pixtral", **EYES, "image_size": 96, "head_dim": 8,
                          "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        "image_token_index": id_of("[IMG]"), "spatial_merge_size": 2,
    }  # fmt: skip


def _glm4v(id_of: Callable[[str], int]) -> dict[str, Any]:
    return {
        "text_config": {**TEXT, "head_dim": 8, "rope_parameters": MROPE},
        "vision_config": {**QWEN_EYES, "image_size": SIDE},
        "image_token_id": id_of("<|image|>"), "video_token_id": id_of("<|video|>"),
        "image_start_token_id": id_of("<|begin_of_image|>"),
        "image_end_token_id": id_of("<|end_of_image|>"),
        "video_start_token_id": id_of("<|begin_of_video|>"),
        "video_end_token_id": id_of("<|end_of_video|>"),
    }  # fmt: skip


def _cohere2(id_of: Callable[[str], int]) -> dict[str, Any]:
    kinds = ["full_attention"] * BLOCKS
    return {
        "text_config": {"model_type": "cohere2", **TEXT, "layer_types": kinds},
        "vision_config": SIGLIP, "downsample_factor": 2, "alignment_intermediate_size": 64,
        "image_token_id": id_of("<|IMG_PATCH|>"),
    }  # fmt: skip


# --- processors ---------------------------------------------------------------------------------


def _squares() -> dict[str, Any]:
    return {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}


def _square() -> dict[str, int]:
    return {"height": SIDE, "width": SIDE}


def _llava_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return LlavaProcessor(
        CLIPImageProcessorPil(**_squares()), tokenizer, patch_size=6,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def _next_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(**_squares(), image_grid_pinpoints=PINPOINTS), tokenizer,
        patch_size=6, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def _onevision_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import LlavaOnevisionProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )
    from transformers.models.llava_onevision.video_processing_llava_onevision import (
        LlavaOnevisionVideoProcessor,
    )

    images = LlavaOnevisionImageProcessorPil(size=_square(), image_grid_pinpoints=PINPOINTS)
    return LlavaOnevisionProcessor(
        images, tokenizer, LlavaOnevisionVideoProcessor(size=_square()), num_image_tokens=16,
        vision_feature_select_strategy="full",
    )  # fmt: skip


def _qwen_processor(kind: str) -> Callable[[PreTrainedTokenizerFast], Any]:
    def processor(tokenizer: PreTrainedTokenizerFast) -> Any:
        import transformers
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        images = Qwen2VLImageProcessorPil(
            patch_size=6, merge_size=2, size={"shortest_edge": 144, "longest_edge": 48**2}
        )
        name = "Qwen3VL" if kind == "Qwen3VL" else "Qwen2VL"
        videos = getattr(transformers, f"{name}VideoProcessor")(patch_size=6, merge_size=2)
        made = getattr(transformers, f"{kind}Processor")
        return made(image_processor=images, tokenizer=tokenizer, video_processor=videos)

    return processor


def _internvl_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import InternVLProcessor, InternVLVideoProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        GotOcr2ImageProcessorPil,
    )

    images = GotOcr2ImageProcessorPil(size=_square(), crop_to_patches=True, max_patches=4)
    return InternVLProcessor(
        images, tokenizer, InternVLVideoProcessor(size=_square()), image_seq_length=4
    )


def _glm4v_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import Glm4vProcessor, Glm4vVideoProcessor
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    images = Glm4vImageProcessorPil(
        patch_size=6, merge_size=2, size={"shortest_edge": 144, "longest_edge": 2 * 48**2}
    )
    return Glm4vProcessor(images, tokenizer, Glm4vVideoProcessor(patch_size=6, merge_size=2))


def _cohere2_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import Cohere2VisionProcessor
    from transformers.models.cohere2_vision.image_processing_cohere2_vision import (
        Cohere2VisionImageProcessor,
    )

    images = Cohere2VisionImageProcessor(size=_square(), patch_size=2, max_patches=4)
    return Cohere2VisionProcessor(images, tokenizer)


def _idefics_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Also of SmolVLM, whose first checkpoints have it: the later one needs num2words."""
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
    )
    return Idefics3Processor(images, tokenizer, image_seq_len=4)


def _gemma3_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    return Gemma3Processor(Gemma3ImageProcessorPil(size=_square()), tokenizer, image_seq_length=4)


def _paligemma_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(size=_square())
    images.image_seq_length = 16
    return PaliGemmaProcessor(images, tokenizer)


def _mllama_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    return MllamaProcessor(MllamaImageProcessorPil(size=_square(), max_image_tiles=4), tokenizer)


def _deepseek_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import DeepseekVLProcessor
    from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import (
        DeepseekVLImageProcessorPil,
    )

    images = DeepseekVLImageProcessorPil(size=_square(), min_size=6)
    return DeepseekVLProcessor(images, tokenizer, num_image_tokens=16)


def _mistral3_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import PixtralProcessor
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    images = PixtralImageProcessorPil(
        size={"longest_edge": 48}, patch_size={"height": 12, "width": 12}
    )
    return PixtralProcessor(images, tokenizer, patch_size=6, spatial_merge_size=2)


_USER_ASSISTANT = _turns(
    "<image>\n", "USER: ", " ASSISTANT:", "</s>", begin="<s>", system="{} "
)  # fmt: skip
_QWEN_CHAT = _chat_ml("<|vision_start|><|image_pad|><|vision_end|>")

FAMILIES: dict[str, Recipe] = {
    "llava": Recipe(
        {**_SENTENCES, "image_token": "<image>"}, _USER_ASSISTANT, _llava, _llava_processor
    ),
    "vipllava": Recipe(
        {**_SENTENCES, "image_token": "<image>"}, _USER_ASSISTANT, _vipllava, _llava_processor
    ),
    "llava_next": Recipe(
        {**_SENTENCES, "image_token": "<image>", "inst": "[INST]", "end_inst": "[/INST]"},
        _turns("<image>\n", "[INST] ", " [/INST]", "</s>", begin="<s>"),
        _llava_next, _next_processor,
    ),
    "llava_onevision": Recipe(
        {**_ML, "image_token": "<image>", "video_token": "<video>"},
        _chat_ml("<image>\n"), _onevision, _onevision_processor,
    ),
    "qwen2_vl": Recipe(
        _QWEN, _QWEN_CHAT,
        _qwen({"embed_dim": 32, "mlp_ratio": 2, "hidden_size": 32}), _qwen_processor("Qwen2VL"),
    ),
    "qwen2_5_vl": Recipe(
        _QWEN, _QWEN_CHAT,
        _qwen({"window_size": 24, "fullatt_block_indexes": [2]}), _qwen_processor("Qwen2_5_VL"),
    ),
    "qwen3_vl": Recipe(
        _QWEN, _QWEN_CHAT,
        _qwen({"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}, head_dim=8,
              rope_parameters=MROPE | {"mrope_interleaved": True}),
        _qwen_processor("Qwen3VL"),
    ),
    "internvl": Recipe(
        {**_ML, "start_image_token": "<img>", "end_image_token": "</img>",
         "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
        _chat_ml("<IMG_CONTEXT>\n"), _internvl, _internvl_processor,
    ),
    "glm4v": Recipe(
        {"pad_token": "<|endoftext|>", "eos_token": "<|user|>", "assistant": "<|assistant|>",
         "system": "<|system|>", "image_token": "<|image|>", "video_token": "<|video|>",
         "begin_image": "<|begin_of_image|>", "end_image": "<|end_of_image|>",
         "begin_video": "<|begin_of_video|>", "end_video": "<|end_of_video|>",
         "mask": "[gMASK]", "sop": "<sop>"},
        _turns("<|begin_of_image|><|image|><|end_of_image|>", "<|user|>\n", "<|assistant|>\n", "",
               begin="[gMASK]<sop>", system="<|system|>\n{}"),
        _glm4v, _glm4v_processor,
    ),
    "cohere2_vision": Recipe(
        {"pad_token": "<PAD>", "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>",
         "start": "<|START_OF_TURN_TOKEN|>", "user": "<|USER_TOKEN|>",
         "bot": "<|CHATBOT_TOKEN|>", "system": "<|SYSTEM_TOKEN|>",
         "image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>",
         "eoi_token": "<|END_OF_IMG|>", "img_line_break_token": "<|IMG_LINE_BREAK|>"},
        _turns("<|IMG_PATCH|>", "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
               "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
               "<|END_OF_TURN_TOKEN|>", begin="<BOS_TOKEN>",
               system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{}<|END_OF_TURN_TOKEN|>"),
        _cohere2, _cohere2_processor,
    ),
    "idefics3": Recipe(_IDEFICS, _IDEFICS_CHAT, _idefics3, _idefics_processor),
    "smolvlm": Recipe(_IDEFICS, _IDEFICS_CHAT, _idefics3, _idefics_processor),
    "gemma3": Recipe(
        {**_GEMMA, "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
         "image_token": "<image_soft_token>", "sot": "<start_of_turn>", "eot": "<end_of_turn>"},
        _turns("<start_of_image>", "<start_of_turn>user\n",
               "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n", begin="<bos>",
               system="<start_of_turn>user\n{}\n\n"),
        _gemma3, _gemma3_processor,
    ),
    "paligemma": Recipe(
        {**_GEMMA, "image_token": "<image>"}, None, _paligemma, _paligemma_processor
    ),
    "mllama": Recipe(
        {"pad_token": "<|finetune_right_pad_id|>", "bos_token": "<|begin_of_text|>",
         "eos_token": "<|eot_id|>", "image_token": "<|image|>", "python": "<|python_tag|>",
         "start": "<|start_header_id|>", "end": "<|end_header_id|>"},
        _turns("<|image|>", "<|start_header_id|>user<|end_header_id|>\n\n",
               "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>",
               begin="<|begin_of_text|>",
               system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>"),
        _mllama, _mllama_processor,
    ),
    "deepseek_vl": Recipe(
        {**_SENTENCES, "image_token": "<image_placeholder>"},
        _turns("<image_placeholder>", "User: ", "\n\nAssistant:", "</s>", begin="<s>",
               system="{}\n\n"),
        _deepseek, _deepseek_processor,
    ),
    "mistral3": Recipe(
        {**_SENTENCES, "image_token": "[IMG]", "break": "[IMG_BREAK]", "image_end": "[IMG_END]",
         "inst": "[INST]", "end_inst": "[/INST]", "sys": "[SYSTEM_PROMPT]",
         "end_sys": "[/SYSTEM_PROMPT]"},
        _turns("[IMG]", "[INST]", "[/INST]", "</s>", begin="<s>",
               system="[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]"),
        _mistral3, _mistral3_processor,
    ),
}  # fmt: skip


@cache
def parts_of(name: str) -> tuple[Any, Any]:
    """Make the model and the processor of a family."""
    torch.set_num_threads(1)
    recipe = FAMILIES[name]
    tokenizer = _tokenizer(recipe.special)
    processor = recipe.processor(tokenizer)
    processor.chat_template = recipe.template
    return _network(name, recipe, tokenizer), processor


def _network(name: str, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Any:
    told = recipe.config(tokenizer.convert_tokens_to_ids)
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    ends = {name: getattr(tokenizer, name) for name in names}
    told["text_config"] |= {"vocab_size": len(tokenizer), **ends}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **told)).eval()
    with torch.no_grad():
        for label, weight in model.named_parameters():
            if weight.ndim > 1:  # larger than the default, so that answers differ
                weight.normal_(std=0.15)
            elif "gate" in label and weight.numel() == 1:  # Mllama's, 0 before training
                weight.fill_(0.5)
    model.config.pad_token_id = tokenizer.pad_token_id
    for name, value in ends.items():
        setattr(model.generation_config, name, value)
    return model


def _tokenizer(special: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on a few sentences."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [*QUESTIONS, "As an AI assistant, ", "user\n", "assistant\n", "USER: ASSISTANT: system"],
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=[AddedToken(t, special=True) for t in special.values()],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    standard = {n: t for n, t in special.items() if n in ("pad_token", "bos_token", "eos_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **standard,
        extra_special_tokens={n: t for n, t in special.items() if n not in standard},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def pictures(count: int, sizes: tuple[tuple[int, int], ...] = ((SIDE, SIDE),)) -> list[Image.Image]:
    """Coloured noise of some sizes in turn, the same in every run."""
    rng = random.Random(count)
    made = []
    for index in range(count):
        width, height = sizes[index % len(sizes)]
        made.append(Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height)))
    return made


def requests_of() -> list[Any]:
    """Five requests with a picture and four without, of several sizes and lengths."""
    from hauberk.requests import Request

    shown = pictures(5, ((SIDE, SIDE), (48, 24), (30, 50)))
    asked = [Request(QUESTIONS[index], (image,)) for index, image in enumerate(shown)]
    return [*asked, *map(Request, QUESTIONS[3:7])]


def table() -> str:
    """Say for every family what the doctor says of it, in Markdown."""
    from hauberk.doctor import CHECKS, verdicts_of

    heads = [f"{defense} {action}" for defense, action, _ in CHECKS]
    lines, reasons = [], dict[str, int]()
    for name in sorted(FAMILIES):
        model, processor = parts_of(name)
        cells = [f"`{name}`"]
        for verdict in verdicts_of(model, processor.image_processor):
            reason = verdict.reason.replace(repr(name), "…")
            if reason:
                cells.append(f"no [{reasons.setdefault(reason, len(reasons) + 1)}]")
            else:
                cells.append("yes")
        lines.append(" | ".join(cells))
    rows = [" | ".join(["family", *heads]), " | ".join(["---"] * (len(heads) + 1)), *lines]
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([_HEAD, *(f"| {row} |" for row in rows), "", *notes, ""])


_HEAD = """\
# What can be done with which family

Made by `python -m tests.families > docs/families.md` and held by `tests/test_families.py` against
what happens: every *yes* is tried on a tiny model of the true classes, every *no* is the error that
the defense raises. `hauberk doctor MODEL` says the same of any other model.

- **cmrm** *per data set*: one shift for all requests; *per request*: one of each, while it is
  answered; *folds*: a shift at every position kept in biases, which moves requests without a
  picture as well; *exports*: that as a checkpoint that stock transformers loads
- **davsp** *applies*: a frame around pictures, which is a PNG and needs nothing of the model;
  *trains*: on this family, through a differentiable copy of its processor
- **guardalign** *masks*: parts of pictures; *calibrates*: the attention on a safety prefix
- **tga** *projector*, *low rank*: what is replaced; *trains*: on this family; *exports*: as a plain
  checkpoint
"""

if __name__ == "__main__":
    print(table(), end="")
