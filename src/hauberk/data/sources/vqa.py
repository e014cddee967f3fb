"""VQAv2 and TextVQA: questions on pictures that ten people answered.

Sources: Goyal et al., "Making the V in VQA Matter", CVPR 2017, arXiv:1612.00837; Singh et al.,
"Towards VQA Models That Can Read", CVPR 2019, arXiv:1904.08920; both as lmms-lab keeps them on the
hub.  Answers are scored by agreement with the ten, which are in the meta; the reference is what
most of them say.  The tests have no public answers, so that everybody reports the validation split.

TextVQA can be asked with the words that an OCR engine read in the picture, as LLaVA-1.5 is, or
without; numbers of the two are not comparable.
"""

from collections.abc import Iterator

from hauberk.data.sources.folder import Folder
from hauberk.data.sources.prompts import PROMPT, answers_of, ended, key_of, most_common
from hauberk.data.sources.source import Asked, Item, Option, Source, only, sized


def _vqav2(folder: Folder, asked: Asked) -> Iterator[Item]:
    for row in folder.rows_of(asked.split):
        answers = answers_of(row)
        yield Item(
            key=key_of(row.id("question_id"), asked["prompt"]),
            suite="vqav2",
            channel="benign",
            expected="answer",
            question=ended(row.text("question"), asked["prompt"]),
            where=row.where,
            picture=row.picture("image"),
            scenario=row.optional("answer_type") or "vqa",
            reference=row.optional("multiple_choice_answer") or most_common(answers),
            pair=row.id("image_id"),
            meta={"metric": "vqa", "answers": answers},
        )


def _textvqa(folder: Folder, asked: Asked) -> Iterator[Item]:
    for row in folder.rows_of(asked.split):
        answers, tokens = answers_of(row), row.texts("ocr_tokens")
        question = row.text("question").capitalize()  # as LLaVA-1.5 and lmms-eval ask
        read = f"\nReference OCR token: {', '.join(tokens)}" if asked["ocr"] and tokens else ""
        yield Item(
            key=f"{'ocr-' if asked['ocr'] else ''}{key_of(row.id('question_id'), asked['prompt'])}",
            suite="textvqa_ocr" if asked["ocr"] else "textvqa",
            channel="benign",
            expected="answer",
            question=ended(f"{question}{read}", asked["prompt"]),
            where=row.where,
            picture=row.picture("image"),
            scenario="reading",
            reference=most_common(answers),
            pair=row.id("image_id"),
            meta={"metric": "textvqa", "answers": answers, "ocr_tokens": tokens},
        )


VQAV2 = Source(
    title="VQAv2",
    licence="CC-BY-4.0; pictures of COCO, by the terms of Flickr",
    splits=("validation",),
    rows=sized(validation=214_354),
    files=("data/{split}-*.parquet",),
    read=_vqav2,
    hub="lmms-lab/VQAv2",
    options=PROMPT,
    rows_verified=only(),
)
TEXTVQA = Source(
    title="TextVQA",
    licence="CC-BY-4.0",
    splits=("validation", "train"),
    rows=sized(validation=5_000, train=34_602),
    files=("data/{split}-*.parquet",),
    read=_textvqa,
    hub="lmms-lab/textvqa",
    options={**PROMPT, "ocr": Option(False, bool, "whether the question lists what OCR read")},
    rows_verified=only("validation"),
)
