"""Tiny guard models of the true classes, whose weights were made to give a known answer."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AddedToken,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4Processor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor
from transformers.models.llava_onevision.image_processing_llava_onevision import (
    LlavaOnevisionImageProcessor,
)

START, END = "<|start|>", "<|end|>"
BAD = "zorb"
"""What makes a guard find a text unsafe, a word of the tests alone."""
STRINGS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}<|turn|>"
    "{% endfor %}judge:<|start|>"
)
"""As Llama Guard 3 8B reads a conversation: texts."""
PARTS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<|image|>{% elif p['type'] == 'text' %}{{ p['text'] }}{% endif %}"
    "{% endfor %}<|turn|>{% endfor %}judge:<|start|>"
)
"""As Llama Guard 3 1B and 4 read it: parts."""
IMAGE_TOKENS = (
    "<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>",
    "<|tile_y_separator|>", "<image>", "<video>",
)  # fmt: skip
SIZE = 312


def tokenizer_of(answers, *, bos="<|bos|>"):
    """A tokenizer of bytes, with a token for each whole answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({byte: n for n, byte in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=bos, eos_token=END, clean_up_tokenization_spaces=False
    )
    special = [START, "<|turn|>", *IMAGE_TOKENS]
    tokenizer.add_tokens([AddedToken(text, special=True) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (BAD, *answers)])
    assert len(tokenizer) <= SIZE
    return tokenizer


@torch.no_grad()
def steer(model, tokenizer, start, safe, unsafe):
    """Make a decoder answer ``safe``, or ``unsafe`` where :data:`BAD` is in its prompt.

    Embeddings are orthogonal, and all blocks add nothing but the first, whose attention looks at
    all positions alike and carries the share of BAD among them into a dimension of its own.
    """
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in (BAD, END, safe, unsafe)}
    begin = tokenizer(start, add_special_tokens=False).input_ids[-1]
    decoder, head = model.get_decoder(), model.get_output_embeddings().weight
    model.get_input_embeddings().weight.copy_(torch.eye(SIZE))
    blocks = getattr(decoder, "model", decoder).layers  # Llama 4's decoder has a head of its own
    for block in blocks:
        for name, weight in block.named_parameters():
            if "norm" not in name:
                weight.zero_()
    flag = SIZE - 1  # no token has it: there are fewer
    first = blocks[0].self_attn
    first.v_proj.weight[0, ids[BAD]] = 1.0
    first.o_proj.weight[flag, 0] = 1.0
    head.zero_()
    head[ids[safe], begin] = 1.0
    head[ids[unsafe], flag] = 1000.0
    for answer in (safe, unsafe):
        head[ids[END], ids[answer]] = 1e6
    model.generation_config.eos_token_id = ids[END]
    model.generation_config.pad_token_id = None


LAYERS = {
    "hidden_size": SIZE, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": SIZE, "tie_word_embeddings": False,
}  # fmt: skip


def save(folder, model, processor, *steering):
    torch.manual_seed(0)
    tokenizer = getattr(processor, "tokenizer", processor)
    steer(model, tokenizer, *steering)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def llama_guard_3(folder, template=STRINGS, context=4096):
    tokenizer = tokenizer_of(["safe", "unsafe\nS1,S9"])
    tokenizer.chat_template = template
    model = LlamaForCausalLM(LlamaConfig(**LAYERS, max_position_embeddings=context))
    return save(folder, model, tokenizer, START, "safe", "unsafe\nS1,S9")


def harmbench(folder):
    tokenizer = tokenizer_of(["Yes", "No"], bos="<s>")
    model = LlamaForCausalLM(LlamaConfig(**LAYERS, max_position_embeddings=4096))
    return save(folder, model, tokenizer, "[/INST]", "No", "Yes")


def md_judge(folder):
    tokenizer = tokenizer_of(["safe", "unsafe\nO4"], bos="<s>")
    model = MistralForCausalLM(MistralConfig(**LAYERS, max_position_embeddings=4096))
    return save(folder, model, tokenizer, "[/INST]", "safe", "unsafe\nO4")


def llama_guard_4(folder):
    tokenizer = tokenizer_of(["safe", "unsafe\nS9"])
    images = Llama4ImageProcessor(size={"height": 8, "width": 8}, max_patches=1)
    processor = Llama4Processor(images, tokenizer, patch_size=4, chat_template=PARTS)
    text = LAYERS | {
        "head_dim": SIZE // 2, "intermediate_size_mlp": 8, "moe_layers": [], "num_local_experts": 1,
        "max_position_embeddings": 4096, "pad_token_id": 0, "use_qk_norm": False,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "vision_output_dim": 16,
        "projector_input_dim": 16, "projector_output_dim": 16,
    }  # fmt: skip
    config = Llama4Config(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
    )
    model = Llama4ForConditionalGeneration(config)
    return save(folder, model, processor, START, "safe", "unsafe\nS9")


UNSAFE_RATING = '{"rating": "Unsafe", "category": "O6: Weapons", "rationale": "it shows some."}'
SAFE_RATING = '{"rating": "Safe", "category": "NA: None applying", "rationale": "nothing."}'


def llavaguard(folder, rating=UNSAFE_RATING):
    tokenizer = tokenizer_of([SAFE_RATING, UNSAFE_RATING])
    template = PARTS.replace("<|image|>", "<image>")
    images = LlavaOnevisionImageProcessor(
        size={"height": 8, "width": 8}, image_grid_pinpoints=[[8, 8]]
    )
    processor = LlavaOnevisionProcessor(
        images, tokenizer, LlavaOnevisionVideoProcessor(), num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=template, image_token="<image>", video_token="<video>",
    )  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
        "vision_use_head": False,
    }  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=LAYERS | {"model_type": "qwen2", "max_position_embeddings": 4096},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[8, 8]],
        vision_feature_select_strategy="full",
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    return save(folder, model, processor, START, rating, rating)
