"""Stage ablate_projector: trainings beside TGA's that explain it, on some suites of a model.

in   artifacts/MODEL/tga/layers, artifacts/CLIP/text_index, the CLIP, artifacts/data/*,
     artifacts/MODEL/adversarial, the model
out  artifacts/MODEL/tga/parts/   responses.jsonl, metrics.json, trainings.json (what each of them
     measured), card.json

The rows are the variants of ``tga`` in params.yaml that the profile names, each trained as TGA is
in all that the variant does not say, and deployed at the share of its change that the rule chose;
where the model's own weights were the best, the last ones show what the training did all the same.
One that is trained with a retrieved text in its prompts is asked without one and, under
NAME_retrieved, with one: the paper does not say which is meant.  The share is that of the former.
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks.params import TGA, Params
from tasks.parts import measure_parts
from tasks.stage import (
    SCRATCH,
    index_folder,
    load_clip,
    main,
    parts_folder,
    read_json,
    tested_files,
    write_json,
    writing,
)
from tasks.train_projector import measuring, mixed_on, student_of, told_of, train_on


def run(params: Params, model_name: str) -> Path:
    """Train every variant; answer and judge the first test samples of each suite under it."""
    from tqdm import tqdm

    from hauberk.bundle import binding_of, versions
    from hauberk.data.samples import read_suite
    from hauberk.defenses.projector import Retrieved

    named = params.budget.projector.variants if params.explains(model_name) else []
    student = student_of(params, model_name, asked=bool(named))
    retriever = _retriever(params) if named else None
    scratch = SCRATCH / f"ablate_projector@{model_name}"
    parts: dict[str, Any] = {}
    trainings: dict[str, Any] = {}
    own = None
    total = params.budget.projector.steps * len(named)
    with tqdm(total=total, desc=f"{model_name}: steps of projectors") as bar:
        for name in named:
            told = params.tga.variants[name]
            found = None if told.retrieved is None else _found(retriever, student)
            trained = train_on(
                params, student, told, scratch / f"{name}.safetensors", bar.update, found
            )
            trainings[name] = {**told_of(trained), "alignment": asdict(told)}
            projector = trained.last
            if trained.step:
                own = own or measuring(params, student)(None)
                projector, swept = mixed_on(params, student, trained.projector, own)
                told_share = {"share": projector.about["share"], "sweep": swept.document()}
                trainings[name] |= told_share
            parts[name] = projector
            if told.retrieved is not None:
                place = Retrieved(told.retrieved)
                parts[f"{name}_retrieved"] = projector.with_retrieved(place, retriever)
    files = tested_files(model_name, params.tga.parts_on)
    samples = [sample for file in files for sample in read_suite(file)[: params.budget.parts]]
    loaded = student.model, student.processor
    measured = measure_parts(params, model_name, loaded, samples, parts)
    card = {
        "model": model_name,
        "binding": asdict(binding_of(*loaded)),
        "index": read_json(index_folder(params.tga.index.clip) / "card.json")["card_sha256"],
        "generation": params.evaluate.told,
        "versions": versions(),
        **measured.card,
    }
    folder = parts_folder(model_name, TGA)
    with writing(folder, card) as partial:
        measured.write(partial)
        write_json(trainings, partial / "trainings.json")
    shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _retriever(params: Params) -> Any:
    from hauberk.retrieval import Retriever, TextIndex

    clip, processor = load_clip(params, params.tga.index.clip)
    index = TextIndex.load(index_folder(params.tga.index.clip), clip, processor)
    return Retriever(index, clip, processor)


def _found(retriever: Any, student: Any) -> list[str]:
    """Retrieve one text for the picture of every lesson, never its own caption; "" without one."""
    from hauberk.retrieval import Query

    pictured = [one for one in student.samples if one.image is not None]
    queries = [Query(one.image, one.caption, one.sample_id) for one in pictured]
    found = iter(retriever.find(queries))
    return [next(found).text if one.image is not None else "" for one in student.samples]


if __name__ == "__main__":
    main("ablate_projector", run, "model")
