"""MME and POPE: questions on pictures whose answer is yes or no.

Sources: Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language
Models", arXiv:2306.13394; Li et al., "Evaluating Object Hallucination in Large Vision-Language
Models" (POPE), EMNLP 2023, arXiv:2305.10355.  On the hub as lmms-lab keeps them; POPE also as its
authors publish it, three files beside a folder of COCO val2014.

MME asks two questions on every picture, one of which is to be denied.  They share a
``question_id``, which is the ``group`` in the meta: a picture counts in acc+ if both are right.
POPE asks for objects that are not there: at random, by how common they are, or by how often they
stand beside those that are (``random``, ``popular``, ``adversarial``).
"""

from collections.abc import Iterator
from pathlib import Path

from hauberk.data.sources.folder import Folder
from hauberk.data.sources.prompts import PROMPT, ended, key_of, yes_or_no
from hauberk.data.sources.source import Asked, Item, Option, Source, only, sized
from hauberk.data.tables import Row

_PAIR = 2
"""Questions on a picture of MME."""
_CATEGORIES = ("random", "popular", "adversarial")


def _mme(folder: Folder, asked: Asked) -> Iterator[Item]:
    answers: dict[str, list[str]] = {}
    for row in folder.rows_of(asked.split):
        group, answer = row.id("question_id"), yes_or_no(row, "answer")
        before = answers.setdefault(group, [])
        if len(before) == _PAIR or answer in before:
            raise row.wrong(
                f"'question_id' {group!r} has {[*before, answer]}; a picture has two questions, "
                "one to affirm and one to deny"
            )
        before.append(answer)
        yield Item(
            key=key_of(f"{group}-{answer}", asked["prompt"]),
            suite="mme",
            channel="benign",
            expected="answer",
            question=ended(row.text("question"), asked["prompt"]),
            where=row.where,
            picture=row.picture("image"),
            scenario=row.text("category"),
            reference=answer.capitalize(),
            pair=group,
            meta={"metric": "mme", "group": group},
        )
    halves = sorted(group for group, told in answers.items() if len(told) < _PAIR)
    folder.missing |= {f"the other question on {group}" for group in halves}


def _pope(folder: Folder, asked: Asked) -> Iterator[Item]:
    files = {name: folder.find(f"coco_pope_{name}.json") for name in _CATEGORIES}
    if not any(files.values()):
        for row in folder.rows_of(asked.split):
            yield _asked_for(row, row.text("category"), "question", "answer", asked, folder)
        return
    pictures = Folder(asked["images"]) if asked["images"] else folder
    for category, table in files.items():
        if table is None:
            folder.missing.add(f"coco_pope_{category}.json")
            continue
        for row in folder.rows(table):
            yield _asked_for(row, category, "text", "label", asked, pictures)


def _asked_for(
    row: Row, category: str, question: str, answer: str, asked: Asked, pictures: Folder
) -> Item:
    """Make the item of a question after an object, whatever its columns are called."""
    if category not in _CATEGORIES:
        raise row.wrong(f"the category is {category!r}; it must be one of {_CATEGORIES}")
    key = f"{category}-{row.id('question_id')}"
    shown = "image_source" if row.has("image_source") else "image"
    named = isinstance(row.values.get(shown), str)
    return Item(
        key=key_of(key, asked["prompt"]),
        suite="pope",
        channel="benign",
        expected="answer",
        question=ended(row.text(question), asked["prompt"]),
        where=row.where,
        picture=pictures.picture(row, "image", "", "val2014"),
        scenario=category,
        reference=yes_or_no(row, answer).capitalize(),
        pair=row.text(shown).removesuffix(".jpg") if named else key,
        meta={"metric": "pope"},
    )


MME = Source(
    title="MME",
    licence="academic use only, by the terms of its authors",
    splits=("test",),
    rows=sized(test=2_374),
    files=("data/{split}-*.parquet",),
    read=_mme,
    hub="lmms-lab/MME",
    options=PROMPT,
)
POPE = Source(
    title="POPE",
    licence="MIT; pictures of COCO, by the terms of Flickr",
    splits=("test",),
    rows=sized(test=9_000),
    files=("data/{split}-*.parquet",),
    read=_pope,
    hub="lmms-lab/POPE",
    options={
        **PROMPT,
        "images": Option(None, Path, "folder of COCO val2014, for the authors' own files"),
    },
    rows_verified=only(),
)
