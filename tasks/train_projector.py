"""Stage train_projector: train suites and a model -> a TGA bundle.

in   artifacts/data/train/*, artifacts/data/calibration/*, artifacts/MODEL/tga/layers, the model
out  artifacts/MODEL/tga/bundle/   projector.safetensors, training.json (losses by step, what
     validation said, how near pictures lie to their captions before and after), sweep.json (every
     share of the change that was tried, the rule; not where the model's own weights were the
     best), card.json

No answer that is trained on is a refusal: answers are the model's own to harmless requests, and
requests whose pictures are told in words are held against what the model itself says
to these words.  A run that was killed goes on after its last validation.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.judging import answers_it, guard_files, judge_at, outcomes
from tasks.params import TGA, AlignmentParams, Params
from tasks.stage import (
    SCRATCH,
    bundle_folder,
    code_hash,
    layers_folder,
    load_model,
    main,
    read_json,
    spread,
    suite_file,
)

_SHOWN = 100
"""Pictures over which the cosines by layer are averaged."""
RULE = (
    "Of the weights that were validated, each with the whole of its change, those with the largest "
    "difference between the benign suites' mean accuracy and the attack suites' mean unsafe rate, "
    "the earliest among equals; 0 are the model's own.  Measured on the calibration split only."
)


def run(params: Params, model_name: str) -> Path:
    """Train the weights, keep the best of those that were validated, write the bundle."""
    from tqdm import tqdm

    from hauberk.bundle import binding_of
    from hauberk.files import file_hash

    student = student_of(params, model_name)
    scratch = SCRATCH / f"train_projector@{model_name}"
    with tqdm(total=params.budget.projector.steps, desc=f"{model_name}: steps of a projector") as b:
        trained = train_on(
            params, student, params.tga.alignment, scratch / "state.safetensors", b.update
        )
    projector, merit = trained.projector, trained.validated[trained.step]
    files = {}
    if trained.step:  # else they are the model's own, of which no share is more than another
        projector, swept = mixed_on(params, student, trained.projector)
        merit = swept.tried[swept.chosen][1].merit
        files["sweep.json"] = swept.document()
    files["training.json"] = {
        **told_of(trained),
        "share": projector.about.get("share"),
        "deployed_merit": merit,
        "cosines": cosines(student, projector),
        "alignment": asdict(params.tga.alignment),
        "training": asdict(params.tga.training),
    }
    folder = projector.save(
        bundle_folder(model_name, TGA),
        binding_of(student.model, student.processor),
        data=[{"id": name, "sha256": file_hash(file)} for name, file in student.files.items()],
        measurements={"calibration_merit": merit},
        extra_files={
            name: json.dumps(told, indent=1, sort_keys=True, allow_nan=False) + "\n"
            for name, told in files.items()
        },
    )
    shutil.rmtree(scratch, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class Student:
    """A model, and what it is trained and validated on."""

    name: str
    model: Any
    processor: Any
    answered: list[Any]
    """Lessons with an answer; those of a suite that is named twice stand there twice."""
    aligned: list[Any]
    """Lessons with a caption, likewise."""
    samples: list[Any]
    """Those of both, in this order."""
    validated: list[Any]
    """Samples of the calibration split."""
    files: dict[str, Path]
    located: tuple[int, ...]
    """Blocks where refusals were located."""

    def layers(self, told: AlignmentParams) -> tuple[int, ...]:
        """The blocks that are aligned."""
        from hauberk.anatomy import anatomy_of
        from hauberk.defenses.alignment import authors_layers

        blocks = len(anatomy_of(self.model).blocks)
        named = {
            "last": (blocks - 1,),
            "located": self.located,
            "authors": authors_layers(blocks),
        }
        return named[told.layers] if isinstance(told.layers, str) else tuple(told.layers)


def student_of(params: Params, model_name: str, *, asked: bool = True) -> Student:
    """Load a model with all that it is trained and validated on.

    It is ``asked`` for its answers to what it is to keep, unless nothing is to be trained.
    """
    from hauberk.data.samples import read_suite

    told, budget = params.tga, params.budget.projector
    model, processor = load_model(params, model_name)
    files = {
        f"{split}/{suite}": suite_file(model_name, split, suite)
        for split, suites in (
            ("train", (*told.aligned, *told.answered)),
            ("calibration", told.validate_on),
        )
        for suite in suites
    }
    read = {name: read_suite(file) for name, file in files.items()}
    harmless = [
        sample
        for suite in dict.fromkeys(told.answered)
        for sample in spread(read[f"train/{suite}"], budget.samples)
    ]
    counted = Counter(told.answered)
    answered = [
        pair
        for pair in (_answered(params, model, processor, harmless) if asked else [])
        for _ in range(counted[pair[0].suite])
    ]
    shown = [
        sample
        for suite, count in Counter(told.aligned).items()
        for sample in spread(read[f"train/{suite}"], budget.samples)
        for _ in range(count)
    ]
    return Student(
        model_name,
        model,
        processor,
        [lesson for _, lesson in answered],
        [_told(sample) for sample in shown],
        [sample for sample, _ in answered] + shown,
        [
            sample
            for suite in told.validate_on
            for sample in spread(read[f"calibration/{suite}"], budget.validated)
        ],
        files,
        tuple(read_json(layers_folder(model_name) / "layers.json")["located"]["layers"]),
    )


def train_on(
    params: Params,
    student: Student,
    alignment: AlignmentParams,
    checkpoint: Path,
    progress: Callable[[int], Any],
    found: Sequence[str] | None = None,
) -> Any:
    """Train the weights of one setting; ``found`` are retrieved texts, one a lesson."""
    from hauberk.defenses.alignment import AlignmentSetting
    from hauberk.defenses.projector import Part, Retrieved
    from hauberk.defenses.projector_step import ProjectorLoss
    from hauberk.defenses.projector_training import ProjectorTraining, train_projector
    from hauberk.errors import BadParams, UnsupportedRequest

    told, steps = params.tga.training, params.budget.projector.steps
    fields = asdict(alignment)
    place = fields.pop("retrieved")
    setting = AlignmentSetting(**{**fields, "layers": student.layers(alignment)})
    retrieved = None if place is None else Retrieved(place)
    try:
        loss = ProjectorLoss(student.model, student.processor, setting, retrieved)
    except UnsupportedRequest as error:
        raise BadParams(
            f"tga.models: {student.name}: {error} Or take the model out of the list."
        ) from None
    lessons = with_texts([*student.answered, *student.aligned], found)
    prepared = loss.prepare(lessons, params.evaluate.max_new_tokens)
    training = ProjectorTraining(
        steps=steps,
        batch=told.batch,
        aligned=told.aligned,
        rate=told.rate,
        decoder_rate=told.decoder_rate,
        validate_every=max(1, steps // told.validations),
        seed=params.seed,
    )

    measured = measuring(params, student)

    return train_projector(
        loss,
        prepared,
        Part(told.mode, last=told.last, rank=told.rank, alpha=2.0 * told.rank),
        training,
        lambda projector: float(measured(projector).merit),
        checkpoint=checkpoint,
        also=_depends_on(params, student),
        progress=progress,
    )


def mixed_on(
    params: Params, student: Student, projector: Any, undefended: Any = None
) -> tuple[Any, Any]:
    """Choose how much of a trained change is made; return it, and the sweep that chose it.

    ``undefended`` is what the model does with its own weights, where that was measured already.
    """
    from tqdm import tqdm

    from hauberk.evaluation.selection import MixedSetting, sweep

    def mixed(setting: Any) -> Any:
        return projector.mixed(student.model, setting.alpha)

    measured = measuring(params, student)
    settings = [MixedSetting(alpha) for alpha in params.tga.alphas]
    with tqdm(total=len(settings), desc=f"{student.name}: shares of a change") as bar:

        def tried(setting: Any) -> Any:
            rates = measured(mixed(setting))
            bar.update()
            return rates

        own = undefended or measured(None)
        found = sweep(settings, own, tried, params.tga.bounded)
    return mixed(found.tried[found.chosen][0]), found


def measuring(params: Params, student: Student) -> Callable[[Any], Any]:
    """Tell what the model does on the calibration split with some weights; None for its own."""
    from hauberk.evaluation.selection import measure

    judge, told = judge_at(params, "first"), params.evaluate

    def measured(projector: Any) -> Any:
        return measure(
            student.model,
            student.processor,
            student.validated,
            projector,
            judge,
            batch_size=told.batch_size,
            max_new_tokens=told.max_new_tokens,
        )

    return measured


def with_texts(lessons: Sequence[Any], found: Sequence[str] | None) -> list[Any]:
    """Give every lesson the text that was retrieved for its picture."""
    from dataclasses import replace

    if found is None:
        return list(lessons)
    return [replace(lesson, retrieved=text) for lesson, text in zip(lessons, found, strict=True)]


def told_of(trained: Any) -> dict[str, Any]:
    """What a training measured, as plain data."""
    return {
        "rule": RULE,
        "step": trained.step,
        "validated": [{"step": step, "merit": merit} for step, merit in trained.validated.items()],
        "history": trained.history,
    }


def cosines(student: Student, projector: Any) -> list[dict[str, float]]:
    """How near pictures lie to their captions, by block, without the weights and with them.

    Over the image's positions against the caption's, as the paper measures it, and at the last
    position of the prompt against that of its text twin; the words are read by the model's own
    weights in both.
    """
    from contextlib import nullcontext

    from hauberk.analysis.gap import cosines as between
    from hauberk.analysis.states import image_states, text_states
    from hauberk.analysis.twins import last_states
    from hauberk.requests import Request

    model, processor = student.model, student.processor
    shown = spread(student.aligned, _SHOWN)
    requests = [lesson.request for lesson in shown]
    twins = [Request(f"{one.caption} {one.request.text}") for one in shown]
    words = text_states(model, processor, twins, [lesson.caption for lesson in shown])
    said = last_states(model, processor, twins)
    rows: list[dict[str, float]] = []
    for when, armour in (("before", nullcontext()), ("after", projector.applied(model))):
        with armour:
            pairs = {
                "image": (image_states(model, processor, requests), words),
                "decision": (last_states(model, processor, requests), said),
            }
        for position, (image, text) in pairs.items():
            means = between(image, text).mean(0).tolist()
            for layer, mean in enumerate(means):
                if layer >= len(rows):
                    rows.append({"layer": layer})
                rows[layer][f"{position}_{when}"] = mean
    return rows


def _told(sample: Any) -> Any:
    from hauberk.defenses.projector_step import Lesson

    return Lesson(sample.request, caption=sample.caption)


def _answered(
    params: Params, model: Any, processor: Any, samples: Sequence[Any]
) -> list[tuple[Any, Any]]:
    """Give harmless requests the model's own answers, so that it keeps them; none is a refusal."""
    from hauberk.defenses.projector_step import Lesson
    from hauberk.errors import BadData
    from hauberk.requests import respond

    answers = respond(
        model,
        processor,
        [sample.request for sample in samples],
        max_new_tokens=params.evaluate.max_new_tokens,
        batch_size=params.evaluate.batch_size,
    )
    said = outcomes(judge_at(params, "first"), samples, answers)
    found = [
        (sample, Lesson(sample.request, answer=answer.text))
        for sample, answer, outcome in zip(samples, answers, said, strict=True)
        if answer.text and answers_it(outcome)
    ]
    if not found:
        raise BadData(
            "the model answers none of the requests of tga.answered, so that there is no answer to "
            "keep; name other suites."
        )
    return found


def _depends_on(params: Params, student: Student) -> str:
    """Tell weights, data and settings that a training depends on besides its tensors."""
    from hauberk.bundle import binding_of, versions
    from hauberk.files import file_hash

    data = {name: file_hash(file) for name, file in student.files.items()}
    binding = asdict(binding_of(student.model, student.processor))
    told = params.tga
    read = told.aligned, told.answered, told.validate_on, told.index
    settings = params.evaluate.answers, read, params.judges.first
    return repr((binding, data, settings, versions(), code_hash(), guard_files(params)))


if __name__ == "__main__":
    main("train_projector", run, "model")
