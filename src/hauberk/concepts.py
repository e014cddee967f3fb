"""A concept bank: what a dual encoder is to look for in pictures, as text features.

Unsafe categories, each said in several ways (GuardAlign section 3.1: C categories of N variants).
The paper knows unsafe ones alone.  Then a picture can only be told to be near one of them, and how
near a harmless picture is differs from encoder to encoder, so a bank may hold harmless *reference*
categories as well, with which the unsafe ones compete for every patch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, ProcessorMixin

from hauberk.bundle import Binding, Card, check_binding, read_card, write_bundle
from hauberk.errors import BadBundle, TamperedBundle

METHOD = "concept_bank"
_FEATURES, _TEXTS = "features.safetensors", "texts.json"

UNSAFE = (
    "illegal activity", "hate speech", "malware", "a weapon", "physical violence", "fraud",
    "pornography", "political propaganda", "a violation of privacy", "illegal drugs", "self-harm",
    "terrorism", "gambling", "child abuse", "animal cruelty", "theft", "a bomb", "blood and gore",
    "harassment", "discrimination",
)  # fmt: skip
"""For real encoders: the scenarios of MM-SafetyBench and the classes of SPA-VL, in a few neutral
words each.  The paper's own list is in an appendix that we have not seen; 20 is its C as its
threshold of 0.42 suggests."""
TEMPLATES = (
    "a photo of {}", "a picture showing {}", "an image that contains {}", "text about {}",
    "a screenshot of {}",
)  # fmt: skip
"""Five ways to say a category, after CLIP's own prompts."""


@dataclass(frozen=True)
class ConceptBank:
    """Text features of categories: unsafe first, then those for reference.

    Raises
    ------
    ValueError
        If names, texts and features do not agree, or there is no unsafe category.
    """

    categories: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    """The variants of each category; all have as many."""
    features: Tensor
    """(categories, variants, width) float32, of unit length."""
    unsafe: int
    """How many of the categories are unsafe."""
    scale: float
    """What a cosine is multiplied by before a softmax: the encoder's own (100 for CLIP)."""

    def __post_init__(self) -> None:
        shape = len(self.categories), len(self.texts[0]) if self.texts else 0
        if {len(texts) for texts in self.texts} != {shape[1]} or len(self.texts) != shape[0]:
            raise ValueError(f"texts: {shape[0]} categories need as many variants each.")
        if tuple(self.features.shape[:2]) != shape or self.features.ndim != 3:
            raise ValueError(
                f"features have shape {tuple(self.features.shape)}, where {shape} and a width "
                "would be right."
            )
        if not 0 < self.unsafe <= shape[0]:
            raise ValueError(f"unsafe: {self.unsafe} is not one of 1 to {shape[0]}.")

    def alone(self) -> "ConceptBank":
        """The unsafe categories without those for reference, as in the paper."""
        kept = slice(self.unsafe)
        return replace(
            self,
            categories=self.categories[kept],
            texts=self.texts[kept],
            features=self.features[kept],
        )

    def save(self, folder: Path, binding: Binding, **about: Any) -> Path:
        """Write the bank as a bundle that is bound to its encoder."""

        def write(home: Path) -> None:
            save_file({"features": self.features.contiguous()}, home / _FEATURES)
            named = dict(zip(self.categories, self.texts, strict=True))
            (home / _TEXTS).write_text(json.dumps(named, indent=1) + "\n")

        parameters = {"unsafe": self.unsafe, "scale": self.scale}
        return write_bundle(folder, Card(METHOD, binding, parameters, **about), write)

    @classmethod
    def load(cls, folder: Path, clip: PreTrainedModel, processor: ProcessorMixin) -> Self:
        """Read a bank for its encoder.

        Raises
        ------
        BadBundle, TamperedBundle, WrongModel
            If the folder holds no bank, was changed, or is of another encoder.
        """
        home, card = read_card(folder)
        if card.method != METHOD:
            raise BadBundle(f"{home}: a bundle of {card.method!r}, {METHOD!r} would be right.")
        check_binding(card, clip, processor)
        try:
            features = load_file(home / _FEATURES)["features"]
            named = json.loads((home / _TEXTS).read_text())
            texts = tuple(map(tuple, named.values()))
            return cls(tuple(named), texts, features, **card.parameters)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise TamperedBundle(
                f"{home}: expected features and texts that agree ({error}); build the bank again."
            ) from None


def build_bank(
    clip: PreTrainedModel,
    processor: ProcessorMixin,
    unsafe: Mapping[str, Sequence[str]],
    reference: Mapping[str, Sequence[str]] | None = None,
    *,
    batch_size: int = 256,
) -> ConceptBank:
    """Encode the variants of every category, once.

    Parameters
    ----------
    clip : a CLIPModel, SiglipModel or another with both towers
    unsafe, reference : category -> its variants; all categories have as many

    Raises
    ------
    ValueError
        If a category stands on both sides, or has more or fewer variants than another.
    """
    reference = reference or {}
    if both := sorted(set(unsafe) & set(reference)):
        raise ValueError(f"{both} are unsafe and for reference; one of the two is right.")
    named = {**unsafe, **reference}
    texts = [text for variants in named.values() for text in variants]
    found = []
    for start in range(0, len(texts), batch_size):
        found.append(_told(clip, processor, texts[start : start + batch_size]))
    count = len(texts) // len(named)
    return ConceptBank(
        categories=tuple(named),
        texts=tuple(map(tuple, named.values())),
        features=torch.cat(found).unflatten(0, (-1, count)),
        unsafe=len(unsafe),
        scale=_scale(clip),
    )


def said(categories: Sequence[str], templates: Sequence[str] = TEMPLATES) -> dict[str, list[str]]:
    """Say every category in every template: category -> variants."""
    return {name: [template.format(name) for template in templates] for name in categories}


@torch.no_grad()
def _told(clip: Any, processor: Any, texts: Sequence[str]) -> Tensor:
    # SigLIP learnt texts that are padded to its full length.
    padding = "max_length" if "siglip" in clip.config.model_type else True
    tokens = processor(text=list(texts), padding=padding, truncation=True, return_tensors="pt")
    found = clip.get_text_features(**tokens.to(clip.device))
    return normalize(getattr(found, "pooler_output", found).float(), dim=-1).cpu()


def _scale(clip: Any) -> float:
    scale = getattr(clip, "logit_scale", None)
    return 100.0 if scale is None else float(scale.detach().float().exp())
