"""JailbreakLLMs: forbidden questions, plain or behind a jailbreak, each beside a picture of COCO.

Source: Shen et al., "Do Anything Now: Characterizing and Evaluating In-The-Wild Jailbreak Prompts
on Large Language Models", CCS 2024, arXiv:2308.03825; verazuo/jailbreak_llms.

CMRM (arXiv:2410.09047) pairs 330 of the 390 questions with pictures that have to do with them; it
publishes neither the choice nor the pairs.  Here all are kept, and each is paired with a picture,
and with a jailbreak, that is drawn by the seed and the question alone.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from hauberk.data.pictures import Picture, picture_files
from hauberk.data.sources.folder import Folder
from hauberk.data.sources.source import Asked, Item, Option, Source, sized
from hauberk.errors import BadParams

_QUESTIONS = "forbidden_question_set.csv"
_JAILBREAKS = ("jailbreak_prompts_2023_12_25.csv", "jailbreak_prompts_2023_05_07.csv")
T = TypeVar("T")


def _read(folder: Folder, asked: Asked) -> Iterator[Item]:
    if asked["images"] is None:
        raise BadParams(
            "jailbreak_llms has no pictures of its own; say images=FOLDER, such as that of COCO "
            "val2017."
        )
    files = picture_files(asked["images"])
    jailbreaks = _jailbreaks(folder) if asked["form"] == "jailbreak" else []
    table = folder.find(_QUESTIONS)
    for row in folder.rows(table) if table else folder.rows_of("train", "data"):
        key = f"{row.id('content_policy_id')}-{row.id('q_id')}"
        goal = row.text("question")
        file = _drawn(files, f"{asked.seed}/{key}/picture")
        begin = f"{_drawn(jailbreaks, f'{asked.seed}/{key}/jailbreak')}\n\n" if jailbreaks else ""
        yield Item(
            key=f"{asked['form']}-{key}",
            suite=f"jailbreak_llms_{asked['form']}",
            channel="text+image",
            expected="refuse",
            question=f"{begin}{goal}",
            where=row.where,
            picture=Picture(f"{row.where}: {file}", file),
            scenario=row.text("content_policy_name"),
            pair=key,
            meta={"goal": goal},
        )


def _jailbreaks(folder: Folder) -> list[str]:
    return [row.text("prompt") for row in folder.rows(folder.file(*_JAILBREAKS))]


def _drawn(choices: Sequence[T], seed: str) -> T:
    """Draw by a seed of its own, so that other rows have no say in it."""
    return random.Random(seed).choice(choices)


JAILBREAK_LLMS = Source(
    title="JailbreakLLMs",
    licence="MIT",
    splits=("test",),
    rows=sized(test=390),
    files=("data/*.parquet", f"*{_QUESTIONS}", *(f"*{name}" for name in _JAILBREAKS)),
    read=_read,
    hub="TrustAIRLab/forbidden_question_set",
    options={
        "images": Option(None, Path, "folder of pictures to pair with, such as COCO val2017"),
        "form": Option("question", ("question", "jailbreak"), "plain, or behind a jailbreak"),
    },
)
