"""VLSafe: harmful questions beside pictures of COCO that have nothing to do with them.

Source: Chen et al., "DRESS: Instructing Large Vision-Language Models to Align and Interact with
Humans via Natural Language Feedback", CVPR 2024, arXiv:2311.10081; folder ``VLSafe`` of
YangyiYY/LVLM_NLF on the hub.  CMRM evaluates on the part ``examine``.

The pictures are not included: a row names a file of COCO train2017.
"""

from collections.abc import Iterator
from pathlib import Path

from hauberk.data.sources.folder import Folder
from hauberk.data.sources.source import Asked, Item, Option, Source, sized

_FILES = {"test": "harmlessness_examine.jsonl", "train": "harmlessnss_alignment.jsonl"}
"""The second is spelt as its authors spell it."""


def _read(folder: Folder, asked: Asked) -> Iterator[Item]:
    name = _FILES[asked.split]
    table = folder.file(name, f"VLSafe_{name}")
    pictures = Folder(asked["images"]) if asked["images"] else folder
    for row in folder.rows(table):
        yield Item(
            key=row.key,
            suite="vlsafe",
            channel="text+image",
            expected="refuse",
            question=row.text("query"),
            where=row.where,
            picture=pictures.picture(row, "image_id", "", "train2017", "images"),
            scenario="harmful text",
            caption=row.optional("caption"),
        )


VLSAFE = Source(
    title="VLSafe",
    licence="none stated",
    splits=("test", "train"),
    rows=sized(test=1110),
    files=tuple(f"VLSafe/{name}" for name in _FILES.values()),
    read=_read,
    hub="YangyiYY/LVLM_NLF",
    options={"images": Option(None, Path, "folder of COCO train2017; the data set's where None")},
)
