"""A set of one's own: a table of JSON lines, CSV or Parquet, and a folder of pictures.

One row is one sample.  ``question`` and ``expected`` (answer, refuse or hedge) must be there.
``image`` names a file of the folder, or of ``images`` in it; ``reference`` is the right answer of
a benign sample.  ``id``, ``pair_id``, ``suite``, ``channel``, ``scenario`` and ``caption`` are as
in the normal form.  ``metric``, ``answers`` and ``choices`` say how an answer is scored, and
``meta``, an object, what else there is: see :attr:`hauberk.data.samples.Sample.details`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args

from hauberk.data.samples import Channel, Expected
from hauberk.data.sources.folder import Folder
from hauberk.data.sources.source import Asked, Item, Option, Source
from hauberk.data.tables import TABLES, Row
from hauberk.errors import BadData

_KNOWN = {
    "id", "pair_id", "suite", "channel", "scenario", "caption", "question", "image", "expected",
    "reference", "metric", "answers", "choices", "meta",
}  # fmt: skip


def _read(folder: Folder, asked: Asked) -> Iterator[Item]:
    for row in folder.rows(_table(folder, asked["table"])):
        unknown = sorted(set(row.values) - _KNOWN)
        if unknown:
            raise row.wrong(f"has columns {unknown}, which mean nothing; put them into 'meta'")
        expected = _word(row, "expected", Expected)
        pictured = row.has("image")
        usual = "benign" if expected == "answer" else "text+image" if pictured else "text"
        channel = _word(row, "channel", Channel) if row.has("channel") else usual
        key = row.id("id") if row.has("id") else row.key
        yield Item(
            key=key,
            suite=row.optional("suite") or f"own_{expected}",
            channel=cast(Channel, channel),
            expected=cast(Expected, expected),
            question=row.text("question"),
            where=row.where,
            picture=folder.picture(row, "image", "", "images") if pictured else None,
            scenario=row.optional("scenario"),
            reference=row.optional("reference"),
            pair=row.id("pair_id") if row.has("pair_id") else "",
            caption=row.optional("caption"),
            meta=_meta(row),
        )


def _table(folder: Folder, name: str) -> Path:
    if name:
        return folder.file(name)
    found = sorted(path for path in folder.root.iterdir() if path.suffix.lower() in TABLES)
    if len(found) != 1:
        raise BadData(
            f"{folder.root}: holds {len(found)} tables ({', '.join(map(folder.name, found))}); "
            f"put one into it that ends in {', '.join(TABLES)}, or say which one: table=NAME."
        )
    return found[0]


def _word(row: Row, column: str, kind: Any) -> str:
    word = row.text(column)
    if word not in get_args(kind):
        raise row.wrong(f"{column!r} is {word!r}; it must be one of {', '.join(get_args(kind))}")
    return word


def _meta(row: Row) -> dict[str, Any]:
    meta = dict(row.row("meta").values) if row.has("meta") else {}
    if row.has("metric"):
        meta["metric"] = row.text("metric")
    return meta | {name: row.texts(name) for name in ("answers", "choices") if row.has(name)}


OWN = Source(
    title="a set of one's own",
    licence="as its owner says",
    splits=("all",),
    rows=lambda _: None,
    files=("*",),
    read=_read,
    options={"table": Option("", str, "name of the table, where the folder holds several")},
)
