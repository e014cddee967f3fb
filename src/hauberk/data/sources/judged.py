"""MM-Vet and LLaVA-Bench: open questions whose answers a judge compares with a reference.

Sources: Yu et al., "MM-Vet: Evaluating Large Multimodal Models for Integrated Capabilities", ICML
2024, arXiv:2308.02490; Liu et al., "Visual Instruction Tuning", NeurIPS 2023, arXiv:2304.08485
(LLaVA-Bench, on pictures in the wild and on COCO).  On the hub as lmms-lab keeps them, or as their
authors publish them.  The two LLaVA-Benches are different sets: CMRM reports COCO, DAVSP the wild.
"""

from collections.abc import Iterator
from pathlib import Path

from hauberk.data.pictures import Picture
from hauberk.data.sources.folder import Folder
from hauberk.data.sources.source import Asked, Item, Option, Source, only, sized
from hauberk.data.tables import Row

_COCO = "COCO_val2014_"
"""With what the files of val2014 begin; the questions on them leave it out."""


def _mm_vet(folder: Folder, asked: Asked) -> Iterator[Item]:
    table = folder.find("mm-vet.json")
    for row in folder.rows(table) if table else folder.rows_of(asked.split):
        column, key = ("imagename", row.key) if table else ("image", row.id("question_id"))
        capability = row.values.get("capability")
        skills = [capability] if isinstance(capability, str) else row.texts("capability")
        yield _item(
            row,
            key=key,
            suite="mm_vet",
            question=row.text("question"),
            picture=folder.picture(row, column, *_beside(folder, table)),
            scenario=",".join(skills),
            reference=row.text("answer"),
            metric="judged",
        )


def _wild(folder: Folder, asked: Asked) -> Iterator[Item]:
    questions = folder.find("questions.jsonl")
    if questions is None:
        yield from _hub_bench(folder, asked, "llava_bench_wild", "gpt_answer")
        return
    answers = _texts(folder, "answers_gpt4.jsonl", "question_id", "text")
    captions = _texts(folder, "context.jsonl", "image", "caption")
    for row in folder.rows(questions):
        picture = folder.picture(row, "image", *_beside(folder, questions))
        yield _question(row, "llava_bench_wild", picture, answers, captions)


def _coco(folder: Folder, asked: Asked) -> Iterator[Item]:
    questions = folder.find("qa90_questions.jsonl")
    if questions is None:
        yield from _hub_bench(folder, asked, "llava_bench_coco", "answer")
        return
    answers = _texts(folder, "qa90_gpt4_answer.jsonl", "question_id", "text")
    pictures = Folder(asked["images"]) if asked["images"] else folder
    for row in folder.rows(questions):
        under = ("", "val2014")
        bare = pictures.picture(row, "image", *under)
        named = pictures.picture_named(row, f"{_COCO}{row.text('image')}", *under)
        yield _question(row, "llava_bench_coco", bare if bare.is_there else named, answers, {})


def _hub_bench(folder: Folder, asked: Asked, suite: str, answer: str) -> Iterator[Item]:
    for row in folder.rows_of(asked.split):
        caption = row.values.get("caption")
        yield _item(
            row,
            key=row.id("question_id"),
            suite=suite,
            question=row.text("question"),
            picture=row.picture("image"),
            scenario=row.text("category"),
            reference=row.text(answer),
            caption="\n".join(row.texts("caption"))
            if isinstance(caption, list)
            else row.optional("caption"),
        )


def _question(
    row: Row, suite: str, picture: Picture, answers: dict[str, str], captions: dict[str, str]
) -> Item:
    key = row.id("question_id")
    if key not in answers:
        raise row.wrong(f"'question_id' {key!r} has no reference answer in the file of answers")
    return _item(
        row,
        key=key,
        suite=suite,
        question=row.text("text"),
        picture=picture,
        scenario=row.text("category"),
        reference=answers[key],
        caption=captions.get(row.text("image"), ""),
    )


def _item(
    row: Row,
    *,
    key: str,
    suite: str,
    question: str,
    picture: Picture,
    scenario: str,
    reference: str,
    caption: str = "",
    metric: str = "relative",
) -> Item:
    return Item(
        key=key,
        suite=suite,
        channel="benign",
        expected="answer",
        question=question,
        where=row.where,
        picture=picture,
        scenario=scenario,
        reference=reference,
        caption=caption,
        meta={"metric": metric},
    )


def _texts(folder: Folder, name: str, key: str, text: str) -> dict[str, str]:
    """Read a file that lies beside the questions, by what it shares with them."""
    return {row.id(key): row.text(text) for row in folder.rows(folder.file(name))}


def _beside(folder: Folder, table: Path | None) -> tuple[str, ...]:
    """Name the folders that pictures lie in beside a table of the authors' own."""
    if table is None:
        return ()
    home = folder.name(table.parent)
    return (f"{home}/images", home)


MM_VET = Source(
    title="MM-Vet",
    licence="Apache-2.0",
    splits=("test",),
    rows=sized(test=218),
    files=("data/{split}-*.parquet",),
    read=_mm_vet,
    hub="lmms-lab/MMVet",
    rows_verified=only(),
)
LLAVA_BENCH_WILD = Source(
    title="LLaVA-Bench (in the wild)",
    licence="CC-BY-NC-4.0",
    splits=("train",),
    rows=sized(train=60),
    files=("data/{split}-*.parquet",),
    read=_wild,
    hub="lmms-lab/llava-bench-in-the-wild",
    rows_verified=only(),
)
LLAVA_BENCH_COCO = Source(
    title="LLaVA-Bench (COCO)",
    licence="CC-BY-NC-4.0; pictures of COCO, by the terms of Flickr",
    splits=("train",),
    rows=sized(train=90),
    files=("data/{split}-*.parquet",),
    read=_coco,
    hub="lmms-lab/llava-bench-coco",
    options={"images": Option(None, Path, "folder of COCO val2014, for the authors' own files")},
)
