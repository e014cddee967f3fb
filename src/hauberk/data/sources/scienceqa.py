"""ScienceQA: questions of school science with lettered choices, half of them on a picture.

Source: Lu et al., "Learn to Explain: Multimodal Reasoning via Thought Chains for Science Question
Answering", NeurIPS 2022, arXiv:2209.09513; lmms-lab/ScienceQA on the hub (FULL, or IMG with those
that have a picture), or the authors' ``problems.json`` and ``pid_splits.json``.
"""

import string
from collections.abc import Iterator, Sequence

from hauberk.data.pictures import Picture
from hauberk.data.sources.folder import Folder
from hauberk.data.sources.prompts import LETTER
from hauberk.data.sources.source import Asked, Item, Option, Source, only
from hauberk.data.tables import Row, read_object

_ROWS = {
    "all": {"test": 4_241, "validation": 4_241, "train": 12_726},
    "pictured": {"test": 2_017, "validation": 2_097, "train": 6_218},
}
_THEIRS = {"test": "test", "validation": "val", "train": "train"}
"""What ``pid_splits.json`` calls the splits."""


def _read(folder: Folder, asked: Asked) -> Iterator[Item]:
    problems = folder.find("problems.json")
    found = _original(folder, asked) if problems else _hub(folder, asked)
    for key, row, picture in found:
        if picture is None and asked["rows"] == "pictured":
            continue
        choices = row.texts("choices")
        right = row.integer("answer")
        if not 0 <= right < len(choices) <= len(string.ascii_uppercase):
            raise row.wrong(f"'answer' is {right}, which is none of its {len(choices)} choices")
        yield Item(
            key=key,
            suite="scienceqa",
            channel="benign",
            expected="answer",
            question=_lettered(row.text("question"), row.optional("hint"), choices),
            where=row.where,
            picture=picture,
            scenario=row.optional("subject") or "science",
            reference=string.ascii_uppercase[right],
            meta={"metric": "choice", "choices": choices},
        )


def _hub(folder: Folder, asked: Asked) -> Iterator[tuple[str, Row, Picture | None]]:
    part = "ScienceQA-IMG" if asked["rows"] == "pictured" else "ScienceQA-FULL"
    within = [part] if folder.split(asked.split, part) else []
    # Numbers count the rows of another table in each case.
    for number, row in enumerate(folder.rows_of(asked.split, *within)):
        picture = row.picture("image") if row.has("image") else None
        yield f"{asked['rows']}-{number}", row, picture


def _original(folder: Folder, asked: Asked) -> Iterator[tuple[str, Row, Picture | None]]:
    theirs = _THEIRS[asked.split]
    table = folder.file("pid_splits.json")
    folder.tables.add(table)
    name = folder.name(table)
    keys = set(Row(read_object(table, name), name, theirs).texts(theirs))
    for row in folder.rows(folder.file("problems.json")):
        if row.key not in keys:
            continue
        named = row.optional("image")
        under = [f"{home}{theirs}" for home in ("", "images/", "data/scienceqa/images/")]
        picture = folder.picture_named(row, f"{row.key}/{named}", *under) if named else None
        yield row.key, row, picture


def _lettered(question: str, hint: str, choices: Sequence[str]) -> str:
    context = [f"Context: {hint}"] if hint else []
    options = [
        f"{letter}. {choice}"
        for letter, choice in zip(string.ascii_uppercase, choices, strict=False)
    ]
    return "\n".join([*context, question, *options]) + LETTER


SCIENCEQA = Source(
    title="ScienceQA",
    licence="CC-BY-NC-SA-4.0",
    splits=("test", "validation", "train"),
    rows=lambda asked: _ROWS[asked["rows"]][asked.split],
    files=("*/{split}-*.parquet",),
    read=_read,
    hub="lmms-lab/ScienceQA",
    options={"rows": Option("all", ("all", "pictured"), "all, or those with a picture")},
    rows_verified=only(),
)
