"""XSTest: harmless prompts that sound harmful, and harmful ones in contrast to them.

Source: Röttger et al., "XSTest: A Test Suite for Identifying Exaggerated Safety Behaviours in
Large Language Models", NAACL 2024, arXiv:2308.01263; ``xstest_v2_prompts.csv`` of
paul-rottger/exaggerated-safety at a3bb396, or ``xstest_prompts.csv`` of later.

Every type of 25 safe prompts has a contrast of 25 unsafe ones in the same order: the n-th of both
are a pair.  Words alone; a blank or an unrelated picture beside them, which is ours, makes it a
test of what the presence of a picture does.  Twins are shown the same picture.
"""

import io
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from hauberk.blank import blank_image
from hauberk.data.pictures import Picture, picture_files
from hauberk.data.sources.folder import Folder
from hauberk.data.sources.source import Asked, Item, Option, Source, sized
from hauberk.errors import BadParams

_FILES = ("xstest_v2_prompts.csv", "xstest_prompts.csv")
_CONTRAST = "contrast_"
_FAMILY = {
    "real_group_nons_discr": "discr",
    "nons_group_real_discr": "discr",
    "privacy_public": "privacy",
    "privacy_fictional": "privacy",
}
"""Safe types that share a contrast; the others have one of their own name."""
_SIDE = 336
"""Pixels of a blank picture: what the vision tower of LLaVA-1.5 sees, which needs no resampling."""


def _read(folder: Folder, asked: Asked) -> Iterator[Item]:
    table = folder.find(*_FILES)
    files = _pictures(asked)
    seen: Counter[str] = Counter()
    for row in folder.rows(table) if table else folder.rows_of("prompts"):
        kind = row.text("type")
        harmful = kind.startswith(_CONTRAST)
        if row.has("label") and (row.text("label") != "safe") != harmful:
            raise row.wrong(f"'label' is {row.text('label')!r} though 'type' is {kind!r}")
        bare = kind.removeprefix(_CONTRAST)
        pair = f"{_FAMILY.get(bare, bare)}-{seen[kind]}"
        seen[kind] += 1
        yield Item(
            key=f"{asked['image']}-{row.id('id', 'id_v2')}",
            suite=f"xstest_{'unsafe' if harmful else 'safe'}_{asked['image']}",
            channel=("text" if asked["image"] == "none" else "text+image")
            if harmful
            else "lookalike",
            expected="refuse" if harmful else "answer",
            question=row.text("prompt"),
            where=row.where,
            picture=_drawn(files, f"{asked.seed}/{pair}"),
            scenario=kind,
            pair=pair,
            meta={} if harmful else {"metric": "refusal"},
        )


def _pictures(asked: Asked) -> Sequence[Picture]:
    if asked["image"] == "none":
        return ()
    if asked["image"] == "blank":
        blank_image((_SIDE, _SIDE)).save(buffer := io.BytesIO(), "PNG")
        return (Picture("a blank picture", buffer.getvalue()),)
    if asked["images"] is None:
        raise BadParams(
            "xstest has no pictures of its own; say images=FOLDER, such as that of COCO val2017."
        )
    return [Picture(str(path), path) for path in picture_files(asked["images"])]


def _drawn(files: Sequence[Picture], seed: str) -> Picture | None:
    return random.Random(seed).choice(files) if files else None


XSTEST = Source(
    title="XSTest",
    licence="CC-BY-4.0",
    splits=("test",),
    rows=sized(test=450),
    files=("data/*.parquet", "*.csv"),
    read=_read,
    hub="natolambert/xstest-v2-copy",
    options={
        "image": Option("none", ("none", "blank", "unrelated"), "picture beside the prompt"),
        "images": Option(None, Path, "folder of unrelated pictures"),
    },
)
