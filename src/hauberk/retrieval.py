"""Texts for pictures: the nearest of a large index, by any CLIP or SigLIP dual encoder.

The authors of TGA retrieve one text for each training picture, from captions and toxic snippets
(Xu et al., ICLR 2025, arXiv:2410.12662; they use BEiT-3, which transformers has not, and publish no
code for it).  A text that says what the picture's own caption says would teach nothing, so a query
may name caption and picture, and is then guarded:

* a text of the same picture is passed over;
* a text that is nearly the caption (cosine above .98) is passed over;
* a text that is the caption is passed over, or cut to its first half, as the authors do.

The index is a bundle bound to its encoder, like a concept bank.  Search is exact: a product in
blocks, or faiss' flat inner product where that is asked for.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, ProcessorMixin

from hauberk.bundle import Binding, Card, read_bound, write_bundle
from hauberk.concepts import check_lengths, encode_texts
from hauberk.errors import TamperedBundle
from hauberk.requests import as_rgb

METHOD = "text-index"
_TENSORS, _TEXTS = "features.safetensors", "texts.json"

Backend = Literal["product", "faiss"]
Equal = Literal["halve", "drop"]

NEAR = 0.98
"""Texts that are closer than this to a caption say the same; the specification's."""
_BLOCK = 65_536
"""Texts that are multiplied with a block of queries at once..."""
_QUERIES = 256
"""...and the queries of such a block: 64 MB of scores."""
_SPARE = 8
"""Candidates beyond the one that is wanted, for those that the guards pass over; where they do not
suffice, twice as many are looked at, and so on."""


