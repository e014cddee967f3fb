"""Tiny real models: the true architectures with random weights, made in a second, no download."""

import random
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.families import FAMILIES

# The same examples in every run, and no deadline: a busy machine is not a bug.
settings.register_profile("steady", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("steady")


@dataclass(frozen=True)
class Tiny:
    """A model, its processor, and requests it can read."""

    name: str
    """Of the family, as the lab calls it."""
    model: Any
    processor: Any
    pictured: list[Any]
    plain: list[Any]
    varied: list[Any]
    """With pictures of other sizes than the lab's, one and two of them."""


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """A LLaVA of 200k parameters with more vision than decoder blocks, and 12 + 6 requests."""
    return tiny_of("lab-llava")


@pytest.fixture(scope="session", params=["lab-llava", "lab-qwen", "lab-intern"])
def any_tiny(request: pytest.FixtureRequest) -> Tiny:
    """A tiny model of every family of the lab in turn, with the same requests."""
    return tiny_of(request.param)


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Tiny:
    """A tiny model of every family that is known in turn, with pictures of several sizes."""
    from tests.families import parts_of, requests_of

    model, processor = parts_of(request.param)
    asked = requests_of()
    return Tiny(request.param, model, processor, asked[:5], asked[5:], asked[:5])


@pytest.fixture
def ending(any_tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the answers of ``any_tiny`` end, early or late, at one of these tokens."""
    from hauberk.requests import encode

    model, requests = any_tiny.model, any_tiny.pictured + any_tiny.plain
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    said = model.generate(**encode(any_tiny.processor, requests), **arguments)[:, -12:].tolist()
    ends = [answer[3 * index % 12] for index, answer in enumerate(said[::2])]
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    return ends


@cache
def tiny_of(name: str) -> Tiny:
    """Make a tiny model of a family of the lab."""
    import torch

    from hauberk.lab import build, curriculum
    from hauberk.requests import Request

    torch.set_num_threads(1)
    size = build.Size(
        vision_width=32, vision_layers=5, patch=24, text_width=32, text_layers=4, vocabulary=400
    )
    rng = random.Random(0)
    scenes = curriculum.scenes(rng, 12)
    text = list(islice(curriculum.text_examples(rng, aligned=True), 300))
    visual = list(islice(curriculum.visual_examples(rng, scenes, questions=0.6), 300))
    family = build.FAMILIES[name]
    corpus = [
        f"USER: {question} ASSISTANT: {family.dialect.say(answer)}"
        for example in (*text, *visual)
        for question, answer in example.turns
    ]
    tokenizer = build.tokenizer_of(family, corpus, size)
    processor = build.processor_of(family, tokenizer, size)
    model = build.network_of(family, tokenizer, size, seed=0)
    torch.manual_seed(0)
    for weight in model.parameters():  # larger than the default, so that answers differ
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    pictured = [
        Request(example.turns[0][0], (scenes[example.scene].draw(),))
        for example in visual[: len(scenes)]
        if example.scene is not None
    ]
    plain = [Request(example.turns[0][0]) for example in text[:6]]
    first, second = (request.images[0] for request in pictured[:2])
    varied = [
        Request(pictured[0].text, (first.resize((170, 96)),)),
        Request(pictured[1].text, (first.resize((96, 190)), second)),
    ]
    return Tiny(name, model.eval(), processor, pictured, plain, varied)


@pytest.fixture(scope="session")
def lab_folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as ``save_pretrained`` writes it, for whoever loads from disk."""
    folder = tmp_path_factory.mktemp("lab") / "lab-llava"
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class TinyClip:
    """A CLIP or SigLIP with random weights, and its processor."""

    model: Any
    processor: Any


@pytest.fixture(scope="session")
def tiny_clip() -> TinyClip:
    """A CLIP of 60k parameters that reads the words of the lab."""
    import torch

    from hauberk.lab import clip

    recipe = clip.Recipe(
        side=24, vision_width=16, vision_layers=2, patch=12, text_width=16, text_layers=1, heads=2,
        projection=16,
    )  # fmt: skip
    tokenizer = clip.tokenizer_of()
    model = clip.network_of(tokenizer, recipe)
    for weight in model.parameters():  # larger than the default, so that features differ
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return TinyClip(model, clip.processor_of(tokenizer, recipe.side))


@pytest.fixture(scope="session")
def tiny_siglip(tiny_clip: TinyClip) -> TinyClip:
    """A SigLIP of other sizes, with the words of the lab."""
    import torch
    from transformers import SiglipConfig, SiglipModel, SiglipProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    tokenizer = tiny_clip.processor.tokenizer
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 48}
    torch.manual_seed(0)
    config = SiglipConfig(text_config=tower | text,
                          vision_config=tower | {"image_size": 24, "patch_size": 12})  # fmt: skip
    images = SiglipImageProcessorPil(size={"height": 24, "width": 24})
    processor = SiglipProcessor(image_processor=images, tokenizer=tokenizer)
    return TinyClip(SiglipModel(config).eval(), processor)
