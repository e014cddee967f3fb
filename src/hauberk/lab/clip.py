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

import hashlib
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
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
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hauberk.lab.build import CLIP_MEAN, CLIP_STD
from hauberk.lab.language import VERBS
from hauberk.lab.objects import COLORS, THINGS
from hauberk.lab.optimize import descend, quicken
from hauberk.lab.scenes import ROW, Pool
from hauberk.lab.stages import kept
from hauberk.lab.views import (
    BANKS,
    CLASSES,
    WORDINGS,
    Batch,
    Shown,
    Subject,
    View,
    altered,
    batches,
    caption_of,
)

STAGES = ("tower", "contrast")
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
    """Multiply in bfloat16 and compile the blocks; it needs a C++ compiler."""


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


class Studio:
    """Tokenizer, processor and network of one run, and where its checkpoints lie."""

    def __init__(self, recipe: Recipe, work: Path) -> None:
        self.recipe, self.work = recipe, work
        self.tokenizer = tokenizer_of()
        self.processor = processor_of(self.tokenizer, recipe.side)
        self.model = network_of(self.tokenizer, recipe)
        if recipe.fast:
            quicken(self.model.vision_model)
            quicken(self.model.text_model)

    def checkpoint(self, stage: str) -> Path:
        """Where the weights after ``stage`` are kept."""
        return self.work / f"{stage}.safetensors"

    def part(self, stage: str) -> nn.Module:
        """What a stage trains."""
        part: nn.Module = self.model.vision_model if stage == "tower" else self.model
        return part

    def pixels(self, batch: Batch) -> Tensor:
        """All views as the processor hands them to the tower: float32 (views, 3, side, side)."""
        size = (self.recipe.side, self.recipe.side)
        crops = [crop.resize(size, Image.Resampling.BICUBIC) for crop in batch.crops()]
        stacked = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops]))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return (stacked.permute(0, 3, 1, 2).float() / 255 - mean) / std

    def autocast(self) -> torch.autocast:
        """The arithmetic of the towers."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.recipe.fast)

    def logits(self, batch: Batch, texts: Sequence[str]) -> Tensor:
        """Scaled cosines of views and texts: float32 (views, texts)."""
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        with self.autocast():
            found = (
                self.model.get_image_features(self.pixels(batch)),
                self.model.get_text_features(**tokens),
            )
        seen, told = (nn.functional.normalize(f.pooler_output.float(), dim=-1) for f in found)
        return self.model.logit_scale.exp() * seen @ told.T


_PATCHES = {
    word: index + 1
    for index, word in enumerate([*THINGS, *(f"written {word}" for word in ("a", *VERBS, *THINGS))])
}
"""What a patch may show besides ground: a thing, or a word (a thing and its name are two)."""
_TINTS = {name: index for index, name in enumerate(COLORS)}


def patch_labels(batch: Batch, grid: int) -> tuple[Tensor, Tensor]:
    """Tell for each patch in whose box its centre lies, and of which colour that is.

    Both are int64 (views, patches).  Class 0 is the ground; the colour of ground and words is -1
    (not asked).
    """
    what = torch.zeros(len(batch.views), grid, grid, dtype=torch.long)
    which = torch.full_like(what, -1)
    for row, (subject, view) in enumerate(zip(batch.subjects, batch.views, strict=True)):
        what[row], which[row] = _labels(subject, view, grid)
    return what.flatten(1), which.flatten(1)


def _labels(subject: Subject, view: View, grid: int) -> tuple[Tensor, Tensor]:
    centers = (np.arange(grid) + 0.5) * view.side / grid

    def covered(low: float, high: float) -> slice:
        """The patches, in one direction, with their centre between two places in the view."""
        first, last = np.searchsorted(centers, (low, high))
        return slice(int(first), int(last))

    what = torch.zeros(grid, grid, dtype=torch.long)
    which = torch.full_like(what, -1)
    boxes = [
        (item.left, item.top, item.left + item.side, item.top + item.side,
         item.thing.name, _TINTS[item.color])
        for item in subject.scene.placed
    ] + [
        (left, line.top, right, line.top + ROW, f"written {word}", -1)
        for line in subject.scene.lines
        for word, left, right in line.boxes()
    ]  # fmt: skip
    for left, top, right, bottom, name, tint in boxes:
        box = (
            covered(top - view.top, bottom - view.top),
            covered(left - view.left, right - view.left),
        )
        what[box], which[box] = _PATCHES[name], tint
    return what, which


def train_tower(studio: Studio) -> None:
    """Stage ``tower``: every patch tells whose it is, the class token what a view shows."""
    recipe, tower = studio.recipe, studio.model.vision_model
    stream = batches(random.Random(f"{recipe.seed}/tower"), recipe.batch, _POOL)
    torch.manual_seed(recipe.seed)
    heads = nn.ModuleList(
        nn.Linear(recipe.vision_width, classes)
        for classes in (len(_PATCHES) + 1, len(COLORS), len(CLASSES))
    )
    cross_entropy = nn.functional.cross_entropy

    def loss_of(_: int) -> Tensor:
        batch = next(stream)
        what, which = patch_labels(batch, recipe.side // recipe.patch)
        with studio.autocast():
            found = tower(studio.pixels(batch))
        patches, view = found.last_hidden_state[:, 1:].float(), found.pooler_output.float()
        loss = cross_entropy(heads[0](patches).flatten(0, 1), what.flatten())
        if (which >= 0).any():
            tints = heads[1](patches).flatten(0, 1)
            loss = loss + cross_entropy(tints, which.flatten(), ignore_index=-1)
        return loss + cross_entropy(heads[2](view), batch.shares)

    _descend(studio, "tower", [tower, heads], loss_of)


def train_contrast(studio: Studio) -> None:
    """Stage ``contrast``: views and what is said of them, in classes and in captions."""
    recipe, model = studio.recipe, studio.model
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
        logits = studio.logits(batch, [text for texts in (*prompts, captions) for text in texts])
        *banked, paired = logits.split([len(texts) for texts in (*prompts, captions)], dim=1)
        loss = contrast(paired, said)
        for found, bank in zip(banked, BANKS.values(), strict=True):
            loss = loss + classified(found, batch.shares @ bank.member)
        return loss

    _descend(studio, "contrast", [model], loss_of)


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


def _descend(studio: Studio, stage: str, parts: Sequence[nn.Module], loss_of: Any) -> None:
    recipe = studio.recipe
    studio.model.train()
    descend(
        f"{stage:>9}",
        parts,
        loss_of,
        steps=recipe.steps[stage],
        peak_rate=recipe.peak_rate[stage],
    )
    studio.model.eval()


_TRAIN = {"tower": train_tower, "contrast": train_contrast}


def run_stages(recipe: Recipe, work: Path, until: str = STAGES[-1]) -> Studio:
    """Run the stages that have no checkpoint yet; return the studio with the trained network.

    Raises
    ------
    ValueError
        If a checkpoint was made by another recipe.
    """
    work.mkdir(parents=True, exist_ok=True)
    studio = Studio(recipe, work)
    stages = STAGES[: STAGES.index(until) + 1]
    for stage in stages:
        if studio.checkpoint(stage).exists():
            _assert_of(recipe, stage, studio.checkpoint(stage))
    for stage in stages:
        saved, part = studio.checkpoint(stage), studio.part(stage)
        if saved.exists():
            part.load_state_dict(load_file(saved))
            continue
        started = time.monotonic()
        _TRAIN[stage](studio)
        seconds = round(time.monotonic() - started)
        unfinished = saved.with_suffix(".part")
        weights = {key: value.contiguous() for key, value in part.state_dict().items()}
        save_file(
            weights, unfinished, metadata=_metadata(recipe, stage) | {"seconds": str(seconds)}
        )
        unfinished.rename(saved)
        tqdm.write(f"lab-clip: {stage} took {seconds} s", file=sys.stderr)
    return studio


def _metadata(recipe: Recipe, stage: str) -> dict[str, str]:
    """Say what the weights after a stage depend on, and how they were multiplied."""
    terms = asdict(recipe)
    for key in ("steps", "peak_rate"):
        terms[key] = {name: terms[key][name] for name in STAGES[: STAGES.index(stage) + 1]}
    del terms["fast"]
    terms["source"] = source_hash()
    return {"recipe": json.dumps(terms, sort_keys=True), "fast": json.dumps(recipe.fast)}


_SOURCES = ("build", "clip", "language", "objects", "optimize", "scenes", "views")


def source_hash() -> str:
    """Hash the source of the world and of this model, on which a training run depends too."""
    files = [Path(__file__).with_name(f"{name}.py") for name in _SOURCES]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _assert_of(recipe: Recipe, stage: str, saved: Path) -> None:
    found, expected = kept(saved).get("recipe"), _metadata(recipe, stage)["recipe"]
    if found != expected:
        raise ValueError(
            f"{saved} was trained by another recipe: {found}, expected {expected}. "
            "Remove it to train the stage again, or choose another folder with --work."
        )
