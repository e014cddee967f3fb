"""Every data set in small: the files that its authors or the hub hand out, with made-up content."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(seed: int, form: str = "PNG", size: tuple[int, int] = (12, 9)) -> bytes:
    """The file of a small picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), form)
    return buffer.getvalue()


def embedded(seed: int, form: str = "PNG") -> dict[str, Any]:
    """A picture as `datasets` embeds it."""
    return {"bytes": picture(seed, form), "path": f"{seed}.{form.lower()}"}


@dataclass(frozen=True)
class Layout:
    """What lies in a folder: one table that the tests break, and what lies beside it."""

    name: str
    """Of the source."""
    table: str
    rows: Sequence[Mapping[str, Any]]
    suites: Mapping[str, int]
    """How many samples of which suite are in it."""
    needed: Sequence[str]
    """Columns without which a row cannot be read."""
    beside: Mapping[str, bytes] = field(default_factory=dict)
    """Other files: pictures, and tables that the tests leave alone."""
    options: Mapping[str, Any] = field(default_factory=dict)
    split: str | None = None
    image: str = ""
    """The column of a picture: embedded, or the name of a file."""
    id: str = ""
    """The column by which rows are told apart; "" if by their number."""
    pictures: str = ""
    """A folder of other pictures, for the option ``images``."""
    draws: bool = False
    """Whether it draws from the pictures that are there, so that none can be missing."""

    def __str__(self) -> str:
        return f"{self.name}, {self.table}"

    def write(self, folder: Path, rows: Sequence[Mapping[str, Any]] | None = None) -> Path:
        """Write it all; ``rows`` in place of its own."""
        for name, content in self.beside.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        path = folder / self.table
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[path.suffix](path, self.rows if rows is None else rows)
        return folder

    def asked(self, folder: Path) -> dict[str, Any]:
        """What to say to `load`."""
        images = {"images": folder / self.pictures} if self.pictures else {}
        return {**self.options, **images, "split": self.split, "allow_partial": True}


def _json(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with a ``_key`` make an object of objects; POPE's files hold JSON lines."""
    if path.stem.startswith("coco_pope"):
        _jsonl(path, rows)
        return
    keyed = {
        row["_key"]: {k: v for k, v in row.items() if k != "_key"} for row in rows if "_key" in row
    }
    path.write_text(json.dumps(keyed or list(rows), indent=1), encoding="utf-8")


def _jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["id"])
        writer.writeheader()
        writer.writerows(rows)


def _parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


WRITERS: dict[str, Callable[[Path, Sequence[Mapping[str, Any]]], None]] = {
    ".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet,
}  # fmt: skip


def lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


COCO = {f"coco/{index:012d}.jpg": picture(100 + index, "JPEG") for index in range(3)}
_CLASSES = {"class1": "Representation", "class2": "Some", "class3": "More"}
_ANSWERS = ["two", "two", "2", "two", "three", "two", "2", "two", "two", "two"]
_XSTEST_TYPES = (
    "homonyms",
    "contrast_homonyms",
    "privacy_public",
    "privacy_fictional",
    "contrast_privacy",
)

