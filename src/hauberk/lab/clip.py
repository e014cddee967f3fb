"""lab-clip: a CLIP that was trained from nothing on the miniature world, whole and in crops.

It learns from views (:mod:`hauberk.lab.views`) in two stages.

1. ``tower``    the vision tower tells for every patch in whose box it lies and in which colour,
   and with its class token what a view shows most of.  Contrast alone, from nothing, stalls: 18 %
   zero-shot after 500 steps.
2. ``contrast`` both towers learn zero-shot classification as it is used (a softmax over one
   prompt for every name, every category, harmful and harmless) and contrast between views and
   captions, of which each comes with false ones that differ in a word.

Scenes stand in layouts of the pool ``train``, wishes are written in pairings of that pool, and
captions have its wordings; training never sees those of ``calibration`` and ``test``.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hauberk.lab.build import CLIP_MEAN, CLIP_STD
from hauberk.lab.language import VERBS
from hauberk.lab.objects import COLORS
from hauberk.lab.optimize import quicken
from hauberk.lab.patches import SEEN, normalised, patch_labels, stacked
from hauberk.lab.scenes import Pool
from hauberk.lab.trainer import Trainer
from hauberk.lab.views import (
    BANKS,
    CLASSES,
    WORDINGS,
    Batch,
    Shown,
    altered,
    batches,
    caption_of,
)

_POOL: Pool = "train"


@dataclass(frozen=True)
class Recipe:
    """Every number of a training run that one may want to vary; the others are in the source."""

    seed: int = 4
    side: int = 96
    """Height and width, in pixels, to which views are resized."""
    patch: int = 12
    vision_width: int = 128
    vision_layers: int = 4
    text_width: int = 96
    text_layers: int = 2
    heads: int = 4
    projection: int = 128
    batch: int = 64
    steps: dict[str, int] = field(default_factory=lambda: {"tower": 1600, "contrast": 1500})
    peak_rate: dict[str, float] = field(default_factory=lambda: {"tower": 1e-2, "contrast": 5e-3})
    false_captions: int = 2
    """For each view, captions that differ from its own in a word."""
    fast: bool = False
    """Compile the blocks, and multiply in bfloat16 where the CPU has tiles for it; it needs a C++
    compiler."""


# --- the model --------------------------------------------------------------------------------

_SPECIAL = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>"}
"""In this order, because transformers takes an end that is token 2 for an old bug of CLIP's."""
_TOKENS = 48
"""The longest text; the longest caption of the world has 30 tokens."""
_VOCABULARY = 1024
"""More than the words of the world need."""


