"""JailbreakV-28K: jailbreaks of language models beside pictures, and pictures that are jailbreaks.

Source: Luo et al., "JailBreakV-28K: A Benchmark for Assessing the Robustness of MultiModal Large
Language Models against Jailbreak Attacks", COLM 2024, arXiv:2404.03027; on the hub
JailbreakV-28K/JailBreakV-28k (MIT).

The hub holds some hundred pictures of each folder; the others are handed out by a form.  So a set
without them is refused unless ``allow_partial`` is said.  Its pictures of writing are made like
those of FigStep and MM-SafetyBench, and may be the same.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath

from hauberk.data.samples import Channel
from hauberk.data.sources.folder import Folder
from hauberk.data.sources.source import Asked, Item, Source, sized
from hauberk.data.tables import Row

_FOLDERS = ("llm_transfer_attack", "query_related", "figstep")


def _read(folder: Folder, asked: Asked) -> Iterator[Item]:
    table = folder.file(f"{asked.split}.csv")
    home = folder.name(table.parent)
    for row in folder.rows(table):
        picture = folder.picture(row, "image_path", home, "", "JailBreakV_28K")
        kind, channel = _kind(row)
        yield Item(
            key=row.id("id"),
            suite=f"jailbreakv_{kind}",
            channel=channel,
            expected="refuse",
            question=row.text("jailbreak_query"),
            where=row.where,
            picture=picture,
            scenario=row.text("policy"),
            meta={
                "goal": row.text("redteam_query"),
                "format": row.text("format"),
                "from": row.optional("from"),
            },
        )


def _kind(row: Row) -> tuple[str, Channel]:
    """Tell the attack by the folder of its picture, and what the picture does by its name."""
    path = PurePosixPath(row.text("image_path").replace("\\", "/"))
    kind = next((name for name in _FOLDERS if name in path.parts), None)
    if kind is None:
        raise row.wrong(f"'image_path' is {str(path)!r}, in none of the folders {_FOLDERS}")
    if kind == "llm_transfer_attack":
        return kind, "text+image"
    if kind == "figstep":
        return kind, "typographic"
    if path.name.lower().startswith(("typo", "sd_typo")):
        return f"{kind}_typo", "typographic"
    return kind, "image"


JAILBREAKV = Source(
    title="JailbreakV-28K",
    licence="MIT",
    splits=("JailBreakV_28K", "mini_JailBreakV_28K"),
    rows=sized(JailBreakV_28K=28_000, mini_JailBreakV_28K=280),
    files=("JailBreakV_28K/{split}.csv", *(f"JailBreakV_28K/{name}/*" for name in _FOLDERS)),
    read=_read,
    hub="JailbreakV-28K/JailBreakV-28k",
)