LAYOUTS = [
    Layout(
        "vlsafe",
        "VLSafe/harmlessness_examine.jsonl",
        [
            {
                "image_id": f"{i % 3:012d}.jpg",
                "caption": f"thing {i}",
                "query": f"harmful request {i}",
            }
            for i in range(4)
        ],
        {"vlsafe": 4},
        needed=["image_id", "query"],
        beside=COCO,
        pictures="coco",
        image="image_id",
    ),
    Layout(
        "vlsafe",
        "VLSafe/harmlessnss_alignment.jsonl",
        [
            {
                "image_id": f"{i:012d}.jpg",
                "query": f"harmful request {i}",
                "interaction": [{"user": "u"}, {"model": "m"}],
            }
            for i in range(2)
        ],
        {"vlsafe": 2},
        needed=["image_id", "query"],
        beside={name.replace("coco/", "train2017/"): content for name, content in COCO.items()},
        split="train",
        image="image_id",
    ),
    Layout(
        "jailbreak_llms",
        "data/forbidden_question/forbidden_question_set.csv",
        [
            {
                "content_policy_id": str(p),
                "content_policy_name": f"policy {p}",
                "q_id": str(q),
                "question": f"harmful request {p}-{q}",
            }
            for p in range(2)
            for q in range(2)
        ],
        {"jailbreak_llms_jailbreak": 4},
        needed=["content_policy_id", "q_id", "question", "content_policy_name"],
        beside={
            **COCO,
            "data/prompts/jailbreak_prompts_2023_12_25.csv": (
                b'platform,source,prompt,jailbreak\nweb,x,"first, preface",True\n'
                b"web,x,second preface,True\n"
            ),
        },
        options={"form": "jailbreak"},
        draws=True,
        pictures="coco",
        id="q_id",
    ),
    *(
        Layout(
            "mm_safetybench",
            f"processed_questions/{number:02d}-{scenario}.json",
            [
                {
                    "_key": str(i),
                    "Question": f"harmful request {i}",
                    "Changed Question": f"changed {i}",
                    "Key Phrase": f"phrase {i}",
                    "Rephrased Question": f"of the phrase {i}",
                    "Rephrased Question(SD)": f"of the scene {i}",
                }
                for i in range(2)
            ],
            {f"mm_safetybench_{kind}{hedge}": 2 for kind in ("sd", "sd_typo", "typo")},
            needed=["Rephrased Question", "Rephrased Question(SD)", "Question"],
            beside={
                f"imgs/{place}/{kind}/{i}.jpg": picture(i, "JPEG")
                for kind in ("SD", "SD_TYPO", "TYPO")
                for i in range(2)
            },
        )
        for number, scenario, place, hedge in (
            (1, "Illegal_Activitiy", "01-Illegal_Activitiy", ""),
            (12, "Health_Consultation", "12", "_hedge"),
        )
    ),
    Layout(
        "mm_safetybench",
        "data/Legal_Opinion/SD_TYPO-00000-of-00001.parquet",
        [
            {"id": str(i), "question": f"of the phrase {i}", "image": embedded(i, "JPEG")}
            for i in range(3)
        ],
        {"mm_safetybench_sd_typo_hedge": 3},
        needed=["id", "question", "image"],
        options={"variant": "SD_TYPO"},
        image="image",
        id="id",
    ),
    Layout(
        "figstep",
        "data/question/safebench.csv",
        [
            {
                "dataset": "ForbidQI",
                "category_id": "1",
                "task_id": str(i),
                "category_name": "Illegal Activities",
                "question": f"harmful request {i}",
                "instruction": f"Steps to thing {i}.",
            }
            for i in (1, 2)
        ],
        {"figstep": 2},
        needed=["dataset", "category_id", "task_id", "category_name", "question", "instruction"],
        beside={f"data/images/SafeBench/query_ForbidQI_1_{i}_6.png": picture(i) for i in (1, 2)},
        id="task_id",
    ),
    Layout(
        "spa_vl",
        "test/harm-00000-of-00001.parquet",
        [{"image": embedded(i), "question": f"harmful request {i}", **_CLASSES} for i in range(3)],
        {"spa_vl_harm": 3},
        needed=["image", "question"],
        image="image",
    ),
    Layout(
        "spa_vl",
        "validation/validation-00000-of-00001.parquet",
        [
            {
                "image": embedded(i),
                "question": f"harmful request {i}",
                "chosen": "no",
                "rejected": "yes",
                "image_name": f"{i // 2}.jpg",
                **_CLASSES,
            }
            for i in range(3)
        ],
        {"spa_vl_validation": 3},
        needed=["image", "question"],
        split="validation",
        image="image",
    ),
    Layout(
        "spa_vl",
        "test/help-00000-of-00001.parquet",
        [{"image": embedded(i), "question": f"question {i}", **_CLASSES} for i in range(2)],
        {"spa_vl_help": 2},
        needed=["image", "question"],
        options={"kind": "help"},
        image="image",
    ),
    Layout(
        "jailbreakv",
        "JailBreakV_28K/mini_JailBreakV_28K.csv",
        [
            {
                "id": str(i),
                "jailbreak_query": f"wrapped harmful request {i}",
                "redteam_query": f"harmful request {i}",
                "format": "Template",
                "policy": "Fraud",
                "image_path": path,
                "from": "RedTeam_2K",
                "selected_mini": "True",
                "transfer_from_llm": "True",
            }
            for i, path in enumerate(
                (
                    "llm_transfer_attack/SD_1.png",
                    "query_related/SD_2.png",
                    "query_related/typo_3.png",
                    "figstep/figstep_4.png",
                )
            )
        ],
        {
            "jailbreakv_llm_transfer_attack": 1,
            "jailbreakv_query_related": 1,
            "jailbreakv_query_related_typo": 1,
            "jailbreakv_figstep": 1,
        },
        needed=["id", "jailbreak_query", "redteam_query", "format", "policy", "image_path"],
        beside={
            f"JailBreakV_28K/{path}": picture(i)
            for i, path in enumerate(
                (
                    "llm_transfer_attack/SD_1.png",
                    "query_related/SD_2.png",
                    "query_related/typo_3.png",
                    "figstep/figstep_4.png",
                )
            )
        },
        split="mini_JailBreakV_28K",
        image="image_path",
        id="id",
    ),
    Layout(
        "vlguard",
        "test.json",
        [
            {
                "id": "a1",
                "image": "bad/1.jpg",
                "safe": False,
                "harmful_category": "privacy",
                "harmful_subcategory": "data",
                "instr-resp": [{"instruction": "harmful request 1", "response": "no"}],
            },
            {
                "id": "b2",
                "image": "good/2.jpg",
                "safe": True,
                "instr-resp": [
                    {"safe_instruction": "question 2", "response": "an answer"},
                    {"unsafe_instruction": "harmful request 2", "response": "no"},
                ],
            },
        ],
        {"vlguard_unsafes": 1, "vlguard_safe_unsafes": 1, "vlguard_safe_safes": 1},
        needed=["id", "image", "safe", "instr-resp"],
        beside={"test/bad/1.jpg": picture(1, "JPEG"), "test/good/2.jpg": picture(2, "JPEG")},
        image="image",
        id="id",
    ),
    Layout(
        "xstest",
        "xstest_v2_prompts.csv",
        [
            {
                "id": str(10 * t + i),
                "type": kind,
                "prompt": f"{kind} request {i}",
                "focus": "f",
                "note": "",
            }
            for t, kind in enumerate(_XSTEST_TYPES)
            for i in range(2)
        ],
        {"xstest_safe_unrelated": 6, "xstest_unsafe_unrelated": 4},
        needed=["id", "type", "prompt"],
        beside=COCO,
        options={"image": "unrelated"},
        draws=True,
        pictures="coco",
        id="id",
    ),
    Layout(
        "xstest",
        "data/prompts-00000-of-00001.parquet",
        [
            {"id": i, "type": kind, "prompt": f"request {i}", "note": "n", "label": label}
            for i, (kind, label) in enumerate(
                [("homonyms", "safe"), ("contrast_homonyms", "unsafe")]
            )
        ],
        {"xstest_safe_none": 1, "xstest_unsafe_none": 1},
        needed=["id", "type", "prompt"],
        id="id",
    ),
    Layout(
        "mossbench",
        "data/images_information/information.json",
        [
            {
                "_key": str(i),
                "image": f"images/{i}.webp",
                "short description": f"thing {i}",
                "question": f"question {i}",
                "pid": str(i),
                "metadata": {
                    "over": f"type {i}",
                    "human": 0,
                    "child": 0,
                    "syn": 1,
                    "ocr": 0,
                    "harm": 7,
                },
            }
            for i in (1, 2, 3)
        ],
        {"mossbench": 3},
        needed=["pid", "question", "image"],
        beside={f"data/images/{i}.webp": picture(i, "WEBP") for i in (1, 2, 3)},
        image="image",
        id="pid",
    ),
    Layout(
        "mossbench",
        "oversensitivity/train-00000-of-00001.parquet",
        [
            {"pid": str(i), "question": f"question {i}", "over": "1", "image": embedded(i)}
            for i in (1, 2)
        ],
        {"mossbench": 2},
        needed=["pid", "question", "image", "over"],
        image="image",
        id="pid",
    ),
    Layout(
        "vqav2",
        "data/validation-00000-of-00001.parquet",
        [
            {
                "question_type": "how many",
                "multiple_choice_answer": "two",
                "answers": [
                    {"answer": a, "answer_confidence": "yes", "answer_id": n}
                    for n, a in enumerate(_ANSWERS)
                ],
                "image_id": 7 + i // 2,
                "answer_type": "number",
                "question_id": 700 + i,
                "question": f"how many {i}?",
                "image": embedded(7 + i // 2, "JPEG"),
            }
            for i in range(3)
        ],
        {"vqav2": 3},
        needed=["answers", "image_id", "question_id", "question", "image"],
        image="image",
        id="question_id",
    ),
    Layout(
        "textvqa",
        "data/validation-00000-of-00001.parquet",
        [
            {
                "image_id": f"0{i}",
                "question_id": i,
                "question": f"what is written on {i}?",
                "image": embedded(i, "JPEG"),
                "ocr_tokens": ["STOP", "now"],
                "answers": _ANSWERS,
            }
            for i in range(2)
        ],
        {"textvqa_ocr": 2},
        needed=["image_id", "question_id", "question", "image", "ocr_tokens", "answers"],
        options={"ocr": True},
        image="image",
        id="question_id",
    ),
    Layout(
        "mme",
        "data/test-00000-of-00001.parquet",
        [
            {
                "question_id": f"count/{i}.jpg",
                "image": embedded(i, "JPEG"),
                "question": f"is it {answer}? Please answer yes or no.",
                "answer": answer,
                "category": "count",
            }
            for i in range(2)
            for answer in ("Yes", "No")
        ],
        {"mme": 4},
        needed=["question_id", "image", "question", "answer", "category"],
        image="image",
        id="question_id",
    ),
    Layout(
        "mm_vet",
        "data/test-00000-of-00001.parquet",
        [
            {
                "question_id": f"v1_{i}",
                "image": embedded(i),
                "question": f"question {i}",
                "answer": "x=1<AND>y=2",
                "image_source": "web",
                "capability": "ocr,math",
            }
            for i in range(2)
        ],
        {"mm_vet": 2},
        needed=["question_id", "image", "question", "answer", "capability"],
        image="image",
        id="question_id",
    ),
    Layout(
        "mm_vet",
        "mm-vet/mm-vet.json",
        [
            {
                "_key": f"v1_{i}",
                "imagename": f"v1_{i}.png",
                "question": f"question {i}",
                "answer": "an answer",
                "capability": ["rec", "know"],
                "imagesource": "web",
            }
            for i in range(2)
        ],
        {"mm_vet": 2},
        needed=["imagename", "question", "answer", "capability"],
        beside={f"mm-vet/images/v1_{i}.png": picture(i) for i in range(2)},
        image="imagename",
    ),
    Layout(
        "llava_bench_wild",
        "data/train-00000-of-00001.parquet",
        [
            {
                "image_id": f"00{i}.jpg",
                "question_id": i,
                "question": f"question {i}",
                "caption": "a thing",
                "gpt_answer": "an answer",
                "category": "conv",
                "image": embedded(i),
            }
            for i in range(2)
        ],
        {"llava_bench_wild": 2},
        needed=["question_id", "question", "gpt_answer", "category", "image"],
        image="image",
        id="question_id",
    ),
    Layout(
        "llava_bench_wild",
        "questions.jsonl",
        [
            {"question_id": i, "image": f"00{i}.jpg", "text": f"question {i}", "category": "detail"}
            for i in range(2)
        ],
        {"llava_bench_wild": 2},
        needed=["question_id", "image", "text", "category"],
        beside={
            **{f"images/00{i}.jpg": picture(i, "JPEG") for i in range(2)},
            "answers_gpt4.jsonl": lines(
                [{"question_id": i, "text": f"answer {i}"} for i in range(2)]
            ),
            "context.jsonl": lines(
                [{"id": i, "image": f"00{i}.jpg", "caption": f"thing {i}"} for i in range(2)]
            ),
        },
        image="image",
        id="question_id",
    ),
    Layout(
        "llava_bench_coco",
        "coco2014_val_qa_eval/qa90_questions.jsonl",
        [
            {
                "question_id": i,
                "image": f"{i:012d}.jpg",
                "text": f"question {i}",
                "category": "complex",
            }
            for i in range(2)
        ],
        {"llava_bench_coco": 2},
        needed=["question_id", "image", "text", "category"],
        beside={
            "coco2014_val_qa_eval/qa90_gpt4_answer.jsonl": lines(
                [{"question_id": i, "text": f"answer {i}", "metadata": {}} for i in range(2)]
            ),
            "val2014/000000000000.jpg": picture(0, "JPEG"),
            "val2014/COCO_val2014_000000000001.jpg": picture(1, "JPEG"),
        },
        pictures="val2014",
        image="image",
        id="question_id",
    ),
    Layout(
        "llava_bench_coco",
        "data/train-00000-of-00001.parquet",
        [
            {
                "question_id": i,
                "question": f"question {i}",
                "image": embedded(i),
                "caption": ["a thing", "something"],
                "answer": "an answer",
                "category": "conv",
            }
            for i in range(2)
        ],
        {"llava_bench_coco": 2},
        needed=["question_id", "question", "answer", "category", "image"],
        image="image",
        id="question_id",
    ),
    Layout(
        "scienceqa",
        "ScienceQA-FULL/test-00000-of-00001.parquet",
        [
            {
                "image": embedded(i) if i else None,
                "question": f"question {i}",
                "choices": ["red", "blue", "green"],
                "answer": i,
                "hint": "a hint" if i else "",
                "subject": "natural science",
            }
            for i in range(3)
        ],
        {"scienceqa": 3},
        needed=["question", "choices", "answer"],
        image="image",
    ),
    Layout(
        "scienceqa",
        "data/scienceqa/problems.json",
        [
            {
                "_key": str(i),
                "question": f"question {i}",
                "choices": ["red", "blue"],
                "answer": i % 2,
                "hint": "",
                "image": "image.png" if i else None,
                "subject": "social science",
                "split": "test",
            }
            for i in range(3)
        ],
        {"scienceqa": 2},
        needed=["question", "choices", "answer"],
        beside={
            "data/scienceqa/pid_splits.json": lines(
                [{"train": ["9"], "val": [], "test": ["0", "1", "2"]}]
            ),
            **{f"data/scienceqa/images/test/{i}/image.png": picture(i) for i in (1, 2)},
        },
        options={"rows": "pictured"},
        image="image",
    ),
    Layout(
        "pope",
        "data/test-00000-of-00001.parquet",
        [
            {
                "id": str(i),
                "question_id": str(i % 2),
                "question": f"Is there a thing {i}?",
                "answer": "yes" if i % 2 else "no",
                "image_source": f"COCO_val2014_{i % 2:012d}",
                "image": embedded(i % 2, "JPEG"),
                "category": category,
            }
            for i, category in enumerate(("random", "random", "popular", "adversarial"))
        ],
        {"pope": 4},
        needed=["question_id", "question", "answer", "image", "category"],
        image="image",
        id="question_id",
    ),
    Layout(
        "pope",
        "output/coco/coco_pope_popular.json",
        [
            {
                "question_id": i,
                "image": f"COCO_val2014_{i}.jpg",
                "text": "Is there a?",
                "label": "yes",
            }
            for i in range(2)
        ],
        {"pope": 2},
        needed=["question_id", "text", "label", "image"],
        beside={f"val2014/COCO_val2014_{i}.jpg": picture(i, "JPEG") for i in range(2)},
        pictures="val2014",
        image="image",
        id="question_id",
    ),
    Layout(
        "own",
        "mine.jsonl",
        [
            {
                "id": "a",
                "question": "harmful request 1",
                "expected": "refuse",
                "image": "1.png",
                "pair_id": "p",
            },
            {
                "id": "b",
                "question": "question 2",
                "expected": "answer",
                "reference": "right",
                "pair_id": "p",
            },
            {"id": "c", "question": "question 3", "expected": "hedge", "scenario": "advice"},
            {
                "id": "d",
                "question": "question 4",
                "expected": "answer",
                "metric": "vqa",
                "answers": ["two", "2"],
                "image": "sub/2.png",
                "meta": {"note": 1},
            },
        ],
        {"own_refuse": 1, "own_answer": 2, "own_hedge": 1},
        needed=["question", "expected"],
        beside={"images/1.png": picture(1), "images/sub/2.png": picture(2)},
        image="image",
        id="id",
    ),
    Layout(
        "own",
        "mine.csv",
        [
            {
                "id": str(i),
                "question": f"question, with comma {i}",
                "expected": "answer",
                "reference": "right",
                "image": f"{i}.png",
                "meta": '{"metric": "exact"}',
            }
            for i in range(2)
        ],
        {"own_answer": 2},
        needed=["question", "expected"],
        beside={f"{i}.png": picture(i) for i in range(2)},
        image="image",
        id="id",
    ),
]
"""Those of MM-SafetyBench hold one scenario each; the others are missing."""
