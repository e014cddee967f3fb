"""Concepts in words: what a CLIP compares the patches of a picture with.

A concept is what fills the gap of every template ("a picture of {}"); its variants are the filled
templates, encoded once.  GuardAlign (arXiv:2602.24027, section 3.1) compares with unsafe categories
alone.  Here harmless *reference* concepts may compete with them, because an angle between a picture
and a word means little by itself: a patch of anything well drawn lies nearer to every word than a
patch of bare ground does, and only another word for the same patch tells the two apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, ProcessorMixin

from hauberk.bundle import Binding, Card, read_bound, write_bundle
from hauberk.errors import TamperedBundle

METHOD = "concept_bank"
_TENSORS = "concepts.safetensors"
_UNIT = 1e-3
"""How far the length of a feature may lie from 1: rounding, not another normalisation."""


@dataclass(frozen=True)
class ConceptBank:
    """Unsafe concepts, and harmless ones beside them, as unit features.

    Raises
    ------
    ValueError
        If there is no category or template, a category occurs twice, a template has no gap, or
        features are not float32 unit rows of the shapes that the names ask for.
    """

    categories: tuple[str, ...]
    """C unsafe concepts."""
    templates: tuple[str, ...]
    """N wordings with one gap, ``{}``."""
    features: Tensor
    """(C, N, d) float32, rows of length 1."""
    reference: tuple[str, ...] = ()
    """R harmless concepts; GuardAlign has none."""
    reference_features: Tensor | None = None
    """(R, N, d) float32, rows of length 1; None if R is 0."""
    logit_scale: float = 100.0
    """What the model multiplies cosines by before a softmax; 100 is that of OpenAI's CLIPs."""

    def __post_init__(self) -> None:
        _check_names(self.categories, self.reference, self.templates)
        if not (isfinite(self.logit_scale) and self.logit_scale > 0):
            raise ValueError(f"logit_scale {self.logit_scale} is wrong, more than 0 is right.")
        width = self.features.shape[-1]
        _check_rows("features", self.features, (len(self.categories), len(self.templates), width))
        if self.reference or self.reference_features is not None:
            found = self.reference_features
            shape = (len(self.reference), len(self.templates), width)
            _check_rows("reference_features", found if found is not None else torch.empty(0), shape)

    @property
    def variants(self) -> tuple[tuple[str, ...], ...]:
        """C x N texts."""
        return _filled(self.categories, self.templates)

    @property
    def reference_variants(self) -> tuple[tuple[str, ...], ...]:
        """R x N texts."""
        return _filled(self.reference, self.templates)

    @property
    def all_features(self) -> Tensor:
        """(C + R, N, d) float32: the unsafe concepts first."""
        if self.reference_features is None:
            return self.features
        return torch.cat([self.features, self.reference_features])

    @property
    def parameters(self) -> dict[str, Any]:
        """What a card says of it, as plain data."""
        return {
            "categories": list(self.categories),
            "reference": list(self.reference),
            "templates": list(self.templates),
            "logit_scale": self.logit_scale,
        }

    def write(self, home: Path) -> None:
        """Write the features into the folder of a bundle: ``concepts.safetensors``."""
        tensors = {"features": self.features.contiguous()}
        if self.reference_features is not None:
            tensors["reference_features"] = self.reference_features.contiguous()
        save_file(tensors, home / _TENSORS)

    @classmethod
    def read(cls, home: Path, parameters: Mapping[str, Any]) -> "ConceptBank":
        """Read what :meth:`write` wrote, with the parameters that a card kept of it.

        Raises
        ------
        TamperedBundle
            If they are no bank.
        """
        try:
            tensors = load_file(home / _TENSORS)
            return cls(
                categories=tuple(parameters["categories"]),
                templates=tuple(parameters["templates"]),
                features=tensors.pop("features"),
                reference=tuple(parameters["reference"]),
                reference_features=tensors.pop("reference_features", None),
                logit_scale=float(parameters["logit_scale"]),
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise TamperedBundle(
                f"{home}: its card and {_TENSORS} are no concept bank ({error}); build it again."
            ) from None

    def save(self, folder: Path, binding: Binding, **about: Any) -> Path:
        """Write a bundle; ``binding`` is that of the CLIP, ``about`` the card's ``data`` and so on.

        ``data`` is empty unless given: a bank is made of words alone.  ``parameters`` of ``about``
        stand beside those of the bank.
        """
        parameters = self.parameters | about.pop("parameters", {})
        card = Card(METHOD, binding, parameters, **{"data": [], **about})
        return write_bundle(folder, card, self.write)

    @classmethod
    def load(
        cls, folder: Path | str, clip: PreTrainedModel, processor: ProcessorMixin
    ) -> "ConceptBank":
        """Read a bundle, verified and made for this CLIP and its processor.

        Raises
        ------
        BadBundle, TamperedBundle, WrongModel
            If it is no bank, was changed, or was made with another CLIP.
        """
        home, card = read_bound(folder, METHOD, clip, processor, "ConceptBank.save")
        return cls.read(home, card.parameters)


@torch.no_grad()
def build_bank(
    clip: Any,
    processor: ProcessorMixin,
    *,
    categories: Sequence[str],
    templates: Sequence[str],
    reference: Sequence[str] = (),
    batch_size: int = 256,
) -> ConceptBank:
    """Encode every concept in every template.

    Parameters
    ----------
    clip : CLIPModel, SiglipModel or alike: it has ``get_text_features`` and ``logit_scale``
    processor : the CLIP's own
    categories, reference : unsafe and harmless concepts, as they fill a gap: "a bomb"
    templates : wordings with one gap, ``{}``
    batch_size : texts that are encoded together

    Raises
    ------
    ValueError
        If a text is longer than the model reads, or the names are wrong: see :class:`ConceptBank`.
    """
    _check_names(categories, reference, templates)
    texts = [text for row in _filled([*categories, *reference], templates) for text in row]
    check_lengths(clip, processor, texts)
    found = [
        encode_texts(clip, processor, texts[start : start + batch_size])
        for start in range(0, len(texts), batch_size)
    ]
    features = torch.cat(found).unflatten(0, (-1, len(templates)))
    unsafe, harmless = features.split([len(categories), len(reference)])
    return ConceptBank(
        categories=tuple(categories),
        templates=tuple(templates),
        features=unsafe,
        reference=tuple(reference),
        reference_features=harmless if reference else None,
        logit_scale=float(clip.logit_scale.exp()),
    )


@torch.no_grad()
def encode_texts(clip: Any, processor: ProcessorMixin, texts: Sequence[str]) -> Tensor:
    """Encode texts, in one batch: (texts, d) float32 on the CPU, rows of length 1."""
    # SigLIP was trained on texts that are padded to the full length, and masks nothing.
    padding = "max_length" if clip.config.model_type.startswith("siglip") else True
    tokens = processor.tokenizer(list(texts), padding=padding, return_tensors="pt").to(clip.device)
    features: Tensor = clip.get_text_features(**tokens).pooler_output
    return normalize(features.float(), dim=-1).cpu()


def check_lengths(clip: PreTrainedModel, processor: ProcessorMixin, texts: Sequence[str]) -> None:
    """Raise ValueError, naming it, for a text that is longer than the model reads."""
    limit = clip.config.text_config.max_position_embeddings
    lengths = map(len, processor.tokenizer(list(texts))["input_ids"])
    for text, length in zip(texts, lengths, strict=True):
        if length > limit:
            raise ValueError(
                f"{text!r} has {length} tokens, the model reads {limit}; shorten it, or the "
                "template of a concept."
            )


def _filled(concepts: Sequence[str], templates: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        tuple(template.replace("{}", concept) for template in templates) for concept in concepts
    )


def _check_names(
    categories: Sequence[str], reference: Sequence[str], templates: Sequence[str]
) -> None:
    if not categories or not templates:
        raise ValueError(
            f"{len(categories)} categories and {len(templates)} templates; 1 or more of each is "
            "right."
        )
    together = [*categories, *reference]
    if repeated := sorted({name for name in together if together.count(name) > 1}):
        raise ValueError(f"concepts {repeated} stand there more than once; once is right.")
    if wrong := [template for template in templates if template.count("{}") != 1]:
        raise ValueError(f"templates {wrong} have not one gap; write {{}} once in each.")


def _check_rows(name: str, rows: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(rows.shape) != shape or rows.dtype != torch.float32:
        raise ValueError(f"{name} must be float32 {shape}; found {rows.dtype} {tuple(rows.shape)}.")
    away = (rows.norm(dim=-1) - 1).abs().max().item()
    if not away < _UNIT:  # so that NaN is found
        raise ValueError(f"{name}: rows must have length 1, one is off by {away:.3g}.")