@dataclass(frozen=True)
class TextIndex:
    """Texts and their features.

    Raises
    ------
    ValueError
        If there is no text, one repeats, or lengths and shapes do not fit.
    """

    texts: tuple[str, ...]
    features: Tensor
    """(texts, d) float32 or float16 on the CPU, rows of length 1."""
    images: tuple[str, ...] = ()
    """The id of the picture that each text is of, "" where it is of none; () where none is."""

    def __post_init__(self) -> None:
        if not self.texts or len(set(self.texts)) != len(self.texts):
            raise ValueError(
                f"{len(self.texts)} texts, {len(set(self.texts))} of them different; give one or "
                "more, each once."
            )
        if self.features.ndim != 2 or len(self.features) != len(self.texts):
            raise ValueError(
                f"features: {tuple(self.features.shape)} is wrong, ({len(self.texts)}, d) is right."
            )
        if self.images and len(self.images) != len(self.texts):
            raise ValueError(f"{len(self.images)} ids of pictures for {len(self.texts)} texts.")

    def search(
        self, queries: Tensor, count: int, backend: Backend = "product"
    ) -> tuple[Tensor, Tensor]:
        """Find the nearest texts, exactly.

        Parameters
        ----------
        queries : (n, d) float32, rows of length 1
        count : texts for each, at most all of them
        backend : ``product`` of blocks, or ``faiss``' flat index, which is as exact; of 1.2 million
            texts it took twice the time and seventeen times the memory (`make bench`)

        Returns
        -------
        scores : Tensor (n, count) float32, falling
        places : Tensor (n, count) int64

        Raises
        ------
        ValueError
            If the backend is not one of those named.
        ImportError
            If faiss is asked for and not installed.
        """
        if backend not in get_args(Backend):
            right = ", ".join(get_args(Backend))
            raise ValueError(f"backend: {backend!r} is not one of {right}.")
        count = min(count, len(self.texts))
        if backend == "faiss":
            return self._faiss(queries, count)
        found = [self._product(part, count) for part in queries.split(_QUERIES)]
        if not found:
            return torch.empty(0, count), torch.empty(0, count, dtype=torch.long)
        scores, places = zip(*found, strict=True)
        return torch.cat(scores), torch.cat(places)

    def _product(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        best = torch.empty(len(queries), 0)
        where = torch.empty(len(queries), 0, dtype=torch.long)
        for first in range(0, len(self.texts), _BLOCK):
            scores = queries @ self.features[first : first + _BLOCK].float().T
            top = scores.topk(min(count, scores.shape[1]), dim=1)
            best = torch.cat([best, top.values], dim=1)
            where = torch.cat([where, top.indices + first], dim=1)
            kept = best.topk(min(count, best.shape[1]), dim=1)
            best, where = kept.values, where.gather(1, kept.indices)
        return best, where

    def _faiss(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        faiss = import_module("faiss")
        flat = faiss.IndexFlatIP(self.features.shape[1])
        for block in self.features.split(_BLOCK):
            flat.add(block.float().numpy())
        scores, places = flat.search(queries.numpy(), count)
        return torch.from_numpy(scores), torch.from_numpy(places)

    def save(self, folder: Path, binding: Binding, **about: Any) -> Path:
        """Write a bundle; ``binding`` is that of the encoder, ``about`` the card's ``data``."""

        def write(home: Path) -> None:
            save_file({"features": self.features.contiguous()}, home / _TENSORS)
            content = {"texts": self.texts, "images": self.images}
            (home / _TEXTS).write_text(json.dumps(content, indent=0) + "\n")

        parameters = {
            "texts": len(self.texts),
            "of_pictures": sum(map(bool, self.images)),
            "width": self.features.shape[1],
        } | about.pop("parameters", {})
        card = Card(METHOD, binding, parameters, **{"data": [], **about})
        return write_bundle(folder, card, write)

    @classmethod
    def load(cls, folder: Path | str, clip: PreTrainedModel, processor: ProcessorMixin) -> Self:
        """Read a bundle, verified and made for this encoder and its processor.

        Raises
        ------
        BadBundle, TamperedBundle, WrongModel
            If it is no index, was changed, or was made with another encoder.
        """
        home, _ = read_bound(folder, METHOD, clip, processor, "TextIndex.save")
        try:
            content = json.loads((home / _TEXTS).read_text())
            features = load_file(home / _TENSORS)["features"]
            return cls(tuple(content["texts"]), features, tuple(content["images"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise TamperedBundle(
                f"{home}: {_TEXTS} and {_TENSORS} are no index of texts ({error}); build it again."
            ) from None


def build_index(
    clip: PreTrainedModel,
    processor: ProcessorMixin,
    texts: Sequence[str],
    images: Sequence[str] = (),
    *,
    batch_size: int = 256,
) -> TextIndex:
    """Encode texts; of one that repeats, the first is kept.

    Parameters
    ----------
    clip, processor : any dual encoder with ``get_text_features``, and its own processor
    texts : captions, and snippets of what is to be refused
    images : for each text the id of its picture, "" for none; () where none is of a picture

    Raises
    ------
    ValueError
        If there is no text, or one is longer than the encoder reads.
    """
    if images and len(images) != len(texts):
        raise ValueError(f"{len(images)} ids of pictures for {len(texts)} texts; give one each.")
    first = {text: place for place, text in reversed(list(enumerate(texts)))}
    kept = sorted(first.values())
    chosen = [texts[place] for place in kept]
    check_lengths(clip, processor, chosen)
    parts = [encode_texts(clip, processor, part) for part in _batches(chosen, batch_size)]
    features = torch.cat(parts) if parts else torch.empty(0, 0)
    return TextIndex(tuple(chosen), features, tuple(images[place] for place in kept if images))


@torch.no_grad()
def encode_images(
    clip: Any,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    batch_size: int = 64,
) -> Tensor:
    """Encode whole pictures as the processor feeds them: (n, d) float32 on the CPU, unit rows.

    Raises
    ------
    BadRequest
        If the mode of a picture does not say which value is white.
    """
    found = [torch.empty(0, 0)]
    feed: Any = processor.image_processor
    for part in _batches(images, batch_size):
        pixels = feed(images=[as_rgb(image) for image in part], return_tensors="pt")["pixel_values"]
        features = clip.get_image_features(pixel_values=pixels.to(clip.device, clip.dtype))
        found.append(normalize(features.pooler_output.float(), dim=-1).cpu())
    return torch.cat(found[1:] or found)


@dataclass(frozen=True)
class Query:
    """A picture to find a text for, and what must not be found."""

    image: Image.Image
    caption: str = ""
    """Its own; "" for a picture without one, as at inference."""
    image_id: str = ""
    """By which the index may know it."""


@dataclass(frozen=True)
class Found:
    """A text that was found."""

    text: str
    """"" where the guards pass over every text of the index."""
    score: float
    """Cosine of picture and text; NaN for none."""
    guarded: int
    """Nearer texts that were passed over."""


@dataclass(frozen=True)
class Retriever:
    """Finds the nearest text that a picture's guards leave.

    Parameters
    ----------
    index : made with ``clip``
    clip, processor : the dual encoder
    equal : what becomes of a text that is the caption itself: the authors ``halve`` it
    near : cosine from which on a text is taken for the caption said otherwise
    backend : see :meth:`TextIndex.search`
    """

    index: TextIndex
    clip: PreTrainedModel
    processor: ProcessorMixin
    equal: Equal = "halve"
    near: float = NEAR
    backend: Backend = "product"

    def texts(self, images: Sequence[Image.Image]) -> list[str]:
        """Give the nearest text of each picture, unguarded, as at inference."""
        return [found.text for found in self.find([Query(image) for image in images])]

    def find(self, queries: Sequence[Query]) -> list[Found]:
        """Find one text for each query."""
        features = encode_images(self.clip, self.processor, [query.image for query in queries])
        captions = sorted({query.caption for query in queries} - {""})
        parts = [encode_texts(self.clip, self.processor, part) for part in _batches(captions, 256)]
        own = dict(zip(captions, torch.cat(parts) if parts else [], strict=True))
        found: dict[int, Found] = {}
        count, most = 1 + _SPARE, len(self.index.texts)
        left = list(range(len(queries)))
        while left:
            scores, places = self.index.search(features[left], count, self.backend)
            for row, place in enumerate(left):
                candidates = list(zip(scores[row].tolist(), places[row].tolist(), strict=True))
                chosen = self._chosen(queries[place], candidates, own)
                if chosen is not None:
                    found[place] = chosen
                elif count >= most:
                    found[place] = Found("", float("nan"), most)
            left = [place for place in left if place not in found]
            count *= 2
        return [found[place] for place in range(len(queries))]

    def _chosen(
        self, query: Query, candidates: Sequence[tuple[float, int]], own: Mapping[str, Tensor]
    ) -> Found | None:
        for guarded, (score, place) in enumerate(candidates):
            text = self.index.texts[place]
            if query.image_id and self.index.images and self.index.images[place] == query.image_id:
                continue
            if query.caption and text == query.caption:
                half = unleaked(text, query.caption)
                if self.equal == "halve" and half:
                    return Found(half, score, guarded)
                continue
            if query.caption:
                alike = (self.index.features[place].float() @ own[query.caption]).item()
                if alike > self.near:
                    continue
            return Found(text, score, guarded)
        return None


def unleaked(text: str, caption: str) -> str:
    """Cut a retrieved text that is the caption to the first half of its characters."""
    return text[: len(text) // 2].rstrip() if text == caption else text


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
