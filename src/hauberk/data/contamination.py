"""What a defense was fitted on and is evaluated on as well: the same text, picture or nearly so.

Texts are compared without case, marks and spacing.  The same words beside another picture are
another question: sets such as FigStep ask all of theirs in the same words.

Pictures are compared by their pixels, and by a difference hash of 128 bits (Krawetz, "Kind of Like
That", 2013: whether a small grey picture gets brighter to the right; here downwards too), which
survives another size or another compression.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hauberk.data.samples import Sample
from hauberk.errors import BadData

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["text", "picture", "near_picture"]

NEAR = 6
"""Bits of 128 in which near pictures may differ.  Our choice: of 400 pictures of twelve shapes,
copies at half the size and JPEG quality 50 differed from the first in at most 8, 99 of 100 in at
most 5, and pictures of others in at least 13.  The lab's, of one layout each, come as near as 6."""
_SYMBOLS = "#%&@/*"
"""Marks in Unicode's eyes that tell words apart, beside what it calls symbols itself."""
_SIDE = 8
_FLAT = 8
"""Levels of grey of 256: a picture that varies by less has no gradients to compare."""
_STEP = 4
"""Levels of grey by which a gradient rises: without it, flat parts would compare their noise."""
_BLOCK = 128
"""Evaluated pictures that are compared at once: with 100,000 fitted ones they take 100 MB."""


@dataclass
class _Index:
    """What is remembered of a collection: hashes alone, so that it may be large."""

    texts: dict[bytes, list[str]] = field(default_factory=dict)
    pictures: dict[bytes, list[str]] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    looks: list[NDArray[np.uint64]] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        text = text_hash(sample.question)
        shown = b"" if sample.image is None else pixel_hash(sample.image)
        if text:
            self.texts.setdefault(text + shown, []).append(sample.sample_id)
        if sample.image is None:
            return
        self.pictures.setdefault(shown, []).append(sample.sample_id)
        look = difference_hash(sample.image)
        if look is not None:
            self.ids.append(sample.sample_id)
            self.looks.append(look)


def contamination(
    fitted: Iterable[Sample],
    evaluated: Iterable[Sample],
    *,
    near: int = NEAR,
    refuse: bool = False,
) -> "pd.DataFrame":
    """Find what two collections share; both are run through once, and only hashes are kept.

    Parameters
    ----------
    fitted, evaluated : samples that something was fitted on, and that it is evaluated on
    near : bits of 128 in which near pictures may differ; see :data:`NEAR`
    refuse : whether to raise an error where they share anything

    Returns
    -------
    DataFrame
        One row for each evaluated sample and kind of overlap: ``kind`` (text, picture or
        near_picture), ``evaluated`` and ``fitted`` (sample ids; of several fitted ones the
        nearest), ``bits`` (in which the pictures' hashes differ; 0 for texts) and ``matches`` (how
        many fitted samples overlap).  A text counts if the pictures are the same or neither has
        one.  A picture that is the same is not told as a near one again.

    Raises
    ------
    BadData
        If they overlap and ``refuse`` is set.
    """
    import pandas as pd

    left, right = _Index(), _Index()
    for sample in fitted:
        left.add(sample)
    for sample in evaluated:
        right.add(sample)
    rows = [
        *_same("text", left.texts, right.texts),
        *_same("picture", left.pictures, right.pictures),
    ]
    same = {row[1] for row in rows if row[0] == "picture"}
    rows += [row for row in _near(left, right, near) if row[1] not in same]
    table = pd.DataFrame(rows, columns=["kind", "evaluated", "fitted", "bits", "matches"])
    if refuse and rows:
        counts = ", ".join(f"{n} by {kind}" for kind, n in table["kind"].value_counts().items())
        kind, one, other, *_ = rows[0]
        raise BadData(
            f"{len(set(table['evaluated']))} evaluated samples were fitted on: {counts}; the first "
            f"is {one!r}, whose {kind} is that of {other!r}.  Leave them out of one of the two "
            "collections."
        )
    return table


_Found = tuple[Kind, str, str, int, int]


def _same(
    kind: Kind, left: Mapping[bytes, list[str]], right: Mapping[bytes, list[str]]
) -> Iterator[_Found]:
    for key, names in right.items():
        if key in left:
            yield from ((kind, name, left[key][0], 0, len(left[key])) for name in names)


def _near(left: _Index, right: _Index, near: int) -> Iterator[_Found]:
    if not left.looks or not right.looks:
        return
    known = np.stack(left.looks)
    for start in range(0, len(right.looks), _BLOCK):
        block = np.stack(right.looks[start : start + _BLOCK])
        bits = sum(
            np.bitwise_count(block[:, None, word] ^ known[None, :, word]).astype(np.uint8)
            for word in range(known.shape[1])
        )
        for row, apart in enumerate(np.asarray(bits)):
            nearest = int(apart.argmin())
            if apart[nearest] <= near:
                matches = int((apart <= near).sum())
                name = right.ids[start + row]
                yield "near_picture", name, left.ids[nearest], int(apart[nearest]), matches


def text_hash(text: str) -> bytes:
    """Hash a text without case, marks and spacing; 16 bytes, none of a text without words.

    Symbols count, as "C++" is not "C#" and "2 + 2" not "2 * 2".
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(map(_kept, folded)).split()
    if not any(map(str.isalnum, "".join(words))):
        return b""
    return hashlib.sha256(" ".join(words).encode("utf-8", "surrogatepass")).digest()[:16]


def _kept(character: str) -> str:
    kind = unicodedata.category(character)
    if kind[0] in "LMN" or character == "_":
        return character
    return f" {character} " if kind in ("Sm", "Sc", "So") or character in _SYMBOLS else " "


def pixel_hash(image: Image.Image) -> bytes:
    """Hash what a picture shows, whatever its file's format and mode; 16 bytes."""
    from hauberk.requests import as_rgb

    rgb = as_rgb(image)
    return hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).digest()[:16]


def difference_hash(image: Image.Image) -> NDArray[np.uint64] | None:
    """Tell where a small grey copy of a picture gets brighter, to the right and downwards.

    Returns
    -------
    ndarray (2,), uint64
        64 bits to the right, 64 bits downwards; None of a picture of one colour, which would be
        near every other such.
    """
    from hauberk.requests import as_rgb

    grey = as_rgb(image).convert("L").resize((_SIDE + 1, _SIDE + 1), Image.Resampling.BOX)
    levels = np.asarray(grey, dtype=np.int16)
    if np.ptp(levels) < _FLAT:
        return None
    right = levels[:_SIDE, 1:] > levels[:_SIDE, :-1] + _STEP
    down = levels[1:, :_SIDE] > levels[:-1, :_SIDE] + _STEP
    return np.packbits(np.stack([right, down]).reshape(2, -1), axis=1).view(np.uint64)[:, 0]