def tokenizer_of() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on lower-cased words: one token for each word of the world."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    nouns = [noun for bank in BANKS.values() for nouns in bank.nouns for noun in nouns]
    core.train_from_iterator(
        [*WORDINGS[_POOL], *nouns, *COLORS, *VERBS, "there is a and the words . it says ."],
        trainers.BpeTrainer(
            vocab_size=_VOCABULARY,
            special_tokens=[
                AddedToken(token, special=True, normalized=False) for token in _SPECIAL.values()
            ],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    begin, end = _SPECIAL["bos_token"], _SPECIAL["eos_token"]
    core.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        special_tokens=[(token, core.token_to_id(token)) for token in (begin, end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **_SPECIAL,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=_TOKENS,
    )


def processor_of(tokenizer: PreTrainedTokenizerFast, side: int) -> CLIPProcessor:
    """Pair the tokenizer with CLIP's own image processor."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def network_of(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> CLIPModel:
    """Make the untrained network."""
    torch.manual_seed(recipe.seed)

    def tower(width: int, layers: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": recipe.heads,
            "projection_dim": recipe.projection,
        }

    config = CLIPConfig(
        text_config=tower(recipe.text_width, recipe.text_layers)
        | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": _TOKENS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config=tower(recipe.vision_width, recipe.vision_layers)
        | {"image_size": recipe.side, "patch_size": recipe.patch},
        projection_dim=recipe.projection,
    )
    model: CLIPModel = CLIPModel(config).eval()
    return model


def load(folder: Path) -> tuple[CLIPModel, CLIPProcessor]:
    """Load it exactly as any user of transformers would."""
    model = CLIPModel.from_pretrained(folder, local_files_only=True)
    return model.eval(), CLIPProcessor.from_pretrained(folder, local_files_only=True)


# --- training ---------------------------------------------------------------------------------


class ClipTrainer(Trainer):
    """Tokenizer, processor and network of one run."""

    STAGES = ("tower", "contrast")
    SOURCES = (
        "build", "clip", "language", "objects", "optimize", "patches", "scenes", "trainer", "views",
    )  # fmt: skip

    def __init__(self, name: str, recipe: Recipe, work: Path) -> None:
        super().__init__(name, recipe, work)
        self.tokenizer = tokenizer_of()
        self.processor = processor_of(self.tokenizer, recipe.side)
        self.model = network_of(self.tokenizer, recipe)
        if recipe.fast:
            quicken(self.model.vision_model)
            quicken(self.model.text_model)

    def train(self, stage: str) -> None:  # noqa: D102
        {"tower": train_tower, "contrast": train_contrast}[stage](self)

    def trained(self, stage: str) -> nn.Module:  # noqa: D102
        part: nn.Module = self.model.vision_model if stage == "tower" else self.model
        return part

    def pixels(self, batch: Batch) -> Tensor:
        """All views as the processor hands them to the tower: float32 (views, 3, side, side)."""
        size = (self.recipe.side, self.recipe.side)
        crops = (crop.resize(size, Image.Resampling.BICUBIC) for crop in batch.crops())
        return normalised(stacked(crops))

    def logits(self, batch: Batch, texts: Sequence[str]) -> Tensor:
        """Scaled cosines of views and texts: float32 (views, texts)."""
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        with self.autocast():
            found = (
                self.model.get_image_features(self.pixels(batch)),
                self.model.get_text_features(**tokens),
            )
        seen, told = (nn.functional.normalize(f.pooler_output.float(), dim=-1) for f in found)
        logits: Tensor = self.model.logit_scale.exp() * seen @ told.T
        return logits


def _labels(batch: Batch, grid: int) -> tuple[Tensor, Tensor]:
    """What each patch of each view shows: see :func:`patch_labels`; all views in a row."""
    labels = [
        patch_labels(subject.scene, grid, left=view.left, top=view.top, side=view.side)
        for subject, view in zip(batch.subjects, batch.views, strict=True)
    ]
    what, which = (torch.cat(of_all) for of_all in zip(*labels, strict=True))
    return what, which


def train_tower(trainer: ClipTrainer) -> None:
    """Stage ``tower``: every patch tells whose it is, the class token what a view shows."""
    recipe, tower = trainer.recipe, trainer.model.vision_model
    stream = batches(random.Random(f"{recipe.seed}/tower"), recipe.batch, _POOL)
    torch.manual_seed(recipe.seed)
    heads = nn.ModuleList(
        nn.Linear(recipe.vision_width, classes)
        for classes in (len(SEEN) + 1, len(COLORS), len(CLASSES))
    )
    cross_entropy = nn.functional.cross_entropy

    def loss_of(_: int) -> Tensor:
        batch = next(stream)
        what, which = _labels(batch, recipe.side // recipe.patch)
        with trainer.autocast():
            found = tower(trainer.pixels(batch))
        patches, view = found.last_hidden_state[:, 1:].float(), found.pooler_output.float()
        loss = cross_entropy(heads[0](patches).flatten(0, 1), what)
        if (which >= 0).any():
            tints = heads[1](patches).flatten(0, 1)
            loss = loss + cross_entropy(tints, which, ignore_index=-1)
        return loss + cross_entropy(heads[2](view), batch.shares)

    trainer.descend("tower", [tower, heads], loss_of)


def train_contrast(trainer: ClipTrainer) -> None:
    """Stage ``contrast``: views and what is said of them, in classes and in captions."""
    recipe, model = trainer.recipe, trainer.model
    rng = random.Random(f"{recipe.seed}/contrast")
    stream = batches(rng, recipe.batch, _POOL)

    def loss_of(_: int) -> Tensor:
        with torch.no_grad():
            model.logit_scale.clamp_(max=_SCALE)
        batch = next(stream)
        prompts = [bank.texts(rng, rng.choice(WORDINGS[_POOL])) for bank in BANKS.values()]
        said = [
            *batch.shown,
            *(altered(rng, shown) for _ in range(recipe.false_captions) for shown in batch.shown),
        ]
        captions = [caption_of(rng, shown, _POOL) for shown in said]
        logits = trainer.logits(batch, [text for texts in (*prompts, captions) for text in texts])
        *banked, paired = logits.split([len(texts) for texts in (*prompts, captions)], dim=1)
        loss = contrast(paired, said)
        for found, bank in zip(banked, BANKS.values(), strict=True):
            loss = loss + classified(found, batch.shares @ bank.member)
        return loss

    trainer.descend("contrast", [model], loss_of)


_SCALE = float(np.log(100))
"""CLIP's own bound of the logarithm of the inverse temperature."""


def classified(logits: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy of the views that show any of the classes: both are (views, classes).

    ``shares`` are float32, of any sum a view.
    """
    total = shares.sum(dim=1, keepdim=True)
    shown = total[:, 0] > 0
    if not shown.any():
        return torch.zeros(())
    return nn.functional.cross_entropy(logits[shown], (shares / total)[shown])


def contrast(logits: Tensor, said: Sequence[Shown]) -> Tensor:
    """CLIP's loss, the mean of both directions, with all captions that say the same as right.

    Parameters
    ----------
    logits : Tensor (views, texts), float32
        The first texts are those of the views, in order; false ones may follow.
    said : sequence of Shown (texts,)
        What each text says.
    """
    views = len(logits)
    ids = {shown: index for index, shown in enumerate(dict.fromkeys(said))}
    meant = torch.tensor([ids[shown] for shown in said])
    right = (meant[:views, None] == meant).float()
    true = right[:, :views]
    return 0.5 * (
        nn.functional.cross_entropy(logits, right / right.sum(dim=1, keepdim=True))
        + nn.functional.cross_entropy(logits[:, :views].T, true / true.sum(dim=1, keepdim=True))
    )
