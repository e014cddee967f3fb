"""SPA-VL: questions on pictures of harm, and for each a better and a worse answer.

Source: Zhang et al., "SPA-VL: A Comprehensive Safety Preference Alignment Dataset for Vision
Language Models", CVPR 2025, arXiv:2406.12030; sqrti/SPA-VL on the hub.

Of the part that is evaluated, ``harm`` is to be refused and ``help`` to be answered; the rates of
ETA and GuardAlign are of ``harm``.
"""

from collections.abc import Iterator

from hauberk.data.sources.folder import Folder
from hauberk.data.sources.source import Asked, Item, Option, Source

_ROWS = {"train": 93_258, "validation": 7_000}
_TESTED = 265
"""Of each kind."""


def _read(folder: Folder, asked: Asked) -> Iterator[Item]:
    name = asked["kind"] if asked.split == "test" else asked.split
    helps = name == "help"
    for number, row in enumerate(folder.rows_of(name)):
        classes = [row.optional(column) for column in ("class1", "class2", "class3")]
        answers = {side: row.text(side) for side in ("chosen", "rejected") if row.has(side)}
        yield Item(
            key=f"{name}-{number}",
            suite=f"spa_vl_{name}",
            channel="benign" if helps else "image",
            expected="answer" if helps else "refuse",
            question=row.text("question"),
            where=row.where,
            picture=row.picture("image"),
            scenario="/".join(filter(None, classes)),
            reference=answers.get("chosen", "") if helps else "",
            pair=row.optional("image_name"),
            meta=answers
            | ({"metric": "relative" if answers.get("chosen") else "refusal"} if helps else {}),
        )


SPA_VL = Source(
    title="SPA-VL",
    licence="CC-BY-4.0",
    splits=("test", "validation", "train"),
    rows=lambda asked: _ROWS.get(asked.split, _TESTED),
    files=("data/{split}*", "{split}/*"),
    read=_read,
    hub="sqrti/SPA-VL",
    options={"kind": Option("harm", ("harm", "help"), "of the split test")},
    # The rates of harm that ETA and GuardAlign print are parts of 265; of the others none is known.
    rows_verified=lambda asked: asked.split == "test" and asked["kind"] == "harm",
)
