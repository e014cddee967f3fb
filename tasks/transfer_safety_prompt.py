"""Stage transfer_safety_prompt: the frames of all other models, tried on one.

in   artifacts/frames/*, artifacts/data/*, the models
out  artifacts/MODEL/davsp/transfer/   responses.jsonl, metrics.json, card.json; where one frame was
     trained on several models, NAME/frame.png and NAME/training.json

A frame is only pixels, so it can be put before a model that it was not made for, as it would be
before one behind an API; how far that helps is for the numbers to say.  The rows are named
davsp@MODEL after the model that the frame was trained on.  A processor that does not feed a canvas
as it is resamples or crops it, as it would any picture.

Where the profile has steps for it, one more frame is trained on all other models at once, at least
two of them; its row is named after those, joined by +.
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks.params import TRANSFERRED, Params
from tasks.parts import measure_parts
from tasks.stage import (
    FRAMES,
    SCRATCH,
    load_model,
    main,
    read_json,
    suite_file,
    transfer_folder,
    write_json,
    writing,
)
from tasks.train_safety_prompt import student_of, train_on


def run(params: Params, model_name: str) -> Path:
    """Answer and judge the first test samples of each suite under the frames of other models."""
    from hauberk.bundle import binding_of, read_card, versions
    from hauberk.data.lab import ATTACKED
    from hauberk.data.samples import read_suite
    from hauberk.defenses.safety_prompt import SafetyPrompt

    others = [name for name in params.davsp.models if name != model_name]
    cards = {name: read_card(FRAMES / name / "bundle") for name in others}
    frames = {name: SafetyPrompt.read(*found) for name, found in cards.items()}
    joint = _joint(params, model_name, others)
    frames |= {name: prompt for name, (prompt, _) in joint.items()}
    drawn = [suite for suite in params.davsp.parts_on if suite not in ATTACKED]
    model, processor = load_model(params, model_name)
    files = [suite_file(model_name, "test", suite) for suite in drawn]
    samples = [sample for file in files for sample in read_suite(file)[: params.budget.parts]]
    tried = {f"{TRANSFERRED}{name}": prompt for name, prompt in frames.items()}
    found = measure_parts(params, model_name, (model, processor), samples, tried)
    card = {
        "model": model_name,
        "binding": asdict(binding_of(model, processor)),
        "frames": {
            name: read_json(FRAMES / name / "bundle" / "card.json")["card_sha256"] for name in cards
        },
        "generation": params.evaluate.told,
        "versions": versions(),
        **found.card,
    }
    folder = transfer_folder(model_name)
    with writing(folder, card) as partial:
        found.write(partial)
        for name, (prompt, trained) in joint.items():
            (partial / name).mkdir()
            prompt.picture().save(partial / name / "frame.png")
            write_json(trained, partial / name / "training.json")
    return folder


def _joint(params: Params, left_out: str, names: list[str]) -> dict[str, Any]:
    """Train a frame on all models but one: its name -> frame, and its training."""
    from tqdm import tqdm

    from hauberk.defenses.safety_prompt import SafetyPrompt

    told, steps = params.davsp, params.budget.frame.joint_steps
    if not steps or len(names) < 2:
        return {}
    students: list[Any] = []
    ground = None
    for name in names:
        students.append(
            student_of(params, name, told.joint, FRAMES / name / "harm", "joint", ground)
        )
        ground = students[0].loss.geometry.ground  # a frame has one, whatever processors there are
    together = "+".join(names)
    scratch = SCRATCH / f"transfer_safety_prompt@{left_out}"
    with tqdm(total=steps, desc=f"{together}: steps of a frame") as bar:
        _, trained = train_on(params, students, steps, scratch / "frame.safetensors", bar.update)
    merits = [{"step": step, "merit": merit} for step, merit in trained.validated.items()]
    history = {"step": trained.step, "validated": merits, "history": trained.history}
    shutil.rmtree(scratch, ignore_errors=True)
    return {
        together: (SafetyPrompt(trained.frame, students[0].loss.geometry, told.prefix), history)
    }


if __name__ == "__main__":
    main("transfer_safety_prompt", run, "model")
