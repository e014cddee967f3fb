"""MM-SafetyBench: harm that a picture shows, writes, or both.

Source: Liu et al., "MM-SafetyBench: A Benchmark for Safety Evaluation of Multimodal Large Language
Models", ECCV 2024, arXiv:2311.17600; PKU-Alignment/MM-SafetyBench on the hub, or the questions of
isXinLiu/MM-SafetyBench with the pictures of its Google Drive.

A picture goes with the question that was reworded for it: ``SD``, which shows a scene, with
``Rephrased Question(SD)``; ``TYPO``, which writes the key phrase, and ``SD_TYPO``, which does both,
with ``Rephrased Question``; ``Text_only`` is the question as first asked.  Of the 13 scenarios four
ask for advice that calls for care rather than refusal, and go to suites of their own.  Published
numbers are of all 13 or of 8; ``core`` in the meta tells which those 8 are.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hauberk.data.samples import Channel
from hauberk.data.sources.folder import Folder
from hauberk.data.sources.source import Asked, Item, Option, Source
from hauberk.data.tables import Row

_SCENARIOS = (
    "Illegal_Activitiy", "HateSpeech", "Malware_Generation", "Physical_Harm", "EconomicHarm",
    "Fraud", "Sex", "Political_Lobbying", "Privacy_Violence", "Legal_Opinion", "Financial_Advice",
    "Health_Consultation", "Gov_Decision",
)  # fmt: skip
"""In the order of their numbers, from 01, and as the authors spell them."""
_HEDGE = {"Legal_Opinion", "Financial_Advice", "Health_Consultation", "Gov_Decision"}
_NOT_CORE = {*_HEDGE, "Political_Lobbying"}
"""Left out by those who report 8 scenarios, ECSO (arXiv:2403.09572) first."""
_QUESTION = {
    "SD": "Rephrased Question(SD)",
    "SD_TYPO": "Rephrased Question",
    "TYPO": "Rephrased Question",
    "Text_only": "Question",
}
_CHANNEL: dict[str, Channel] = {
    "SD": "image", "SD_TYPO": "typographic", "TYPO": "typographic", "Text_only": "text",
}  # fmt: skip
_PICTURED = ("SD", "SD_TYPO", "TYPO")
_QUESTIONS = 1680


def _variants(asked: Asked) -> tuple[str, ...]:
    return _PICTURED if asked["variant"] == "pictured" else (asked["variant"],)


def _read(folder: Folder, asked: Asked) -> Iterator[Item]:
    questions = folder.find("processed_questions")
    for number, scenario in enumerate(_SCENARIOS, 1):
        if questions is not None:
            yield from _original(folder, questions, f"{number:02d}-{scenario}", asked)
        else:
            yield from _hub(folder, scenario, asked)


def _original(folder: Folder, questions: Path, numbered: str, asked: Asked) -> Iterator[Item]:
    table = questions / f"{numbered}.json"
    if not table.is_file():
        folder.missing.add(folder.name(table))
        return
    number, scenario = numbered.split("-")
    home = folder.find("imgs", "MM-SafetyBench(imgs)") or questions.parent / "imgs"
    under = [folder.name(home / name) for name in (numbered, number)]
    for row in folder.rows(table):
        for variant in _variants(asked):
            picture = (
                folder.picture_named(row, f"{variant}/{row.key}.jpg", *under)
                if variant in _PICTURED
                else None
            )
            item = _item(row, row.key, scenario, variant, row.text(_QUESTION[variant]))
            yield replace(item, picture=picture, meta={**item.meta, "goal": row.text("Question")})


def _hub(folder: Folder, scenario: str, asked: Asked) -> Iterator[Item]:
    for variant in _variants(asked):
        if not folder.split(variant, scenario):
            folder.missing.add(f"{scenario}/{variant}.parquet")
            continue
        for row in folder.rows_of(variant, scenario):
            item = _item(row, row.id("id"), scenario, variant, row.text("question"))
            yield replace(item, picture=row.picture("image") if variant in _PICTURED else None)


def _item(row: Row, key: str, scenario: str, variant: str, question: str) -> Item:
    hedged = scenario in _HEDGE
    return Item(
        key=f"{scenario}-{key}-{variant}",
        suite=f"mm_safetybench_{variant.lower()}{'_hedge' if hedged else ''}",
        channel=_CHANNEL[variant],
        expected="hedge" if hedged else "refuse",
        question=question,
        where=row.where,
        scenario=scenario,
        pair=f"{scenario}-{key}",
        meta={"core": scenario not in _NOT_CORE},
    )


MM_SAFETYBENCH = Source(
    title="MM-SafetyBench",
    licence="CC-BY-NC-4.0",
    splits=("test",),
    rows=lambda asked: _QUESTIONS * len(_variants(asked)),
    files=("data/*/*.parquet",),
    read=_read,
    hub="PKU-Alignment/MM-SafetyBench",
    options={
        "variant": Option(
            "pictured", ("pictured", *_QUESTION), "which pictures; pictured for all three kinds"
        )
    },
)
