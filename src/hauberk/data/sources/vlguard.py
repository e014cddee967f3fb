"""VLGuard: pictures that are unsafe, and safe ones with a harmful and a harmless instruction each.

Source: Zong et al., "Safety Fine-Tuning at (Almost) No Cost: A Baseline for Vision Large Language
Models", ICML 2024, arXiv:2402.02207; ys-zong/VLGuard on the hub, behind terms.

``instr-resp`` of an unsafe picture is one instruction with its refusal (suite ``unsafes``).  Of a
safe one it is two objects with different keys: ``safe_instruction`` (``safe_safes``) and
``unsafe_instruction`` (``safe_unsafes``), which are twins.
"""

from collections.abc import Iterator

from hauberk.data.samples import Channel, Expected
from hauberk.data.sources.folder import Folder
from hauberk.data.sources.source import Asked, Item, Source, sized
from hauberk.data.tables import Row

_SUITES: dict[str, tuple[str, Channel, Expected]] = {
    "instruction": ("unsafes", "image", "refuse"),
    "unsafe_instruction": ("safe_unsafes", "text+image", "refuse"),
    "safe_instruction": ("safe_safes", "benign", "answer"),
}


def _read(folder: Folder, asked: Asked) -> Iterator[Item]:
    table = folder.file(f"{asked.split}.json")
    home = folder.name(table.parent)
    under = [f"{home}/{asked.split}", f"{home}/VLGuard/{asked.split}", home]
    for row in folder.rows(table):
        picture = folder.picture(row, "image", *under)
        keys = ("safe_instruction", "unsafe_instruction") if row.flag("safe") else ("instruction",)
        for key in keys:
            suite, channel, expected = _SUITES[key]
            told = _told(row, key)
            answers = expected == "answer"
            response = told.text("response")
            yield Item(
                key=f"{row.id('id')}-{suite}",
                suite=f"vlguard_{suite}",
                channel=channel,
                expected=expected,
                question=told.text(key),
                where=row.where,
                picture=picture,
                scenario="/".join(
                    filter(None, map(row.optional, ("harmful_category", "harmful_subcategory")))
                ),
                reference=response if answers else "",
                pair=row.id("id"),
                meta={"metric": "relative"} if answers else {"chosen": response},
            )


def _told(row: Row, key: str) -> Row:
    pairs = row.rows("instr-resp")
    found = next((pair for pair in pairs if pair.has(key)), None)
    if found is None:
        raise row.wrong(
            f"'instr-resp' has no {key!r}, only {[sorted(pair.values) for pair in pairs]}, though "
            f"'safe' is {row.values['safe']}"
        )
    return found


VLGUARD = Source(
    title="VLGuard",
    licence="research only, by the terms of its page",
    splits=("test", "train"),
    # Unsafe pictures once, safe ones twice.
    rows=sized(test=442 + 2 * 558, train=1023 + 2 * 977),
    files=("{split}.json", "{split}.zip"),
    read=_read,
    hub="ys-zong/VLGuard",
    gated=True,
)
