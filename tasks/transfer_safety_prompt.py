"""Stage transfer_safety_prompt: the frame of every model, tried on every other one.

in   artifacts/frames/*, artifacts/data/*, the models
out  artifacts/transfer/   responses.jsonl, metrics.json, card.json; for every frame of several
     models NAME/frame.png and NAME/training.json

A frame is only pixels, so it can be put before a model that it was not made for, as it would be
before one behind an API; how far that helps is for the numbers to say.  The rows are named
davsp@MODEL after the model that the frame was trained on.  A processor that does not feed a canvas
as it is resamples or crops it, as it would any picture.

Where the profile has steps for it, for every model one more frame is trained on all others at once,
and tried on all of them; its row is named after those that it was trained on, joined by +.
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks.params import TRANSFERRED, Params
from tasks.parts import Parts, measure_parts
from tasks.stage import (
    FRAMES,
    SCRATCH,
    TRANSFER,
    load_model,
    main,
    read_json,
    suite_file,
    write_json,
    writing,
)
from tasks.train_safety_prompt import student_of, train_on


def run(params: Params) -> Path:
    """Answer and judge the first test samples of each suite under the frames of other models."""
    from hauberk.bundle import binding_of, read_card, versions
    from hauberk.data.lab import ATTACKED
    from hauberk.data.samples import read_suite
    from hauberk.defenses.safety_prompt import SafetyPrompt

    cards = {name: read_card(FRAMES / name / "bundle") for name in params.models}
    frames = {name: SafetyPrompt.read(*found) for name, found in cards.items()}
    joint = _joint(params) if params.budget.frame.joint_steps else {}
    frames |= {name: prompt for name, (prompt, _) in joint.items()}
    tried: dict[str, Parts] = {}
    bindings = {}
    drawn = [suite for suite in params.davsp.parts_on if suite not in ATTACKED]
    for target in params.models:
        model, processor = load_model(params, target)
        files = [suite_file(target, "test", suite) for suite in drawn]
        samples = [sample for file in files for sample in read_suite(file)[: params.budget.parts]]
        others = {f"{TRANSFERRED}{name}": frames[name] for name in frames if name != target}
        tried[target] = measure_parts(params, target, (model, processor), samples, others)
        bindings[target] = asdict(binding_of(model, processor))
    together = Parts(
        records=[record for found in tried.values() for record in found.records],
        rows=[row for found in tried.values() for row in found.rows],
    )
    card = {
        "bindings": bindings,
        "frames": {
            name: read_json(FRAMES / name / "bundle" / "card.json")["card_sha256"] for name in cards
        },
        "generation": asdict(params.evaluate),
        "versions": versions(),
        "tried": {target: found.card for target, found in tried.items()},
    }
    with writing(TRANSFER, card) as partial:
        together.write(partial)
        for name, (prompt, trained) in joint.items():
            (partial / name).mkdir()
            prompt.picture().save(partial / name / "frame.png")
            write_json(trained, partial / name / "training.json")
    return TRANSFER


def _joint(params: Params) -> dict[str, Any]:
    """Train a frame on all models but one, for each of them: name -> frame, and its training."""
    from tqdm import tqdm

    from hauberk.defenses.safety_prompt import SafetyPrompt

    if len(params.models) < 3:  # on all but one of two is no joint training
        return {}
    found: dict[str, Any] = {}
    told, steps = params.davsp, params.budget.frame.joint_steps
    students: dict[str, Any] = {}
    ground = None
    for name in params.models:
        student = student_of(params, name, told.joint, FRAMES / name / "harm", "joint", ground)
        students[name] = student
        ground = student.loss.geometry.ground  # a frame has one, whatever processors there are
    for left_out in params.models:
        names = [name for name in params.models if name != left_out]
        together = "+".join(names)
        scratch = SCRATCH / "transfer_safety_prompt" / together
        with tqdm(total=steps, desc=f"{together}: steps of a frame") as bar:
            _, trained = train_on(
                params,
                [students[name] for name in names],
                steps,
                scratch / "frame.safetensors",
                bar.update,
            )
        geometry = students[names[0]].loss.geometry
        merits = [{"step": step, "merit": merit} for step, merit in trained.validated.items()]
        history = {"step": trained.step, "validated": merits, "history": trained.history}
        found[together] = SafetyPrompt(trained.frame, geometry, told.prefix), history
    shutil.rmtree(SCRATCH / "transfer_safety_prompt", ignore_errors=True)
    return found


if __name__ == "__main__":
    main("transfer_safety_prompt", run)
