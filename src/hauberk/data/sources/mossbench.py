"""MOSSBench: harmless requests about pictures that make a careful model refuse.

Source: Li et al., "MOSSBench: Is Your Multimodal Language Model Oversensitive to Safe Queries?",
arXiv:2406.17806; folder ``data`` of xirui-li/MOSSBench, or AIcell/MOSSBench on the hub.  Its
authors forbid training on it.

``over`` is the type of stimulus: 1 exaggerated risk, 2 negated harm, 3 counterintuitive
interpretation.
"""

from collections.abc import Iterator

from hauberk.data.sources.folder import Folder
from hauberk.data.sources.source import Asked, Item, Source, sized

_TABLES = (
    "data/images_information/information.json",
    "data/information.json",
    "information.json",
)
"""A clone also holds ``data_contrast``, whose requests are other ones: ``data`` goes first."""


def _read(folder: Folder, asked: Asked) -> Iterator[Item]:
    table = folder.find(*_TABLES)
    above = table.parents if table else [folder.root]
    homes = [folder.name(home) for home in above if home.is_relative_to(folder.root)]
    for row in folder.rows(table) if table else folder.rows_of("train"):
        told = row.row("metadata") if row.has("metadata") else row
        yield Item(
            key=row.id("pid"),
            suite="mossbench",
            channel="lookalike",
            expected="answer",
            question=row.text("question"),
            where=row.where,
            picture=folder.picture(
                row, "decoded_image" if row.has("decoded_image") else "image", *homes
            ),
            scenario=told.id("over"),
            caption=row.optional("short description"),
            meta={"metric": "refusal"},
        )


MOSSBENCH = Source(
    title="MOSSBench",
    licence="CC-BY-SA-4.0",
    splits=("test",),
    rows=sized(test=300),
    files=("*information.json", "images/*", "*.parquet"),
    read=_read,
    hub="AIcell/MOSSBench",
)
