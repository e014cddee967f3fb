"""Stage train_safety_prompt: train suites, a harmfulness vector and a model -> a DAVSP bundle.

in   artifacts/data/train/*, artifacts/data/calibration/*, artifacts/MODEL/davsp/harm, the model
out  artifacts/MODEL/davsp/bundle/   frame.png, training.json (losses by step, what validation
     said, scores of requests before and after), card.json
     artifacts/frames/MODEL/         the same bundle, and the vector, where what tries frames on
     other models, or trains one on several, finds them

What is to be answered is what the model itself says: to a harmless request without a frame, to a
harmful one without its picture, or else as it refuses most others.  A run that was killed goes on
after its last validation.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.judging import answers_it, guard_files, judge_at, outcomes
from tasks.params import DAVSP, FrameParams, Params
from tasks.stage import (
    FRAMES,
    SCRATCH,
    bundle_folder,
    code_hash,
    harm_folder,
    load_model,
    main,
    read_json,
    spread,
    suite_file,
)

_SHOWN = 100
"""Requests of a kind whose scores are shown, before and after."""


def run(params: Params, model_name: str) -> Path:
    """Train the frame, keep the best of those that were validated, write the bundle."""
    from tqdm import tqdm

    from hauberk.bundle import binding_of
    from hauberk.defenses.safety_prompt import SafetyPrompt
    from hauberk.files import file_hash, replacing

    told = params.davsp
    student = student_of(
        params,
        model_name,
        told.frame_of(model_name),
        harm_folder(model_name),
        f"frames.{model_name}",
    )
    scratch = SCRATCH / f"train_safety_prompt@{model_name}"
    steps = params.budget.frame.steps
    with tqdm(total=steps, desc=f"{model_name}: steps of a frame") as bar:
        start, result = train_on(
            params, [student], steps, scratch / "frame.safetensors", bar.update
        )
    prompt = SafetyPrompt(result.frame, student.loss.geometry, told.prefix)
    axis = student.loss.goal.axis
    document = {
        "rule": (
            "Of the frames that were validated, the one with the largest difference between the "
            "benign suites' mean accuracy and the attack suites' mean unsafe rate, the earliest "
            "among equals; 0 is the untrained frame.  Measured on the calibration split only."
        ),
        "step": result.step,
        "validated": [{"step": step, "merit": merit} for step, merit in result.validated.items()],
        "history": result.history,
        "goal": {
            "layer": axis.layer,
            "score": told.harm.score,
            "high": student.loss.goal.high,
            "low": student.loss.goal.low,
        },
        "scores": _scores(student.loss, student.cases, start, result.frame),
    }
    folder = prompt.save(
        bundle_folder(model_name, DAVSP),
        binding_of(student.loss.model, student.loss.processor),
        data=[{"id": name, "sha256": file_hash(file)} for name, file in student.files.items()],
        measurements={"calibration_merit": result.validated[result.step]},
        extra_files={
            "training.json": json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"
        },
    )
    with replacing(FRAMES / model_name) as partial:
        shutil.copytree(folder, partial / "bundle")
        shutil.copytree(harm_folder(model_name), partial / "harm")
    shutil.rmtree(scratch, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class Student:
    """A model that a frame is trained on."""

    loss: Any
    cases: list[Any]
    """Prepared ones."""
    pictures: list[Any]
    """Those that it is trained on."""
    validated: list[Any]
    """Samples of the calibration split."""
    files: dict[str, Path]


def student_of(
    params: Params,
    model_name: str,
    frame: FrameParams,
    harm: Path,
    key: str,
    ground: tuple[int, int, int] | None = None,
) -> Student:
    """Load a model with all that a frame at this place is trained and validated on.

    ``key`` names the place in ``davsp`` of params.yaml; ``ground`` fills up pictures of another
    aspect, None for the colour that the model's processor maps to zero.
    """
    from hauberk.data.samples import read_suite
    from hauberk.defenses.safety_prompt_step import FrameLoss, Goal

    told = params.davsp
    model, processor = load_model(params, model_name)
    files = {
        f"{split}/{suite}": suite_file(model_name, split, suite)
        for split, suites in (
            ("train", (*told.harmful, *told.harmless)),
            ("calibration", told.validate_on),
        )
        for suite in suites
    }
    read = {name: read_suite(file) for name, file in files.items()}
    suites = [*told.harmful, *told.harmless]
    count, budget = params.budget.frame.validated, params.budget.frame.samples
    trained = [
        sample
        for suite in dict.fromkeys(suites)
        for sample in spread(read[f"train/{suite}"], budget)
    ]
    validated = [
        sample
        for suite in told.validate_on
        for sample in spread(read[f"calibration/{suite}"], count)
    ]
    geometry = _geometry(frame, key, model, processor, trained[0].image, ground)
    axis, high, low = _harm(harm)
    goal = Goal(axis, high, low, told.training.answer_weight, told.training.clean_weight)
    loss = FrameLoss(model, processor, geometry, goal, prefix=told.prefix)
    cases = _cases(params, model, processor, trained)
    prepared = loss.prepare([case for _, case in cases], params.evaluate.max_new_tokens)
    counted = Counter(suites)  # one that stands there twice counts twice
    weighted = [
        one for (suite, _), one in zip(cases, prepared, strict=True) for _ in range(counted[suite])
    ]
    return Student(loss, weighted, [sample.image for sample in trained], validated, files)


def train_on(
    params: Params,
    students: Sequence[Student],
    steps: int,
    checkpoint: Path,
    progress: Callable[[int], Any],
) -> tuple[Any, Any]:
    """Train one frame on one model or several; return where it began, and what came of it."""
    from hauberk.defenses.safety_prompt import SafetyPrompt
    from hauberk.defenses.safety_prompt_training import Course, FrameSetting, train_frame
    from hauberk.evaluation.selection import measure

    told = params.davsp.training
    setting = FrameSetting(
        steps=steps,
        batch=params.budget.frame.batch,
        optimizer=told.optimizer,
        rate=params.budget.frame.rate,
        batches=told.batches,
        harmful_answered=told.harmful_answered,
        validate_every=max(1, steps // told.validations),
        seed=params.seed,
    )

    judge = judge_at(params, "first")

    def validate(frame: Any) -> float:
        merits = []
        for student in students:
            prompt = SafetyPrompt(frame, student.loss.geometry, params.davsp.prefix)
            found = measure(
                student.loss.model,
                student.loss.processor,
                student.validated,
                prompt,
                judge,
                batch_size=params.evaluate.batch_size,
                max_new_tokens=params.evaluate.max_new_tokens,
            )
            merits.append(found.merit)
        return round(sum(merits) / len(merits), 9)  # as a merit is: the same counts, the same mean

    start = _start(students[0].loss.geometry, students[0].pictures)
    courses = [Course(student.loss, student.cases) for student in students]
    trained = train_frame(
        courses,
        start,
        setting,
        validate,
        checkpoint=checkpoint,
        also=_depends_on(params, students),
        progress=progress,
    )
    return start, trained


def _depends_on(params: Params, students: Sequence[Student]) -> str:
    """Tell weights, data and settings that a training depends on besides its tensors."""
    from hauberk.bundle import binding_of, versions
    from hauberk.files import file_hash

    bindings = [asdict(binding_of(one.loss.model, one.loss.processor)) for one in students]
    data = [{name: file_hash(file) for name, file in one.files.items()} for one in students]
    settings = params.evaluate.answers, params.davsp, params.judges.first
    return repr((bindings, data, settings, versions(), code_hash(), guard_files(params)))


def _geometry(
    told: FrameParams,
    key: str,
    model: Any,
    processor: Any,
    picture: Any,
    ground: tuple[int, int, int] | None,
) -> Any:
    """Where the frame of a model is: as params.yaml says, or a token wide around what is fed."""
    import torch

    from hauberk.anatomy import anatomy_of
    from hauberk.defenses.safety_prompt import Geometry
    from hauberk.errors import BadParams, UnknownFamily
    from hauberk.pixels import as_fed, pixel_input
    from hauberk.requests import mean_color

    try:
        width, height = as_fed(processor, picture).size
    except UnknownFamily as error:
        raise BadParams(
            f"davsp.models: {key}: {error} Or take the model out of the list."
        ) from None
    if told.canvas is not None:
        height, width = told.canvas
    margins = told.margins or [_token(anatomy_of(model).vision_tower.config, model, processor)] * 4
    try:
        geometry = Geometry(
            height, width, tuple(margins), told.fit, ground or mean_color(processor)
        )
        pixel_input(processor, torch.zeros(1, 3, height, width))
    except ValueError as error:
        raise BadParams(f"davsp.{key}: {error}") from None
    except UnknownFamily as error:
        raise BadParams(
            f"davsp.models: {key}: {error} Or take the model out of the list."
        ) from None
    return geometry


def _token(tower: Any, model: Any, processor: Any) -> int:
    """Pixels along a side of what becomes one token: a patch, or some that are merged."""
    patch = tower.patch_size if isinstance(tower.patch_size, int) else tower.patch_size[0]
    merged = getattr(processor.image_processor, "merge_size", None)
    return int(patch * (merged or round(1 / getattr(model.config, "downsample_ratio", 1))))


def _harm(folder: Path) -> tuple[Any, float, float]:
    """How states of a model are scored, and what harmful and harmless requests are to score."""
    from safetensors.torch import load_file

    from hauberk.analysis.harmfulness import HarmVectors

    found = read_json(folder / "harm.json")
    vectors = HarmVectors(**load_file(folder / "vectors.safetensors"))
    return vectors.axis(found["layer"], found["score"]), found["high"], found["low"]


def _cases(
    params: Params, model: Any, processor: Any, samples: Sequence[Any]
) -> list[tuple[str, Any]]:
    """Give every request what is to be answered to it, with the suite that it is of."""
    from dataclasses import replace

    from hauberk.defenses.safety_prompt_step import Case
    from hauberk.errors import BadData
    from hauberk.requests import respond

    asked = [replace(s, image=None) if s.expected == "refuse" else s for s in samples]
    answers = respond(
        model,
        processor,
        [sample.request for sample in asked],
        max_new_tokens=params.evaluate.max_new_tokens,
        batch_size=params.evaluate.batch_size,
    )
    told = outcomes(judge_at(params, "first"), asked, answers)
    pairs = list(zip(samples, answers, told, strict=True))
    refusals = Counter(answer.text for s, answer, how in pairs if how == "refused")
    if not refusals and params.davsp.refusal is None:
        raise BadData(
            "the model refuses none of the harmful requests of davsp.harmful, not even without "
            "their pictures, so that there is no refusal to train on; say one in davsp.refusal of "
            "params.yaml, or name other suites."
        )
    usual = params.davsp.refusal or refusals.most_common(1)[0][0]
    cases = []
    for sample, answer, how in pairs:
        harmful = sample.expected == "refuse"
        if harmful or (answers_it(how) and answer.text):
            said = answer.text if not harmful or how == "refused" else usual
            cases.append((sample.suite, Case(sample.request, harmful, said)))
    if all(case.harmful for _, case in cases):
        raise BadData(
            "the model answers none of the harmless requests of davsp.harmless, so that there is "
            "no answer to keep; name other suites."
        )
    return cases


def _start(geometry: Any, pictures: Sequence[Any]) -> Any:
    """Start with the mean colour of the pictures' own edges, which a model is used to see there."""
    import numpy as np
    import torch

    edges = []
    for picture in pictures:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
        rows, columns = (pixels[[0, -1]], pixels[:, [0, -1]])
        edges.append(np.concatenate([rows.reshape(-1, 3), columns.reshape(-1, 3)]).mean(0))
    color = torch.tensor(np.mean(edges, axis=0)).round().to(torch.uint8)
    return color.view(3, 1, 1).expand(3, geometry.height, geometry.width).clone()


def _scores(loss: Any, prepared: Sequence[Any], before: Any, after: Any) -> dict[str, Any]:
    """Score requests of both kinds with the untrained frame and with the trained one."""
    from hauberk.pixels import frozen

    found: dict[str, Any] = {}
    for kind in (True, False):
        rows = spread([row for row in prepared if row.harmful is kind], _SHOWN)
        for when, frame in (("before", before), ("after", after)):
            scores: list[float] = []
            for start in range(0, len(rows), 32):
                part = rows[start : start + 32]
                with frozen(loss.model):
                    scores += loss.scores(frame, part).tolist()
            found.setdefault("harmful" if kind else "harmless", {})[when] = scores
    return found


if __name__ == "__main__":
    main("train_safety_prompt", run, "model")
